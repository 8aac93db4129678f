"""The steps of RL and distillation: statistics, JSD, a softcap; how right each divergence is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import families
import formulas
import machine
import timing
import torch
from accuracy import LEAST, MOST, Worst
from cases import DTYPES, NARROW, Problem
from goals import Result
from jobs_io import Reporter
from speed import Settings, per_pair, short
from timing import Comparison, Step
from torch import Tensor

import fusedkl

Loss = Callable[[Tensor, Tensor], Tensor]
# kind, options: every divergence that takes a second sweep.
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("skew_kl", {"alpha": 0.1}),
    ("renyi", {"alpha": 0.5}),
    ("renyi", {"alpha": 2.0}),
    ("tvd", {}),
    ("hellinger", {}),
)


def step_rows(
    logprob: Tensor, entropy: Tensor, exact_kl: Tensor, k3: Tensor, advantage: Tensor
) -> Tensor:
    """What both sides differentiate: a GRPO loss with every statistic in it, per token."""
    return 0.04 * k3 + 0.01 * exact_kl - advantage * logprob - 0.001 * entropy


def trl_step(ids: Tensor, advantage: Tensor) -> Loss:
    """Log-probabilities, entropy, exact KL and k3 as TRL composes them."""

    def loss(policy: Tensor, reference: Tensor) -> Tensor:
        return step_rows(*formulas.statistics(policy, reference, ids), advantage).mean()

    return loss


def our_step(ids: Tensor, advantage: Tensor) -> Loss:
    """The same from token_stats."""
    fields = ("logprob", "entropy", "reverse_kl", "log_ratio")

    def loss(policy: Tensor, reference: Tensor) -> Tensor:
        s = fusedkl.token_stats(policy, reference, ids, fields=fields)
        assert s.logprob is not None and s.entropy is not None and s.reverse_kl is not None
        return step_rows(s.logprob, s.entropy, s.reverse_kl, s.k3, advantage).mean()

    return loss


def mixture_jsd(policy: Tensor, reference: Tensor) -> Tensor:
    """The generalized JSD at beta = 1/2 in fp32, for the compiler."""
    return formulas.jsd(policy, reference).mean()


def generalized_jsd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The same on the logits as they come, in their dtype, as TRL runs it."""
    return formulas.jsd(student, teacher, formulas.as_is).mean()


SOFTCAP = 30.0  # of Gemma 2


def capped_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """The KL of logits under a softcap, in fp32."""
    x, y = (SOFTCAP * torch.tanh(formulas.upcast(t) / SOFTCAP) for t in (policy, reference))
    return formulas.forward_kl(x, y, formulas.as_is).mean()


def our_capped_kl(policy: Tensor, reference: Tensor) -> Tensor:
    return fusedkl.forward_kl(policy, reference, softcap=SOFTCAP, reduction="mean")


def our_jsd(policy: Tensor, reference: Tensor) -> Tensor:
    return fusedkl.jsd(policy, reference, reduction="mean")


def _gradient_step(loss: Loss, problem: Problem) -> Step:
    leaf = problem.policy.detach().requires_grad_()

    def run() -> Tensor:
        (grad,) = torch.autograd.grad(loss(leaf, problem.reference), leaf)
        return grad

    return Step(run)


def _right(ours: Loss, problem: Problem) -> Callable[[Loss], str]:
    """Compares losses on the distinct rows with the composition in float64."""
    x, y = problem.policy[: problem.distinct], problem.reference[: problem.distinct]
    found = float(ours(x, y))

    def check(truth: Loss) -> str:
        expected = float(truth(x.double(), y.double()))
        close = abs(found - expected) <= 1e-5 * max(abs(expected), 1e-3)
        return "" if close else f"value {found:.9g}, expected {expected:.9g}"

    return check


def _emit(reporter: Reporter, goal: str, problem: Problem, result: Comparison, name: str) -> None:
    ours, other = per_pair(result.base, problem), per_pair(result.other, problem)
    ratio = result.ratio
    reporter.emit(
        Result(
            goal,
            short(problem),
            ratio.median,
            ratio.low,
            ratio.high,
            note=f"{ours:.3f} vs {other:.3f} ns/pair, {name}",
            detail={"ours_ns": ours, "other_ns": other},
        )
    )


