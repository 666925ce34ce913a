"""The matrix of architectures and groups: what each cell needs, and what comes of it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import architectures as zoo
import torch
from torch import nn

from helpers_symmetry import random, randomised
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, sign_change
from symbnn.symmetry.fields import (
    SpatialAction,
    field,
    flips,
    half_turns,
    point_symmetries,
    rotations,
    rotations_and_flips,
    shifts,
    time_reversal,
)
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import intertwining_error, network_action
from tolerances import exact64

SPACES = {
    "quarter turns": rotations,
    "turns and flips": rotations_and_flips,
    "left-right flips": flips,
    "half turns": half_turns,
}


class Cell(NamedTuple):
    """A network and a group that acts on its inputs."""

    make: Callable[[], nn.Module]
    action: Any  # on the input, or several of them
    tokens: int = 0  # where inputs are numbers of words

    def network(self) -> nn.Module:
        """Random weights of order one, in evaluation mode."""
        torch.manual_seed(0)  # for what is no parameter, such as vectors of a spectral norm
        return randomised(self.make()).eval()

    def inputs(self) -> Any:
        """Three inputs of order one, in the form of the action."""
        several = self.action if isinstance(self.action, tuple) else (self.action,)
        made = tuple(self._input(its.shape, seed) for seed, its in enumerate(several))
        return made if isinstance(self.action, tuple) else made[0]

    def _input(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        if self.tokens:
            return torch.randint(self.tokens, (3, *shape), generator=torch.Generator().manual_seed(seed))
        return random(3, *shape, seed=seed)

    def derive(self, network: nn.Module):
        """The action on this network."""
        return network_action(network, self.action, example=self.inputs() if self.tokens else None)


def elements(count: int, features: int) -> Action:
    """Permutations of the elements of a set, or of tokens."""
    group = Permutations(count)
    return Action.product(natural_action(group), Action.trivial(group, (features,)))


def graph(nodes: int, features: int) -> tuple[Action, Action]:
    """Permutations of nodes, and of the rows and columns of what joins them."""
    natural = natural_action(Permutations(nodes))
    return elements(nodes, features), Action.product(natural, natural)


def circular() -> nn.Module:
    """A convolutional network on a torus."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def dense() -> nn.Module:
    """Layers and norms alone, on images."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def series() -> nn.Module:
    """Convolutions along time, and a flattened head."""
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 2),
    )


IMAGES = {  # architecture -> maker, shapes of inputs
    "ResNet": (zoo.ResNet, (3, 9, 9)),
    "ResNet, 8 pixels": (zoo.ResNet, (3, 8, 8)),
    "ResNet, group norm": (lambda: zoo.ResNet(zoo.groups), (3, 9, 9)),
    "LeNet": (zoo.LeNet, (1, 16, 16)),
    "VGG": (zoo.vgg, (3, 8, 8)),
    "DenseNet": (zoo.DenseNet, (3, 8, 8)),
    "MobileNet": (zoo.mobilenet, (3, 8, 8)),
    "MobileNet, squeeze and excitation": (lambda: zoo.mobilenet(True), (3, 8, 8)),
    "ConvNeXt": (zoo.convnext, (3, 8, 8)),
    "U-Net, transposed": (zoo.UNet, (2, 8, 8)),
    "U-Net, upsampled": (lambda: zoo.UNet(False), (2, 8, 8)),
    "ViT": (zoo.ViT, (3, 8, 8)),
    "ViT, no positions": (lambda: zoo.ViT(False), (3, 8, 8)),
    "Siamese": (zoo.Siamese, (1, 6, 6)),
    "two heads": (zoo.TwoHeads, (1, 6, 6)),
    "tied": (zoo.Tied, (1, 6, 6)),
    "autoencoder": (zoo.Autoencoder, (1, 8, 8)),
    "parametrised": (zoo.normed, (1, 4, 4)),
    "layers and norms": (dense, (2, 8, 8)),
}
SEQUENCES = {
    "LSTM": zoo.Recurrent,
    "GRU, two ways": lambda: zoo.Recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "RNN": lambda: zoo.Recurrent(nn.RNN),
}


def _cells() -> dict[tuple[str, str], Cell]:
    found = {}
    for name, (make, shape) in IMAGES.items():
        for group, space in SPACES.items():
            action = field(space(), shape)
            found[name, group] = Cell(make, (action, action) if name == "Siamese" else action)
    found["LeNet", "translations"] = Cell(zoo.LeNet, field(shifts(4, step=4), (1, 16, 16)))
    found["circular", "translations"] = Cell(circular, field(shifts(4, step=2), (2, 8, 8)))
    found["circular", "quarter turns"] = Cell(circular, field(rotations(), (2, 8, 8)))
    for name, transposed in (("3-D U-Net, transposed", True), ("3-D U-Net, upsampled", False)):
        found[name, "symmetries of the cube"] = Cell(
            lambda transposed=transposed: zoo.UNet(transposed, 3), field(point_symmetries(3), (2, 4, 4, 4))
        )
    for name, make, action in (
        ("transformer encoder", zoo.encoder, elements(5, 8)),
        ("set transformer", zoo.SetTransformer, elements(5, 3)),
        ("DeepSets", zoo.DeepSets, elements(5, 3)),
        ("PointNet", zoo.PointNet, elements(5, 3)),
        ("message passing", zoo.MessagePassing, graph(5, 3)),
        ("gated", zoo.Gated, natural_action(Permutations(6))),
        ("MLP", zoo.mlp, natural_action(Permutations(6))),
    ):
        found[name, "permutations"] = Cell(make, action)
    for name, make in {**SEQUENCES, "series": series}.items():
        still = Action.trivial(Cyclic(2), (5, 3))
        on_time = Action.product(time_reversal().on(5), Action.trivial(Cyclic(2), (3,)))
        its = (
            (field(SpatialAction.trivial(Cyclic(2), 1), (3, 5)), field(time_reversal(), (3, 5)))
            if name == "series"
            else (still, on_time)
        )
        found |= {(name, group): Cell(make, action) for group, action in zip(("trivial", "time reversal"), its)}
    found["bag of words", "permutations"] = Cell(zoo.TextClassifier, natural_action(Permutations(7)), tokens=11)
    found["MLP", "sign changes"] = Cell(zoo.mlp, sign_change(6))
    found["gated", "sign changes"] = Cell(zoo.Gated, sign_change(6))
    return found


CELLS = _cells()


def outcome(cell: Cell) -> str:
    """ "works", or "refused: reason"; whatever else is raised goes through."""
    network = cell.network()
    try:
        action = cell.derive(network)
    except Refusal as refusal:
        return f"refused: {refusal.cause}"
    error = intertwining_error(network, action, cell.inputs())
    assert error <= exact64, f"an action that is off by {error:.1e}"
    return "works"


def matrix(names: Iterable[tuple[str, str]] = ()) -> list[tuple[str, str, str]]:
    """Architecture, group and outcome of these cells, or of all."""
    return [(*name, outcome(CELLS[name])) for name in (names or CELLS)]
