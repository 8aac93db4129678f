"""patch() and unpatch(): what is replaced, for how long, and what is put back."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import outcome, pair, quiet
from torch.nn.functional import kl_div as bound_earlier

import fusedkl
from fusedkl.rebinding import TARGETS

# Not names of this module: patch() rebinds those.
KL: Any = types.SimpleNamespace(torchs=F.kl_div, ours=TARGETS[0].ours)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    assert F.kl_div is KL.torchs
    yield
    leaked = F.kl_div is not KL.torchs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while fusedkl.unpatch():
            leaked = True
    F.kl_div = KL.torchs
    assert not leaked


def test_context_manager() -> None:
    with fusedkl.patch() as handle:
        assert F.kl_div is torch.nn.functional.kl_div is KL.ours
        assert handle.active
    assert F.kl_div is KL.torchs
    assert not handle.active
    with pytest.raises(ZeroDivisionError), fusedkl.patch():
        raise ZeroDivisionError
    assert F.kl_div is KL.torchs


def test_calls() -> None:
    handle = fusedkl.patch()
    assert F.kl_div is KL.ours and handle.active
    assert fusedkl.unpatch() is True
    assert F.kl_div is KL.torchs and not handle.active
    assert fusedkl.unpatch() is False
    assert F.kl_div is KL.torchs


def test_repr_lists_what_is_replaced() -> None:
    handle = fusedkl.patch()
    assert (
        "  torch.nn.functional.kl_div = fusedkl.kl_div (was torch.nn.functional.kl_div)\n"
    ) in repr(handle)
    assert "  torch.Tensor.softmax = fusedkl's deferred softmax\n" in repr(handle)
    assert f"  {__name__}.bound_earlier rebound" in repr(handle)
    fusedkl.unpatch()
    assert repr(handle) == "<fusedkl.patch: not active, nothing replaced>"


NAMES = {"functional": ["kl_div"], "torch": ["log_softmax", "softmax"], "nn": []}


def test_nothing_but_the_attributes_changes() -> None:
    modules = {"functional": torch.nn.functional, "torch": torch, "nn": torch.nn}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    methods = dict(vars(torch.Tensor))
    with fusedkl.patch():
        for name, module in modules.items():
            now = vars(module)
            assert sorted(k for k in now if now[k] is not before[name].get(k)) == NAMES[name]
        assert sorted(vars(torch.Tensor).keys() - methods.keys()) == NAMES["torch"]
    assert {name: dict(vars(module)) for name, module in modules.items()} == before
    assert dict(vars(torch.Tensor)) == methods


def module_with(source: str) -> Iterator[Any]:
    module: Any = types.ModuleType("a_users_module")
    exec(source, vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_names_bound_earlier_are_rebound_and_given_back() -> None:
    source = """
from torch import softmax
from torch.nn.functional import kl_div as kl, log_softmax
mine = kl
"""
    for module in module_with(source):
        before = dict(vars(module))
        with fusedkl.patch() as handle:
            assert module.kl is KL.ours is module.mine is not fusedkl.kl_div
            assert module.softmax is torch.softmax is not before["softmax"]
            assert "a_users_module.softmax rebound" in repr(handle)
            exec(
                "from torch import log_softmax as since\nfrom fusedkl import kl_div as own\n"
                "from torch.nn.functional import kl_div as kl_since",
                vars(module),
            )
            module.mine = len
        assert module.kl is KL.torchs and module.softmax is before["softmax"] is torch.softmax
        assert module.since is torch.log_softmax
        assert module.own is fusedkl.kl_div and module.mine is len
        assert module.kl_since is KL.torchs


def test_what_is_out_of_reach_is_listed() -> None:
    def closing(function: Any) -> Any:
        return lambda *args: function(*args)

    class Holder:
        loss = staticmethod(KL.torchs)

    def default(x: Any, function: Any = torch.softmax) -> Any:
        return function(x, -1)

    holder: Any = Holder()
    holder.mine = torch.log_softmax
    kept = closing(KL.torchs)
    assert fusedkl.patch().unreached
    handle = fusedkl.patch()
    listed = "\n".join(handle.unreached)
    fusedkl.unpatch()
    fusedkl.unpatch()
    assert handle.unreached == []
    assert "torch.nn.functional.kl_div in the closure of " in listed and kept
    assert (
        "softmax in the defaults of test_what_is_out_of_reach_is_listed.<locals>.default" in listed
    )
    assert "log_softmax in an object of class " in listed and "Holder" in listed


def test_an_empty_cell_holds_nothing() -> None:
    """A closure over a variable that is not set yet, of a function that holds torch's elsewhere."""

    def early(function: Any = KL.torchs) -> Any:
        return later, function

    with fusedkl.patch() as handle:
        listed = repr(handle)
    assert "test_an_empty_cell_holds_nothing.<locals>.early" in listed
    later = early
    assert early()[0] is later


