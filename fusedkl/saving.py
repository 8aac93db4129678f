"""What a backward keeps: also tensors of torch.inference_mode; and whether hooks take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Hooks = tuple[Callable[..., Any], Callable[..., Any]] | None


def _of_inference_mode(t: Tensor | None) -> bool:
    # torch.compile traces no such question
    return t is not None and not torch.compiler.is_compiling() and t.is_inference()


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.save_for_backward, which refuses what was made under torch.inference_mode.

    A teacher's logits, most likely. Nobody can write to them outside of that mode, so they are
    kept as they are: a copy would be of the size of the logits.
    """
    ctx.apart = None
    for t in tensors:
        if _of_inference_mode(t):
            ctx.apart = [t if _of_inference_mode(t) else None for t in tensors]
            tensors = tuple(None if _of_inference_mode(t) else t for t in tensors)
            break
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What `keep` was given."""
    saved: tuple[Any, ...] = ctx.saved_tensors
    if ctx.apart is None:
        return saved
    both = zip(saved, ctx.apart, strict=True)
    return tuple(one if apart is None else apart for one, apart in both)


def ordinary(t: Tensor) -> Tensor:
    """`t`, or a copy that torch's own operations can save."""
    return t.clone() if _of_inference_mode(t) else t


def hooks() -> Hooks:
    """Those that take what autograd saves now (checkpointing, offloading), and ask for no version.

    Not for torch.compile to trace.
    """
    found: Hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


def hooked() -> bool:
    """Whether there are any."""
    return hooks() is not None
