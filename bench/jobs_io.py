"""How a measuring process talks to the one that shows the table: marked lines on stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TextIO

from goals import Result

# Compilers and libraries may print to stdout as well; what they print carries no mark.
_STEP, _RESULT = "@step ", "@result "


class Reporter:
    """The child's side; every result carries the instruction set that the process runs on."""

    def __init__(self, isa: str, stream: TextIO = sys.stdout) -> None:
        self._isa, self._stream = isa, stream

    def step(self, text: str) -> None:
        print(_STEP + text, file=self._stream, flush=True)

    def emit(self, result: Result) -> None:
        result.isa = self._isa
        print(_RESULT + json.dumps(asdict(result)), file=self._stream, flush=True)


def parse(line: str) -> str | Result | None:
    """The parent's side: the text of a step, a result, or None for anything else."""
    if line.startswith(_STEP):
        return line[len(_STEP) :].rstrip("\n")
    if line.startswith(_RESULT):
        return Result(**json.loads(line[len(_RESULT) :]))
    return None
