"""Signed permutations and the actions built from them: axioms, torch's own functions, devices, derivatives."""
import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from late import ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, check_action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import (
    FieldAction,
    SpatialAction,
    field,
    flips,
    half_turns,
    rotations,
    rotations_and_flips,
    shifts,
    time_reversal,
    translations,
)
from symbnn.symmetry.groups import Cyclic, Dihedral, Product, Subgroup, Permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@st.composite
def signed_permutations(draw, size=None):
    n = size or draw(st.integers(1, 7))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=n, max_size=n))
    return SignedPermutation(draw(st.permutations(range(n))), signs)


@st.composite
def several(draw, count=3):
    n = draw(st.integers(1, 7))
    return [draw(signed_permutations(n)) for _ in range(count)]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- signed permutations


@given(several())
def test_group_axioms_and_matrices(maps):
    P, Q, R = maps
    identity = SignedPermutation.identity(P.size)
    assert (P @ Q) @ R == P @ (Q @ R)
    assert P @ P.inverse() == identity == P.inverse() @ P
    assert (P @ Q).inverse() == Q.inverse() @ P.inverse()
    assert torch.equal((P @ Q).matrix(), P.matrix() @ Q.matrix())
    assert torch.equal(P.inverse().matrix(), P.matrix().T)
    assert SignedPermutation.from_matrix(P.matrix()) == P
    assert (P @ Q).absolute() == P.absolute() @ Q.absolute()
    assert torch.equal(P.absolute().matrix(), P.matrix().abs())
    assert hash(P) == hash(SignedPermutation.from_matrix(P.matrix()))
    assert P.is_unsigned == bool((P.matrix() >= 0).all())


