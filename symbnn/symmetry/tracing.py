"""A network's forward pass as a graph of torch's own operators, whatever way it was written."""

import copy
import itertools
import logging
import operator
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ..binding import Placeholder, copy_tree, plain_network
from ..errors import Refusal, require, shortened
from .features import Features, Ledger, Site
from .operations import LAYER_RULES, RULES
from . import contractions, filters, reductions, views  # noqa: F401


# --- layers that are read as one operation

_OPAQUE: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.library.custom_op("symbnn::layer", mutates_args=())
def _layer_operator(inputs: list[Tensor], parameters: list[Tensor], number: int) -> Tensor:
    return _plain_call(inputs, parameters, number).clone()


@_layer_operator.register_fake
def _(inputs: list[Tensor], parameters: list[Tensor], number: int) -> Tensor:
    return _plain_call(inputs, parameters, number).clone()


def _plain_call(inputs: list[Tensor], parameters: list[Tensor], number: int) -> Tensor:
    """The layer's own forward pass."""
    module = copy.copy(_OPAQUE[number])
    module.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
    return torch.func.functional_call(module, dict(zip(_named(module), parameters)), tuple(inputs))


def _named(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def _as_one_operation(network: nn.Module) -> None:
    """Make the layers that have a rule of their own, in a copy of a network, appear as one operation in its graph."""
    for module in network.modules():
        if type(module) in LAYER_RULES:
            number = next(_NUMBERS)
            _OPAQUE[number] = module
            module.__dict__["forward"] = partial(_call_layer, module, number)


def _call_layer(module: nn.Module, number: int, *inputs: Any) -> Tensor:
    require(all(isinstance(its, Tensor) for its in inputs), f"tensors, by position, for a {type(module).__name__}, which has a rule",
            f"arguments of the types {', '.join(type(its).__name__ for its in inputs)}", "settings that are passed to forward",
            "settings that are passed to the layer's __init__")
    return _layer_operator(list(inputs), list(_named(module).values()), number)


# --- graphs


class Graph(NamedTuple):
    """A traced forward pass."""

    nodes: fx.Graph
    parameters: dict[str, str]  # placeholder -> name of a parameter or buffer
    tensors: dict[str, Tensor]  # values of buffers and constants by placeholder
    inputs: list[str]  # placeholders of the inputs, flattened
    outputs: list[Any]  # nodes
    network: nn.Module
    structure: Any  # of the outputs


def _deterministic(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode with a plain parameter in the place of each posterior."""
    plain = plain_network(network)
    own = {id(p): nn.Parameter(p.detach().clone()) for p in plain.parameters() if p.is_floating_point()}
    for module in plain.modules():
        if isinstance(module, Placeholder):
            own[id(module)] = nn.Parameter(torch.zeros(module.shape, dtype=module.dtype, device=module.device))  # type: ignore[attr-defined]
    copied = copy_tree(plain, own, evaluating=True, compiled=False)
    _as_one_operation(copied)
    return copied


def network_graph(network: nn.Module, example: tuple[Any, ...], options: Mapping[str, Any] | None = None) -> Graph:
    """The network's forward pass on inputs like these as a graph of operators. Raises `Refusal` where it is not fixed."""
    from torch.export import export
    module = _deterministic(network)
    try:
        with warnings.catch_warnings(), _quiet("torch._subclasses.fake_tensor"):
            warnings.simplefilter("ignore")
            program = export(module, example, dict(options or {}), strict=False)
    except Exception as error:  # anything that the network's own code raises
        raise _untraced(network, module, example, options or {}, error) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = {**dict(module.named_buffers(remove_duplicate=False))}
    tensors = {key: state[name] for key, name in signature.inputs_to_buffers.items() if name in state}
    tensors |= {key: program.constants[name] for key, name in signature.inputs_to_lifted_tensor_constants.items()}
    result = next(node for node in program.graph.nodes if node.op == "output").args[0]
    kinds = [spec.kind.name for spec in signature.output_specs]
    outputs = [value for value, kind in zip(result, kinds) if kind == "USER_OUTPUT"]
    return Graph(program.graph, names, tensors, list(signature.user_inputs), outputs, module, program.call_spec.out_spec)


@contextmanager
def _quiet(name: str):
    """What torch logs of an error that is explained in a refusal is left out."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _untraced(network: nn.Module, module: nn.Module, example: tuple, options: Mapping[str, Any], error: Exception) -> Refusal:
    """Why a network has no graph: it does not take such inputs, or its forward pass depends on them."""
    shapes = ", ".join(str(tuple(its.shape)) for its in tree_leaves((example, dict(options))) if isinstance(its, Tensor))
    try:
        with torch.no_grad():
            module(*example, **options)
    except Exception as own:
        return Refusal(f"a network that takes inputs of the shapes {shapes}, the first axis being the batch",
                       got=f"{type(network).__name__}, which raises {_first_line(own)}",
                       cause="an action on inputs of another shape or number than the network is made for",
                       fix="field(space, (C, H, W)) for images (C, H, W), one action for each input, and example= for inputs "
                           "that are no floating-point numbers")
    return Refusal("a network whose forward pass is one fixed graph of operations",
                   got=f"{type(network).__name__}, which torch.export cannot trace, {_first_line(error)}",
                   cause="an if or a loop that depends on data",
                   fix="a forward pass without it, such as torch.relu(x) in place of x if x > 0 else 0")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shortened(lines[0], 300) if lines else ''}"


# --- the walk


def read(graph: Graph, ledger: Ledger, inputs: Sequence[Features | Any]) -> tuple[dict[str, Features], list[Any]]:
    """Walk along a graph; the features of each parameter that was met, and those that the network returns."""
    parameters: dict[str, Features] = {}
    values: dict[fx.Node, Any] = {}
    given = dict(zip(graph.inputs, inputs))
    movable = set(graph.parameters.values()) - {graph.parameters[key] for key in graph.tensors if key in graph.parameters} | (
        _statistics(graph))

    def value_of(node: fx.Node) -> Any:
        if node not in values and node.op == "placeholder":
            values[node] = _placeholder(graph, ledger, node, given, movable, parameters)
        elif node not in values and node.op == "get_attr":
            values[node] = None
        return values[node]

    for node in graph.nodes.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), value_of)
            values[node] = _apply(graph, ledger, node, args, kwargs)
            if _mutates(node) and isinstance(node.args[0], fx.Node):
                values[node.args[0]] = values[node]
    return parameters, [value_of(node) if isinstance(node, fx.Node) else node for node in graph.outputs]


def _statistics(graph: Graph) -> set[str]:
    """Names of buffers that move with the features: running statistics, and what parametrisations keep."""
    found = set()
    for node in graph.nodes.nodes:
        if node.op == "call_function" and _operator(node) in ("batch_norm", "instance_norm"):
            found |= {graph.parameters[arg.name] for arg in node.args[3:5] if isinstance(arg, fx.Node) and arg.name in graph.parameters}
    return found | {name for name in graph.parameters.values() if "parametrizations." in name}


def _placeholder(graph: Graph, ledger: Ledger, node: fx.Node, given: Mapping[str, Any], movable: set[str],
                 parameters: dict[str, Features]) -> Any:
    if node.name in given:
        return given[node.name]
    name = graph.parameters.get(node.name, "")
    if name not in movable:
        return graph.tensors[node.name]
    layer = name.rpartition(".")[0]
    shape = node.meta["val"].shape
    title = layer if name.rpartition(".")[2] in ("weight", "bias") else name
    features = Features(tuple((ledger.unknown(size, f"{title}:{k}" if k else title, k > 0),) for k, size in enumerate(shape)), name)
    parameters[name] = features
    return features


def _operator(node: fx.Node) -> str:
    """The name of torch's operator, without namespace and overload."""
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_") if _mutates(node) else name


def _mutates(node: fx.Node) -> bool:
    """Whether an operator writes into its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _apply(graph: Graph, ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    if not _has_features((args, dict(kwargs))):
        return node.target(*args, **kwargs)  # type: ignore[operator]
    name = _operator(node)
    site = Site(ledger, name, _label(graph, node, name), _line(node))
    if node.target is torch.ops.symbnn.layer.default:
        return _apply_layer(site, *args)
    key = f"{name}.{node.target._overloadname}" if hasattr(node.target, "_overloadname") else name
    found = RULES.get(key, RULES.get(name))
    if found is None:
        site.refuse(f"a call of {name}, for which no action is known", "an operation that moves or mixes features in another way",
                    "layers and functions of torch that a rule is known for, or a rule of your own: @rule(...)")
    if _mutates(node) and not isinstance(args[0], Features):
        site.refuse("a constant into which features are written", "a tensor that is made in the forward pass and filled in place",
                    "torch.cat or torch.stack of the pieces")
    _check_operands(site, name, (args, kwargs))
    try:
        return found(site, *args, **kwargs)
    except (TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
        if isinstance(error, Refusal):
            raise
        site.refuse(f"the arguments {shortened(args[1:])} {shortened(dict(kwargs))}", f"arguments that no rule reads ({error})",
                    "the layer of torch.nn in place of the function")


def _apply_layer(site: Site, inputs: Sequence[Any], parameters: Sequence[Features], number: int) -> Any:
    """The rule of a layer that is read as one operation, of its inputs and of its parameters by their names."""
    module = _OPAQUE[number]
    named = {name.replace(".", "_"): value for name, value in zip(_named(module), parameters)}
    return LAYER_RULES[type(module)](site, module, *inputs, **named)


def _has_features(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_features, value.values()))
    if isinstance(value, (list, tuple)) and not isinstance(value, Features):
        return any(map(_has_features, value))
    return isinstance(value, (Features, views.Stacked, reductions.Places))


def _check_operands(site: Site, name: str, value: Any) -> None:
    if isinstance(value, reductions.Places):
        site.refuse("positions of maxima", "the positions of maxima are no features", "the maxima themselves, return_indices=False")
    if isinstance(value, Features) and value.opened and name not in ("mean", "sum", "amax", "amin", "max", "min", "logsumexp"):
        reductions.refuse_opened(site, value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and not isinstance(value, Features):
        for its in value:
            _check_operands(site, name, its)


def _label(graph: Graph, node: fx.Node, name: str) -> str:
    """The layer that calls an operator, with its settings where it is one of torch's."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    try:
        module = graph.network.get_submodule(path)
    except AttributeError:
        module = None
    title = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
    if module is not None and title.startswith("torch.nn.modules") and not isinstance(module, (nn.Sequential, nn.ModuleList)):
        described = f"{type(module).__name__}({module.extra_repr()})"
        return f"{path}: {described}" if path else described
    return f"{path}: {name}" if path else name


def _line(node: fx.Node) -> str:
    """The line of the network's own code that calls an operator, as 'file.py:12: y = x + z'."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [(lines[k].strip(), lines[k + 1].strip()) for k in range(0, len(lines) - 1, 2) if lines[k].strip().startswith("File")]
    own = [(where, code) for where, code in frames if "/torch/" not in where]
    if not own:
        return ""
    where, code = own[-1]
    file, _, rest = where[len('File "'):].partition('", line ')
    return f"{file.rpartition('/')[2]}:{rest.partition(',')[0]}: {code}"

