"""What a forward pass looks at."""
import pytest
import torch
from torch.nn import functional as F

from helpers import seeded
from helpers_posterior import Written, linear, loop
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import apply_weights, forward, predict, sample_weights
from symbnn.posterior.watching import Watch, WithoutDropout
from tolerances import assert_close


def reads_a_constant(m, x):
    assert m.table.sum().item() > 0  # of the network, not of the inputs
    return m.a(x) * float(m.table[0, 0]) if m.table.tolist() else x


def test_looking_at_constants_is_no_looking_at_values():
    torch.manual_seed(0)
    plain, x = Written(reads_a_constant, a=linear()), torch.randn(6, 3)
    plain.register_buffer("table", torch.ones(2, 2))
    assert execution_plan(with_posteriors(plain), x).together
    for look in (lambda h: bool(torch.isfinite(h).all()), lambda h: h.tolist(), lambda h: h.numpy(), lambda h: h[h > 9],
                 lambda h: torch.equal(h, h), lambda h: h.nonzero()):
        network = with_posteriors(Written(lambda m, x, look=look: (h := m.a(x), look(h.detach()))[0], a=linear()))
        plan = execution_plan(network, x)
        assert plan.separable and not plan.in_pieces and not plan.together
        assert len(forward(network, x, 3, "split")[0]) == 6  # a run of rows is a batch of its own


JOINS = {
    "gaps filled by the mean of the batch": lambda m, x: m.a(torch.where(x.isnan(), x.nanmean(0), x)),
    "outliers replaced": lambda m, x: (h := m.a(x)).where(h.abs() < 9, h.median(0).values),
    "summed by a column of numbers": lambda m, x: (h := m.a(x)) + torch.zeros_like(h).index_add(
        0, x[:, 0].abs().long().clamp(0, len(x) - 1), h),
    "picked by a column of numbers": lambda m, x: m.a(x)[x[:, 0].abs().long().clamp(0, len(x) - 1)],
}


@pytest.mark.parametrize("name", JOINS)
def test_rows_that_are_joined_for_some_values_only(name):
    torch.manual_seed(0)
    plain, quiet = Written(JOINS[name], a=linear()).double(), 0.01 * torch.rand(6, 3, dtype=torch.float64)
    network = with_posteriors(plain)
    predict(network, quiet, draws=2)
    loud = 30 * torch.randn(6, 3, dtype=torch.float64)
    loud[2, 1] = torch.nan if "gaps" in name else 1.0
    weights = sample_weights(network, 3, seeded(1))
    assert_close(predict(network, loud, weights=weights, memory=1), loop(plain, loud, weights), 1e-7)
    assert_close(apply_weights(network, loud, weights), loop(plain, loud, weights), 1e-7)


def watched(run, rows=5):
    """What is noted while a function of rows and a weight runs, and the watch."""
    x, weight = torch.randn(rows, 3, generator=seeded()), torch.randn(3, 3, generator=seeded(1))
    watch = Watch(x, [weight])
    with watch, WithoutDropout(watch):
        run(x, weight)
    return watch.noted, watch


@pytest.mark.parametrize("run", [
    lambda x, w: torch.relu(x @ w), lambda x, w: x.softmax(-1), lambda x, w: x.sum(1), lambda x, w: x[:, [0, 2]],
    lambda x, w: x[torch.arange(5)], lambda x, w: x.gather(1, torch.zeros(5, 1, dtype=torch.int64)),
    lambda x, w: w.mean(0), lambda x, w: torch.ones(5).mean().item(), lambda x, w: len(x) > 3,
])
def test_what_a_trial_can_settle_is_not_noted(run):
    assert watched(run)[0] == []


@pytest.mark.parametrize("run, name", [
    (lambda x, w: x.mean(0), "mean over rows"), (lambda x, w: (x @ w).max(), "max over rows"),
    (lambda x, w: x.sum(), "sum over rows"), (lambda x, w: x.cumsum(0), "cumsum over rows"),
    (lambda x, w: x[x[:, 0] > 0], "index"), (lambda x, w: x.nonzero(), "nonzero"), (lambda x, w: w.sum().item(),
    "_local_scalar_dense"), (lambda x, w: x.view(-1).tolist(), "tolist"), (lambda x, w: x.numpy(), "numpy"),
    (lambda x, w: x.index_add(0, x[:, 0].long().clamp(0, 4), x), "index_add over rows"),
])
def test_what_it_cannot_settle_is_noted(run, name):
    assert name in watched(run)[0]


def test_random_numbers_are_noted_and_dropout_is_left_out():
    x = torch.randn(5, 3, generator=seeded())
    kept = []
    _, watch = watched(lambda x, w: kept.append(torch.equal(F.dropout(x, 0.5), x)))
    assert kept == [True] and watch.random and not watch.drew
    _, watch = watched(lambda x, w: x + torch.rand_like(x))
    assert watch.random and watch.drew
    assert watched(lambda x, w: x.sum(0), rows=1)[0] == []  # one row is joined with nothing
    assert not torch.equal(F.dropout(x, 0.5), x)  # outside of the mode dropout is as ever
