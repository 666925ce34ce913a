"""One scale for a block: the maps that keep blocks, one by one."""
import pytest

from helpers_posterior import check_closedness, random, signed_permutations
from symbnn.posterior.block_gaussian import BlockGaussian


@pytest.mark.parametrize("scales, closed", [((2, 2), 384), ((2, 1), 128), ((1, 2), 128), ((1, 1), 384)])
def test_all_signed_permutations_of_four_coordinates_with_blocks(scales, closed):
    q = BlockGaussian(random((2, 2), 0), random(scales, 1), trainable=False)
    assert sum(check_closedness(q, p) for p in signed_permutations(4)) == closed
