"""Signed permutations: the axioms, application along axes, devices, derivatives, tables that are none."""
import copy
import pickle

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_ground import refusal_of
from helpers_symmetry import random
from symbnn.errors import Refusal
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact64

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


def test_compiles_to_the_same(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes are no part of a graph
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


@pytest.mark.parametrize("index, sign, got", [
    ([0, 0], [1, 1], "the place 0 2 times, and the place 1 never"), ([0, 2], [1, 1], "the place 2 among 2"),
    ([-1, 0], [1, 1], "the place -1 among 2"), ([[0, 1]], [[1, 1]], r"shape (1, 2)"), ([0, 1], [1, 0], "[1, 0]"),
    ([0, 1], [1, 1, 1], "[1, 1, 1]"), ([0, 1.5], [1, 1], "the place 1.5"), ([0.0, torch.nan], [1, 1], "the place nan"),
    ([0, 1], [1, 1.5], "[1.0, 1.5]"), ([0, 1], torch.tensor([1, 257]), "[1, 257]"), ([0, 1], [[1], [1]], "[[1], [1]]"),
])
def test_bad_tables_are_refused(index, sign, got):
    """Numbers that a conversion to whole numbers, or to a byte, would make right are refused too."""
    refusal = refusal_of(lambda: SignedPermutation(index, sign))
    assert got in refusal.got
    fixed = eval(refusal.fix.split(":")[0])
    assert torch.equal(fixed(torch.tensor([5, 6, 7])), torch.tensor([6, 5, -7]))


def test_tables_of_other_types():
    expected = SignedPermutation([1, 0], [-1, 1])
    for index, sign in (((1, 0), (-1, 1)), (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])),
                        (torch.tensor([1, 0], dtype=torch.int32), [-1, 1]), ([True, False], [-1, True])):
        found = SignedPermutation(index, sign)
        assert found == expected and (found.index.dtype, found.sign.dtype) == (torch.int64, torch.int8)
    assert SignedPermutation([], []).size == 0
    for twin in (pickle.loads(pickle.dumps(expected)), copy.deepcopy(expected)):
        assert twin == expected and not twin.is_unsigned


@pytest.mark.parametrize("matrix", [[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]],
                                    [[1.0, 0.0], [1.0, 0.0]], [1.0, 0.0]])
def test_other_matrices_are_refused(matrix):
    with pytest.raises(Refusal, match="one entry -1 or \\+1 in each row"):
        SignedPermutation.from_matrix(torch.tensor(matrix))
    assert "torch.as_tensor(matrix)" in refusal_of(lambda: SignedPermutation.from_matrix(matrix)).fix


def test_a_matrix_that_is_one_up_to_rounding_is_read_after_the_fix():
    angle = torch.tensor(torch.pi / 2, dtype=torch.float64)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    assert "matrix.round()" in refusal_of(lambda: SignedPermutation.from_matrix(matrix)).fix
    assert SignedPermutation.from_matrix(matrix.round()) == SignedPermutation([1, 0], [-1, 1])


def test_sizes_that_do_not_fit_are_refused():
    three, two, x = SignedPermutation.identity(3), SignedPermutation.identity(2), torch.zeros(2, 3, 4)
    refusal = refusal_of(lambda: three(x))
    assert "multiply to 3" in refusal.expected and "(2, 3, 4)" in refusal.got
    assert torch.equal(three(x, dims=1), x)
    refusal = refusal_of(lambda: three @ two)
    assert "3 and 2 coordinates" in refusal.got and "kron(P, Q)" in refusal.fix
    assert SignedPermutation.kron(three, two).size == 6 and SignedPermutation.direct_sum(three, two).size == 5
    assert "torch.as_tensor(x)" in refusal_of(lambda: three([1, 2, 3])).fix


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_signs_of_types_without_signs_are_refused(dtype):
    """-3 would be 253 among bytes, and no sign at all among truth values."""
    x, swap = torch.ones(2, dtype=dtype), SignedPermutation(torch.tensor([1, 0]), torch.tensor([1, -1]))
    with pytest.raises(Refusal, match=r"can be negative.*x\.to\(torch\.float32\)"):
        swap(x)
    assert torch.equal(swap(x.to(torch.int64)), torch.tensor([1, -1]))
    assert torch.equal(swap.absolute()(x), x)
