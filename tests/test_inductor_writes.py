"""Code that writes in place: every write stays, and nothing is read after it that stood before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from inductor_cases import MARKS, N, V, compiled, inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedkl

pytestmark = [*MARKS, pytest.mark.slow]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def nothing_reported() -> None:
    fusedkl.inductor.report(clear=True)


@torch.library.custom_op("fusedkl_tests::triple", mutates_args={"w"})
def triple(w: Tensor) -> None:
    w.mul_(3)


def run(function: Loss, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, the arguments as they are afterwards, and the gradient if there is one."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    result = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(result.sum(), wanted) if wanted else ()
    return [result, *leaves, *grads]


def agree(function: Loss, extra: Tensor, trained: bool = False) -> fusedkl.inductor.Report:
    """Holds result, state and gradient to float64 of the plain code; returns the report."""
    x, y, _ = inputs()
    given = (x.detach().requires_grad_(trained), y, extra)
    wide = tuple(t.double() if t.is_floating_point() else t for t in given)
    for wanted, found in zip(run(function, wide), run(compiled(function), given), strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-7)
    return fusedkl.inductor.report(clear=True)


def kl(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")


def column() -> Tensor:
    return torch.arange(1.0, N + 1).unsqueeze(-1)


# -- writes that nothing in the graph uses ---------------------------------------------------------


def counter(x: Tensor, y: Tensor, count: Tensor) -> Tensor:
    count.add_(1)
    return kl(x, y).sum(-1)


def moving_average(x: Tensor, y: Tensor, average: Tensor) -> Tensor:
    loss = kl(x, y).sum(-1)
    average.mul_(0.9).add_(0.1 * loss.detach().unsqueeze(-1))
    return loss


def zeroed(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = kl(x, y).sum(-1)
    w.zero_()
    return loss


def with_out(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    torch.add(w, 1, out=w)
    return kl(x, y).sum(-1)


def by_setitem(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    w[1] = 7
    return kl(x, y).sum(-1)


def by_an_activation(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    F.threshold(w, 3.0, 0.0, True)
    return kl(x, y).sum(-1)


def by_an_operator(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    triple(w)
    return kl(x, y).sum(-1)


UNUSED = [counter, moving_average, zeroed, with_out, by_setitem, by_an_activation, by_an_operator]


@pytest.mark.parametrize("function", UNUSED, ids=lambda f: f.__name__)
def test_a_write_without_users_stays(function: Loss) -> None:
    report = agree(function, column(), trained=True)
    assert [r.kinds for r in report.rewritten] == ["forward_kl"] and report.missed == ()


def test_what_only_the_sum_needed_goes() -> None:
    left: list[str] = []

    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        w.mul_(2)
        lp, lq = F.log_softmax(x / 2, -1), F.softmax(y / 2, -1).log()
        return (lp.exp() * (lp - lq) * w).sum()

    graph = compiled(loss, seen=lambda g: left.extend(str(n.target) for n in g.nodes))
    graph(*inputs()[:2], column())
    assert "mul_" in left and any("row_numbers" in name for name in left)
    assert not [n for n in left if "softmax" in n or "exp" in n or "sub" in n or "div" in n]


# -- what is read where the sum stands, and written before that ------------------------------------


def weight(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    return w.mul_(3).sum() + terms.sum(-1)


def weight_by_setitem(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    w[1] = 7
    return terms.sum(-1)


def weight_by_statement(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    w *= 3
    return terms.sum(-1)


def weight_by_out(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    torch.mul(w + 1, 3, out=w)
    return terms.sum(-1)


def weight_by_activation(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    F.threshold(w, 3.0, 0.0, True)
    return terms.sum(-1)


def weight_by_list(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    torch._foreach_mul_([w], 3.0)
    return terms.sum(-1)


def weight_by_operator(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    triple(w)
    return terms.sum(-1)


def weight_by_subgraph(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w
    checkpoint(lambda t: t.mul_(3), w, use_reentrant=False)
    return terms.sum(-1)


def weight_by_view(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y) * w[:, :1]
    w.view(-1).mul_(3)
    return terms.sum(-1)


def filled(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    terms = kl(x, y).masked_fill(mask, 0)
    mask.logical_not_()
    return terms.sum(-1)


def kept(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    terms = torch.where(mask, kl(x, y), 0.0)
    mask.logical_not_()
    return terms.sum(-1)


def selected(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    terms = kl(x, y)[mask.squeeze(-1)]
    mask.zero_()
    return terms.sum()


def logits(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    terms = kl(x, y)
    return x.mul_(3).sum() + terms.sum(-1)


def quotient(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Rows at two temperatures are divided beforehand, and the quotient is read."""
    z = x / 2
    terms = kl(z, y / 3)
    return z.mul_(3).sum() + terms.sum(-1)


