"""The shapes that are declared are judged while the tests run."""
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import shapes
from symbnn.posterior.likelihoods import Categorical


@shapes.watched
def total(x: Float[Tensor, "rows columns"], y: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return x.sum(-1) + y if len(y) > 1 else x.sum()


def test_a_wrong_argument_and_a_wrong_result_are_found():
    assert total(torch.ones(2, 3), torch.ones(2)).tolist() == [4, 4]
    with pytest.raises(TypeError, match="y of total is"):
        total(torch.ones(3, 3), torch.ones(2, dtype=torch.int64).repeat(2)[:3])
    with pytest.raises(TypeError, match="its result of total is"):
        total(torch.ones(1, 3), torch.ones(1))


def test_the_package_is_watched_and_each_test_anew():
    categorical, shown = Categorical.log_prob, torch.zeros(1, 2, 4)
    assert categorical.__wrapped__ and not hasattr(Categorical.move.__wrapped__, "__wrapped__")
    for _ in range(shapes.CALLS):
        categorical(Categorical(), shown, torch.tensor([0, 3]))
    assert shapes._seen[categorical.__wrapped__.__code__] == shapes.CALLS
    shapes.begin_test()
    assert not shapes._seen
