"""How a measuring process talks to the one that shows the table: marked lines on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from goals import Result

# Compilers and libraries may print to stdout as well; what they print carries no mark.
MARK = "@bench-"


class Reporter:
    """The child's side; every result carries the instruction set that the process runs on."""

    def __init__(self, isa: str, stream: TextIO = sys.stdout) -> None:
        self._isa, self._stream = isa, stream

    def step(self, text: str) -> None:
        send("step", text, self._stream)

    def emit(self, result: Result) -> None:
        result.isa = self._isa
        send("result", asdict(result), self._stream)


def send(kind: str, content: Any, stream: TextIO | None = None) -> None:
    """One marked line: what kind it is, and anything that JSON holds."""
    print(f"{MARK}{kind} {json.dumps(content)}", file=stream or sys.stdout, flush=True)


def receive(line: str) -> tuple[str, Any]:
    """Kind and content of a marked line; ("", None) for anything else."""
    kind, _, content = line.partition(" ")
    return (kind[len(MARK) :], json.loads(content)) if kind.startswith(MARK) else ("", None)


def parse(line: str) -> str | Result | None:
    """The parent's side: the text of a step, a result, or None for anything else."""
    kind, content = receive(line)
    if kind == "step":
        return str(content)
    return Result(**content) if kind == "result" else None


def child(
    arguments: list[str], environment: dict[str, str], take: Callable[[str], None]
) -> tuple[int, str]:
    """Run bench/run.py in a process of its own; its exit status and the end of what it logged."""
    script = Path(__file__).resolve().with_name("run.py")
    command = [sys.executable, str(script), *arguments]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                take(line)
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        log.seek(0)
        return status, "\n".join(log.read().splitlines()[-25:])
