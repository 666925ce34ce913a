"""How a group acts on every weight of a network, derived from the network itself, and the check that it does."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from ..binding import bind
from ..errors import Refusal, check_choice, check_kind, check_shape, check_tensor, require, shortened
from .actions import Action, check_action, natural_action, regular_channels
from .axes import Absolute, Atom, Axis, Batch, Known, Still, Uncoupled, Unknown, action_on, axes_of, leaves
from .features import Features, Ledger, Site, describe
from .fields import FieldAction, SpatialAction, field
from .groups import Cyclic, Element, Group, Permutations, Product
from .reductions import Places, refuse_opened
from .tracing import Graph, network_graph, read


@dataclass(frozen=True)
class NetworkAction:
    """How a group acts on a network's inputs, outputs and weights, such that for all g, x and theta

        f(rho_X(g) x; rho(g) theta) = rho_Y(g) f(x; theta).

    Parameters, and the running statistics of norms, go by their plain names such as `"0.weight"`. A *channel class* is
    a set of feature axes that are moved alike: `"input"`, `"output"`, or named after the first layer that writes it.
    """

    group: Group
    input: Any  # an Action, or a tuple or dictionary of them for several inputs
    output: Any  # an Action, or several of them in the form of the network's outputs
    parameters: dict[str, Action]
    layers: dict[str, tuple[str, str]]  # layer -> channel classes that it reads and writes
    channels: dict[str, Action]  # channel class -> action on its channels

    def act(self, g: Element, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply `rho(g)` to tensors by parameter name, each of shape `(..., *shape)` with any leading draw axes.

        Raises `Refusal` for names that are no parameters of the network.
        """
        unknown = sorted(set(tensors) - set(self.parameters))
        if unknown:
            raise Refusal("tensors by names of the network that the action was derived from",
                          got=f"the names {shortened(unknown)}", cause="weights or an action of another network",
                          fix=f"names among {shortened(sorted(self.parameters), 200)}")
        return {name: self.parameters[name].act(g, tensor) for name, tensor in tensors.items()}


