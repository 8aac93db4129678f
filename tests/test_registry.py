"""Every registered field and divergence is everywhere it must be, and nothing else is."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl import divergences, modules, named, reference, reference_family
from fusedkl._library import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
# A value of the parameter of each field and divergence that has one.
PARAMETERS = {"jsd": 0.3, "skew_kl": 0.2, "renyi": 0.6}


def number(name: str) -> float | None:
    return PARAMETERS.get(name)


@pytest.mark.parametrize("field", divergences.FIELDS.values(), ids=lambda f: f.name)
def test_a_backend_computes_every_field(backend: str, field: divergences.Field) -> None:
    policy, other = torch.randn(2, 3, 7)
    ids = torch.randint(0, 7, (3, 2)) if field.needs_token_ids else None
    second = other if field.needs_reference else None
    arguments = (policy, second, ids, [field.name], number(field.name), *(None,) * 4, backend)
    values, state = torch.ops.fusedkl.row_stats(*arguments)
    assert values.shape == (divergences.value_rows([field.name], 2), 3)
    assert state.shape == (3, len(reference.STATE))
    assert bool(values.isfinite().all()) and bool((values != 0).all())


def test_fields_come_in_the_order_asked_for(backend: str) -> None:
    policy, other = torch.randn(2, 3, 7)
    ids = torch.randint(0, 7, (3, 2))
    names = [name for name, field in divergences.FIELDS.items() if not field.second_sweep][::-1]

    def stats(fields: list[str], second: Tensor | None, tokens: Tensor | None) -> Tensor:
        values, _ = torch.ops.fusedkl.row_stats(
            policy, second, tokens, fields, *(None,) * 5, backend
        )
        return values

    definitions = [divergences.FIELDS[name] for name in names]
    alone = [
        stats([f.name], other if f.needs_reference else None, ids if f.needs_token_ids else None)
        for f in definitions
    ]
    torch.testing.assert_close(stats(names, other, ids), torch.cat(alone), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
def test_a_divergence_has_its_function_and_module(name: str) -> None:
    function = getattr(fusedkl, name)
    assert name in fusedkl.__all__
    general = inspect.signature(fusedkl.divergence).parameters
    own = divergences.DIVERGENCES[name].parameter
    parameters = inspect.signature(function).parameters
    expected = ["policy_logits", "reference_logits", *([own] if own else []), "options"]
    assert list(parameters) == expected
    if own:
        default = divergences.DIVERGENCES[name].default
        given = parameters[own].default
        assert given == (inspect.Parameter.empty if default is None else default)
    accepted = set(named.DivergenceOptions.__annotations__) | {"kind", "beta", "alpha"}
    assert accepted | {"policy_logits", "reference_logits"} == set(general)
    found = [
        value
        for value in vars(modules).values()
        if isinstance(value, type) and getattr(value, "kind", None) == name
    ]
    assert len(found) == 1 and found[0].__name__ in fusedkl.__all__
    policy, other = torch.randn(2, 3, 7)
    options = {own: number(name)} if own else {}
    value = fusedkl.divergence(policy, other, name, **options)
    assert torch.equal(function(policy, other, **options), value)
    assert torch.equal(found[0](**options)(policy, other), value)


# Where each backend has its fields by name. In C++ one file of each folder knows them.
COMPILED = {"csrc/cpu": "fields.h", "csrc/cuda": "call.h"}


@pytest.mark.parametrize("field", divergences.FIELDS.values(), ids=lambda f: f.name)
def test_the_mathematics_of_a_field_stands_in_each_of_its_homes(field: divergences.Field) -> None:
    def naming(paths: Iterable[Path]) -> set[str]:
        return {path.name for path in paths if f'"{field.name}"' in path.read_text()}

    assert f'"{field.name}"' in inspect.getsource(reference) + inspect.getsource(reference_family)
    for folder, file in COMPILED.items():
        assert naming((ROOT / folder).glob("*.*")) == {file}, folder
    triton = naming((ROOT / "kernels").glob("*.py"))
    assert triton if not field.second_sweep else "family.py" in triton


def test_every_parameter_has_a_range_and_no_other() -> None:
    """Where a divergence is defined is asked of each that has a parameter."""
    with_parameter = {k for k, d in divergences.DIVERGENCES.items() if d.parameter}
    assert with_parameter == set(divergences._RANGES)


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
        # a compiler that copied a slice of logits first would allocate the largest tensor of a step
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(outer.tags)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(outer.name(), "Meta")