@given(signed_permutations(), signed_permutations(), st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_application_along_axes(P, Q, dtype):
    x = random(2, P.size, 3, Q.size).to(dtype)
    along_one = torch.einsum("ij,ajbc->aibc", P.matrix(dtype), x)
    along_both = torch.einsum("ij,kl,ajbl->aibk", P.matrix(dtype), Q.matrix(dtype), x)
    both = SignedPermutation.kron(P, Q)
    assert torch.equal(P(x, 1), along_one) and torch.equal(P(x, dims=(-3,)), along_one)
    assert torch.equal(both(x, (1, 3)), along_both) and torch.equal(both(x, (1, -1)), along_both)
    assert torch.equal(SignedPermutation.kron(Q, P)(x, (3, 1)), along_both)
    assert P(x, 1).dtype == dtype
    assert torch.equal(both.matrix(), torch.kron(P.matrix(), Q.matrix()))
    assert torch.equal(SignedPermutation.direct_sum(P, Q).matrix(), torch.block_diag(P.matrix(), Q.matrix()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward-mode rules
@given(signed_permutations())
@settings(max_examples=25)
def test_derivatives_and_transforms(P):
    x = random(4, P.size).requires_grad_()
    assert torch.autograd.gradcheck(P, x)
    assert torch.equal(torch.func.vmap(P)(x), P(x))
    assert torch.equal(torch.func.jacrev(P)(x[0].detach()), P.matrix())
    assert torch.equal(torch.func.jvp(P, (x[0].detach(),), (x[1].detach(),))[1], P(x[1]))
    y = torch.arange(P.size)
    assert torch.equal(P(y), (P.matrix(torch.int64) @ y))


def test_no_copy_of_what_is_not_moved_and_no_change_of_the_input():
    x = random(3, 4)
    before = x.clone()
    SignedPermutation([1, 0, 3, 2], [1, -1, 1, 1])(x)
    assert torch.equal(x, before)


def test_compiles_to_the_same():
    P = SignedPermutation([2, 0, 1], [1, -1, 1])
    x = random(5, 3)
    assert torch.equal(torch.compile(lambda x: P(x), backend="eager", fullgraph=True)(x), P(x))


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device):
    P = SignedPermutation([2, 0, 1], [1, -1, 1])
    x = random(5, 3).to(device)
    assert P(x).device == x.device
    assert_close(P(x).cpu(), P(x.cpu()), exact64)
    moved = P.to(device)
    assert moved == P and moved.inverse() @ moved == SignedPermutation.identity(3).to(device)
    assert_close(moved(x).cpu(), P(x.cpu()), exact64)
    assert P(torch.empty(5, 3, device="meta")).shape == (5, 3)


@pytest.mark.parametrize("index, sign", [([0, 0], [1, 1]), ([0, 2], [1, 1]), ([0, 1], [1, 0]), ([0, 1], [1, 1, 1]),
                                         ([-1, 0], [1, 1]), ([[0, 1]], [[1, 1]])])
def test_bad_tables_are_refused(index, sign):
    with pytest.raises(Refusal, match="index table"):
        SignedPermutation(index, sign)


@pytest.mark.parametrize("matrix", [[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]],
                                    [[1.0, 0.0], [1.0, 0.0]]])
def test_other_matrices_are_refused(matrix):
    with pytest.raises(Refusal, match="signed permutation matrix"):
        SignedPermutation.from_matrix(torch.tensor(matrix))


# --- actions

GROUPS = [Cyclic(1), Cyclic(4), Dihedral(4), Permutations(3), Product(Cyclic(2), Cyclic(3)),
          Subgroup(Dihedral(4), ((2, 0), (0, 1)))]
ACTIONS = [
    *(regular_channels(group, copies) for group in GROUPS for copies in (1, 3)),
    natural_action(Permutations(5)), natural_action(Permutations(40)), sign_change(4),
    rotations().on(5, 5), rotations().on(4, 4), rotations_and_flips().on(4, 4), rotations_and_flips().kernel(3, 3),
    flips().on(3, 4), half_turns().on(3, 4), time_reversal().on(7), shifts(7).on(3, 7), shifts(3, step=-2).on(2, 6),
    shifts(4, ndim=1).on(2), translations(3, 2).on(3, 2), translations(4).on(4),
    SpatialAction.trivial(Dihedral(3), 2).on(2, 3),
    field(rotations_and_flips(), (16, 3, 3), regular_channels(Dihedral(4), 2)), field(rotations(), (3, 4, 4)),
    Action.product(sign_change(2), regular_channels(Cyclic(2)), flips().kernel(3, 3)),
    natural_action(Permutations(3)).pulled_back(Product(Permutations(3), Cyclic(2)), lambda g: g[0]),
    Action.trivial(Cyclic(3), ()),
]


@pytest.mark.parametrize("action", ACTIONS, ids=repr)
def test_homomorphism(action):
    check_action(action)
    for derived in (action.flattened(), action.absolute()):
        check_action(derived)
    group = action.group
    a, b = group.sample(2, torch.Generator().manual_seed(3))
    x = random(2, *action.shape, seed=4)
    assert torch.equal(action.act(group.compose(a, b), x), action.act(a, action.act(b, x)))
    assert torch.equal(action.act(group.inverse(a), action.act(a, x)), x)
    assert torch.equal(action.act(group.identity(), x), x)


@pytest.mark.parametrize("action", [a for a in ACTIONS if "lambda" not in str(a.rule)], ids=repr)
def test_pickle_and_copy(action):
    for twin in (pickle.loads(pickle.dumps(action)), copy.deepcopy(action)):
        assert twin.agrees_with(action) and twin.shape == action.shape


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, exact32), (torch.float64, exact64)])
def test_images_against_torch(dtype, tolerance):
    x = random(2, 3, 6, 6, dtype=dtype)
    turns = field(rotations_and_flips(), (3, 6, 6))
    for k in range(4):
        assert_close(field(rotations(), (3, 6, 6)).act(k, x), x.rot90(k, (-2, -1)), tolerance)
        assert_close(turns.act((k, 0), x), x.rot90(k, (-2, -1)), tolerance)
        assert_close(turns.act((k, 1), x), x.flip(-1).rot90(k, (-2, -1)), tolerance)
    assert_close(field(half_turns(), (3, 6, 6)).act(1, x), x.flip(-1, -2), tolerance)
    assert_close(field(flips(), (3, 6, 6)).act(1, x), x.flip(-1), tolerance)
    assert_close(field(shifts(3, step=2), (3, 6, 6)).act(2, x), x.roll(4, -1), tolerance)
    assert_close(field(translations(6, 6), (3, 6, 6)).act((1, 4), x), x.roll((1, 4), (-2, -1)), tolerance)
    assert_close(field(time_reversal(), (3, 6)).act(1, x[:, :, 0]), x[:, :, 0].flip(-1), tolerance)


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_regular_channels_follow_the_group(group):
    copies, elements = 2, group.elements()
    action = regular_channels(group, copies)
    x = random(group.order * copies)
    for g in elements:
        y = action.act(g, x)
        for i, h in enumerate(elements):
            for c in range(copies):
                assert y[group.index(group.compose(g, h)) * copies + c] == x[i * copies + c]


def test_large_groups_are_never_listed():
    units = natural_action(Permutations(1000))
    product = Action.product(units, units)
    (g,) = units.group.sample(1, torch.Generator().manual_seed(0))
    W = random(1000, 1000, dtype=torch.float32)
    order = torch.tensor(g)
    expected = torch.empty_like(W)
    expected[order[:, None], order] = W
    assert torch.equal(product.act(g, W), expected)
    assert not product._kept
    check_action(units)


def test_field_keeps_its_parts():
    channels = regular_channels(Cyclic(4), 2)
    action = field(rotations(), (8, 5, 5), channels)
    assert isinstance(action, FieldAction) and action.channels is channels
    assert action.size == (5, 5) and action.shape == (8, 5, 5) and action.numel == 200


