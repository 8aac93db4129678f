"""One name and one list of arguments for the many ways of writing a call in a graph of torch."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

# name -> (names of the arguments, torch's functions); methods of that name take the same.
_CALLS: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "log_softmax": (("x", "dim", "dtype"), (torch.log_softmax,)),
    "softmax": (("x", "dim", "dtype"), (torch.softmax,)),
    "logsumexp": (("x", "dim", "keepdim"), (torch.logsumexp,)),
    "exp": (("x",), (torch.exp,)),
    "log": (("x",), (torch.log,)),
    "clamp": (("x", "min", "max"), (torch.clamp,)),
    "clamp_min": (("x", "min"), (torch.clamp_min,)),
    "log1p": (("x",), (torch.log1p,)),
    "neg": (("x",), (torch.neg, operator.neg)),
    "add": (("x", "y"), (torch.add, operator.add)),
    "sub": (("x", "y"), (torch.sub, operator.sub)),
    "mul": (("x", "y"), (torch.mul, operator.mul)),
    "div": (("x", "y"), (torch.div, torch.true_divide, operator.truediv)),
    "sum": (("x", "dim", "keepdim"), (torch.sum,)),
    "mean": (("x", "dim", "keepdim"), (torch.mean,)),
    "gather": (("x", "dim", "index"), (torch.gather,)),
    "unsqueeze": (("x", "dim"), (torch.unsqueeze,)),
    "squeeze": (("x", "dim"), (torch.squeeze,)),
    "stack": (("x", "dim"), (torch.stack,)),
    "masked_fill": (("x", "mask", "value"), (torch.masked_fill,)),
    "where": (("mask", "x", "value"), (torch.where,)),
    "getitem": (("x", "index"), (operator.getitem,)),
    "detach": (("x",), ()),
    "contiguous": (("x",), ()),
    "clone": (("x",), (torch.clone,)),
    "tensor": (("value", "dtype", "device"), (torch.tensor,)),
    "kl_div": (
        ("x", "y", "size_average", "reduce", "reduction", "log_target"),
        (F.kl_div,),
    ),
}
_METHODS_ONLY_IN_FUNCTIONS = {"tensor", "kl_div", "where", "stack"}
_SOFTMAX = ("x", "dim", "_stacklevel", "dtype")

_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    function: (name, names) for name, (names, functions) in _CALLS.items() for function in functions
} | {F.log_softmax: ("log_softmax", _SOFTMAX), F.softmax: ("softmax", _SOFTMAX)}
_METHODS = {
    name: (name, names)
    for name, (names, _) in _CALLS.items()
    if name not in _METHODS_ONLY_IN_FUNCTIONS
}
_ALIASES = {"input": "x", "other": "y", "target": "y", "self": "x", "condition": "mask"}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def read(node: Node) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of a node that is one of the calls above or a cast; None for others."""
    if node.op == "call_method" and node.target in ("to", "type", "type_as", *_CASTS):
        return _cast(node)
    found = _signature(node)
    if found is None or _others(node, found[1]):
        return None
    name, names = found
    arguments = dict(zip(names, node.args, strict=False))
    named = ((_ALIASES.get(key, key), value) for key, value in node.kwargs.items())
    arguments.update((key, value) for key, value in named if key in names)  # others are None
    return name, arguments


def unread(node: Node) -> str | None:
    """Why `read` does not know a call of a name that it knows."""
    found = _signature(node)
    others = [] if found is None else _others(node, found[1])
    return None if found is None or not others else f"{found[0]}: {others[0]} is not read"


def _signature(node: Node) -> tuple[str, tuple[str, ...]] | None:
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _others(node: Node, names: tuple[str, ...]) -> list[str]:
    """The arguments of a call besides `names`."""
    more = [f"argument {i + 1}" for i in range(len(names), len(node.args))]
    given = [key for key, value in node.kwargs.items() if value is not None]
    return more + [key for key in given if _ALIASES.get(key, key) not in names]


def _cast(node: Node) -> tuple[str, dict[str, Any]]:
    # What it casts to is in the result; a move to another device is not a cast.
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = example(source), example(node)
    if before is None or after is None or before.device != after.device:
        return "moved", {"x": source}
    return "cast", {"x": source, "dtype": after.dtype}


def example(node: Any) -> Any:
    """The fake tensor, number or symbol that stands for a node's value; None if there is none."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def where(node: Node) -> str:
    """file:line and source of the user's line, as far as the graph knows it."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith('File "'):
            file, _, rest = lines[i].removeprefix('File "').partition('", line ')
            source = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{file}:{rest.partition(',')[0]}: {source}"
    return node.name
