"""Groups: the axioms for every kind of group, drawn by hypothesis; uniform draws; refusals."""
import itertools
import math
import pickle
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_ground import refusal_of
from symbnn.errors import Refusal
from symbnn.symmetry.groups import Cyclic, Dihedral, Group, Permutations, Product, Subgroup, left_regular, parse_group
from symbnn.symmetry.hyperoctahedral import Signed, proper_rotations

PLAIN = st.one_of(
    st.integers(1, 30).map(Cyclic),
    st.integers(1, 15).map(Dihedral),
    st.integers(1, 40).map(Permutations),
    st.integers(1, 40).map(Signed),
)
PRODUCTS = st.lists(PLAIN, min_size=0, max_size=3).map(lambda factors: Product(*factors))


@st.composite
def subgroups(draw) -> Subgroup:
    kinds = (st.integers(1, 30).map(Cyclic), st.integers(1, 15).map(Dihedral), st.integers(1, 5).map(Permutations))
    parent = draw(st.one_of(*kinds))
    seed, count = draw(st.integers(0, 2**31)), draw(st.integers(0, 2))
    return Subgroup(parent, tuple(parent.sample(count, torch.Generator().manual_seed(seed))))


GROUPS = st.one_of(PLAIN, PRODUCTS, subgroups(), st.builds(Product, subgroups(), PRODUCTS))
SEEDS = st.integers(0, 2**31)
SMALL: list[Group] = [
    Cyclic(1),
    Cyclic(4),
    Dihedral(1),
    Dihedral(2),
    Dihedral(4),
    Permutations(1),
    Permutations(4),
    Signed(1),
    Signed(3),
    proper_rotations(3),
    Product(),
    Product(Cyclic(4), Cyclic(2)),
    Product(Product(Cyclic(2), Permutations(3)), Dihedral(3)),
    Subgroup(Permutations(4), ((1, 2, 0, 3), (1, 0, 3, 2))),
    Subgroup(Dihedral(6), ()),
]


@given(GROUPS, SEEDS)
@settings(deadline=None, max_examples=150)
def test_axioms(group, seed):
    a, b, c = group.sample(3, torch.Generator().manual_seed(seed))
    e = group.identity()
    assert all(group.contains(g) for g in (a, b, c, e, group.compose(a, b), group.inverse(a)))
    assert group.compose(group.compose(a, b), c) == group.compose(a, group.compose(b, c))
    assert group.compose(a, e) == a == group.compose(e, a)
    assert group.compose(a, group.inverse(a)) == e == group.compose(group.inverse(a), a)


@given(GROUPS, SEEDS, st.integers(-30, 30))
@settings(deadline=None)
def test_powers_and_values(group, seed, k):
    (a,) = group.sample(1, torch.Generator().manual_seed(seed))
    step, expected = (a if k >= 0 else group.inverse(a)), group.identity()
    for _ in range(abs(k)):
        expected = group.compose(expected, step)
    assert group.power(a, k) == expected
    copy = pickle.loads(pickle.dumps(group))
    assert copy == group
    assert hash(copy) == hash(group)
    if group.is_abelian:
        b, c = group.sample(2, torch.Generator().manual_seed(seed + 1))
        assert group.compose(b, c) == group.compose(c, b)


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_list_of_elements(group):
    elements = group.elements()
    assert elements[0] == group.identity()
    assert len(set(elements)) == len(elements) == group.order
    assert [group.index(g) for g in elements] == list(range(group.order))
    assert all(group.contains(g) for g in elements)
    assert {group.compose(a, b) for a, b in itertools.product(elements, repeat=2)} == set(elements)
    assert group.is_abelian == all(
        group.compose(a, b) == group.compose(b, a) for a, b in itertools.product(elements, repeat=2)
    )


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_generators_generate(group):
    assert all(group.contains(g) for g in group.generators())
    assert set(Subgroup(group, group.generators()).elements()) == set(group.elements())


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_left_regular_is_a_faithful_homomorphism(group):
    places = {g: left_regular(group, g) for g in group.elements()}
    assert len(set(places.values())) == group.order
    for a, b in itertools.product(group.elements(), repeat=2):
        together = places[group.compose(a, b)]
        assert together == tuple(places[a][i] for i in places[b])
        assert group.elements()[places[a][group.index(b)]] == group.compose(a, b)


@pytest.mark.parametrize("group", [group for group in SMALL if group.order > 1], ids=str)
def test_draws_are_uniform(group):
    """Chi-square: mean m - 1, variance 2(m - 1), so within four standard deviations."""
    draws = group.sample(300 * group.order, torch.Generator().manual_seed(3))
    counts = Counter(draws)
    chi_square = sum((counts[g] - 300) ** 2 / 300 for g in group.elements())
    cells = group.order - 1
    assert abs(chi_square - cells) <= 4 * math.sqrt(2 * cells)


def test_draws_repeat_and_advance():
    for group in SMALL:
        first = group.sample(20, torch.Generator().manual_seed(5))
        source = torch.Generator().manual_seed(5)
        assert group.sample(20, source) == first
        assert group.sample(0, source) == []
        if group.order > 3:
            assert group.sample(20, source) != first


