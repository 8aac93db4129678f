"""Every public docstring has its parts, and the PyTorch code in it computes what the call does."""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusedkl

# No tensors in, none out: a sentence, and what comes back.
TOOLS = {"backends", "explain", "inductor", "patch", "unpatch", "TokenStats", "TopkDivergence"}
COMPUTE = sorted(set(fusedkl.__all__) - TOOLS)
NUMBERS = {"AdaptiveKLController", "FixedKLController"}  # of tensors they have no more to say

PARTS = {
    "a formula": r"sum |log|exp|\^2|=",
    "shapes": r"shape|\[\.\.\.|0-d",
    "dtypes": r"float32|dtype|floating",
    "units": r"\b(nats|bits)\b|\bunits?\b",
    "equivalent code": r"Equivalent",
    "errors": r"Raises:|Errors:|(Type|Value)Error",
    "a source": r"\b(1[89]|20)\d\d\b|Source:",
}
# Where a docstring says that another one holds for it too.
NAME = r"`(?:fusedkl\.)?(\w+)`"
HANDED_ON = f"{NAME} as a module|errors: {NAME}|[Ss]ee {NAME}|[Aa]s (?:for|in) {NAME}"


def docstring(name: str) -> str:
    return inspect.cleandoc(getattr(fusedkl, name).__doc__ or "")


def whole(name: str) -> str:
    """The docstring, and those that it refers to."""
    texts, names = [], [name]
    for each in names:
        texts.append(docstring(each))
        spoken = " ".join(texts[-1].split())
        found = [n for groups in re.findall(HANDED_ON, spoken) for n in groups if n]
        names += [n for n in found if n not in names and n in fusedkl.__all__]
    return "\n".join(texts)


@pytest.mark.parametrize("name", fusedkl.__all__)
def test_it_begins_with_a_sentence(name: str) -> None:
    first, *rest = docstring(name).split("\n")
    assert first.endswith((".", ":")) and len(first) < 110, first
    assert not rest or rest[0] == "", "the sentence is one line, and alone"


@pytest.mark.parametrize("name", COMPUTE)
def test_it_has_all_parts(name: str) -> None:
    text = whole(name)
    missing = {part for part, sign in PARTS.items() if not re.search(sign, text)}
    assert missing <= ({"shapes", "dtypes"} if name in NUMBERS else set())


