"""What contenders would allocate on a GPU, counted without one, for shapes of any size.

Tensors are fake ones on a CUDA device: every operator runs its shape rules and allocates nothing.
Their storages are counted as they come and go, so what is found is the peak of what PyTorch's
allocator is asked for above the inputs. Not in it: scratch inside a single kernel, the allocator's
rounding, and torch.compile, whose buffers only its code for a real GPU tells.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from contenders import Contender
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fusedkl import validation
from fusedkl.backends import resolve

from .batch import Batch, Case, K
from .contenders import PEERS, ours
from .models import MODELS
from .operations import OPERATIONS

DTYPE = torch.bfloat16
SHAPES = (("llama3", 8192), ("qwen3", 8192), ("gemma3-270m", 8192), ("gemma3-270m", 32768))
OPERATIONS_SHOWN = ("forward_kl", "jsd", "token_stats")
# What a backend must have for them, where it is not the operation's name.
OURS_NEEDS = {"jsd": ("jsd",), "token_stats": ("logprob", "entropy", "reverse_kl", "log_ratio")}


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operators made inside and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def known(self, *tensors: Tensor) -> None:
        """Not to be counted: the inputs."""
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def backward(loss: Tensor) -> dict[int, Tensor]:
    """The gradients of the leaves, by id: the autograd engine in a few lines of Python.

    The engine itself asks the CUDA driver for its devices. As it does, a node runs when all that
    comes to it is there, the one recorded last first, and what it saved is given back with it.
    """
    root: Any = loss.grad_fn
    waiting = _uses(root)
    arrived: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready: list[Any] = [root]
    leaves: dict[int, Tensor] = {}
    del root, loss
    # Checkpoints make one copy of what they recompute per backward, and ask which one this is.
    one_task = mock.patch.object(torch._C, "_current_graph_task_id", return_value=1)
    with torch.no_grad(), one_task:
        while ready:
            ready.sort(key=lambda node: node._sequence_nr())
            node = ready.pop()
            slots = arrived.pop(node)
            if hasattr(node, "variable"):
                leaves[id(node.variable)] = slots[0]
                continue
            for after, slot, grad in _run(node, slots):
                have = arrived.setdefault(after, {})
                have[slot] = _sum(have.pop(slot), grad) if slot in have else grad
                waiting[after] -= 1
                if waiting[after] == 0:
                    ready.append(after)
                    del waiting[after]
                del have, grad
            # nothing here may keep a node or a gradient alive while the next one runs
            node = after = None
            slots = {}
    return leaves


def _sum(old: Tensor, new: Tensor) -> Tensor:
    """In place where nobody else holds the sum so far, as the engine does it."""
    alone = sys.getrefcount(old) == 2  # this function's, and getrefcount's own
    return old.add_(new) if alone and old.is_contiguous() else old + new


def _uses(root: Any) -> dict[Any, int]:
    """How many gradients each node waits for."""
    uses: dict[Any, int] = {}
    stack = [root]
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is not None:
                uses[after] = uses.get(after, 0) + 1
                if uses[after] == 1:
                    stack.append(after)
    return uses


def _run(node: Any, slots: dict[int, Tensor]) -> list[tuple[Any, int, Tensor]]:
    """One node's gradients and where each goes; `slots` is emptied."""
    arriving = [slots.pop(i, None) for i in range(max(slots) + 1)]
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    found = (node.apply if in_python else node)(*arriving)
    grads = found if isinstance(found, tuple) else (found,)
    if in_python:  # one for every argument, while edges are those of tensors
        grads = tuple(grad for grad in grads if grad is not None)
        edges = [edge for edge in node.next_functions if edge[0] is not None]
    else:
        edges = node.next_functions
    pairs = zip(edges, grads, strict=True)
    return [(*edge, grad) for edge, grad in pairs if edge[0] is not None]


def count(contender: Contender, case: Case) -> int:
    """Peak bytes above the inputs; for the KLs and statistics, forward and backward."""
    with FakeTensorMode():
        shape = case.tokens, case.vocabulary
        policy, reference = (torch.empty(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        row = torch.empty(case.tokens, device="cuda")
        ids = torch.empty(case.tokens, dtype=torch.int64, device="cuda")
        topk = torch.empty(case.tokens, K, device="cuda")
        counted = row.bool()
        batch = Batch(policy, reference, counted, ids, row, topk.long(), topk)
        leaf = policy.requires_grad_()
        # fake tensors have no address, so that two of them look like one
        apart = mock.patch.object(validation, "inplace_grad")
        with apart, Allocations() as seen:
            seen.known(*batch[:7])
            gradients = backward(contender.loss(batch._replace(policy=leaf)))
            assert gradients[id(leaf)].shape == shape
        return seen.most


def table(say: Callable[[str], None], quick: bool) -> Iterator[dict[str, Any]]:
    """A row per operation, shape and contender: bytes, and how many matrices of logits that is."""
    for operation in OPERATIONS_SHOWN:
        for model, tokens in SHAPES[:1] if quick else SHAPES:
            case = Case("memory model", operation, model, tokens)
            for contender in contenders(case):
                say(f"counting {case.name}: {contender.name}")
                found = count(contender, case)
                logits = tokens * case.vocabulary * DTYPE.itemsize
                yield {
                    "operation": operation,
                    "model": MODELS[model].title,
                    "tokens": tokens,
                    "vocabulary": case.vocabulary,
                    "contender": contender.name,
                    "bytes": found,
                    "times_logits": found / logits,
                }


def contenders(case: Case) -> Iterator[Contender]:
    """Those whose allocations are operators', and ours where a GPU backend has the operation."""
    for name in ("eager", "eager, no upcast", "chunked", "chunked, checkpoint"):
        if name != "eager, no upcast" or OPERATIONS[case.operation].is_kl:
            yield PEERS[name](case)
    wanted = ("forward_kl",) if OPERATIONS[case.operation].is_kl else OURS_NEEDS[case.operation]
    on_gpu = torch.device("cuda")
    for backend in ("triton", "cuda"):
        try:
            resolve(backend, on_gpu, wanted)
        except ValueError:
            continue  # it has no kernels for that, or was not built
        yield ours(case, backend)
        if OPERATIONS[case.operation].is_kl:
            yield ours(case, backend, inplace=True)
        return