def test_numbers_through_the_patch() -> None:
    """F.kl_div, nn.KLDivLoss and a name bound earlier: the same values and warnings."""
    x, t = pair((4, 50), torch.float32, False)
    module = torch.nn.KLDivLoss(reduction="batchmean")
    plain = [KL.torchs(x, t, reduction=r) for r in ("none", "sum", "batchmean")] + [module(x, t)]
    with fusedkl.patch():
        for r, wanted in zip(("none", "sum", "batchmean"), plain, strict=False):
            torch.testing.assert_close(F.kl_div(x, t, reduction=r), wanted)
            torch.testing.assert_close(bound_earlier(x, t, reduction=r), wanted)
        value = module(x, t)
        torch.testing.assert_close(value, plain[3])
        assert torch.equal(value, KL.ours(x, t, reduction="batchmean"))
        torch.testing.assert_close(
            torch.autograd.grad(value, (x, t)), torch.autograd.grad(plain[3], (x, t))
        )
        with pytest.warns(UserWarning, match="'mean' divides") as caught:
            F.kl_div(x, t)
        assert [w.filename for w in caught] == [__file__]
        patched = outcome(torch.nn.KLDivLoss(), x, t)
    unpatched = outcome(torch.nn.KLDivLoss(), x, t)
    assert patched.warned == unpatched.warned and patched.where == unpatched.where


def test_unusual_inputs_do_not_recurse() -> None:
    x, t = pair((4, 5), torch.float32, False)

    class Tagged(torch.Tensor):
        pass

    with fusedkl.patch():
        for a, b in (
            (x, t.double()),
            (x, t[:1]),
            (x.as_subclass(Tagged), t),
            (x[:, ::2], t[:, ::2]),
        ):
            for kwargs in ({"reduction": "none"}, {"reduction": "sum"}, {"reduce": False}):
                torch.testing.assert_close(
                    quiet(F.kl_div, a, b, **kwargs), quiet(KL.torchs, a, b, **kwargs)
                )
        with pytest.raises(ValueError, match="not a valid value for reduction"):
            F.kl_div(x, t, reduction="avg")


def test_nesting() -> None:
    with fusedkl.patch() as outer:
        with fusedkl.patch() as inner:
            assert outer.active and inner.active and outer is not inner
        assert F.kl_div is KL.ours and outer.active
        fusedkl.patch()
        fusedkl.unpatch()
        assert F.kl_div is KL.ours
    assert F.kl_div is KL.torchs


def test_one_handle_entered_again() -> None:
    handle = fusedkl.patch()
    with handle:
        with handle:
            assert F.kl_div is KL.ours
        assert F.kl_div is KL.ours and handle.active
    assert F.kl_div is KL.torchs and not handle.active
    with handle:
        assert F.kl_div is KL.ours
    assert F.kl_div is KL.torchs


def test_unpatch_inside_with() -> None:
    with fusedkl.patch():
        assert fusedkl.unpatch()
        assert F.kl_div is KL.torchs
    assert F.kl_div is KL.torchs


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_ends(order: tuple[int, ...]) -> None:
    handles = [fusedkl.patch() for _ in range(3)]
    for ended, index in enumerate(order):
        assert F.kl_div is KL.ours
        handles[index].__exit__(None, None, None)
        assert not handles[index].active
        handles[index].__exit__(None, None, None)  # twice is once
        assert sum(h.active for h in handles) == 2 - ended
    assert F.kl_div is KL.torchs


def somebody_elses(*args: Any, **kwargs: Any) -> str:
    return "foreign"


foreign: Any = somebody_elses


def test_what_was_there_comes_back() -> None:
    F.kl_div = foreign
    try:
        with fusedkl.patch() as handle:
            assert F.kl_div is KL.ours
            assert "somebody_elses)\n" in repr(handle)
        assert F.kl_div is foreign
    finally:
        F.kl_div = KL.torchs


