"""Which numbers of a graph come from one call, and so from one read of their rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Node

from .terms import Number
from .values import Row
from .writes import Writes


@dataclass(frozen=True)
class Member:
    """A number that `node` needs; index: where a logprob is asked for; grad: the grad mode."""

    node: Node
    number: Number
    index: Node | None
    grad: bool


@dataclass
class Call:
    """Members of the same rows; it is made before the first of them."""

    policy: Row
    reference: Row | None
    index: Node | None = None
    members: list[Member] = field(default_factory=list)

    def add(self, member: Member) -> None:
        self.members.append(member)
        self.index = self.index or member.index

    def inputs(self) -> list[Node]:
        rows = [row for row in (self.policy, self.reference) if row is not None]
        return [*(r.logits for r in rows), *([] if self.index is None else [self.index])]


def calls_of(members: Iterable[Member], writes: Writes) -> list[Call]:
    """As few calls as have all members; those of a row alone join a call of a pair."""
    calls: list[Call] = []
    position = writes.position
    for member in sorted(members, key=lambda m: (not m.number.reference, position[m.node])):
        call = next((c for c in calls if _joins(member, c, writes)), None)
        if call is None:
            call = Call(member.number.policy, member.number.reference)
            calls.append(call)
        call.add(member)
    return calls


def _joins(member: Member, call: Call, writes: Writes) -> bool:
    one, other = member.number, call.members[0]
    if one.policy != call.policy or one.reference not in (None, call.reference):
        return False
    if one.parameter != other.number.parameter or member.grad is not other.grad:
        return False
    if None not in (member.index, call.index) and member.index is not call.index:
        return False
    places = [writes.position[m.node] for m in (member, *call.members)]
    first, last = min(places), max(places)
    inputs = call.inputs() + ([] if member.index is None else [member.index])
    # All there where the call is made, and at the last member still what they are there.
    return all(
        writes.position[node] < first and not writes.between(node, first, last) for node in inputs
    )
