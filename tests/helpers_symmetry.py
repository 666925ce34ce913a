"""What tests of several rooms need from the room of symmetries: random numbers, the axioms of an action."""
import copy
import pickle

import torch

from symbnn.symmetry.actions import Action, check_action


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_is_action(action: Action) -> None:
    """Products, inverses and the identity, of the action and of what is derived from it, on random numbers."""
    check_action(action)
    for derived in (action.flattened(), action.absolute()):
        check_action(derived)
    group = action.group
    a, b = group.sample(2, torch.Generator().manual_seed(3))
    x = random(2, *action.shape, seed=4)
    assert torch.equal(action.act(group.compose(a, b), x), action.act(a, action.act(b, x)))
    assert torch.equal(action.act(group.inverse(a), action.act(a, x)), x)
    assert torch.equal(action.act(group.identity(), x), x)


def assert_can_be_sent(action: Action) -> None:
    """A pickled and a copied action are the same action."""
    for twin in (pickle.loads(pickle.dumps(action)), copy.deepcopy(action)):
        assert twin.agrees_with(action) and twin.shape == action.shape