class _Reading:
    """What is known of a network while its action is derived."""

    def __init__(self, network: nn.Module, graph: Graph, source: Any) -> None:
        self.network, self.graph, self.source = network, graph, source
        sources = tree_leaves(source)
        self.group: Group = sources[0].group
        self.ledger = Ledger(self.group)
        self.named = ["input"] if len(sources) == 1 else [f"input[{k}]" for k in range(len(sources))]
        entries = [Features(((Batch(2),), *axes_of(its, name, name))) for its, name in zip(sources, self.named)]
        require(len(graph.inputs) == len(entries), f"{len(graph.inputs)} inputs, as the network takes",
                f"{len(entries)} actions", "an action for some of the inputs alone",
                "network_action(network, (action_on_first, action_on_second))")
        self.parameters, self.results = read(graph, self.ledger, entries)
        self.site = Site(self.ledger, "output", "output")
        self._check_covered()

    def _check_covered(self) -> None:
        """Refuse parameters that nothing reads."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.graph.network.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        for first, *others in names.values():
            if not {first, *others} & set(self.parameters):
                Site(self.ledger, "parameter", first.rpartition(".")[0] or first).refuse(
                    f"the parameter '{first}', that no layer reads", "a forward pass that does not use it",
                    f"del network.{first}, or a layer of torch.nn that holds it")

    # The output

    def end(self, output: Any) -> None:
        """Say how the outputs move: what is still unknown of them is trivial, or as it is given."""
        self.ends = [self._without_batch(result) for result in self.results]
        self.last = [atom for axes in self.ends for axis in axes for atom in map(_bare, leaves(axis))
                     if isinstance(atom, Unknown)]
        for unknown in self.last:
            unknown.name = "output"
        given = [None] * len(self.ends) if output is None else tree_leaves(output)
        require(len(given) == len(self.ends), f"an action for each of the {len(self.ends)} outputs", f"{len(given)} actions",
                "a network that returns several tensors", "output=None, which leaves all of them as they come")
        for axes, action in zip(self.ends, given):
            if action is not None:
                self._end(axes, action)
        for unknown in self.last:
            if unknown.value is None:
                unknown.value = (Known(Action.trivial(self.group, (unknown.size,)), "output"),)

    def _without_batch(self, result: Any) -> tuple[Axis, ...]:
        """The axes of an output behind the batch; all of them where the batch was reduced."""
        if not isinstance(result, Features):
            self.site.refuse("positions of maxima" if isinstance(result, Places) else f"a result of type {type(result).__name__}",
                             "a network that returns what is no tensor of features", "a module around it that returns the rest")
        if result.opened:
            refuse_opened(self.site, result)
        first, *rest = ([*leaves(axis)] for axis in result.axes) if result.axes else ([],)
        if len(first) == 1 and isinstance(first[0], Batch):
            return result.axes[1:]
        if any(isinstance(atom, Batch) for axis in (first, *rest) for atom in axis):
            self.site.refuse(f"an output of shape {result.shape} from two inputs", "a batch that is not the first axis of the output",
                             "nn.Flatten(1), torch.flatten(x, 1), or batch_first=True, which keep the batch as the first axis")
        return result.axes

    def _end(self, axes: tuple[Axis, ...], action: Action) -> None:
        shape = Features(axes).shape
        if action.group != self.group or action.shape != shape and (action.numel,) != shape:
            raise Refusal(f"an action of {self.group.name} on the shape {shape} for the output", got=repr(action),
                          cause="an action that was made for another group or network",
                          fix=f"Action.trivial(action.group, {shape}), or output=None")
        try:
            copies: dict = {}
            for own, given in zip(axes, axes_of(action if action.shape == shape else action.flattened(), "output")):
                self.ledger.tie(self.site, own, given, copies)
        except Refusal as refusal:
            raise Refusal(f"an action on outputs by which the network's output moves, {' and '.join(map(describe, axes))}",
                          got=repr(action), cause="a network that ends without a layer of its own, or whose output has spatial "
                          "axes", fix="network_action(network, input) without output, or nn.Linear as the last layer") from refusal

    # The channels in between

    def free(self) -> list[Unknown]:
        """The channel classes, or pieces of them, whose action may be chosen."""
        found = [unknown for unknown in self.ledger.unknowns if unknown.value is None]
        for unknown in found:
            if not unknown.name:
                unknown.value = (Still(unknown.size),)
        return [unknown for unknown in found if unknown.name]

    def names(self) -> list[str]:
        """The names of all channel classes."""
        return sorted({*self.named, "output", *(unknown.name for unknown in self.free())})

    def choose(self, hidden: "Hidden") -> None:
        """Choose an action for everything that may move in any way."""
        pieces: dict[str, list[Unknown]] = {}
        for unknown in self.free():
            pieces.setdefault(_whole(unknown.name), []).append(unknown)
        if isinstance(hidden, Mapping):
            _check_names(hidden, {*pieces, *(its.name for found in pieces.values() for its in found)})
        for name, found in pieces.items():
            whole = self._whole(name)
            if len(found) == 1 and found[0].size == whole.size:
                found[0].value = (Known(_chosen(self.group, found[0].name, whole.size, hidden), found[0].name),)
            elif isinstance(hidden, Mapping) and name not in hidden:
                for piece in found:
                    piece.value = (Known(_chosen(self.group, piece.name, piece.size, hidden), piece.name),)
            else:
                self._choose_pieces(whole, found, hidden)

    def _whole(self, name: str) -> Unknown:
        return next(unknown for unknown in self.ledger.unknowns if unknown.name == name)

    def _choose_pieces(self, whole: Unknown, found: list[Unknown], hidden: "Hidden") -> None:
        """Choose the actions on the pieces of a class of channels that some operation takes apart."""
        site = Site(self.ledger, "channels", whole.name)
        if isinstance(hidden, str):
            check_choice(hidden, ("trivial", "regular"), "the action on hidden channels")
            order = self.group.order if hidden == "regular" else 1
            able = [piece for piece in found if piece.size % order == 0]
            if not able:
                site.refuse(f"channels in pieces of {', '.join(str(piece.size) for piece in found)}, of which none has a multiple "
                            f"of {order}", "groups, heads or gates of channels, which the group has to keep as blocks",
                            f"hidden='trivial', or groups or channels in a multiple of {order}")
            for piece in found:
                regular = hidden == "regular" and piece is able[0]
                action = regular_channels(self.group, piece.size // order) if regular else Action.trivial(self.group, (piece.size,))
                piece.value = (Known(action, piece.name),)
            return
        action = _chosen(self.group, whole.name, whole.size, hidden)
        before = list(self.ledger.unknowns)
        self.ledger.tie(site, (whole,), (Known(action, whole.name),))
        for piece in before:
            if piece in found and piece.value is None:
                site.refuse(f"channels under {action!r}, in pieces of {', '.join(str(its.size) for its in found)}",
                            "an action that tears apart the groups, heads or gates of channels that some operation keeps as blocks",
                            f"hidden={{{found[0].name!r}: ...}}, an action for each piece by its name")

    # All together

    def assemble(self) -> NetworkAction:
        """The network's action, once everything is chosen."""
        self.free()
        for check in self.ledger.checks:
            check()
        parameters = self._all_names({name: self._action(name, features.axes) for name, features in self.parameters.items()})
        outputs = [action_on(self.group, axes, "output") for axes in self.ends]
        result = tree_unflatten(outputs, self.graph.structure)
        layers = {name: (_class_name(reads), _class_name(writes)) for name, (reads, writes) in self.ledger.layers.items()}
        return NetworkAction(self.group, self.source, result, parameters, layers, self._channels())

    def _action(self, name: str, axes: Sequence[Axis]) -> Action:
        try:
            return action_on(self.group, axes, "axes")
        except Uncoupled as error:
            Site(self.ledger, "parameter", name.rpartition(".")[0] or name).refuse(
                f"the parameter '{name}', which has {error}", "a parameter along one axis of a grid whose axes are exchanged",
                "a parameter along both axes, or flips() or half_turns(), which keep the axes")
        raise AssertionError("refused before")

    def _channels(self) -> dict[str, Action]:
        """The action on each channel class, in the order in which the classes are met."""
        found = {name: its.channels if isinstance(its, FieldAction) else its.flattened()
                 for name, its in zip(self.named, tree_leaves(self.source))}
        for unknown in self.ledger.unknowns:
            own = tuple(leaves((unknown,)))
            if unknown.name and (len(own) == 1 and isinstance(own[0], Known) and own[0].name == unknown.name):
                found.setdefault(unknown.name, own[0].action)
        for unknown in self.last:
            found.setdefault("output", action_on(self.group, ((unknown,),)))
        return found

    def _all_names(self, parameters: dict[str, Action]) -> dict[str, Action]:
        """In the network's own order, tied tensors under all their names, and counts that nothing moves."""
        known = {id(tensor): name for name, tensor in self.graph.network.named_parameters(remove_duplicate=False) if name in parameters}
        found = {}
        for name, tensor in self.graph.network.named_parameters(remove_duplicate=False):
            found[name] = parameters[known[id(tensor)]]
        for name, _ in self.graph.network.named_buffers():
            layer, _, key = name.rpartition(".")
            if name in parameters:
                found[name] = parameters[name]
            elif key == "num_batches_tracked" and (f"{layer}.running_mean" if layer else "running_mean") in parameters:
                found[name] = Action.trivial(self.group, ())
        return found


