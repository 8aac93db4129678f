"""What fuzz.py calls with: tensors of any layout and content, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 2, 3, 16, 17, 63, 257, 1025, 2049, 4500)
LAYOUTS = ("plain", "padded", "shifted", "transposed", "strided")


@dataclass
class Arguments:
    """Tensors of their own, where the call's were."""

    positional: list[Any]
    options: dict[str, Any]
    tensors: list[Tensor]


@dataclass
class Call:
    """A function of (backend, ...) and its arguments; a tensor stands with its layout."""

    function: Callable[..., Any]
    name: str
    positional: list[Any]
    options: dict[str, Any] = field(default_factory=dict)

    def fresh(self) -> Arguments:
        tensors: list[Tensor] = []

        def made(value: Any) -> Any:
            if isinstance(value, Laid):
                tensors.append(value.out())
                return tensors[-1]
            return value

        positional = [made(v) for v in self.positional]
        options = {k: made(v) for k, v in self.options.items()}
        return Arguments(positional, options, tensors)

    def __repr__(self) -> str:
        named = [f"{k}={v!r}" for k, v in self.options.items()]
        return f"{self.name}({', '.join([*map(repr, self.positional), *named])})"


@dataclass
class Laid:
    """A tensor's content, how it lies in memory, and whether it wants a gradient."""

    content: Tensor
    layout: str = "plain"
    gradient: bool = False

    def out(self) -> Tensor:
        t = self.content
        if self.layout == "padded" and t.dim() >= 2:  # rows further apart than they are long
            t = torch.cat([t, torch.zeros_like(t[..., :1])], -1)[..., :-1]
        elif self.layout == "shifted" and t.dim() >= 1:  # not aligned to a vector
            t = torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].reshape(t.shape)
        elif self.layout == "transposed" and t.dim() >= 3:
            t = t.transpose(0, 1).contiguous().transpose(0, 1)
        elif self.layout == "strided" and t.dim() >= 1:
            t = torch.stack([t, torch.zeros_like(t)], -1).flatten(-2)[..., ::2]
        else:
            t = t.clone()
        return t.requires_grad_() if self.gradient else t

    def __repr__(self) -> str:
        t = self.content
        few = t.tolist() if t.numel() <= 8 else "..."
        said = f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} {self.layout}"
        return f"<{said}{' grad' if self.gradient else ''} {few}>"


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Leading dims: none to three, empty ones too."""
    return tuple(draw(st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=3)))


@st.composite
def contents(draw: st.DrawFn, shape: tuple[int, ...], finite: bool = False) -> Tensor:
    """float64 logits: peaks, holes, offsets, and now and then what no model should give."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    t *= draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 20.0]))
    if t.numel() and draw(st.booleans()):
        t[..., draw(st.integers(0, shape[-1] - 1))] += draw(st.sampled_from([8.0, 30.0, -40.0]))
    if not finite and t.numel():
        holes = torch.rand(shape, generator=generator)
        t[holes < draw(st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.5, 1.0]))] = -torch.inf
        odd = draw(st.sampled_from([0.0, 0.0, 0.0, torch.nan, torch.inf]))
        if odd != 0.0:
            t.reshape(-1)[draw(st.integers(0, t.numel() - 1))] = odd
    return t + draw(st.sampled_from([0.0, 0.0, 0.0, 100.0, -3e3]))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Laid, Laid]:
    """Policy and reference, close or far, of dtypes of their own."""
    shape = (*draw(shapes()), draw(st.sampled_from(WIDTHS)))
    y = draw(contents(shape))
    x = draw(contents(shape))
    if draw(st.booleans()):
        x = y + draw(st.sampled_from([0.0, 1e-4, 1e-2, 0.5])) * x.nan_to_num(0, 0, 0).clamp(-9, 9)
    types = draw(st.sampled_from([(d, d) for d in DTYPES] * 2 + [(DTYPES[0], DTYPES[1])]))
    made = [
        Laid(t.to(d), draw(st.sampled_from(LAYOUTS)), draw(st.booleans()))
        for t, d in zip((x, y), types, strict=True)
    ]
    return made[0], made[1]


def per_row(shape: tuple[int, ...]) -> dict[str, st.SearchStrategy[Any]]:
    """Options that are one value per token, of the right shape."""
    size = int(torch.tensor(shape).prod()) if shape else 1

    def laid(values: list[Any], dtype: torch.dtype) -> Laid:
        return Laid(torch.tensor(values, dtype=dtype).reshape(shape))

    def each(of: st.SearchStrategy[Any], dtype: torch.dtype) -> st.SearchStrategy[Laid]:
        return st.lists(of, min_size=size, max_size=size).map(lambda v: laid(v, dtype))

    return {
        "mask": each(st.booleans(), torch.bool),
        "weight": each(st.sampled_from([0.0, 0.5, 1.0, 3.0]), torch.float32),
        "labels": each(st.sampled_from([-100, 0]), torch.int64),
        "temperature": each(st.sampled_from([0.3, 1.0, 2.5]), torch.float32),
    }


# One in eight options is of a kind or a value that no call accepts.
JUNK = st.sampled_from([None, "mean ", -1, 0, 2.5, float("nan"), True, [1], torch.zeros(2, 2)])


@st.composite
def options(draw: st.DrawFn, known: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """Some of these options; junk for one of them now and then."""
    names = draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=4)) if known else []
    found = {name: draw(known[name]) for name in names}
    if names and draw(st.integers(0, 7)) == 0:
        found[names[0]] = draw(JUNK)
    return found