FUNCTIONS = [n for n in COMPUTE if inspect.isfunction(getattr(fusedkl, n))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_has_a_source_of_its_own(name: str) -> None:
    assert re.search(PARTS["a source"], docstring(name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_named(name: str) -> None:
    text = whole(name).lower()
    arguments = set(inspect.signature(getattr(fusedkl, name)).parameters) - {"options"}
    assert [a for a in arguments if a not in text] == []


def equivalent(name: str) -> str:
    """The first code after the word."""
    after = docstring(name).split("Equivalent", 1)[1]
    block = re.search(r"::\n\n((?: {4}.*\n|\n)+)", after + "\n")
    inline = re.search(r"``([^`]+)``", after)
    if inline and (not block or inline.start() < block.start()):
        return inline[1].replace("\n", " ")
    assert block, name
    return textwrap.dedent(block[1])


# The call that the code of the same name stands for, with the names that this code uses.
CALLS = {
    "divergence": 'divergence(policy, reference, "reverse_kl", temperature=T)',
    "forward_kl": "forward_kl(policy, reference, temperature=T)",
    "reverse_kl": "reverse_kl(policy, reference, temperature=T)",
    "jeffreys": "jeffreys(policy, reference, temperature=T)",
    "jsd": "jsd(policy, reference, beta=beta, temperature=T)",
    "skew_kl": "skew_kl(policy, reference, alpha=alpha, temperature=T)",
    "renyi": "renyi(policy, reference, alpha=alpha, temperature=T)",
    "tvd": "tvd(policy, reference, temperature=T)",
    "hellinger": "hellinger(policy, reference, temperature=T)",
    "log_softmax": "log_softmax(logits, dim, dtype)",
    "token_stats": "token_stats(policy, reference, token_ids, temperature=T).reverse_kl",
    "entropy": "entropy(logits, temperature=temperature)",
    "logsumexp": "logsumexp(logits, temperature=temperature)",
    "selective_log_softmax": "selective_log_softmax(logits, index, temperature=temperature)",
    "topk_divergence": "topk_divergence(policy_logits, topk_ids, topk_logprobs, temperature=T)",
    "distillation_loss": "distillation_loss(student_logits, teacher_logits, labels, **mixed)",
    "linear_divergence": "linear_divergence(*heads, kind, mask=mask, temperature=temperature)",
    "linear_token_stats": "linear_token_stats(*heads, token_ids=token_ids, fields=fields)",
    "gaussian_kl": "gaussian_kl(mu, logvar, prior_mu, prior_logvar)",
    "fisher_vector_product": "fisher_vector_product(logits, vector, temperature=T)",
    "kl_estimate": 'kl_estimate(l, torch.zeros_like(l), "k3")',
    "kl_penalized_rewards": "kl_penalized_rewards(rewards, kl, mask, coef)",
    "nats_to_bits": "nats_to_bits(nats)",
}


def names() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    policy, reference, vector = draw(3, 5, 40)
    token_ids = torch.randint(40, (5,), generator=generator)
    topk_logprobs, topk_ids = F.log_softmax(reference, -1).topk(4)
    mu, logvar, prior_mu, prior_logvar = draw(4, 6)
    rewards, kl = draw(5), draw(5, 7)
    known = {"T": 1.7, "temperature": 1.7, "beta": 0.3, "alpha": 0.2, "coef": 0.1, "log": math.log}
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 2])[:, None]
    return {**known, **locals(), "torch": torch, "F": F}


@pytest.mark.parametrize("name", CALLS)
def test_the_equivalent_code_is_equivalent(name: str) -> None:
    known = names()
    policy = known["policy"]
    known |= {
        "logits": policy,
        "policy_logits": policy,
        "reference_logits": known["reference"],
        "index": known["token_ids"],
        "l": policy[0],
        "nats": policy,
        "student_logits": policy,
        "teacher_logits": known["reference"],
        "labels": known["token_ids"],
        "ce_weight": 0.3,
        "label_smoothing": 0.1,
        "kind": "reverse_kl",
        "reduction": "none",
        "dim": 1,
        "dtype": torch.float64,
        "fields": ["logprob", "ref_entropy"],
    }
    mix = {name: known[name] for name in ("ce_weight", "label_smoothing")}
    known["mixed"] = {**mix, "temperature": known["T"], "reduction": "mean", "scale_t2": True}
    if name.startswith("linear"):
        hidden, ref_hidden, weight, ref_weight = torch.randn(4, 5, 6)
        heads = (hidden, weight, ref_hidden, ref_weight)
        known |= dict(zip(("hidden", "weight", "ref_hidden", "ref_weight"), heads, strict=True))
        known |= {"heads": heads, "token_ids": torch.arange(5), "mask": torch.arange(5) != 2}
        known |= {"divergence": fusedkl.divergence, "token_stats": fusedkl.token_stats}
    program = ast.parse(equivalent(name))
    expressions = [node for node in program.body if isinstance(node, ast.Expr)]
    for node in program.body:
        if not isinstance(node, ast.Expr):
            exec(compile(ast.Module([node], []), name, "exec"), known)
    if expressions:
        theirs = eval(compile(ast.Expression(expressions[-1].value), name, "eval"), known)
    else:
        last = program.body[-1]
        assert isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name)
        theirs = known[last.targets[0].id]
    ours = eval(f"fusedkl.{CALLS[name]}", {**known, "fusedkl": fusedkl})
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (ours, theirs)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=1e-5)