def _bare(atom: Atom) -> Atom:
    return atom.of if isinstance(atom, Absolute) else atom


def _whole(name: str) -> str:
    """The channel class that a piece belongs to."""
    return name.partition("[")[0]


def _class_name(axis: Axis) -> str:
    """The name of the channels along an axis."""
    return next((atom.name for atom in map(_bare, leaves(axis)) if isinstance(atom, (Known, Unknown)) and atom.name), "")


def _check_names(hidden: Mapping[str, Action], known: set[str]) -> None:
    unknown = sorted(hidden.keys() - known)
    if unknown:
        raise Refusal("actions by names of hidden channel classes", got=f"the names {unknown}",
                      cause="a layer that writes to a class of another name, as behind a sum, or to the output",
                      fix=f"names among {sorted(known)}" if known else "hidden='trivial', as there are none")


def _chosen(group: Group, name: str, size: int, hidden: "Hidden") -> Action:
    """The action on one channel class."""
    trivial = Action.trivial(group, (size,))
    if isinstance(hidden, Mapping) or callable(hidden):
        action = hidden.get(name, trivial) if isinstance(hidden, Mapping) else hidden(name, size)
        _check_channels(action, group, name, size)
        return action
    check_choice(hidden, ("trivial", "regular"), "the action on hidden channels")
    if hidden == "regular" and size % group.order:
        raise Refusal(f"a multiple of {group.order} channels, blocks for each element of {group.name}",
                      got=f"{size} channels of layer '{name}'",
                      cause="a width that was chosen without the group",
                      fix=f"{group.order * (size // group.order + 1)} channels in layer '{name}', or hidden='trivial'")
    return trivial if hidden == "trivial" else regular_channels(group, size // group.order)


def _of_a_pair(value: object, part: str) -> dict[type, str]:
    """What to say to a network with its action where one of them belongs."""
    return {type(value): f"pair.{part}"} if isinstance(getattr(value, "action", None), NetworkAction) else {}


def check_network(network: object) -> None:
    """Raise `Refusal` unless this is a torch network."""
    check_kind(network, nn.Module, "the network", "a torch network, and the action after it: f(network, action)",
               {**_of_a_pair(network, "network, the network alone"), (list, tuple): "nn.Sequential(*layers)",
                dict: "the network itself, with network.load_state_dict(state)"})


def _near_actions(action: object) -> dict:
    return {**_of_a_pair(action, "action, how the group acts on its network"),
            SpatialAction: "network_action(network, field(space, (C, H, W))), such as field(rotations(), (1, 28, 28))",
            Group: "network_action(network, action), with an action of the group on inputs"}


def check_acting(network: object, action: object) -> None:
    """Raise `Refusal` unless these are a torch network and an action on a whole network of one input and one output."""
    check_network(network)
    check_kind(action, NetworkAction, "the action on a whole network", "network_action(network, action)", _near_actions(action))
    assert isinstance(action, NetworkAction)
    for its, name in ((action.input, "input"), (action.output, "output")):
        require(isinstance(its, Action), f"a network of one {name} tensor", f"actions on several, {shortened(its, 120)}",
                f"a network with several {name}s", "a module around it, whose forward takes one tensor and returns one")


Hidden = str | Mapping[str, Action] | Callable[[str, int], Action]


Actions = Action | Sequence[Action] | Mapping[str, Action]  # of one input, of several, or of inputs by their names


def network_action(network: nn.Module, input: Actions, *, hidden: Hidden = "trivial", output: Any = None,
                   example: Any = None, graph: Graph | None = None) -> NetworkAction:
    """Derive how a group acts on the weights of `network` from how it acts on the input.

    `input` is an action on one input, or for networks of several inputs a tuple of actions or a dictionary of them by
    the names of arguments. `example` is a batch of inputs of the same form, where zeros of the network's own type would
    not do, as for token numbers.
    `hidden` is the action on the channels of every hidden class: `"trivial"` (they stay), `"regular"` (blocks that the
    group permutes; the channels must be a multiple of the order), a dictionary by class (other classes are trivial), or
    a function of class and number of channels. `output` is the action on the output, by default trivial on channels.
    `graph` is what `network_graph` makes of it, or of a network of the same layers; by default it is made here.

    Raises `Refusal`, naming the layer, the reason and what would work, wherever the network does not commute with the
    group; nothing is approximated.

    >>> from torch import nn
    >>> import symbnn as sb
    >>> plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    >>> action = sb.network_action(plain, sb.field(sb.rotations(), (1, 8, 8)))
    >>> sorted(action.parameters)
    ['0.bias', '0.weight', '3.bias', '3.weight']
    """
    check_network(network)
    for its in _each(input):
        check_kind(its, Action, "the action on inputs", "field(rotations(), (C, H, W)) for images (C, H, W)", {
            SpatialAction: "field(space, (C, H, W)) for images (C, H, W), such as field(rotations(), (1, 28, 28))",
            NetworkAction: "action.input", Group: "an action of the group, such as field(rotations(), (C, H, W))"})
        check_action(its)
    for its in tree_leaves(output):
        check_kind(its, (Action, NoneType), "the action on outputs", "output=None, which leaves classes alone", {
            NetworkAction: "action.output", SpatialAction: "field(space, (C, H, W))"})
    require(not isinstance(hidden, Action), "'trivial', 'regular', a dictionary or a function for hidden channels",
            f"{hidden!r}", "an action on the channels of one class", "hidden={name: action}, by the name of the class")
    graph = graph or network_graph(network, *example_inputs(network, input, example))
    reading = _Reading(network, graph, input)
    reading.end(output)
    reading.choose(hidden)
    return reading.assemble()


def _each(input: Any) -> list:
    """The actions on the inputs, in the order of the arguments."""
    return list(input.values()) if isinstance(input, Mapping) else list(input) if isinstance(input, (tuple, list)) else [input]


def example_inputs(network: nn.Module, input: Actions, example: Any = None) -> tuple[tuple, dict]:
    """Positional and named arguments of a call on two inputs: zeros of the network's type, or the first of an example."""
    like = next((its for its in network.parameters() if its.is_floating_point()), torch.zeros(()))
    given = [None] * len(_each(input)) if example is None else _each(example)
    require(len(given) == len(_each(input)), f"an example of {len(_each(input))} inputs", f"{len(given)} inputs",
            "an example for some of the inputs alone", "example=(x, y), a batch for each action")
    made = [torch.zeros(2, *its.shape, dtype=like.dtype, device=like.device) if x is None else _two(its, x)
            for its, x in zip(_each(input), given)]
    return ((), dict(zip(input, made))) if isinstance(input, Mapping) else (tuple(made), {})


def _two(action: Action, x: Any) -> Tensor:
    """The first two inputs of a batch."""
    check_tensor(x, "an example of inputs", "example")
    require(tuple(x.shape[1:]) == action.shape and len(x) > 0, f"an example of shape ('batch', {', '.join(map(str, action.shape))})",
            f"a tensor of shape {tuple(x.shape)}", "an example of one input, without the axis of the batch", "example=x[None]")
    return x[torch.arange(2) % len(x)]


def _check_channels(action: Action, group: Group, name: str, size: int) -> None:
    if not isinstance(action, Action) or action.group != group or action.shape != (size,):
        raise Refusal(f"an action of {group.name} on the shape ({size},) for the channels of '{name}'",
                      got=shortened(action), cause="an action that was made for another group, layer or network",
                      fix=f"Action.trivial(action.group, ({size},)), or an action of that group on {size} channels")
    check_action(action)

def unit_permutations(network: nn.Module, input_shape: Sequence[int]) -> NetworkAction:
    """The group that permutes the hidden units of a network, which leaves its function as it is.

    `input_shape` is `(C, H, W)`, `(C, L)` or `(n,)`. The group is a product of symmetric groups, one for every channel
    class that is neither input nor output, in the order of the layers. Raises `Refusal` where there is none.

    >>> from torch import nn
    >>> import symbnn as sb
    >>> network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> sb.unit_permutations(network, (2,)).group.order
    24
    """
    check_network(network)
    shape_fix = "unit_permutations(network, (1, 28, 28)) for images, unit_permutations(network, (n,)) for n numbers"
    check_shape(input_shape, "the shape of one input", shape_fix, least=1)
    require(len(input_shape) > 0, "a shape of at least one axis", "the shape ()", "inputs that are single numbers",
            shape_fix)

    def unmoved(group: Group) -> Action:
        if len(input_shape) == 1:
            return Action.trivial(group, input_shape)
        return field(SpatialAction.trivial(group, len(input_shape) - 1), input_shape)

    graph = network_graph(network, *example_inputs(network, unmoved(Cyclic(1))))
    reading = _Reading(network, graph, unmoved(Cyclic(1)))
    reading.end(None)
    free = [(unknown.name, unknown.size) for unknown in reading.free()]
    if not free:
        raise Refusal("a network with hidden units to permute",
                      got=f"{type(network).__name__} with the channel classes {sorted(reading.names())}",
                      cause="a linear model, or sums that tie all its layers to the input or the output",
                      fix="a hidden layer, as in nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))")
    group = Product(*(Permutations(size) for _, size in free))
    places = {name: k for k, (name, _) in enumerate(free)}

    def natural(name: str, size: int) -> Action:
        return natural_action(Permutations(size)).pulled_back(group, operator.itemgetter(places[name]))

    reading = _Reading(network, graph, unmoved(group))
    reading.end(None)
    for unknown in reading.free():
        unknown.value = (Known(natural(unknown.name, unknown.size), unknown.name),)
    return reading.assemble()


def intertwining_error(network: nn.Module, action: NetworkAction, x: Any, elements: Sequence[Element] | None = None, *,
                       tensors: Mapping[str, Tensor] | None = None,
                       forward: Callable[[Any, Mapping[str, Tensor]], Any] | None = None) -> float:
    """The largest entry of `|f(rho_X(g) x; rho(g) theta) - rho_Y(g) f(x; theta)|` over the inputs and group elements.

    `x` is a batch of inputs, or a tuple or dictionary of batches as in `network_action`. `elements` defaults to the
    whole group up to order 64, beyond to its generators and 16 random elements. `theta` defaults to the network's own
    parameters and running statistics, `f` to the network in evaluation mode. For networks whose weights are drawn, pass
    `tensors` by plain name and `forward(x, tensors)`, with draw axes first in the result. The network is left as it is.
    Raises `Refusal` where an argument is of another kind, for inputs on which the group does not act, and where there
    is nothing to compare.
    """
    check_network(network)
    check_kind(action, NetworkAction, "the action on a whole network", "network_action(network, action)", _near_actions(action))
    for its in _each(x):
        check_tensor(its, "the batch of inputs", "x")
    check_kind(elements, (NoneType, tuple, list), "the elements to compare", "a list of elements, such as [g]")
    group = action.group
    _act(action.input, group.identity(), x)  # refuses inputs of another shape
    require(all(its.numel() > 0 for its in _each(x)) and (elements is None or len(elements) > 0),
            "at least one input and one element to compare",
            f"inputs of shape {[tuple(its.shape) for its in _each(x)]} and the elements {elements}", "a batch or a list that came out empty",
            "a batch of at least one input, and elements=None for all of them")
    if elements is None:
        some = (*group.generators(), *group.sample(16, torch.Generator().manual_seed(0)))
        elements = group.elements() if group.order <= 64 else some
    if tensors is None:
        named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        tensors = {name: tensor for name, tensor in named.items() if name in action.parameters}
    forward = forward or partial(_forward, network)
    with torch.no_grad():
        expected = forward(x, tensors)
        errors = [_largest(forward(_act(action.input, g, x), action.act(g, tensors)), _act(action.output, g, expected))
                  for g in elements]
    return max(errors)


def _act(action: Any, g: Element, x: Any) -> Any:
    """A tensor, or several, moved by the actions of the same form."""
    if isinstance(action, Action):
        return action.act(g, x)
    moved = [its.act(g, tensor) for its, tensor in zip(tree_leaves(action), tree_leaves(x), strict=True)]
    return tree_unflatten(moved, tree_structure(x))


def _largest(a: Any, b: Any) -> float:
    return max((float((x - y).abs().max()) for x, y in zip(tree_leaves(a), tree_leaves(b))), default=0.0)


def _forward(network: nn.Module, x: Any, tensors: Mapping[str, Tensor]) -> Any:
    call = bind(network, tensors, evaluating=True)
    return call(**x) if isinstance(x, Mapping) else call(*x) if isinstance(x, (tuple, list)) else call(x)
