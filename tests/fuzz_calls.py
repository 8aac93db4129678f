"""The calls that fuzz.py makes: one family for each public function that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_inputs import DTYPES, WIDTHS, Call, Laid, contents, options, pairs, per_row, shapes
from hypothesis import strategies as st
from torch import Tensor

import fusedkl
from fusedkl import divergences

REDUCTIONS = st.sampled_from(["none", "sum", "mean", "batchmean"])
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "reduction": REDUCTIONS,
    "temperature": st.sampled_from([0.2, 1.0, 3.0]),
    "softcap": st.sampled_from([1.0, 30.0]),
    "logit_scale": st.sampled_from([0.5, 2.0]),
    "valid_vocab": st.integers(1, 64),
}
NAMED = {
    "jsd": {"beta": st.sampled_from([0.0, 0.1, 0.5, 1.0])},
    "skew_kl": {"alpha": st.sampled_from([0.1, 0.7])},
    "renyi": {"alpha": st.sampled_from([0.5, 1.0, 2.0])},
}


def public(name: str) -> Callable[..., Any]:
    """The function of that name, its backend first."""

    def call(backend: str, *positional: Any, **named: Any) -> Any:
        return getattr(fusedkl, name)(*positional, backend=backend, **named)

    return call


@st.composite
def divergence(draw: st.DrawFn) -> Call:
    """Every kind, by its own function or by name."""
    x, y = draw(pairs())
    kind = draw(st.sampled_from(sorted(divergences.DIVERGENCES)))
    parameter = NAMED.get(kind, {})
    known = NUMBERS | per_row(x.content.shape[:-1]) | parameter
    known |= {"ignore_index": st.sampled_from([-100, 0, 7])}
    chosen = draw(options(known))
    if kind == "renyi" and "alpha" not in chosen:
        chosen["alpha"] = 2.0
    if draw(st.booleans()):
        return Call(public(kind), kind, [x, y], chosen)
    return Call(public("divergence"), "divergence", [x, y, kind], chosen)


@st.composite
def token_stats(draw: st.DrawFn) -> Call:
    x, y = draw(pairs())
    leading, width = x.content.shape[:-1], x.content.shape[-1]
    known = {k: v for k, v in NUMBERS.items() if k != "reduction"}
    known["mask"] = per_row(leading)["mask"]
    known["fields"] = st.lists(st.sampled_from(fusedkl.TokenStats._fields), max_size=3)
    chosen = draw(options(known))
    if draw(st.booleans()):
        chosen["token_ids"] = draw(ids(leading, width))
    rows = [x] if draw(st.integers(0, 3)) == 0 else [x, y]
    # Log-probabilities, and so their difference, are known to 1e-6.
    return Call(public("token_stats"), "token_stats", rows, chosen, floor=1e-6)


@st.composite
def ids(draw: st.DrawFn, leading: tuple[int, ...], width: int, count: int | None = None) -> Laid:
    """Token ids of one or `count` a row, now and then one that is not in the vocabulary."""
    shape = leading if count is None else (*leading, count)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    found = torch.randint(width, shape, generator=generator)
    if found.numel() and draw(st.integers(0, 9)) == 0:
        found.reshape(-1)[0] = width
    return Laid(found)


@st.composite
def one_row(draw: st.DrawFn) -> Call:
    """logsumexp, entropy, selective_log_softmax, log_softmax."""
    x, _ = draw(pairs())
    leading, width = x.content.shape[:-1], x.content.shape[-1]
    name = draw(st.sampled_from(["logsumexp", "entropy", "selective_log_softmax", "log_softmax"]))
    if name == "log_softmax":
        known = {"dim": st.integers(-3, 2), "dtype": st.sampled_from([None, *DTYPES])}
        return Call(public(name), name, [x], draw(options(known)))
    several = {"temperature": draw(st.sampled_from([NUMBERS, per_row(leading)]))["temperature"]}
    positional: list[Any] = [x]
    if name == "selective_log_softmax":
        positional.append(draw(ids(leading, width, draw(st.sampled_from([None, 1, 3])))))
    return Call(public(name), name, positional, draw(options(several)))


@st.composite
def topk_divergence(draw: st.DrawFn) -> Call:
    x, y = draw(pairs())
    count = min(x.content.shape[-1], draw(st.sampled_from([1, 2, 5])))
    logprobs, places = F.log_softmax(y.content.double().nan_to_num(0, 0, -50), -1).topk(count, -1)
    known = {k: NUMBERS[k] for k in ("reduction", "temperature")} | {
        "kind": st.sampled_from(["forward_kl", "reverse_kl"]),
        "tail": st.sampled_from(["bucket", "drop", "renormalize"]),
        "mask": per_row(x.content.shape[:-1])["mask"],
        "return_mass": st.booleans(),
    }
    # At most 0 after rounding to float32, as the function asks.
    given = Laid(logprobs.clamp(max=0).float(), "plain", draw(st.booleans()))
    positional = [x, Laid(places), given]
    # log p of a token is known to 1e-7, and the gradient is a difference of two such.
    return Call(public("topk_divergence"), "topk", positional, draw(options(known)), floor=1e-6)


@st.composite
def distillation_loss(draw: st.DrawFn) -> Call:
    x, y = draw(pairs())
    leading, width = x.content.shape[:-1], x.content.shape[-1]
    known = {k: NUMBERS[k] for k in ("reduction", "temperature")} | {
        "ce_weight": st.sampled_from([0.0, 0.3, 1.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "scale_t2": st.booleans(),
        "kind": st.sampled_from([k for k in divergences.DIVERGENCES if k != "renyi"]),
        "softcap": NUMBERS["softcap"],
        "valid_vocab": NUMBERS["valid_vocab"],
        "mask": per_row(leading)["mask"],
        "weight": per_row(leading)["weight"],
    }
    labels = draw(ids(leading, width))
    # Beside 16-bit logits a logsumexp is known to a float's rounding of what the rows differ by.
    rows = [t.content.double().nan_to_num(0, 0, 0).flatten() for t in (x, y)]
    largest = max((float(row.abs().max()) for row in rows if row.numel()), default=0.0)
    half = any(t.content.dtype in (torch.float16, torch.bfloat16) for t in (x, y))
    return Call(
        public("distillation_loss"), "distillation_loss", [x, y, labels], draw(options(known)),
        floor=1e-7 + half * 2.0**-24 * largest,
    )  # fmt: skip


@st.composite
def heads(draw: st.DrawFn) -> tuple[list[Laid], dict[str, st.SearchStrategy[Any]]]:
    """Hidden states and weights of two heads, and the options of whatever takes them."""
    leading, width, inner = draw(shapes()), draw(st.sampled_from(WIDTHS[:7])), 4
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    drawn = [
        Laid((draw(contents(shape, finite=True)).clamp(-4, 4) / 4).to(dtype), "plain", True)
        for shape in ((*leading, inner), (width, inner), (*leading, inner), (width, inner))
    ]
    known = {k: v for k, v in NUMBERS.items() if k not in ("valid_vocab", "reduction")}
    return drawn, known | {"mask": per_row(leading)["mask"], "tile": st.just((2, 7))}


# Products are float32: of weights that cancel, something is left.
HEADS = 1e-5


@st.composite
def linear_divergence(draw: st.DrawFn) -> Call:
    drawn, known = draw(heads())
    leading, width = drawn[0].content.shape[:-1], drawn[1].content.shape[0]
    known |= {"kind": st.sampled_from([k for k in divergences.DIVERGENCES if k != "renyi"])}
    known |= {"reduction": REDUCTIONS, "token_weight": per_row(leading)["weight"]}
    chosen = draw(options(known))
    dtype = drawn[0].content.dtype
    for name in ("bias", "ref_bias"):
        if draw(st.integers(0, 3)) == 0:
            chosen[name] = Laid(torch.linspace(-1, 1, width, dtype=dtype), "plain", True)
    if draw(st.integers(0, 3)) == 0:
        chosen |= {"labels": draw(ids(leading, width)), "ce_weight": 0.3}
    if draw(st.integers(0, 3)) == 0 and not chosen.keys() & {"ref_bias"}:
        drawn = drawn[:2]
        logits = draw(contents((*leading, width), finite=True))
        chosen["ref_logits"] = Laid(logits.to(dtype), "plain", True)
    name = "linear_divergence"
    return Call(public(name), name, drawn, chosen, floor=HEADS)


@st.composite
def linear_token_stats(draw: st.DrawFn) -> Call:
    drawn, known = draw(heads())
    chosen = draw(options(known))
    if draw(st.booleans()):
        leading, width = drawn[0].content.shape[:-1], drawn[1].content.shape[0]
        chosen["token_ids"] = draw(ids(leading, width))
    name = "linear_token_stats"
    return Call(public(name), name, drawn, chosen, floor=HEADS)


def beside(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function without backends: "cpu" is it, "reference" what it is compared with."""
    return lambda backend, *a, **k: (ours if backend == "cpu" else theirs)(*a, **k)


