"""The worst relative error of the KLs and the gradients over the scenario families."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import families
import machine
import oracle_f64
import torch
from cases import DTYPES
from goals import Result
from jobs_io import Reporter
from speed import Settings
from torch import Tensor

import fusedkl

KINDS = ("forward_kl", "reverse_kl")
# The range in which the promise is relative; below it an absolute floor, above it overflow.
LEAST, MOST = 1e-12, 1e3
# Reverse gradients whose terms cancel this much are judged; up to UNKNOWN they are reported apart.
JUDGED, UNKNOWN = 1e4, 1e8


@dataclass
class Worst:
    """The largest error so far, where it was, and what was plainly wrong."""

    error: float = 0.0
    where: str = "nowhere"
    counted: int = 0
    wrong: str = ""

    def take(self, error: float, where: str) -> None:
        self.counted += 1
        if not error <= self.error:
            self.error, self.where = error, where


def run(reporter: Reporter, settings: Settings) -> None:
    """Both directions, both dtypes, all families; on the instruction set of this process."""
    vocabularies = (4099,) if settings.quick else (4099, 151936)
    values = {(kind, d): Worst() for kind in KINDS for d in DTYPES}
    gradients = {(kind, d): Worst() for kind in KINDS for d in DTYPES}
    cancelling = {d: Worst() for d in DTYPES}
    for vocabulary in vocabularies:
        for scenario in families.scenarios(vocabulary):
            reporter.step(f"V = {vocabulary}, {scenario.name}")
            for dtype, torch_dtype in DTYPES.items():
                x, y = scenario.policy.to(torch_dtype), scenario.reference.to(torch_dtype)
                truth = oracle_f64.row(x, y)
                where = f"{scenario.name}, V = {vocabulary}"
                for kind in KINDS:
                    value, grad = _ours(x, y, kind)
                    expected = getattr(truth, kind)
                    expected_grad = getattr(truth, kind.replace("_kl", "_gradient"))
                    _judge_value(values[kind, dtype], value, float(expected), where)
                    if not LEAST <= float(expected) <= MOST:
                        continue
                    error = oracle_f64.relative_l2(grad, expected_grad)
                    if kind == "forward_kl" or truth.reverse_cancellation <= JUDGED:
                        gradients[kind, dtype].take(error, where)
                    elif truth.reverse_cancellation <= UNKNOWN:
                        cancelling[dtype].take(error, where)
    isa, asked = machine.instruction_set(), os.environ.get("FUSEDKL_CPU_ISA", "")
    for (kind, dtype), worst in values.items():
        if asked and asked != isa:
            worst.wrong = f"asked for {asked}, runs {isa}"
        reporter.emit(_result("kl_error", kind, dtype, worst, isa))
    for (kind, dtype), worst in gradients.items():
        reporter.emit(_result(f"gradient_error/{dtype}", kind, dtype, worst, isa))
    for dtype, worst in cancelling.items():
        reporter.emit(_result("gradient_cancelling", "reverse_kl", dtype, worst, isa))


def _ours(x: Tensor, y: Tensor, kind: str) -> tuple[float, Tensor]:
    policy = x[None].clone().requires_grad_()
    value = fusedkl.divergence(policy, y[None], kind)
    (grad,) = torch.autograd.grad(value.sum(), policy)
    return float(value.detach()), grad[0]


def _judge_value(worst: Worst, value: float, expected: float, where: str) -> None:
    """Relative inside the promised range; sign, zero and infinity everywhere."""
    if value < 0 or math.isnan(value) or math.isinf(value) != math.isinf(expected):
        worst.wrong = worst.wrong or f"{where}: got {value}, expected {expected}"
    elif expected == 0 and value != 0:
        worst.wrong = worst.wrong or f"{where}: got {value} for equal rows"
    elif LEAST <= expected <= MOST:
        worst.take(abs(value - expected) / expected, where)


def _result(goal: str, kind: str, dtype: str, worst: Worst, isa: str) -> Result:
    return Result(
        goal,
        f"{kind} {dtype}, {isa}",
        worst.error if worst.counted else None,
        wrong=worst.wrong,
        note=f"{worst.counted} rows; worst: {worst.where}",
    )
