"""Who is measured on a case: every way of computing the mean over tokens, made on demand."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import Contender, Loss
from formulas import Cast, as_is, upcast
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedkl

from .batch import Batch, Case
from .operations import OPERATIONS, Operation, in_place, masked_mean

# As torchtune cuts its batches.
CHUNKS = 8
EAGER = "eager"
Maker = Callable[[Case], Contender]


def _counted(case: Case, batch: Batch) -> Tensor | None:
    return batch.counted if case.masked else None


def _whole(case: Case, cast: Cast = upcast) -> Loss:
    rows = OPERATIONS[case.operation].rows
    return lambda b: masked_mean(rows(b, cast), _counted(case, b))


def _widened(case: Case) -> Loss:
    """Products of a head in float32, as one trains where a machine emulates 16-bit ones."""
    whole = _whole(case)
    return lambda b: whole(b.widened())


def _in_parts(case: Case, size: int, again: bool) -> Loss:
    """Rows by parts of `size`; `again`: what a part keeps is computed again for its gradient."""
    rows = OPERATIONS[case.operation].rows

    def part(policy: Tensor, rest: Batch) -> Tensor:
        return rows(rest._replace(policy=policy), upcast)

    def loss(b: Batch) -> Tensor:
        found = []
        for at, policy in enumerate(b.policy.split(size)):
            rest = b.part(slice(at * size, at * size + len(policy)))
            found.append(
                checkpoint(part, policy, rest, use_reentrant=False) if again else part(policy, rest)
            )
        return masked_mean(torch.cat(found), _counted(case, b))

    return loss


def _compiled(case: Case, rewritten: bool) -> Loss:
    # Another contender's graphs of the same code would be taken for this one's.
    torch._dynamo.reset()
    compiled = torch.compile(_whole(case), dynamic=False)
    if not rewritten:
        return compiled

    def loss(b: Batch) -> Tensor:
        with fusedkl.inductor.enable():
            result: Tensor = compiled(b)
        return result

    return loss


def _liger(case: Case) -> Loss:
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    kl, js = LigerKLDIVLoss(reduction="none", log_target=True), LigerJSD(beta=0.5)

    def loss(b: Batch) -> Tensor:
        log_p, log_q = F.log_softmax(b.policy.float(), -1), F.log_softmax(b.reference.float(), -1)
        if case.operation == "jsd":
            found: Tensor = js(log_p, log_q)
            return found
        if case.operation == "reverse_kl":
            log_p, log_q = log_q, log_p
        return masked_mean(kl(log_p, log_q).sum(-1), _counted(case, b))

    return loss


def ours(case: Case, backend: str, inplace: bool = False) -> Contender:
    """Ours on a backend, its numbers held to more than the peers'."""
    operation: Operation = OPERATIONS[case.operation]
    call = in_place(case.operation) if inplace else operation.ours
    linear = case.operation == "linear"
    # beside the rounding of the gradient itself; those of a head pass through 16-bit products
    gradient = 1e-5 if case.dtype == "fp32" else 5e-3 if linear else 1e-3
    return Contender(
        f"fusedkl {backend}" + (" inplace_grad" if inplace else ""),
        lambda b: call(b, _counted(case, b), backend),
        operation.tolerance,
        gradient,
        inplace,
    )


def _peer(name: str, make: Callable[[Case], Loss]) -> Maker:
    return lambda case: Contender(
        name, make(case), gradient_tolerance=OPERATIONS[case.operation].peer_gradient
    )


PEERS: dict[str, Maker] = {
    EAGER: _peer(EAGER, _whole),
    "eager, no upcast": _peer("eager, no upcast", functools.partial(_whole, cast=as_is)),
    "eager, float32 products": _peer("eager, float32 products", _widened),
    "row loop": _peer("row loop", lambda case: _in_parts(case, 1, False)),
    "chunked": _peer("chunked", lambda case: _in_parts(case, -(-case.tokens // CHUNKS), False)),
    "chunked, checkpoint": _peer(
        "chunked, checkpoint", lambda case: _in_parts(case, -(-case.tokens // CHUNKS), True)
    ),
    "torch.compile": _peer("torch.compile", functools.partial(_compiled, rewritten=False)),
    "torch.compile, rewritten": _peer(
        "torch.compile, rewritten", functools.partial(_compiled, rewritten=True)
    ),
    "liger-kernel": _peer("liger-kernel", _liger),
}


def backends(device: str) -> list[str]:
    """Those with kernels of their own for tensors of a device."""
    found = fusedkl.explain(torch.zeros(1, 8, device=device), torch.zeros(1, 8, device=device))
    fast = ("cpu", "cuda", "triton")
    return [s.name for s in found.backends if s.available and s.name in fast] or ["reference"]


def makers(case: Case, device: str) -> dict[str, Maker]:
    """All that apply to a case, ours first; a peer that cannot be had is not among them."""
    operation = OPERATIONS[case.operation]
    found: dict[str, Maker] = {}
    for backend in backends(device):
        found[f"fusedkl {backend}"] = functools.partial(ours, backend=backend)
        if operation.is_kl and case.backward:
            found[f"fusedkl {backend} inplace_grad"] = functools.partial(
                ours, backend=backend, inplace=True
            )
    return found | {name: make for name, make in PEERS.items() if _applies(name, case, device)}


def _applies(name: str, case: Case, device: str) -> bool:
    operation = OPERATIONS[case.operation]
    if name == "liger-kernel":
        has = importlib.util.find_spec("liger_kernel") is not None and device == "cuda"
        return has and (operation.is_kl or (case.operation == "jsd" and not case.masked))
    if name == "torch.compile, rewritten":
        return operation.is_kl
    if name == "eager, no upcast":
        return operation.is_kl and case.dtype != "fp32"
    if name == "eager, float32 products":
        return case.operation == "linear" and case.dtype != "fp32" and device == "cpu"
    return name != "chunked, checkpoint" or case.backward
