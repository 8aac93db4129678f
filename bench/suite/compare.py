"""This run beside an older one: `--compare old.json`."""

from __future__ import annotations

from dataclasses import dataclass

from .entry import Entry


@dataclass(frozen=True)
class Change:
    """One contender on one case in both runs; factors are new over old."""

    case: str
    contender: str
    time: float
    # Of the time relative to ours: what other load on the machine does not move.
    ratio: float
    peak: float | None
    verdict: str


def rows(old: list[Entry], new: list[Entry]) -> list[Change]:
    """What both have, the largest changes of the ratio first."""
    before = {entry.key: entry for entry in old}
    found = [change(before[entry.key], entry) for entry in new if entry.key in before]
    kept = [one for one in found if one is not None]
    return sorted(kept, key=lambda one: -max(one.ratio, 1 / one.ratio))


def change(old: Entry, new: Entry) -> Change | None:
    """None where one of the two was not timed, unless it is because it is wrong now."""
    if new.wrong and not old.wrong:
        return Change(*new.key, float("nan"), 1.0, None, f"now wrong: {new.wrong}")
    if not (old.seconds and new.seconds and old.ratio and new.ratio):
        return None
    peak = new.peak_bytes / old.peak_bytes if new.peak_bytes and old.peak_bytes else None
    # Our own ratio is 1 by construction, so for the base the times are what there is to compare.
    a, b = (old.seconds, new.seconds) if new.ours else (old.ratio, new.ratio)
    verdict = "within the spread"
    if b.low > a.high or b.high < a.low:
        slower = b.median > a.median
        verdict = "slower" if slower else "faster"
    return Change(
        *new.key,
        new.seconds.median / old.seconds.median,
        new.ratio.median / old.ratio.median,
        peak,
        verdict,
    )
