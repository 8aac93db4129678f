"""The numbers to reach, in one place, and the verdict on a measured value.

A goal is keyed `quantity/dtype`; the jobs measure, this file judges. "must" and "aim" hold for
vocabularies of 128256 and 151936 with both tensors at least four times the last-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """What a quantity is called, which way is better, and the two thresholds (None: reported)."""

    label: str
    must: float | None = None
    aim: float | None = None
    higher_is_better: bool = False
    unit: str = "x"
    # The instruction set the thresholds were set for; None: any.
    isa: str | None = "avx512"
    # Judged at any size: accuracy does not need large tensors.
    any_size: bool = False


@dataclass
class Result:
    """One measured value with its spread (10% and 90% of the samples)."""

    goal: str
    case: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    # The best value that the machine's memory allows, from a limit measured in the same run.
    ceiling: float | None = None
    # Not empty: the numbers were checked before timing and were wrong, so nothing was timed.
    wrong: str = ""
    note: str = ""
    isa: str = ""
    detail: dict[str, float | str] = field(default_factory=dict)


def _faster(label: str, must: float, aim: float, isa: str | None = "avx512") -> Goal:
    return Goal(label, must, aim, higher_is_better=True, isa=isa)


_BACKWARD = "forward + backward vs torch.compile"
_WITH, _WITHOUT = "huge pages for both", "huge pages for neither"

_FULL = "lm_head fused: forward vs full logits"
# One home for both precisions; the two hidden sizes have their own thresholds.
_LINEAR: dict[str, Goal] = {
    **{
        f"linear_products/{precision}": Goal(
            f"lm_head fused: forward, times its own products, {precision}", 1.10, 1.03, isa=None
        )
        for precision in ("fast", "default")
    },
    "linear_forward_small/fast": _faster(f"{_FULL}, H = 1024, fast", 1.6, 2.5, None),
    "linear_forward_large/fast": _faster(f"{_FULL}, H = 4096, fast", 1.1, 1.3, None),
    "linear_forward_small/default": _faster(f"{_FULL}, H = 1024", 1.1, 1.5, None),
    "linear_forward_large/default": _faster(f"{_FULL}, H = 4096", 1.1, 1.5, None),
    **{
        f"linear_train/{precision}": _faster(
            f"lm_head fused: forward + backward vs full logits, {precision}", 1.0, 1.3, None
        )
        for precision in ("fast", "default")
    },
    **{
        f"linear_memory_forward/{precision}": _faster(
            f"lm_head fused: memory of full logits over ours, forward, {precision}", 100, 300, None
        )
        for precision in ("fast", "default")
    },
    **{
        f"linear_memory_train/{precision}": _faster(
            f"lm_head fused: memory, forward + backward, {precision}", 20, 50, None
        )
        for precision in ("fast", "default")
    },
    "linear_gradient/fp32": Goal(
        "lm_head fused: gradient, relative L2", 2e-5, 5e-6, unit="", isa=None, any_size=True
    ),
    "linear_gradient/bf16": Goal(
        "lm_head fused: gradient, relative L2", 5e-3, 3e-3, unit="", isa=None, any_size=True
    ),
}

GOALS: dict[str, Goal] = {
    "forward_compile/bf16": _faster("forward vs torch.compile", 5.0, 7.5),
    "forward_compile/fp32": _faster("forward vs torch.compile", 4.0, 6.5),
    "forward_eager/bf16": _faster("forward vs upcast eager, default allocator", 35.0, 60.0),
    "forward_eager/fp32": _faster("forward vs upcast eager, default allocator", 20.0, 35.0),
    "forward_rowloop/bf16": Goal("forward vs row loop", higher_is_better=True),
    "forward_rowloop/fp32": Goal("forward vs row loop", higher_is_better=True),
    "forward_limit/bf16": Goal("forward, times the memory-read limit", 1.9, 1.3),
    "forward_limit/fp32": Goal("forward, times the memory-read limit", 1.25, 1.0),
    "backward_compile_huge/bf16": _faster(f"{_BACKWARD}, {_WITH}", 4.5, 8.0),
    "backward_compile_huge/fp32": _faster(f"{_BACKWARD}, {_WITH}", 3.0, 5.0),
    "backward_compile_plain/bf16": _faster(f"{_BACKWARD}, {_WITHOUT}", 4.5, 8.0),
    "backward_compile_plain/fp32": _faster(f"{_BACKWARD}, {_WITHOUT}", 3.0, 5.0),
    **{
        f"backward_compile_returned/{dtype}": Goal(
            f"{_BACKWARD}, {_WITH}, our memory given back each time", higher_is_better=True
        )
        for dtype in ("bf16", "fp32")
    },
    "inplace_compile_huge/bf16": _faster(f"{_BACKWARD}, inplace_grad, {_WITH}", 5.5, 9.0),
    "inplace_compile_huge/fp32": _faster(f"{_BACKWARD}, inplace_grad, {_WITH}", 4.0, 8.0),
    "inplace_compile_plain/bf16": _faster(f"{_BACKWARD}, inplace_grad, {_WITHOUT}", 5.5, 9.0),
    "inplace_compile_plain/fp32": _faster(f"{_BACKWARD}, inplace_grad, {_WITHOUT}", 4.0, 8.0),
    "backward_eager/bf16": Goal(
        "forward + backward vs upcast eager, default allocator", higher_is_better=True
    ),
    "backward_eager/fp32": Goal(
        "forward + backward vs upcast eager, default allocator", higher_is_better=True
    ),
    "backward_limit/bf16": Goal("forward + backward, times the 2 reads + 1 write limit"),
    "backward_limit/fp32": Goal("forward + backward, times the 2 reads + 1 write limit"),
    "fresh_write_huge/bf16": Goal(f"first write of a gradient's memory, {_WITH}", unit="ns/pair"),
    "fresh_write_huge/fp32": Goal(f"first write of a gradient's memory, {_WITH}", unit="ns/pair"),
    "fresh_write_plain/bf16": Goal(
        f"first write of a gradient's memory, {_WITHOUT}", unit="ns/pair"
    ),
    "fresh_write_plain/fp32": Goal(
        f"first write of a gradient's memory, {_WITHOUT}", unit="ns/pair"
    ),
    "both_directions": Goal("both directions (jeffreys) vs one", 1.3, 1.1),
    "wide_1": Goal("wide differences vs KL <= 1e-2: noise 1 (KL 0.5)", 1.6, 1.35),
    "wide_4": Goal("wide differences vs KL <= 1e-2: noise 4", 2.0, 1.6),
    "wide_50": Goal("wide differences vs KL <= 1e-2: every row KL > 50", 6.0, 3.0),
    "drifted": Goal("a policy's logits all higher by 8, vs not"),
    "half_masked": Goal("half of the vocabulary masked at random", 0.8, 0.3, unit="ns/pair"),
    "memory_forward": Goal("peak extra memory, forward", 2.0, 2.0, unit="MiB", isa=None),
    "memory_backward": Goal(
        "peak extra memory, forward + backward", 1.05, 1.05, unit="gradients", isa=None
    ),
    "memory_inplace": Goal("peak extra memory, inplace_grad", 2.0, 2.0, unit="MiB", isa=None),
    "memory_peer": Goal("peak extra memory, others", unit="gradients", isa=None),
    "avx2_forward": _faster("AVX2 on both sides: forward vs torch.compile", 1.8, 2.5, "avx2"),
    "avx2_backward": _faster(
        "AVX2 on both sides: forward + backward vs torch.compile", 1.5, 2.0, "avx2"
    ),
    "kl_error": Goal(
        "worst relative KL error over all families", 1e-5, 3e-6, unit="", isa=None, any_size=True
    ),
    "gradient_error/bf16": Goal(
        "worst gradient, relative L2", 4e-3, 3e-3, unit="", isa=None, any_size=True
    ),
    "gradient_error/fp32": Goal(
        "worst gradient, relative L2", 1e-5, 2e-6, unit="", isa=None, any_size=True
    ),
    "gradient_cancelling": Goal(
        "gradient, relative L2, where its terms cancel by 1e4 to 1e8", unit=""
    ),
    "family_error": Goal(
        "worst relative error of the other divergences",
        1e-5,
        1e-6,
        unit="",
        isa=None,
        any_size=True,
    ),
    "grpo_compile": _faster("GRPO step statistics, forward + backward vs torch.compile", 4.0, 8.0),
    "grpo_eager": _faster("GRPO step statistics, forward + backward vs eager", 8.0, 20.0),
    "jsd_compile": _faster("jsd, forward + backward vs torch.compile", 3.0, 6.0),
    "jsd_eager": _faster("jsd, forward + backward vs TRL's operators", 20.0, 50.0),
    "softcap_compile": Goal(
        "forward_kl of capped logits, forward + backward vs torch.compile", higher_is_better=True
    ),
    "softcap_eager": Goal(
        "forward_kl of capped logits, forward + backward vs eager", higher_is_better=True
    ),
    "token_stats": Goal("token_stats with every field vs forward_kl", 1.8, 1.3),
    "flatness": Goal("cost per pair, dearest shape vs cheapest, >= 100k pairs", 1.5, 1.1),
    "row_cost": Goal("fixed cost of a row (of 1024)", unit="us"),
    "call_cost": Goal("fixed cost of a call (1 x 1024)", unit="us"),
    "operator_cost": Goal("of which the operator (1 x 1)", unit="us"),
    "threads_row": Goal("two threads vs one, one row of V = 1M", higher_is_better=True),
    "threads_row_backward": Goal(
        "two threads vs one, one row of V = 1M, forward + backward", higher_is_better=True
    ),
    "threads_forward": Goal("two threads, forward vs torch.compile", higher_is_better=True),
    "threads_backward": Goal(
        f"two threads, forward + backward vs torch.compile, {_WITH}", higher_is_better=True
    ),
    "real_forward": Goal("real logits: forward vs torch.compile", higher_is_better=True),
    "real_backward": Goal(
        "real logits: forward + backward vs torch.compile", higher_is_better=True
    ),
    "real_limit": Goal("real logits: forward, times the memory-read limit"),
    **_LINEAR,
}

AIM, MUST, MISSED, WRONG = "aim reached", "must met", "MISSED", "WRONG NUMBERS"
OUT_OF_REACH, REPORTED, NOT_JUDGED = "MISSED (beyond memory)", "reported", "not judged"
# Of a goal that is for another instruction set: where it stands, and no failure here.
ELSEWHERE = {AIM: "(aim reached)", MUST: "(must met)", MISSED: "(missed)"}
FAILURES = (MISSED, WRONG, OUT_OF_REACH)


def verdict(result: Result, judged: bool = True) -> str:
    """Judge one result; `judged` is False where the sizes are too small for the thresholds.

    A missed must whose threshold lies beyond what the memory of this machine allows says so: it
    is still missed, but no kernel that reads its inputs could meet it here.
    """
    goal = GOALS[result.goal]
    said = _judged(result, goal, judged)
    if goal.isa is None or result.isa == goal.isa:
        return said
    return ELSEWHERE.get(MISSED if said == OUT_OF_REACH else said, said)


def _judged(result: Result, goal: Goal, judged: bool) -> str:
    if result.wrong:
        return WRONG
    if goal.must is None or goal.aim is None:
        return REPORTED
    if result.value is None or not (judged or goal.any_size):
        return NOT_JUDGED
    if _reaches(goal, result.value, goal.aim):
        return AIM
    if _reaches(goal, result.value, goal.must):
        return MUST
    if result.ceiling is not None and not _reaches(goal, result.ceiling, goal.must):
        return OUT_OF_REACH
    return MISSED


def _reaches(goal: Goal, value: float, threshold: float) -> bool:
    # Written so that NaN reaches nothing.
    return value >= threshold if goal.higher_is_better else value <= threshold
