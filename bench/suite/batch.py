"""What is measured: a case by name, and the tensors it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cases
import torch
from cases import EVERY_DTYPE, NARROW
from torch import Tensor

from .models import MODELS, REAL

# Rows that differ; the others repeat them, so that the truth in float64 is quick.
DISTINCT = 8
K = 64
# Columns of memory behind each row of a slice, as of logits of a padded vocabulary.
PADDING = 128


@dataclass(frozen=True)
class Case:
    """One operation on one shape; `topic` is the question that it helps to answer."""

    topic: str
    operation: str
    model: str
    tokens: int
    dtype: str = "bf16"
    backward: bool = True
    masked: float = 0.0
    layout: str = "contiguous"
    # Hidden size, for operations that have a head; 0: the model's own.
    hidden: int = 0

    @property
    def vocabulary(self) -> int:
        return MODELS[self.model].vocabulary

    @property
    def width(self) -> int:
        """Columns of what comes in: logits, or hidden states."""
        hidden = self.hidden or MODELS[self.model].hidden
        return hidden if self.operation == "linear" else self.vocabulary

    @property
    def name(self) -> str:
        parts = [self.operation, self.model, f"{self.tokens} x {self.vocabulary}", self.dtype]
        parts += [f"H = {self.width}"] if self.operation == "linear" else []
        parts += ["forward + backward" if self.backward else "forward"]
        parts += [f"{self.masked:.0%} masked"] if self.masked else []
        parts += [self.layout] if self.layout != "contiguous" else []
        return ", ".join(parts)

    @property
    def least_bytes(self) -> int | None:
        """What must move: counted rows of both inputs read once, the gradient written once."""
        if self.operation == "linear":
            return None
        row = self.vocabulary * EVERY_DTYPE[self.dtype].itemsize
        counted = round(self.tokens * (1 - self.masked))
        inputs = 1 if self.operation == "topk" else 2
        return row * (inputs * counted + (self.tokens if self.backward else 0))


class Batch(NamedTuple):
    """Rows [N, V] of logits (hidden states [N, H] for `linear`) and what goes with each."""

    policy: Tensor
    reference: Tensor
    counted: Tensor  # bool [N]
    ids: Tensor  # int64 [N]
    advantage: Tensor  # [N]
    topk_ids: Tensor  # int64 [N, K]
    topk_logprobs: Tensor  # [N, K]
    weight: Tensor | None = None  # [V, H] of both heads

    def part(self, rows: slice) -> Batch:
        return self._each(lambda t: t[rows])

    def widened(self) -> Batch:
        """In float32, the weight too."""
        wide = self._each(lambda t: t.float() if t.is_floating_point() else t)
        return wide._replace(weight=None if self.weight is None else self.weight.float())

    def double(self) -> Batch:
        """In float64, but for the weight: formulas widen that one by parts."""
        return self._each(lambda t: t.double() if t.is_floating_point() else t)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        kept = self._asdict().items()
        changed: dict[str, Any] = {n: t if n == "weight" else change(t) for n, t in kept}
        return Batch(**changed)


def build(case: Case, device: str = "cpu") -> Batch:
    """The tensors of a case; row i is row i % DISTINCT again, but for whether it counts."""
    policy, reference = _rows(case)
    generator = torch.Generator().manual_seed(1)
    again = torch.arange(case.tokens) % DISTINCT
    ids = torch.randint(case.vocabulary, (DISTINCT,), generator=generator)[again]
    advantage = torch.randn(DISTINCT, generator=generator)[again]
    counted = torch.rand(case.tokens, generator=generator) >= case.masked
    counted[0] = True
    topk = (torch.zeros(case.tokens, 1, dtype=torch.int64), torch.zeros(case.tokens, 1))
    if case.operation == "topk":
        k = min(K, case.vocabulary // 2)
        found = torch.log_softmax(reference[:DISTINCT].float(), -1).topk(k)
        topk = (found.indices[again[: case.tokens]], found.values[again[: case.tokens]])
    weight = _weight(case, generator) if case.operation == "linear" else None
    made = Batch(policy, reference, counted, ids, advantage, *topk, weight)
    return Batch(*(None if t is None else _laid_out(t, case, device) for t in made))  # type: ignore[arg-type]


def _rows(case: Case) -> tuple[Tensor, Tensor]:
    if case.model in REAL:
        import real_logits

        distinct = real_logits.logits(case.model)
        # Spread over the text: the first tokens of a text are unlike the rest.
        places = torch.linspace(0, len(distinct[0]) - 1, DISTINCT).long()
        policy, reference = (cases.repeat(t[places], case.tokens, case.dtype) for t in distinct)
        return policy, reference
    head = case.operation == "linear"
    # Of hidden states: N(0, 1), and a teacher's distance. Nearer to each other, the rounding of
    # 16-bit logits is most of a peer's gradient.
    kind, scale = ("noise 1", 3) if head else (NARROW, 1)
    problem = cases.make(kind, case.width, case.tokens, case.dtype, distinct=DISTINCT)
    return problem.policy / scale, problem.reference / scale


def _weight(case: Case, generator: torch.Generator) -> Tensor:
    weight = torch.empty(case.vocabulary, case.width, dtype=EVERY_DTYPE[case.dtype])
    for part in weight.split(8192):  # no float32 copy of all of it
        part.copy_(torch.randn(part.shape, generator=generator) * (3 / case.width**0.5))
    return weight


def _laid_out(tensor: Tensor, case: Case, device: str) -> Tensor:
    if case.layout == "contiguous" or tensor.dim() < 2 or tensor.shape[1] != case.vocabulary:
        return tensor.to(device)
    rows, columns = tensor.shape
    padded = torch.empty(rows, columns + PADDING, dtype=tensor.dtype, device=device)
    padded[:, :columns] = tensor
    return padded[:, :columns]
