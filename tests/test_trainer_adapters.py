"""Adapters for trainers that are not installed here, against the contracts of what they replace.

The contract of each function is written out below as a module of that name and signature, in plain
float64 torch: what its documentation says it computes.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkl.integrations import openrlhf, verl

VERL = """
def logprobs_from_logits(logits, labels, inplace_backward=True):
    return logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

def entropy_from_logits(logits):
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

def entropy_from_logits_with_chunking(logits, chunk_size=2048):
    return entropy_from_logits(logits)
"""
VERL_CORE = """
def kl_penalty(logprob, ref_logprob, kl_penalty):
    l = logprob.double() - ref_logprob.double()
    kind = kl_penalty[:-1] if kl_penalty.endswith("+") else kl_penalty
    if kind == "full":  # said to take logits, and not implemented there
        log_p, log_q = (t.double().log_softmax(-1) for t in (logprob, ref_logprob))
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    k3 = (torch.exp((-l).clamp(-20, 20)) - (-l).clamp(-20, 20) - 1).clamp(-10, 10)
    value = {"kl": l, "abs": l.abs(), "mse": l * l / 2, "low_var_kl": k3}[
        {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}.get(kind, kind)
    ]
    return value if kind == kl_penalty else value.detach() + l * l / 2 - (l * l / 2).detach()
"""
VERL_DISTILLATION = """
def compute_forward_kl_topk(
    student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format
):
    log_q = teacher_topk_log_probs.values().unsqueeze(0).double()
    ids = teacher_topk_ids.values().unsqueeze(0)
    log_p = student_logits.double().log_softmax(-1)
    own = log_p.topk(ids.shape[-1], -1).indices
    log_p = log_p.gather(-1, ids)
    found = {"student_mass": log_p.exp().sum(-1), "teacher_mass": log_q.exp().sum(-1)}
    least = config.distillation_loss.log_prob_min_clamp
    if least is not None:
        log_p, log_q = log_p.clamp(min=least), log_q.clamp(min=least)
    terms = log_q.exp() * (log_q - log_p)
    both = torch.stack([torch.isin(a, b) for a, b in zip(ids[0], own[0])]).unsqueeze(0)
    found["distillation_losses"] = terms.sum(-1)
    found["overlap_count"] = both.sum(-1)
    found["overlap_token_advantage"] = -(terms * both).sum(-1) / both.sum(-1).clamp(min=1)
    return found
"""
ULYSSES = """
def get_ulysses_sequence_parallel_world_size():
    return 1
"""
OPENRLHF = """
def log_probs_from_logits(logits, labels, temperature=1.0):
    return (logits.double() / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]

def compute_entropy(logits):
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

def compute_approx_kl(log_probs, log_probs_base, kl_estimator="k1"):
    l = log_probs.double() - log_probs_base.double()
    return {"k1": l, "k2": l * l / 2, "k3": torch.exp(-l) - 1 + l}[kl_estimator].clamp(-10, 10)
