"""Variants of data sets: exact where nothing is interpolated, drawn once, test images as they should be, refusals."""
import math
from dataclasses import replace

import pytest
import torch

from symbnn.data.sources import load
from symbnn.data.splits import Dataset, OddData, Split
from symbnn.data.transforms import VARIANTS, in_quadrants, resize, standardize, translate, turn, vary
from symbnn.errors import Refusal
from tolerances import assert_close


def images(count=6, size=8, channels=2):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("quarters", range(-2, 5))
def test_quarter_turns_are_permutations_of_pixels(quarters):
    found = turn(images(), torch.full((6,), 90.0 * quarters))
    assert_close(found, torch.rot90(images(), quarters, (-2, -1)))


def test_each_image_has_its_own_angle():
    angles = torch.tensor([0.0, 90, 180, 270, 0, -90])
    found = turn(images(), angles)
    for image, before, degrees in zip(found, images(), angles):
        assert_close(image, torch.rot90(before, int(degrees) // 90, (-2, -1)))


def test_a_turn_moves_a_spot_counterclockwise():
    """A spot right of the centre, at radius r, is found at (r cos a, r sin a) above it: its centre of mass."""
    size, degrees = 33, 35.0
    image = torch.zeros(1, 1, size, size, dtype=torch.float64)
    image[0, 0, 16, 26] = 1
    found = turn(image, torch.tensor([degrees]))[0, 0]
    up, right = 16 - torch.arange(size), torch.arange(size) - 16
    mass = found.sum()
    angle = math.degrees(math.atan2((found.sum(1) * up).sum() / mass, (found.sum(0) * right).sum() / mass))
    assert abs(angle - degrees) < 1  # bilinear weights of one pixel, a tenth of the radius, blur it by less


def test_translations_are_those_of_each_image_and_fill_with_zeros():
    by = torch.tensor([[0, 0], [1, 0], [0, -2], [-3, 3], [2, 2], [-1, 0]])
    found = translate(images(), by)
    for image, before, (down, right) in zip(found, images(), by.tolist()):
        rolled = torch.roll(before, (down, right), (-2, -1))
        kept = torch.ones(8, 8, dtype=torch.bool)
        kept[range(0, down) if down >= 0 else range(8 + down, 8)] = False
        kept[:, range(0, right) if right >= 0 else range(8 + right, 8)] = False
        assert torch.equal(image, rolled * kept)


def test_a_quadrant_holds_the_image_and_the_others_nothing():
    placed, which = in_quadrants(images(64), torch.Generator().manual_seed(1))
    assert set(which.tolist()) == {0, 1, 2, 3} and placed.shape == (64, 2, 16, 16)
    for image, large, number in zip(images(64), placed, which.tolist()):
        top, left = 8 * (number // 2), 8 * (number % 2)
        assert torch.equal(large[:, top : top + 8, left : left + 8], image)
        assert_close(large.sum(), image.sum())


def test_resizing_averages():
    """At half the size inner pixels have the weights 1, 3, 3, 1 of a triangle of twice the new spacing."""
    column = images(size=8)[..., :1].expand(-1, -1, -1, 8)
    inner = sum(weight * column[:, :, start : start + 3 : 2, :4] for weight, start in zip((1, 3, 3, 1), range(1, 5)))
    assert_close(resize(column, 4)[:, :, 1:3], inner / 8)
    assert resize(images(), None).shape == resize(images(), 8).shape == (6, 2, 8, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_drawn_once_and_keeps_its_labels(variant):
    digits = load("digits", train_size=100)
    once, again, other = (vary(digits, variant, seed=seed) for seed in (0, 0, 1))
    for name in ("train", "validation", "test"):
        split, before = getattr(once, name), getattr(digits, name)
        assert torch.equal(split.inputs, getattr(again, name).inputs)
        assert torch.equal(split.labels % 10, before.labels)
        changed = variant != "plain" and (variant != "shifted" or name == "train")
        assert (split.shape != before.shape or not torch.equal(split.inputs, before.inputs)) == changed
        assert torch.equal(split.inputs, getattr(other, name).inputs) != changed
    assert not torch.equal(once.train.inputs[:50].mean(0), once.validation.inputs[:50].mean(0))


def test_the_two_tasks_of_quadrants_have_the_same_images():
    digits = load("digits")
    what, where = vary(digits, "digit", size=8), vary(digits, "quadrant", size=8)
    assert torch.equal(what.train.inputs, where.train.inputs) and len(where.classes) == len(set(where.classes)) == 40
    quadrant = where.train.labels // 10
    masses = where.train.inputs[:, 0].view(-1, 2, 4, 2, 4).sum((2, 4)).flatten(1)
    assert torch.equal(masses.argmax(1), quadrant)
    assert (torch.bincount(quadrant) > len(quadrant) / 5).all()


def test_standardizing_takes_its_numbers_from_the_training_images():
    digits = load("digits", dtype=torch.float64)
    found, mean, deviation = standardize(digits), digits.train.inputs.mean(), digits.train.inputs.std()
    assert_close(found.train.inputs.mean(), 0.0)
    assert_close(found.train.inputs.std(), 1.0)
    for name in ("validation", "test"):
        assert_close(getattr(found, name).inputs * deviation + mean, getattr(digits, name).inputs)
    with pytest.warns(OddData, match="are equal"):
        blank = replace(digits, train=Split(torch.ones_like(digits.train.inputs), digits.train.labels))
    with pytest.raises(Refusal, match="every pixel 1"):
        standardize(blank)


def test_refusals():
    digits = load("digits", train_size=50)
    series = Split(torch.rand(4, 1, 9), torch.arange(4))
    flat = Dataset("series", series, series, series, tuple("abcd"))
    many = Dataset("many", digits.train, digits.validation, digits.test, tuple(map(str, range(11))))
    for call, said in (
        (lambda: vary(digits, "shiftd"), "'shifted'"), (lambda: vary(digits, size=0), "size=32"),
        (lambda: vary(flat, "turned"), r"\(1, 9\).*inputs\[:, None\]"), (lambda: vary(many, "quadrant"), "11 classes"),
        (lambda: turn(torch.zeros(1, 1, 3, 4), torch.zeros(1)), r"\(1, 1, 3, 4\).*pad"),
        (lambda: turn(torch.zeros(1, 4, 4), torch.zeros(1)), r"images\[:, None\]"),
    ):
        with pytest.raises(Refusal, match=said):
            call()
