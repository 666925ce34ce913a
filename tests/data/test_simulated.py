"""Simulated data: seeds, symmetries, and what is refused; comparisons with exact results are in the chapter."""
import pytest
import torch

from symbnn.data.simulated import canvases, flows, spins
from symbnn.data.sources import OTHER_TASKS, load
from symbnn.errors import Refusal
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import field, point_symmetries, translations


@pytest.mark.parametrize("make", [lambda seed: spins(3, 6, sweeps=3, seed=seed), lambda seed: flows(3, 8, seed=seed),
                                  lambda seed: canvases(3, seed=seed)], ids=["spins", "flows", "canvases"])
def test_a_seed_is_a_data_set(make):
    state = torch.random.get_rng_state()
    first, again, other = make(1), make(1), make(2)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("shift", [False, True])
def test_flows_commute_with_every_symmetry_of_the_lattice(shift):
    """The map is linear, so it is learnt from as many examples as sites, and compared on moved sources."""
    x, y = (values.double() for values in flows(100, 8))
    flow = torch.linalg.lstsq(x.flatten(1), y.flatten(1), driver="gelsd").solution
    space = translations(8, 8) if shift else point_symmetries(2)
    sources = field(space, x.shape[1:])
    vectors = field(space, y.shape[1:], None if shift else natural_action(space.group))
    for g in space.group.generators():
        moved = sources.act(g, x).flatten(1) @ flow
        torch.testing.assert_close(moved.view_as(y), vectors.act(g, y), atol=1e-5, rtol=0)


def test_hot_spins_are_free_and_cold_ones_agree():
    _, hot = spins(400, 8, temperature=1e6, sweeps=3)
    assert abs(hot[:, 0].mean()) < 4 * (2 / 64 / 400) ** 0.5 and abs(hot[:, 1].mean()) < 4 * (1 / 64 / 400) ** 0.5
    _, cold = spins(20, 4, temperature=0.1, sweeps=200)
    assert (cold[:, 0] < -1.4).double().mean() > 0.5


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_every_task_has_embedded_data(name):
    data = load(name, train_size=50)
    assert len(data.train) == 50 and data.classes == () and data.train.inputs.isfinite().all()
    again = load(name, train_size=50, seed=1)
    assert torch.equal(again.test.inputs, data.test.inputs) and not torch.equal(again.train.inputs, data.train.inputs)
    with pytest.raises(Refusal, match="need no file"):
        load(name, "folder")


@pytest.mark.parametrize(("call", "said"), [
    (lambda: spins(3, 5), "size=6"), (lambda: spins(3, 2), "size=4"), (lambda: spins(0), "count"),
    (lambda: spins(3, temperature=0.0), "temperature"), (lambda: spins(3, ndim=0), "ndim"),
    (lambda: spins(3, seed=-1), "seed"), (lambda: flows(3, 6, waves=3), "waves=2"), (lambda: flows(3, 1.5), "size"),
    (lambda: canvases(0), "count"), (lambda: canvases(2, seed="a"), "seed"),
])
def test_simulations_that_cannot_be_meant_are_refused(call, said):
    with pytest.raises(Refusal, match=said):
        call()