def torch_kl_div(p: Tensor, q: Tensor, **named: Any) -> Tensor:
    """torch's, but for the rounding of each step to 16 bits."""
    return F.kl_div(p.double(), q.double(), **named).to(p.dtype)


@st.composite
def kl_div(draw: st.DrawFn) -> Call:
    x, y = draw(pairs())
    log_target, reduction = draw(st.booleans()), draw(st.sampled_from(["none", "sum", "batchmean"]))
    rows = [F.log_softmax(t.content.float().nan_to_num(0, 0, -9), -1) for t in (x, y)]
    target = rows[1] if log_target else rows[1].exp()
    if not log_target:  # torch's gradient divides what it has multiplied by, subnormals rounded
        target = torch.where(target < torch.finfo(torch.float32).tiny, 0, target)
    # What is not fused is torch's, which rounds each step to 16 bits: no truth to compare with.
    wide = x.content.dtype in (torch.float32, torch.float64)
    layout, reduction = (x.layout, reduction) if wide else ("plain", "sum")
    given = [
        Laid(t.to(x.content.dtype), layout, g) for t, g in ((rows[0], True), (target, y.gradient))
    ]
    named = {"log_target": log_target, "reduction": reduction}
    # Logarithms of size 10 in float32, whose rounding is that of all tokens where a row is flat.
    floor = 1e-6 * max(1, x.content.shape[:-1].numel())
    return Call(beside(fusedkl.kl_div, torch_kl_div), "kl_div", given, named, floor)