"""
PACKAGES = {
    "verl": {
        "verl.utils.torch_functional": VERL,
        "verl.utils.ulysses": ULYSSES,
        "verl.trainer.ppo.core_algos": VERL_CORE,
        "verl.trainer.distillation.fsdp.losses": VERL_DISTILLATION,
    },
    "openrlhf": {"openrlhf.models.utils": OPENRLHF},
}
RELEASES = {"verl": "0.9.0", "openrlhf": "0.10.4"}


@pytest.fixture
def package(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """A function that puts a package with those contracts in sys.modules: {module: module}."""
    made: list[str] = []

    def make(name: str) -> dict[str, Any]:
        for path, source in PACKAGES[name].items():
            parts = path.split(".")
            for depth in range(1, len(parts) + 1):
                full = ".".join(parts[:depth])
                if full not in sys.modules:
                    made.append(full)
                    sys.modules[full] = types.ModuleType(full)
                    sys.modules[full].__path__ = []  # type: ignore[attr-defined]
            vars(sys.modules[path])["torch"] = torch
            exec(source, vars(sys.modules[path]))
        sys.modules[name].__version__ = RELEASES[name]  # type: ignore[attr-defined]
        return {path: sys.modules[path] for path in PACKAGES[name]}

    yield make
    for full in made:
        del sys.modules[full]


def both(adapter: Any, call: Callable[[], Tensor], *inputs: Tensor) -> None:
    """The value and the gradients of `call`, as the package has them and patched."""
    wanted, wanted_grads = evaluated(call, inputs)
    with adapter.patch():
        found, found_grads = evaluated(call, inputs)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(found_grads, wanted_grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


def evaluated(call: Callable[[], Tensor], inputs: Any) -> tuple[Tensor, list[Tensor]]:
    value = call()
    towards = torch.linspace(0.5, 2, value.numel()).reshape(value.shape)
    return value.detach(), list(torch.autograd.grad((value * towards).sum(), inputs))


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(3).requires_grad_()


def test_verl_log_probabilities_and_entropies(package: Any) -> None:
    functional = package("verl")["verl.utils.torch_functional"]
    x, labels = logits(3, 5, 97), torch.randint(97, (3, 5))
    both(verl, lambda: functional.logprobs_from_logits(x, labels), x)
    both(verl, lambda: functional.logprobs_from_logits(x[0], labels[0], inplace_backward=False), x)
    both(verl, lambda: functional.entropy_from_logits(x), x)
    both(verl, lambda: functional.entropy_from_logits_with_chunking(x[1], chunk_size=2), x)


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_verl_penalties(package: Any, kind: str, plus: str) -> None:
    core = package("verl")["verl.trainer.ppo.core_algos"]
    p, q = (torch.randn(3, 6).sub(3).requires_grad_() for _ in range(2))
    p.data[0, :4] = torch.tensor([-150.0, -18.0, -5.5, -2.0])  # past each of the limits
    q.data[0, :4] = torch.tensor([-1.0, -1.0, -2.0, -27.0])
    both(verl, lambda: core.kl_penalty(p, q, kind + plus), p, q)


def test_verl_exact_penalty(package: Any) -> None:
    core = package("verl")["verl.trainer.ppo.core_algos"]
    x, y = logits(2, 4, 97), logits(2, 4, 97)
    both(verl, lambda: core.kl_penalty(x, y, "full"), x, y)
    with verl.patch():
        with pytest.raises(ValueError, match=r"logits of shape \[batch, length, V\].*got shape"):
            core.kl_penalty(x[..., 0], y[..., 0], "full")
        with pytest.raises(
            NotImplementedError, match=r"kl_penalty must be one of kl, k1, abs.*'k4'"
        ):
            core.kl_penalty(x[..., 0], y[..., 0], "k4")


@pytest.mark.parametrize("floor", [None, -2.5])
def test_verl_topk_distillation(package: Any, floor: float | None) -> None:
    losses = package("verl")["verl.trainer.distillation.fsdp.losses"]
    x, teacher = logits(1, 11, 97), torch.randn(11, 97).mul(3).log_softmax(-1).topk(8, -1)
    log_q, ids = (
        torch.nested.nested_tensor_from_jagged(t, torch.tensor([0, 4, 11])) for t in teacher
    )
    config = types.SimpleNamespace(
        distillation_loss=types.SimpleNamespace(log_prob_min_clamp=floor)
    )

    def found() -> dict[str, Tensor]:
        result: dict[str, Tensor] = losses.compute_forward_kl_topk(x, log_q, ids, config, "thd")
        return result

    both(verl, lambda: found()["distillation_losses"], x)
    wanted = found()
    with verl.patch():
        for name, value in found().items():
            torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-6)
    assert 0 < int(wanted["overlap_count"].sum()) < 88


def test_openrlhf(package: Any) -> None:
    utils = package("openrlhf")["openrlhf.models.utils"]
    x, labels = logits(3, 5, 97), torch.randint(97, (3, 5))
    before = x.detach().clone()
    both(openrlhf, lambda: utils.log_probs_from_logits(x, labels), x)
    both(openrlhf, lambda: utils.log_probs_from_logits(x, labels, temperature=0.6), x)
    both(openrlhf, lambda: utils.compute_entropy(x), x)
    assert torch.equal(x.detach(), before)
    p, q = (torch.randn(4, 6).sub(3).requires_grad_() for _ in range(2))
    p.data[0, :3] = torch.tensor([-18.0, -5.5, -2.0])
    q.data[0, :3] = torch.tensor([-1.0, -2.0, -27.0])
    for kind in ("k1", "k2", "k3"):
        both(openrlhf, lambda kind=kind: utils.compute_approx_kl(p, q, kind), p, q)
    with (
        openrlhf.patch(),
        pytest.raises(ValueError, match="kl_estimator must be one of k1, k2, k3"),
    ):
        utils.compute_approx_kl(p, q, "k4")


def test_overflow_is_limited(package: Any) -> None:
    """exp overflows in the formula as written, and its gradient is NaN; here it is 0."""
    utils = package("openrlhf")["openrlhf.models.utils"]
    p = torch.tensor([-800.0, -1.0], requires_grad=True)
    with openrlhf.patch():
        value = utils.compute_approx_kl(p, torch.zeros(2), "k3")
    value.sum().backward()
    assert value[0] == 10 and p.grad is not None and p.grad[0] == 0
    assert math.isclose(value[1].item(), math.e - 2, rel_tol=1e-6)


@pytest.mark.parametrize("name", PACKAGES)
def test_unknown_release_is_refused(package: Any, name: str) -> None:
    modules = package(name)
    sys.modules[name].__version__ = "0.99.0"  # type: ignore[attr-defined]
    adapter = {"verl": verl, "openrlhf": openrlhf}[name]
    known = ", ".join(adapter.VERSIONS)
    with pytest.raises(RuntimeError, match=f"knows {name} {known}; got 0.99.0"):
        adapter.patch()
    module = modules[next(iter(modules))]
    first = adapter.VERSIONS["0.10"][0]
    setattr(module, first.name, lambda logits, labels: logits)
    with pytest.raises(RuntimeError, match=rf"{first.name} takes \(logits, labels\), not"):
        adapter.patch()