def run_steps(reporter: Reporter, settings: Settings) -> None:
    """Forward + backward of a GRPO step, JSD and a softcap against the compiler and eager."""
    vocabulary = max(cases.vocabularies(settings.quick).values())
    rows = cases.rows_for(vocabulary, torch.bfloat16, settings.quick)
    problem = cases.make(NARROW, vocabulary, rows, "bf16")
    ids = torch.randint(0, vocabulary, (rows,))
    advantage = torch.randn(rows)
    part = slice(problem.distinct)
    ours = our_step(ids, advantage)
    truth = trl_step(ids[part], advantage[part])
    _versus(
        reporter,
        settings,
        problem,
        "grpo",
        ours,
        trl_step(ids, advantage),
        trl_step(ids, advantage),
        _right(our_step(ids[part], advantage[part]), problem)(truth),
    )
    _versus(
        reporter,
        settings,
        problem,
        "jsd",
        our_jsd,
        mixture_jsd,
        generalized_jsd_loss,
        _right(our_jsd, problem)(generalized_jsd_loss),
    )
    _versus(
        reporter,
        settings,
        problem,
        "softcap",
        our_capped_kl,
        capped_kl,
        capped_kl,
        _right(our_capped_kl, problem)(capped_kl),
    )
    _statistics(reporter, settings, problem, ids)


def _versus(
    reporter: Reporter,
    settings: Settings,
    problem: Problem,
    name: str,
    ours: Loss,
    for_compiler: Loss,
    eager: Loss,
    wrong: str,
) -> None:
    goals = (f"{name}_compile", f"{name}_eager")
    if wrong:
        for goal in goals:
            reporter.emit(Result(goal, short(problem), wrong=wrong))
        return
    torch._dynamo.reset()
    peers = (torch.compile(for_compiler, dynamic=False), eager)
    rounds = (settings.rounds, settings.slow_rounds)
    for goal, peer, n in zip(goals, peers, rounds, strict=True):
        reporter.step(f"{short(problem)}: {goal}")
        result = timing.compare(
            _gradient_step(ours, problem),
            _gradient_step(peer, problem),
            rounds=n,
            seconds=settings.seconds,
        )
        _emit(reporter, goal, problem, result, goal.split("_")[1])


def _statistics(reporter: Reporter, settings: Settings, problem: Problem, ids: Tensor) -> None:
    """token_stats with every field against forward_kl alone, forward."""
    reporter.step(f"{short(problem)}: token_stats")
    base = Step(lambda: fusedkl.forward_kl(problem.policy, problem.reference))
    everything = Step(lambda: fusedkl.token_stats(problem.policy, problem.reference, ids))
    result = timing.compare(base, everything, rounds=settings.rounds, seconds=settings.seconds)
    one, all_ = per_pair(result.base, problem), per_pair(result.other, problem)
    ratio = result.ratio
    reporter.emit(
        Result(
            "token_stats",
            short(problem),
            ratio.median,
            ratio.low,
            ratio.high,
            note=f"{all_:.3f} vs {one:.3f} ns/pair, forward_kl alone",
        )
    )


def run_accuracy(reporter: Reporter, settings: Settings) -> None:
    """Every second-sweep divergence against the reference backend in float64."""
    vocabularies = (4099,) if settings.quick else (4099, 151936)
    values = {(i, d): Worst() for i in range(len(KINDS)) for d in DTYPES}
    for vocabulary in vocabularies:
        for scenario in families.scenarios(vocabulary):
            reporter.step(f"V = {vocabulary}, {scenario.name}")
            for dtype, torch_dtype in DTYPES.items():
                x, y = (t.to(torch_dtype)[None] for t in (scenario.policy, scenario.reference))
                for i, (kind, options) in enumerate(KINDS):
                    value = float(fusedkl.divergence(x, y, kind, **options))
                    truth = float(
                        fusedkl.divergence(
                            x.double(), y.double(), kind, **options, backend="reference"
                        )
                    )
                    worst = values[i, dtype]
                    where = f"{scenario.name}, V = {vocabulary}"
                    if (
                        value < 0
                        or value != value
                        or (value == float("inf")) != (truth == float("inf"))
                    ):
                        worst.wrong = worst.wrong or f"{where}: got {value}, expected {truth}"
                    elif LEAST <= truth <= MOST:
                        worst.take(abs(value - truth) / truth, where)
    for (i, dtype), worst in values.items():
        kind, options = KINDS[i]
        name = " ".join([kind, *(f"{k}={v}" for k, v in options.items())])
        reporter.emit(
            Result(
                "family_error",
                f"{name} {dtype}, {machine.instruction_set()}",
                worst.error if worst.counted else None,
                wrong=worst.wrong,
                note=f"{worst.counted} rows; worst: {worst.where}",
            )
        )