def estimate(p: Tensor, q: Tensor, kind: str) -> Tensor:
    dtype = torch.float64 if torch.float64 in (p.dtype, q.dtype) else torch.float32
    d = p.to(dtype).double() - q.to(dtype).double()
    square = d * d / 2
    plain = {"k1": d, "k2": square, "k3": torch.expm1(-d) + d, "abs": d.abs()}
    value = plain[kind.removesuffix("+")]
    return (value.detach() + square - square.detach() if "+" in kind else value).to(dtype)


@st.composite
def kl_estimate(draw: st.DrawFn) -> Call:
    shape = (*draw(shapes()), 3)
    rows = [draw(contents(shape, finite=True)).clamp(-30, 0) for _ in "pq"]
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in rows]
    given: list[Any] = [Laid(t.to(d), "plain", True) for t, d in zip(rows, dtypes, strict=True)]
    kinds = st.sampled_from(["k1", "k2", "k3", "abs", "k1+", "k3+"])
    return Call(beside(fusedkl.kl_estimate, estimate), "kl_estimate", [*given, draw(kinds)])


def penalized(rewards: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """Token by token."""
    wide = torch.float64 in (kl.dtype, rewards.dtype)
    out = torch.zeros(kl.shape, dtype=torch.float64 if wide else torch.float32)
    for row in torch.cartesian_prod(*map(torch.arange, kl.shape)).reshape(-1, kl.dim()).tolist():
        at, of = tuple(row), tuple(row[:-1])
        if mask[at]:
            last = not mask[of][row[-1] + 1 :].any()
            reward = rewards[at] if rewards.dim() == kl.dim() else rewards[of] * last
            out[at] = reward.to(out.dtype) - coef * kl[at].to(out.dtype)
    return out


@st.composite
def kl_penalized_rewards(draw: st.DrawFn) -> Call:
    shape = (*draw(shapes()), draw(st.sampled_from([0, 1, 5])))
    kl, rewards = (draw(contents((*shape, 1), finite=True))[..., 0] for _ in "kr")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    if not draw(st.booleans()):
        rewards = rewards.sum(-1)
    given = [Laid(t.to(draw(st.sampled_from(DTYPES)))) for t in (rewards, kl)]
    function = beside(fusedkl.kl_penalized_rewards, penalized)
    coef = draw(st.sampled_from([0.0, 0.1]))
    return Call(function, "kl_penalized_rewards", [*given, Laid(mask), coef])


def gaussian(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    d = [t.double() for t in (mu, logvar, prior_mu, prior_logvar)]
    normal = torch.distributions.Normal
    found = torch.distributions.kl_divergence(
        normal(d[0], (d[1] / 2).exp()), normal(d[2], (d[3] / 2).exp())
    )
    return found.to(torch.promote_types(torch.float32, mu.dtype))


@st.composite
def gaussian_kl(draw: st.DrawFn) -> Call:
    shape, dtype = (*draw(shapes()), 3), draw(st.sampled_from(DTYPES))
    given = [
        Laid(draw(contents(shape, finite=True)).clamp(-5, 5).to(dtype), "plain", True)
        for _ in range(4)
    ]
    return Call(beside(fusedkl.gaussian_kl, gaussian), "gaussian_kl", given)


def fisher(logits: Tensor, vector: Tensor, temperature: float = 1.0) -> Tensor:
    x, v = logits.double() / temperature, vector.double()
    p = torch.softmax(x, -1)
    return (p * (v - (p * v).sum(-1, keepdim=True)) / temperature**2).to(vector.dtype)


@st.composite
def fisher_vector_product(draw: st.DrawFn) -> Call:
    x, y = draw(pairs())
    if not bool(x.content.isfinite().all()):  # of a row that is NaN no gradient is promised
        x.gradient = y.gradient = False
    vector = Laid(y.content.nan_to_num(0, 0, 0).clamp(-9, 9), y.layout, y.gradient)
    named = {"temperature": draw(NUMBERS["temperature"])}
    function = beside(fusedkl.fisher_vector_product, fisher)
    return Call(function, "fisher_vector_product", [x, vector], named)


FAMILIES: dict[str, Callable[[], st.SearchStrategy[Call]]] = {
    "divergence": divergence,
    "token_stats": token_stats,
    "one_row": one_row,
    "topk_divergence": topk_divergence,
    "distillation_loss": distillation_loss,
    "linear_divergence": linear_divergence,
    "linear_token_stats": linear_token_stats,
    "kl_div": kl_div,
    "kl_estimate": kl_estimate,
    "kl_penalized_rewards": kl_penalized_rewards,
    "gaussian_kl": gaussian_kl,
    "fisher_vector_product": fisher_vector_product,
}
