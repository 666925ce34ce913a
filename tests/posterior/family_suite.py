"""What every family of distributions is asked: each answer is right, or refused with the reason that is true.

A test class of one family derives from `FamilySuite`, builds members, and names in `refused` the operations that the
family does not have, with what the refusal says. Everything else is compared with a computation that knows nothing of
the family's formulas: quadrature over one weight, Monte Carlo within standard errors, gradients that vanish at a
minimum, all elements of a group one by one.
"""
import copy
import io
import math
from abc import ABC, abstractmethod

import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.equivariance.averages import average
from symbnn.equivariance.bounds import push_forward_divergences
from symbnn.equivariance.expansion import expand
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import InformationEstimator
from symbnn.posterior.divergences import log_affinity, wasserstein2_squared
from symbnn.posterior.family import Family
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import sample_weights
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Permutations
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact64, within_standard_errors

DRAWS = 200_000
QUADRATURE = 1e-5  # kinks of Laplace densities cost the square of the step, 4e-4 deviations
EXCHANGES = natural_action(Permutations(3))
DOUBLE = torch.float64


def moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the first axis, and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


class FamilySuite(ABC):
    """Derive, define `member`, and name in `refused` what the family does not have."""

    refused: dict[str, str] = {}  # operation -> what its refusal says
    in_halves = (torch.float16, torch.bfloat16)

    @abstractmethod
    def member(self, shape: tuple[int, ...], seed: int = 0, trainable: bool = True) -> Family:
        """A member over `shape` in float64; on three weights it is closed under `EXCHANGES`."""

    def initial(self, mean: torch.Tensor, scale: float = 0.3) -> Family:
        return type(self.member((3,))).initial(mean, scale)

    def of_one_weight(self, seed: int = 0) -> Family:
        return self.member((1,), seed, trainable=False)

    def line(self, q: Family) -> tuple[torch.Tensor, torch.Tensor]:
        """Points at which one weight's density is integrated, and what each of them counts."""
        centre, width = q.mean.item(), q.variance.sqrt().item()
        points = torch.linspace(centre - 50 * width, centre + 50 * width, 250_001, dtype=DOUBLE)
        return points[:, None], (points[1] - points[0]).expand(len(points))

    def network(self, plain: nn.Module, scale: float = 0.3) -> nn.Module:
        return with_posteriors(plain.double(), type(self.member((3,))), scale)

    def asked(self, operation: str, ask) -> object:
        """What `ask()` gives; None where the operation is refused, and then with the reason."""
        if operation not in self.refused:
            return ask()
        with pytest.raises(Refusal, match=self.refused[operation]):
            ask()
        return None

    # Drawing, and densities

    def test_moments_are_those_of_draws(self):
        q = self.member((3, 2), trainable=False)
        theta = q.rsample(DRAWS, seeded(1))
        within_standard_errors(moments(theta)[0], q.mean, moments(theta)[1])
        square = moments((theta - q.mean) ** 2)
        within_standard_errors(square[0], q.variance, square[1])

    def test_draws_repeat_and_have_gradients(self):
        q = self.member((3, 2))
        first = q.rsample(5, seeded(3))
        assert torch.equal(first, q.rsample(5, seeded(3))) and torch.equal(first, q.transport(q.noise(5, seeded(3))))
        first.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in q.parameters())

    def test_a_density_integrates_to_one_and_has_the_moments_and_the_entropy(self):
        q = self.of_one_weight()
        log_density = self.asked("density", lambda: q.log_prob(self.line(q)[0]))
        if log_density is None:
            for ask in (q.entropy, q.distribution):
                self.asked("density", ask)
            return
        points, width = self.line(q)
        mass = log_density.exp() * width
        assert abs(mass.sum() - 1) < QUADRATURE
        assert abs((mass * points[:, 0]).sum() - q.mean) < QUADRATURE * (1 + q.mean.abs())
        assert abs((mass * (points[:, 0] - q.mean) ** 2).sum() / q.variance - 1) < 10 * QUADRATURE
        assert abs(q.entropy() + torch.xlogy(mass, 1.0).add(mass * log_density.clamp_min(-1e6)).sum()) < 10 * QUADRATURE
        assert_close(q.distribution().log_prob(q.mean), q.log_prob(q.mean))

    def test_the_density_of_many_weights_is_that_of_its_draws(self):
        """E[q(theta)/q(theta) ...]: the entropy is minus the mean log-density of draws."""
        q = self.member((3, 2), trainable=False)
        if self.asked("density", q.entropy) is not None:
            values, error = moments(-q.log_prob(q.rsample(DRAWS, seeded(2))))
            within_standard_errors(values, q.entropy(), error)

    # Divergences

    def check_divergence(self, q: Family, p: Family) -> None:
        theta = q.rsample(DRAWS, seeded(4)).detach()
        values, error = moments((q.log_prob(theta) - p.log_prob(theta)).detach())
        within_standard_errors(values, q.kl(p), error)

    def test_divergence_from_its_own_kind(self):
        q, p = self.member((3, 2)), self.member((3, 2), 7, trainable=False)
        if self.asked("kl", lambda: q.kl(p)) is not None:
            self.check_divergence(q, p)
            assert_close(q.kl(q.freeze()), torch.tensor(0.0))

    def test_divergence_from_the_prior_that_is_built_for_it(self):
        q = self.member((3, 2))
        prior = isotropic(0.7)("weight", q)
        assert not list(prior.parameters()) and prior.shape == q.shape
        self.check_prior(q, prior)
        if "density" in self.refused:
            expected = -torch.distributions.Normal(torch.zeros(1, dtype=DOUBLE), 0.7).log_prob(q.mean).sum()
            assert_close(q.kl(prior), expected)
        else:
            self.check_divergence(q, prior)
        q.kl(prior).backward()
        assert all(bool(p.grad.isfinite().all()) for p in q.parameters())

    def check_prior(self, q: Family, prior: Family) -> None:
        """Mean zero and the deviation that was asked for."""
        assert not prior.mean.any()
        assert_close(prior.variance.sqrt(), torch.full(q.shape, 0.7, dtype=DOUBLE))

    def test_affinity_by_quadrature(self):
        q, p = self.of_one_weight(), self.of_one_weight(7)
        found = self.asked("affinity", lambda: log_affinity(q, p))
        if found is not None:
            (points, width), (others, _) = self.line(q), self.line(p)
            assert others.min() < points.max() and points.min() < others.max()
            overlap = ((q.log_prob(points) + p.log_prob(points)) / 2).exp() * width
            assert abs(found.exp() - overlap.sum()) < QUADRATURE
            assert_close(found, log_affinity(p, q))
            assert abs(log_affinity(q, q)) < exact64

    def test_wasserstein_distance_by_the_monotone_plan(self):
        """One noise for both laws is the best joint law of two weights, since both rise (or both fall) with it."""
        q, p = self.of_one_weight(), self.of_one_weight(7)
        found = self.asked("wasserstein", lambda: wasserstein2_squared(q, p))
        if found is not None:
            noise = q.noise(DRAWS, seeded(5))
            cost, error = moments((q.transport(noise) - p.transport(noise)).square().sum(-1))
            within_standard_errors(cost, found, error)
            assert_close(found, wasserstein2_squared(p, q))

    # Maps, and groups

    def test_a_push_forward_is_the_law_of_the_moved_weights(self):
        q, map = self.member((3,), trainable=False), EXCHANGES(EXCHANGES.group.generators()[0])
        assert q.is_closed_under(map) and q.is_closed_under(EXCHANGES)
        pushed, theta = q.push_forward(map), q.rsample(DRAWS, seeded(6))
        assert type(pushed) is type(q) and pushed.trainable is q.trainable
        moved = map(theta)
        within_standard_errors(moments(moved)[0], pushed.mean, moments(moved)[1])
        square = moments((moved - pushed.mean) ** 2)
        within_standard_errors(square[0], pushed.variance, square[1])
        if "density" not in self.refused:
            assert_close(pushed.log_prob(moved[:50]), q.log_prob(theta[:50]))

    def broken(self) -> SignedPermutation | torch.Tensor | None:
        """A map under which the family is not closed; None where there is none."""
        turn = torch.eye(3, dtype=DOUBLE)
        turn[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        return turn

    def test_what_breaks_the_family_is_refused_with_the_reason(self):
        q, map = self.member((3,)), self.broken()
        if map is not None:
            closure = q.is_closed_under(map)
            assert not closure and closure.reason
            with pytest.raises(Refusal) as refused:
                q.push_forward(map)
            assert closure.reason in str(refused.value)
            with pytest.raises(Refusal, match="singular"):
                q.push_forward(torch.zeros(3, 3, dtype=DOUBLE))

    @pytest.mark.parametrize("kind", ["geometric", "arithmetic", "projection"])
    def test_an_average_is_invariant_and_the_nearest(self, kind):
        """At the minimum of the mean divergence its gradient in the average's own parameters vanishes."""
        q = self.member((3,))
        found = self.asked(kind, lambda: average(q, EXCHANGES, kind))
        if found is None:
            return
        assert type(found) is type(q) and found.is_invariant_under(EXCHANGES)
        images = [q.push_forward(EXCHANGES(g)).freeze() for g in EXCHANGES.group.elements()]
        if kind == "projection":
            assert_close(found.loc, torch.stack([image.loc for image in images]).mean(0))
            return
        cost = sum(found.kl(image) if kind == "geometric" else image.kl(found) for image in images)
        slopes = torch.autograd.grad(cost, list(found.parameters()))
        assert all(slope.abs().max() < 1e-9 for slope in slopes)

    def test_an_expansion_keeps_the_function_and_is_invariant(self):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        network, turns = self.network(plain), field(rotations(), (1, 5, 5))
        action = network_action(network, turns)
        found = self.asked("expansion", lambda: expand(network, action, "block_diagonal"))
        if found is None:
            return
        large, moves = found
        for name, tensor in variational_tensors(large).items():
            assert type(tensor.posterior) is type(variational_tensors(network)[name].posterior)
            assert tensor.posterior.is_invariant_under(moves.parameters[name])
        x = torch.randn(4, 1, 5, 5, generator=seeded(1), dtype=DOUBLE)
        small = posterior_mean_network(network)
        expected = torch.stack([small(turns.act(g, x)) for g in range(4)]).mean(0)
        assert_close(posterior_mean_network(large)(x), expected)

    def test_unit_densities_give_the_sum_over_all_permutations(self):
        torch.manual_seed(0)
        network = self.network(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
        action = unit_permutations(network, (2,))
        one = self.asked("units", lambda: InformationEstimator(network, action, "permanent"))
        if one is not None:
            weights = sample_weights(network, 4, seeded(2))
            listed = InformationEstimator(network, action, "enumeration")
            assert_close(one.values(weights), listed.values(weights), 1e-9)

    def test_bounds_compare_it_with_its_images(self):
        torch.manual_seed(0)
        network = self.network(nn.Sequential(nn.Linear(3, 2, bias=False)))
        action = network_action(network, EXCHANGES)
        found = self.asked("bound", lambda: push_forward_divergences(network, action))
        if found is None:
            return
        q, elements = network[0].weight.posterior.freeze(), action.group.elements()
        theta = q.rsample(DRAWS, seeded(3))
        for k, g in enumerate(elements):
            other = q.push_forward(action.parameters["0.weight"](g))
            logs = q.log_prob(theta) - other.log_prob(theta)
            back = other.rsample(DRAWS, seeded(3))
            both = moments(logs), moments(other.log_prob(back) - q.log_prob(back))
            values, error = min(both, key=lambda pair: pair[0])
            within_standard_errors(values, found.kl[k], error)
            overlap, error = moments((-logs / 2).exp())
            within_standard_errors(overlap, found.log_affinity[k].exp(), error)

    # Storage

    def test_state_and_copies(self):
        q, other = self.member((3, 2)), self.member((3, 2), 7)
        buffer = io.BytesIO()
        torch.save(q.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        frozen = q.freeze()
        assert set(frozen.state_dict()) == set(q.state_dict())
        assert not list(frozen.parameters()) and not frozen.trainable
        for twin in (other, frozen, copy.deepcopy(q), q.in_dtype(DOUBLE)):
            assert type(twin) is type(q) and torch.equal(twin.rsample(3, seeded(1)), q.rsample(3, seeded(1)))

    def test_half_precision_is_the_same_law_added_up_in_single(self):
        whole = self.member((30, 20))
        for dtype in self.in_halves:
            half = whole.in_dtype(dtype)
            exact, prior = half.in_dtype(DOUBLE), MeanFieldGaussian.initial(torch.zeros(30, 20), 1.0)
            assert half.rsample(2, seeded(1)).dtype == half.mean.dtype == dtype
            found = half.kl(prior)
            assert found.dtype == torch.float32
            assert abs(found - exact.kl(prior.in_dtype(DOUBLE))) <= 1e-3 * abs(found)
            if "density" not in self.refused:
                theta = half.rsample(2, seeded(2)).detach()
                for ours, theirs in ((half.log_prob(theta), exact.log_prob(theta.double())),
                                     (half.entropy(), exact.entropy())):
                    assert ours.dtype == torch.float32 and ours.isfinite().all()
                    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