def test_a_later_replacement_is_left_alone() -> None:
    handle = fusedkl.patch()
    F.kl_div = foreign
    with pytest.warns(
        RuntimeWarning, match=r"was replaced by .*somebody_elses .*left as it is"
    ) as caught:
        fusedkl.unpatch()
    assert caught[0].filename == __file__
    assert F.kl_div is foreign and not handle.active
    F.kl_div = KL.torchs


def test_a_replacement_in_between_comes_back() -> None:
    outer = fusedkl.patch()
    F.kl_div = foreign
    with fusedkl.patch():
        assert F.kl_div is KL.ours
        outer.__exit__(None, None, None)  # out of order: what `outer` found is no longer due
        assert F.kl_div is KL.ours
    assert F.kl_div is foreign
    F.kl_div = KL.torchs


@pytest.mark.slow
def test_threads() -> None:
    """Overlapping patches of many threads: in force while any is active, undone after the last."""
    start, wrong = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        for _ in range(60):
            with fusedkl.patch():
                if F.kl_div is not KL.ours:
                    wrong.append("inside")
                handle = fusedkl.patch()
            if not handle.active:
                wrong.append("ended by another")
            handle.__exit__(None, None, None)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert F.kl_div is KL.torchs


def test_a_handle_ends_in_another_thread() -> None:
    with fusedkl.patch() as handle:
        other = fusedkl.patch()
        thread = threading.Thread(target=handle.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        assert (handle.active, other.active) == (False, True) and F.kl_div is KL.ours
        thread = threading.Thread(target=fusedkl.unpatch)
        thread.start()
        thread.join()
        assert not any((handle.active, other.active)) and F.kl_div is KL.torchs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ours_is_scripted_and_pickled_as_torchs() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(a, b, reduction="sum")

    x, t = pair((4, 50), torch.float32, False)
    with fusedkl.patch():
        scripted = torch.jit.script(function)(x, t)
        assert pickle.loads(pickle.dumps(KL.ours)) is KL.ours
        kept = pickle.dumps(KL.ours)
    torch.testing.assert_close(scripted, KL.torchs(x, t, reduction="sum"))
    assert pickle.loads(kept) is KL.torchs


def test_other_threads_see_it() -> None:
    seen: list[Any] = []
    with fusedkl.patch():
        thread = threading.Thread(target=lambda: seen.append(F.kl_div))
        thread.start()
        thread.join()
    assert seen == [KL.ours]


IMPORT = """
import torch.nn.functional as F
import torch
modules = (F, torch, torch.Tensor)
before = [dict(vars(m)) for m in modules]
import fusedkl, fusedkl.patch, fusedkl.kl_div, fusedkl.rebinding, fusedkl.deferred_kl
assert [dict(vars(m)) for m in modules] == before
"""


@pytest.mark.slow
def test_import_patches_nothing() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True)


def test_compiled_code_follows() -> None:
    """Dynamo's guards notice both changes; the numbers stay."""
    torch._dynamo.reset()
    x, t = pair((3, 5), torch.float32, False)
    compiled = torch.compile(
        lambda a, b: F.kl_div(a, b, reduction="mean"), fullgraph=True, backend="aot_eager"
    )
    wanted = quiet(KL.torchs, x, t)
    torch.testing.assert_close(quiet(compiled, x, t), wanted)
    with fusedkl.patch():
        torch.testing.assert_close(quiet(compiled, x, t), wanted)
    torch.testing.assert_close(quiet(compiled, x, t), wanted)
    torch._dynamo.reset()


FIRST_COMPILED_WHILE_PATCHED = """
import warnings
import torch, fusedkl
import torch.nn.functional as F
warnings.simplefilter("ignore")
x, t = torch.rand(3, 5).log(), torch.rand(3, 5)
def mean():
    torch._dynamo.reset()
    return torch.compile(
        lambda a, b: F.kl_div(a, b, reduction="mean"), fullgraph=True, backend="aot_eager"
    )(x, t)
with fusedkl.patch():
    patched = mean()
torch.testing.assert_close(mean(), patched)
torch.testing.assert_close(F.kl_div(x, t), patched)
"""


@pytest.mark.slow
def test_dynamo_first_used_while_patched() -> None:
    """Dynamo then makes its table of torch's functions with ours in it; unpatch mends that."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_COMPILED_WHILE_PATCHED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