def test_a_huge_group_is_drawn_from_and_never_listed():
    group = Product(Permutations(1000), Permutations(2000))
    assert group.order == math.factorial(1000) * math.factorial(2000)
    source, seconds = torch.Generator().manual_seed(0), []
    for _ in range(10):
        start = time.perf_counter()
        (draw,) = group.sample(1, source)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 10e-3
    assert group.contains(draw)
    assert not group.is_abelian
    for listing in (group.elements, lambda: group.index(draw), lambda: left_regular(group, draw)):
        with pytest.raises(Refusal, match=r"at most 10000 elements.*group\.sample\(64\)"):
            listing()


def test_a_subgroup_too_large_is_refused_when_built_and_a_small_one_in_a_huge_parent_is_not():
    huge = Permutations(100)
    with pytest.raises(Refusal, match=r"a subgroup of S100, with more than 10000.*Subgroup\(group, \(g,\)\)"):
        Subgroup(huge, huge.generators())
    shift = huge.generators()[1]
    assert Subgroup(huge, (shift,)).order == 100


@pytest.mark.parametrize("name", ["C4", "D4", "C2", "S5", "C4xC2", "S1000xS3xD7"])
def test_names_are_read_back(name):
    assert parse_group(name).name == name
    assert str(parse_group(name)) == name


@pytest.mark.parametrize("name", ["", "C", "C0", "c4", "Q8", "C4x", "xC4", "C4 ", "SO2", "C-4", "C4\n"])
def test_wrong_names_are_refused(name):
    with pytest.raises(Refusal, match=r"\"C4\" \(turns\)|at least 1.*Cyclic\(4\)"):
        parse_group(name)


@pytest.mark.parametrize("name, fix", [(4, '"C4"'), (None, '"C4"'), (Cyclic(4), "the group itself")])
def test_names_of_another_kind_are_refused(name, fix):
    assert fix in refusal_of(lambda: parse_group(name)).fix


@pytest.mark.parametrize(
    "group, wrong",
    [
        (Cyclic(4), 4),
        (Cyclic(4), -1),
        (Cyclic(4), "1"),
        (Cyclic(4), 1.0),
        (Dihedral(4), (4, 0)),
        (Dihedral(4), (0, 2)),
        (Dihedral(4), 3),
        (Permutations(3), (0, 1)),
        (Permutations(3), (0, 0, 1)),
        (Permutations(3), (0, 1, 3)),
        (Permutations(2), (0.0, 1.0)),
        (Product(Cyclic(2), Cyclic(3)), (0, 3)),
        (Product(Cyclic(2), Cyclic(3)), (0,)),
        (Subgroup(Cyclic(4), (2,)), 1),
        (Subgroup(Cyclic(4), (2,)), [2]),
    ],
)
def test_strangers_are_refused(group, wrong):
    assert not group.contains(wrong)
    refusal = refusal_of(lambda: group.check(wrong))
    assert refusal.expected == f"an element of {group.name}"
    example = eval(re.search("an element such as (.*), or one of", refusal.fix)[1])
    assert group.contains(example)  # the fix is what it says
    with pytest.raises(Refusal):
        group.index(wrong)


def test_impossible_groups_and_draws_are_refused():
    for make in (Cyclic, Dihedral, Permutations):
        for n in (0, -1, 2.5, "4", None, True):
            refusal = refusal_of(lambda make=make, n=n: make(n))
            assert "at least 1" in refusal.expected and eval(refusal.fix).n == 4
    for factors, fix in ([[Cyclic(2), Cyclic(3)]], r"Product(*groups)"), (["C4", "C2"], 'parse_group("C4xC2")'):
        assert refusal_of(lambda factors=factors: Product(*factors)).fix == fix
    with pytest.raises(Refusal, match="an element of C4"):
        Subgroup(Cyclic(4), (5,))
    for group in (Cyclic(4), Permutations(3), Product(), Product(Cyclic(2))):
        for n in (-1, 2.0):
            with pytest.raises(Refusal, match=r"number of elements to draw.*group\.sample\(1\)"):
                group.sample(n)


def test_sizes_of_another_library_do_not_overflow():
    group = Product(Cyclic(np.int64(2**40)), Cyclic(np.int64(2**40)))
    assert group.order == 2**80 and Permutations(np.int64(3)) == Permutations(3)


def test_conventions():
    """The product is "a after b": the opposite product is a group too, so the axioms cannot tell them apart."""
    a, b = (1, 2, 0), (1, 0, 2)
    assert Permutations(3).compose(a, b) == tuple(a[b[i]] for i in range(3)) == (2, 1, 0)
    assert Dihedral(4).compose((1, 0), (0, 1)) == (1, 1)  # flip, then turn by one
    assert Dihedral(4).compose((0, 1), (1, 0)) == (3, 1)
    assert Product(Permutations(3), Cyclic(4)).compose((a, 1), (b, 3)) == ((2, 1, 0), 0)


def test_the_limit_of_listing():
    assert len(Permutations(7).elements()) == 5040
    with pytest.raises(Refusal, match="S8, of order 40320"):
        Permutations(8).elements()
    assert len(Cyclic(10_000).elements()) == 10_000
    with pytest.raises(Refusal, match="C10001, of order 10001"):
        Cyclic(10_001).elements()
