"""The README's Python runs, and its table of equivalents is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusedkl

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
# | `call` | `code` ... |
ROWS = dict(re.findall(r"^\| `(\w+\(x[^`]*)` \| `([^`]+)`", README, flags=re.MULTILINE))


def test_examples_run() -> None:
    assert EXAMPLES
    namespace: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["x"].grad.shape == namespace["x"].shape


@pytest.mark.parametrize("call", ROWS)
def test_equivalents(call: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 300, generator=generator)
    temperature = 1.7 if "temperature" in call else 1.0
    names: dict[str, Any] = vars(fusedkl) | {
        "torch": torch,
        "F": F,
        "x": x,
        "y": y,
        "T": temperature,
        "index": torch.randint(300, (5,), generator=generator),
        "lp": F.log_softmax(x.double() / temperature, -1),
        "lq": F.log_softmax(y.double() / temperature, -1),
    }
    ours, theirs = eval(call, names), eval(ROWS[call], names)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_the_table_is_read() -> None:
    assert {call.partition("(")[0] for call in ROWS} == {
        "forward_kl",
        "reverse_kl",
        "entropy",
        "logsumexp",
        "selective_log_softmax",
        "log_softmax",
    }
