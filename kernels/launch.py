"""How kernels are launched: sizes as one pure function; calls and rows as kernels take them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .family import SECOND_SWEEP, kind_of


class Launch(NamedTuple):
    """Sizes that decide a kernel's code and its order of summation."""

    width: int  # floats of each running sum of a program
    halves: int  # rows of a half tile: a trip reads 2 halves width tokens of each row
    segment: int  # tokens of a row that one program sums
    block: int  # tokens of a trip of the gradient sweep
    warps: int  # of it
    chunk: int  # tokens of a row that one of its programs writes


# Registers are what limits how many loads of the one-warp sweep are in flight: width 128 is four
# floats a lane for each sum. A segment is short enough that a few long rows fill a GPU, and long
# enough that moving the centre twice in it costs less than one instruction per pair.
SEGMENT = 32768


def choose(vocab: int, dtypes: tuple[torch.dtype, ...], architecture: int) -> Launch:
    """The sizes for a vocabulary, the dtypes of the logits, and an architecture as 90 for sm_90.

    Nothing else may enter: a row's bits must not depend on the batch it is in. Derived from static
    counts (docs/gpu.md); nobody has measured it.
    """
    segments = -(-vocab // SEGMENT)
    trip = 512
    segment = -(-vocab // (segments * trip)) * trip
    return Launch(128, 2, segment, 2048, 4, 4 * 2048)


def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 where there is no such number."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Rows of a program that gives each row one lane.
LANES = 32
PAIR_FIELDS = ("forward_kl", "reverse_kl", "ref_entropy", "ref_logsumexp", "ref_logprob")
PAIR_FIELDS += ("log_ratio", *SECOND_SWEEP)
TOKEN_FIELDS = ("logprob", "ref_logprob", "log_ratio")


class Call:
    """The arguments of row_stats and of its backward, as kernels take them."""

    def __init__(
        self, policy: Tensor, reference: Tensor | None, token_ids: Tensor | None,
        fields: list[str], parameter: float | None, inv_temperature: Tensor | None,
        mask: Tensor | None, valid_vocab: int | None, softcap: float | None,
    ) -> None:  # fmt: skip
        refuse(policy, reference)
        self.policy = policy
        self.pair = any(name in PAIR_FIELDS for name in fields)
        # the policy stands in for a reference that is not needed
        self.other = reference if self.pair and reference is not None else policy
        self.fields = tuple(fields)
        # at most one (validation.py)
        self.family = next((name for name in fields if name in SECOND_SWEEP), None)
        self.kind = kind_of(self.family, parameter)
        self.cap = 1.0 if softcap is None else softcap
        self.capped = softcap is not None
        self.rows = math.prod(policy.shape[:-1])
        shortest = min(policy.shape[-1], self.other.shape[-1])
        self.vocab = shortest if valid_vocab is None else valid_vocab
        self.token_ids = token_ids
        self.tokens = 0 if token_ids is None else token_ids.shape[1]
        self.inv_temperature = inv_temperature
        self.mask = mask
        # what there is: 1 a mask, 2 a 1/T, 4 one 1/T for each row
        self.given = 0 if mask is None else 1
        if inv_temperature is not None:
            self.given |= 2 | (4 if inv_temperature.numel() > 1 else 0)

    def lines(self) -> int:
        """R of values [R, N]."""
        return self._lines(self.fields)

    def line_of(self, name: str) -> int:
        """The first of them that belongs to a field; -1 where it is not asked for."""
        return self._lines(self.fields[: self.fields.index(name)]) if name in self.fields else -1

    def _lines(self, fields: tuple[str, ...]) -> int:
        return sum(self.tokens if name in TOKEN_FIELDS else 1 for name in fields)

    def sizes(self) -> Launch:
        """`choose` for these logits."""
        dtypes = (self.policy.dtype, self.other.dtype)
        return choose(self.vocab, dtypes, architecture(self.policy.device))

    def pointers(self, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1/T, the mask as bytes, the token ids; a float64 tensor stands in for what is not there.

        With its dtype made the right one: no kernel is compiled twice for what may be absent.
        """
        inverse = stand_in if self.inv_temperature is None else self.inv_temperature
        counted = stand_in if self.mask is None else self.mask.contiguous()
        ids = stand_in if self.token_ids is None else self.token_ids
        return inverse, counted.view(torch.uint8), ids.view(torch.int64)


def refuse(*logits: Tensor | None) -> None:
    """A TypeError for what these kernels do not take."""
    for t in logits:
        if t is not None and t.dtype == torch.float64:
            raise TypeError(
                'backend="triton" takes float32, bfloat16 and float16 logits; got float64'
            )


class Piece(NamedTuple):
    """Rows first .. first + rows of some tensors, each strided in two levels over `inner` rows."""

    first: int
    rows: int
    inner: int
    tensors: list[Tensor]
    strides: list[tuple[int, int]]  # outer, inner; of each tensor


def _collapsed(tensors: list[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Leading sizes, and each tensor's strides, with dims merged that all tensors can merge."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        steps = [t.stride(dim) for t in tensors]
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    return sizes, strides


def pieces(tensors: list[Tensor]) -> Iterator[Piece]:
    """Rows of [..., V] tensors of the same leading dims, as few pieces as their strides allow.

    Two levels of strides cover whatever a slice of [batch, sequence, vocabulary] can be; more of
    them take one piece for each step of the outermost dims.
    """
    sizes, strides = _collapsed(tensors)

    def split(
        sizes: list[int], strides: list[list[int]], tensors: list[Tensor], first: int
    ) -> Iterator[Piece]:
        if len(sizes) <= 2:
            pair = [1] * (2 - len(sizes)) + sizes
            yield Piece(
                first,
                pair[0] * pair[1],
                pair[1],
                tensors,
                [(0, 0, *s)[-2:] for s in strides],
            )
            return
        below = 1
        for size in sizes[1:]:
            below *= size
        for i in range(sizes[0]):
            # an offset into the storage: the shape of the view no longer matters
            moved = [
                t.as_strided((1,), (1,), t.storage_offset() + i * s[0])
                for t, s in zip(tensors, strides, strict=True)
            ]
            yield from split(sizes[1:], [s[1:] for s in strides], moved, first + i * below)

    if all(size > 0 for size in tensors[0].shape):
        yield from split(sizes, strides, tensors, 0)


def aligned(piece: Piece) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(step * t.element_size() % 16 == 0 for step in steps)
        for t, steps in zip(piece.tensors, piece.strides, strict=True)
    )
