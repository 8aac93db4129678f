"""What the nodes of a graph write to in place. Reading a value late is safe only in between."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node

from .calls import example

_OPERATORS = (
    *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
_NAMES = frozenset((*_OPERATORS, *(f"__{name}__" for name in _OPERATORS)))
_PURE = frozenset((operator.and_, operator.or_, operator.not_, operator.is_))


def written(node: Node) -> list[Node]:
    """The nodes whose memory a node may write to."""
    if node.op == "call_module":  # its code is not known here
        return node.all_input_nodes
    if node.op == "call_method":
        return _first(node) if _in_place(str(node.target)) else []
    if node.op != "call_function":
        return []
    if isinstance(node.target, HigherOrderOperator):
        return _by_subgraphs(node)
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return _by_schema(node)
    found = _nodes(node.kwargs.get("out"))
    in_place = _in_place(getattr(node.target, "__name__", "")) or _asked_in_place(node)
    return found + (_first(node) if in_place and node.target not in _PURE else [])


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _NAMES


def _first(node: Node) -> list[Node]:
    """The first argument; everything, where that is a list: an optimizer has several of them."""
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, Node) else node.all_input_nodes


def _nodes(argument: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return found


@functools.lru_cache(maxsize=512)
def _signature(function: Any) -> inspect.Signature | None:
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):  # torch's C functions have none
        return None
    return found if "inplace" in found.parameters else None


def _asked_in_place(node: Node) -> bool:
    """Whether it is a function of torch.nn.functional with inplace=True, also by position."""
    signature = _signature(node.target)
    if signature is None:
        return False
    try:
        return bool(signature.bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except TypeError:
        return True


def _by_schema(node: Node) -> list[Node]:
    target = node.target
    if isinstance(target, OpOverloadPacket):
        schemas = [getattr(target, name)._schema for name in target.overloads()]
    else:
        assert isinstance(target, OpOverload)
        schemas = [target._schema]
    found = []
    for schema in schemas:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.kwargs.get(argument.name)
                if not argument.kwarg_only and i < len(node.args):
                    given = node.args[i]
                found += _nodes(given)
    return found


def _by_subgraphs(node: Node) -> list[Node]:
    """All inputs of a higher-order operator, unless it is known by its graphs to write to none."""
    graphs, tensors = [], []
    for given in node.all_input_nodes:
        root, module = node.graph.owning_module, None
        if given.op == "get_attr" and root is not None:
            module = operator.attrgetter(str(given.target))(root)
        if isinstance(module, GraphModule):
            graphs.append(module.graph)
        else:
            tensors.append(given)
    if graphs and not any(written(inner) for graph in graphs for inner in graph.nodes):
        return []
    return tensors


Memory = frozenset[int] | None  # the storages of a value; None: not known which


def _memory(node: Node) -> Memory:
    value = example(node)
    if value is None:
        return None
    found: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            try:
                found.add(each.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):  # sparse, say
                return None
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
    return frozenset(found)


class Writes:
    """All in-place writes of a graph, in order."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._memory: dict[Node, Memory] = {}
        self._to: dict[int, list[Memory]] = {}
        for node, i in self.position.items():
            targets = written(node)
            if targets:
                self._to[i] = [_memory(target) for target in targets]

    def touched(self, writer: Node, nodes: Iterable[Node]) -> list[Node]:
        """Those of some nodes whose memory one node may write to."""
        targets = self._to.get(self.position[writer])
        return [] if targets is None else [n for n in nodes if self._overlap(n, targets)]

    def between(self, node: Node, start: int, end: int) -> bool:
        """Whether a node's memory may be written to after one position and before another."""
        return any(self._overlap(node, to) for i, to in self._to.items() if start < i < end)

    def _overlap(self, node: Node, targets: list[Memory]) -> bool:
        if node not in self._memory:
            self._memory[node] = _memory(node)
        own = self._memory[node]
        if own is None:
            return True
        return bool(own) and any(to is None or bool(own & to) for to in targets)