def terms_themselves(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x, y)
    terms.mul_(w)
    return terms.sum(-1)


def log_probabilities(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    lp = F.log_softmax(x, -1)
    lp.mul_(w)
    return F.kl_div(lp, F.softmax(y, -1), reduction="sum")


def log_probabilities_by_hand(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    lp, lq = F.log_softmax(x, -1), F.log_softmax(y, -1)
    lq.mul_(w)
    return (lp.exp() * (lp - lq)).sum(-1)


def mask() -> Tensor:
    return (torch.arange(N) % 3 != 1).unsqueeze(-1)


_BETWEEN, _WRITTEN = "is changed in place between", "is changed in place"
LATE: dict[Loss, tuple[Callable[[], Tensor], str]] = {
    weight: (column, f"l_w_ {_BETWEEN}"),
    weight_by_setitem: (column, _BETWEEN),
    weight_by_statement: (column, _BETWEEN),
    weight_by_out: (column, _BETWEEN),
    weight_by_activation: (column, _BETWEEN),
    weight_by_list: (column, _BETWEEN),
    weight_by_operator: (column, _BETWEEN),
    weight_by_subgraph: (column, _BETWEEN),
    weight_by_view: (column, _BETWEEN),
    filled: (mask, _BETWEEN),
    kept: (mask, _BETWEEN),
    selected: (mask, _BETWEEN),
    logits: (column, f"l_x_ {_BETWEEN}"),
    quotient: (column, f"z {_BETWEEN}"),
    terms_themselves: (column, f"p (log p - log q) {_WRITTEN}"),
    log_probabilities: (column, f"kl_div: input lp, which {_WRITTEN}"),
    log_probabilities_by_hand: (column, f"sub: one side lq, which {_WRITTEN}"),
}


@pytest.mark.parametrize("function", LATE, ids=lambda f: f.__name__)
def test_a_write_before_the_sum_is_left_alone_and_reported(function: Loss) -> None:
    extra, reason = LATE[function]
    report = agree(function, extra())
    assert report.rewritten == () and any(reason in miss.reason for miss in report.missed)


# -- writes that come early or late enough ---------------------------------------------------------


def padded(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    """Logits of padding are set after the division by the temperature, as is usual."""
    z = x / 2
    z[..., 100:] = -50.0
    return kl(z, y / 2).sum(-1)


def doubled(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    z = x.float().contiguous()
    z = z * 1.5
    z.mul_(2)
    return kl(z, y).sum(-1)


def mask_made_in_place(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    counted = torch.ones(N, 1, dtype=x.dtype)
    counted[:2] = 0
    return (kl(x, y) * counted).sum()


def checkpointed(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A graph that writes to nothing of its caller's."""
    terms = kl(x, y) * w
    other = checkpoint(lambda t: t * 3, w, use_reentrant=False)
    assert isinstance(other, Tensor)
    return terms.sum(-1) + other.sum()


def temperature_after_the_quotient(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    terms = kl(x / w, y / w)
    return w.mul_(3).sum() + terms.sum(-1)


def temperature_between_sums(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    t = torch.full((), 2.0, dtype=x.dtype)
    first = kl(x / t, y / 3).sum(-1)
    t.mul_(2)
    return first + 2 * kl(x / t, y / 3).sum(-1)


def logits_between_sums(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    z = x * 1
    first = kl(z, y).sum(-1)
    z.mul_(2)
    return first + 2 * kl(z, y).sum(-1)


def index_between_sums(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    index = torch.arange(N).unsqueeze(-1)
    lp, lq = F.log_softmax(x, -1), F.log_softmax(y, -1)
    loss = (lp.exp() * (lp - lq)).sum(-1)
    index.add_(1)
    return loss + 2 * lp.gather(-1, index).squeeze(-1)


def index_between_gathers(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    index = torch.arange(N).unsqueeze(-1)
    lp = F.log_softmax(x, -1)
    first = lp.gather(-1, index).squeeze(-1)
    index.add_(1)
    return first + 2 * lp.gather(-1, index).squeeze(-1)


def entropy_before_the_reference(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    lp = F.log_softmax(x, -1)
    entropy = -(lp.exp() * lp).sum(-1)
    lq = F.log_softmax(y.exp(), -1)
    return entropy + 2 * (lp.exp() * (lp - lq)).sum(-1)


def entropy_before_the_index(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    lp = F.log_softmax(x, -1)
    entropy = -(lp.exp() * lp).sum(-1)
    return entropy + 2 * lp.gather(-1, y.argmax(-1, keepdim=True)).squeeze(-1)


REWRITTEN: dict[Loss, int] = {
    padded: 1,
    doubled: 1,
    mask_made_in_place: 1,
    checkpointed: 1,
    temperature_after_the_quotient: 1,
    temperature_between_sums: 2,
    logits_between_sums: 2,
    index_between_sums: 2,
    index_between_gathers: 2,
    entropy_before_the_reference: 2,
    entropy_before_the_index: 2,
}


# torch cannot run backward after these itself, or has another report, below.
NO_BACKWARD = (
    temperature_after_the_quotient,
    temperature_between_sums,
    logits_between_sums,
    index_between_gathers,
)


@pytest.mark.parametrize("function", REWRITTEN, ids=lambda f: f.__name__)
def test_writes_at_other_times_do_not_matter(function: Loss) -> None:
    report = agree(function, column(), trained=function not in NO_BACKWARD)
    assert len(report.rewritten) == REWRITTEN[function] and report.missed == ()


def teacher_reused(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    z = y * 1
    loss = kl(x, z).sum(-1)
    return loss + z.zero_().sum()


def test_logits_that_backward_would_read_are_not_written_either() -> None:
    report = agree(logits_between_sums, column(), trained=True)
    assert len(report.rewritten) == len(report.missed) == 1
    assert "z is changed in place before backward" in report.missed[0].reason
    torch.compiler.reset()
    assert len(agree(teacher_reused, column()).rewritten) == 1
    torch.compiler.reset()
    report = agree(teacher_reused, column(), trained=True)
    assert report.rewritten == () and "before backward" in report.missed[0].reason


# -- other ways to be wrong ------------------------------------------------------------------------


def test_a_quotient_outside_of_no_grad() -> None:
    """It is made with a gradient, and read without one."""

    def loss(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        z = x / 3
        with torch.no_grad():
            q = F.softmax(z, -1)
        return F.kl_div(F.log_softmax(y / 2 + 0 * x, -1), q, reduction="sum")

    assert len(agree(loss, column(), trained=True).rewritten) == 1


def of_itself(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    lp = F.log_softmax(x, -1)
    return F.kl_div(lp, lp.detach(), reduction="sum", log_target=True)


def of_itself_by_hand(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    lp = F.log_softmax(x, -1)
    return (lp.exp() * (lp - lp)).sum(-1)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("function", [of_itself, of_itself_by_hand], ids=lambda f: f.__name__)
def test_a_row_with_itself(function: Loss, trained: bool) -> None:
    report = agree(function, column(), trained)
    if function is of_itself and trained:  # one of them has a gradient: a KL like others
        assert len(report.rewritten) == 1
    else:
        assert report.rewritten == () and len(report.missed) == 1
        assert "the KL of a row with itself" in report.missed[0].reason


@pytest.mark.parametrize("bad", [-1, -2, V, V + 1])
def test_an_index_out_of_range_is_an_error(bad: int) -> None:
    def chosen(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return F.log_softmax(x, -1).gather(-1, index)

    index = torch.arange(N).unsqueeze(-1)
    assert len(agree(chosen, index).rewritten) == 1
    index[2] = bad
    with pytest.raises(RuntimeError):
        chosen(*inputs()[:2], index)
    with pytest.raises(ValueError, match=f"must hold ids from 0 to {V - 1}; got .*{bad}"):
        compiled(chosen)(*inputs()[:2], index)


def test_an_int32_index() -> None:
    def chosen(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return F.log_softmax(x, -1).gather(-1, index)

    assert len(agree(chosen, torch.arange(N, dtype=torch.int32).unsqueeze(-1)).rewritten) == 1