REFUSED = {
    "non-square image": (lambda: rotations().on(28, 20), "equal length"),
    "non-square kernel": (lambda: rotations_and_flips().kernel(3, 5), "equal length"),
    "shifts that do not close": (lambda: shifts(4).on(28, 28), "come back to the start"),
    "wrong number of axes": (lambda: time_reversal().on(5, 5), "grids of 1 axes"),
    "another group's channels": (lambda: field(rotations(), (8, 5, 5), regular_channels(Dihedral(4))), "same group"),
    "product over two groups": (lambda: Action.product(sign_change(2), regular_channels(Cyclic(4))), "one group"),
    "element of another group": (lambda: rotations().on(5, 5)((1, 0)), "C4"),
    "tensor of another shape": (lambda: rotations().on(5, 5).act(1, torch.zeros(2, 4, 4)), "own shape"),
    "rule of another size": (lambda: Action(Cyclic(2), (3,), lambda g: SignedPermutation.identity(2))(1),
                             "all coordinates"),
    "a group that does not act": (lambda: check_action(Action(Cyclic(4), (3,), lambda g: SignedPermutation.sending(
        [(i + g) % 3 for i in range(3)]))), "respects products"),
    "an identity that moves": (lambda: check_action(Action(
        Cyclic(2), (2,), lambda g: SignedPermutation([1, 0], [1, 1]))), "identity"),
    "a large group that does not act": (lambda: check_action(Action(
        Permutations(9), (9,), lambda g: SignedPermutation.sending(g).inverse())), "respects products"),
    "axes of another size": (lambda: SignedPermutation.identity(3)(torch.zeros(2, 4)), "as many coordinates"),
    "composition of two sizes": (lambda: SignedPermutation.identity(3) @ SignedPermutation.identity(2),
                                 "same coordinates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    refused, words = REFUSED[name]
    with pytest.raises(Refusal, match=words):
        refused()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_signs_of_types_without_signs_are_refused(dtype):
    """-3 would be 253 among bytes, and no sign at all among truth values."""
    x, swap = torch.ones(2, dtype=dtype), SignedPermutation(torch.tensor([1, 0]), torch.tensor([1, -1]))
    with pytest.raises(Refusal, match=r"type with signs.*x\.to\(torch\.float32\)"):
        swap(x)
    assert torch.equal(swap(x.to(torch.int64)), torch.tensor([1, -1]))
    assert torch.equal(swap.absolute()(x), x)


# --- conditions over all generators, one of which alone breaks them


def powers(step, of=lambda g: g):
    """The rule g -> step^of(g)."""
    def rule(g):
        result = SignedPermutation.identity(step.size)
        for _ in range(of(g)):
            result = step @ result
        return result
    return rule


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("one", [0, 1])
def test_every_generator_is_asked(one, order):
    """Of two generators, only the one in place `one` moves, negates or breaks anything."""
    two = Product(Cyclic(2), Cyclic(2))
    still = reordered(Action.trivial(two, (2,)), order)
    swap, signs = SignedPermutation([1, 0], [1, 1]), SignedPermutation([0, 1], [1, -1])
    moved, negated = (reordered(Action(two, (2,), powers(step, lambda g: g[one])), order) for step in (swap, signs))
    assert not still.agrees_with(moved) and not moved.agrees_with(still) and moved.agrees_with(moved)
    assert not negated.is_unsigned() and moved.is_unsigned()
    mixed = Product(Cyclic(2), Cyclic(3)) if one else Product(Cyclic(3), Cyclic(2))
    with pytest.raises(Refusal, match="respects products"):  # an exchange has order 2, not 3
        check_action(reordered(Action(mixed, (2,), powers(swap, lambda g: g[one])), order))


def test_every_element_is_asked():
    """The exchange of two coordinates by element 1 alone: wrong at the last element of C4."""
    swap = SignedPermutation([1, 0], [1, 1])
    with pytest.raises(Refusal, match="respects products"):
        check_action(Action(Cyclic(4), (2,), lambda g: swap if g == 1 else SignedPermutation.identity(2)))


@pytest.mark.parametrize("order", ORDERS)
def test_every_generator_moves_a_grid(order):
    with pytest.raises(Refusal, match="equal length"):  # the flip would do
        reordered(rotations_and_flips(), order).on(4, 6)
    with pytest.raises(Refusal, match="equal length"):
        reordered(rotations_and_flips(), order).kernel(1, 3)
    by_axis = reordered(translations(4, 3), order)
    for size in ((4, 5), (3, 3)):  # shifts that close up along one axis alone
        with pytest.raises(Refusal, match="come back to the start"):
            by_axis.on(*size)
    still = SignedPermutation.identity(2)
    rows = SpatialAction(Product(Cyclic(4), Cyclic(3)), 2, lambda g: still, lambda g: (2 * g[0], 0), "rows")
    with pytest.raises(Refusal, match="come back to the start"):
        reordered(rows, order).on(6, 6)
    coarser = reordered(rows, order).resampled((8, 8), (4, 4))
    assert [coarser.shift(g) for g in ((1, 0), (0, 1), (3, 2))] == [(1, 0), (0, 0), (3, 0)]
