"""Every registered field and divergence is everywhere it must be, and nothing else is."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import fusedkl
from fusedkl import divergences, modules, reference
from fusedkl._library import OPERATORS
from fusedkl.backends import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    "temperature",
    "mask",
    "weight",
    "labels",
    "ignore_index",
    "reduction",
    "inplace_grad",
    "backend",
)


@pytest.mark.parametrize("field", divergences.FIELDS.values(), ids=lambda f: f.name)
def test_a_backend_computes_every_field(backend: str, field: divergences.Field) -> None:
    policy, other = torch.randn(2, 3, 7)
    ids = torch.randint(0, 7, (3, 2)) if field.needs_token_ids else None
    second = other if field.needs_reference else None
    values, state = torch.ops.fusedkl.row_stats(
        policy, second, ids, [field.name], None, None, None, None, None, backend
    )
    assert values.shape == (divergences.value_rows([field.name], 2), 3)
    assert state.shape == (3, len(reference.STATE))
    assert bool(values.isfinite().all()) and bool((values != 0).all())


def test_fields_come_in_the_order_asked_for(backend: str) -> None:
    policy, other = torch.randn(2, 3, 7)
    ids = torch.randint(0, 7, (3, 2))
    names = ["logprob", "reverse_kl", "logsumexp", "entropy", "forward_kl"]
    together, _ = torch.ops.fusedkl.row_stats(
        policy, other, ids, names, None, None, None, None, None, backend
    )
    alone = [
        torch.ops.fusedkl.row_stats(
            policy,
            other if divergences.FIELDS[name].needs_reference else None,
            ids if name == "logprob" else None,
            [name],
            *(None,) * 5,
            backend,
        )[0]
        for name in names
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_a_divergence_has_its_function_and_module(name: str) -> None:
    function = getattr(fusedkl, name)
    assert name in fusedkl.__all__
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == ("policy_logits", "reference_logits", *OPTIONS)
    general = inspect.signature(fusedkl.divergence).parameters
    for option in OPTIONS:
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default == general[option].default
    found = [
        value
        for value in vars(modules).values()
        if isinstance(value, type) and getattr(value, "kind", None) == name
    ]
    assert len(found) == 1 and found[0].__name__ in fusedkl.__all__
    policy, other = torch.randn(2, 3, 7)
    value = fusedkl.divergence(policy, other, name)
    assert torch.equal(function(policy, other), value)
    assert torch.equal(found[0]()(policy, other), value)


@pytest.mark.parametrize("field", divergences.FIELDS)
def test_the_mathematics_of_a_field_stands_in_each_of_its_homes(field: str) -> None:
    assert f'"{field}"' in inspect.getsource(reference)
    compiled = [path.read_text() for path in (ROOT / "csrc").rglob("*.[ch]*")]
    assert any(f'"{field}"' in text for text in compiled)
    triton = [path for path in (ROOT / "kernels").glob("*.py") if path.name != "__init__.py"]
    if field in (BACKENDS["triton"].takes or ()):
        assert any(f'"{field}"' in path.read_text() for path in triton)


def test_divergences_are_sums_of_fields() -> None:
    for divergence in divergences.DIVERGENCES.values():
        assert divergence.fields and set(divergence.fields) <= set(divergences.FIELDS)
        assert all(divergences.FIELDS[name].needs_reference for name in divergence.fields)


def test_every_public_name_is_there_and_documented() -> None:
    for name in fusedkl.__all__:
        assert inspect.getdoc(getattr(fusedkl, name)), name


def test_operators_have_their_schemas_and_fakes() -> None:
    for name in OPERATORS:
        outer = getattr(torch.ops.fusedkl, name).default
        inner = getattr(torch.ops.fusedkl, f"_{name}").default
        names = [argument.name for argument in outer._schema.arguments]
        assert names == [*(argument.name for argument in inner._schema.arguments), "backend"]
        assert torch.Tag.pt2_compliant_tag in outer.tags
        assert torch._C._dispatch_has_kernel_for_dispatch_key(outer.name(), "Meta")
