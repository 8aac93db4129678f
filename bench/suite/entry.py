"""What one contender did on one case: an entry of the JSON and a row of every table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from timing import Spread

from .batch import Case


@dataclass
class Entry:
    """Numbers are None where they were not measured; `skipped` then says why, if it is not odd."""

    case: Case
    contender: str
    seconds: Spread | None = None
    # Time over the time of the base, the first contender that is right: ours.
    ratio: Spread | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    # Not empty: not timed, because the numbers are not right.
    wrong: str = ""
    skipped: str = ""
    peak_bytes: int | None = None
    # Of the bytes per second that this machine's memory was measured to give.
    share: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.case.name, self.contender

    @property
    def ours(self) -> bool:
        return self.contender.startswith("fusedkl")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"name": self.case.name, "least_bytes": self.case.least_bytes}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Entry:
        known = {k: v for k, v in content.items() if k in cls.__dataclass_fields__}
        for name in ("seconds", "ratio"):
            known[name] = Spread(**known[name]) if known.get(name) else None
        return cls(**known | {"case": Case(**known["case"])})


@dataclass(frozen=True)
class Point:
    """The worst relative error of a few rows whose divergence is about `kl`."""

    contender: str
    kl: float
    error: float
    negative: int  # rows whose KL came out below 0
    rows: int
