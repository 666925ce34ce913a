"""Operations on each number by itself, and how rules for operations are written down."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Absolute, AxesAction, Axis, Grid, Still, Unknown, absolute, axis_size, leaves
from .features import Copies, Features, Site

Rule = Callable[..., Any]  # of the site and of the operation's own arguments, to the features that it gives
RULES: dict[str, Rule] = {}  # by the names of torch's operators, without overloads
LAYER_RULES: dict[type, Rule] = {}  # by the types of modules that are read as one operation


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Write a function down as the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# --- constants


def as_features(site: Site, value: Any) -> Features:
    """Features of a constant tensor, which has to be the same after it has been moved."""
    if isinstance(value, Features):
        return value
    axes = tuple((site.ledger.unknown(size, "") if size > 1 else Still(1),) for size in value.shape)
    features = Features(axes)

    def check() -> None:
        action = AxesAction(site.ledger.group, axes)
        for g in site.ledger.group.generators():
            moved = action.act(g, value.double() if value.dtype != torch.complex64 else value)
            if not torch.equal(moved, value.to(moved.dtype)):
                site.refuse(f"a constant of shape {tuple(value.shape)}, which the element {g} changes",
                            "a mask, an encoding or weights that prefer some positions, and are no parameters",
                            "a parameter in its place, or a group that leaves it as it is")

    site.ledger.later(check)
    return features


# --- one operand

ODD = ("neg tanh sin asin arcsin atan arctan sinh asinh arcsinh atanh arctanh tan erf erfinv sign sgn trunc fix round "
       "reciprocal dropout alpha_dropout native_dropout contiguous clone detach alias lift_fresh lift_fresh_copy "
       "to _to_copy float double half type_as positive real view_of softshrink hardshrink deg2rad rad2deg "
       "lift _assert_tensor_metadata requires_grad_ conj resolve_conj resolve_neg").split()
EVEN = "abs absolute cos cosh square sinc".split()
OTHER = ("relu relu6 leaky_relu rrelu elu selu celu gelu silu mish softplus sigmoid hardsigmoid hardswish log_sigmoid exp exp2 "
         "expm1 log log2 log10 log1p sqrt rsqrt threshold floor ceil frac acos arccos acosh erfc logit lgamma digamma "
         "logical_not bitwise_not isnan isinf isfinite nan_to_num signbit i0").split()

NOT_ODD = "a function that is not odd does not commute with a change of sign"


@rule(*ODD)
def odd(site: Site, x: Any, *unused: object, **options: object) -> Features:
    """An odd function of each feature by itself: it commutes with permutations and with signs."""
    return as_features(site, x)._replace(parameter="")


@rule(*OTHER)
def pointwise(site: Site, x: Any, *unused: object, **options: object) -> Features:
    """A function of each feature by itself: it commutes with permutations."""
    x = as_features(site, x)
    site.ledger.unsigned(site, x.axes, NOT_ODD)
    return Features(x.axes)


@rule(*EVEN)
def even(site: Site, x: Any, *unused: object, **options: object) -> Features:
    """An even function of each feature by itself: what comes out has no sign."""
    return Features(tuple(tuple(map(absolute, leaves(axis))) for axis in as_features(site, x).axes))


@rule("pow")
def power(site: Site, x: Any, exponent: Any, **options: object) -> Features:
    """A power: odd, even, or neither."""
    if isinstance(exponent, (int, float)) and float(exponent).is_integer():
        return (even if int(exponent) % 2 == 0 else odd)(site, x)
    if isinstance(exponent, (int, float)) or not isinstance(x, Features):
        return pointwise(site, x if isinstance(x, Features) else exponent)
    return together(site, x, exponent)


@rule("clamp", "hardtanh", "clip")
def clamp(site: Site, x: Features, low: Any = None, high: Any = None, **options: Any) -> Features:
    """A clamp, which is odd where its bounds are opposite."""
    low, high = options.get("min", options.get("min_val", low)), options.get("max", options.get("max_val", high))
    if site.operator == "hardtanh":
        low, high = -1 if low is None else low, 1 if high is None else high
    if isinstance(low, Features) or isinstance(high, Features):
        return together(site, x, *(bound for bound in (low, high) if isinstance(bound, (Features, Tensor))))
    return (odd if low is not None and high is not None and low == -high else pointwise)(site, x)


@rule("clamp_min", "clamp_max")
def clamp_one(site: Site, x: Features, bound: Any) -> Features:
    """A clamp on one side."""
    return together(site, x, bound) if isinstance(bound, (Features, Tensor)) else pointwise(site, x)


@rule("feature_dropout", "feature_alpha_dropout")
def feature_dropout(site: Site, x: Features, *unused: object) -> Features:
    """Dropout of whole channels: one random number for all pixels of a channel."""
    if len(x.axes) > 2:
        site.ledger.closed(site, x.axes[2:], "drops whole channels", "nn.Dropout, which drops numbers")
    return Features(x.axes)


@rule("prelu")
def prelu(site: Site, x: Features, weight: Features) -> Features:
    """PReLU, whose slopes move as the channels do."""
    site.ledger.unsigned(site, x.axes, NOT_ODD)
    if weight.shape == (1,):
        site.ledger.still(site, weight.axes[0], "one slope", "one slope")
    else:
        site.ledger.tie(site, x.axes[1], weight.axes[0])
    return Features(x.axes)


@rule("zeros_like", "ones_like", "full_like")
def like(site: Site, x: Features, *numbers: float, **options: object) -> Tensor:
    """A tensor of one number."""
    value = numbers[0] if numbers else 0.0 if "zeros_like" in site.operator else 1.0
    return torch.full(x.shape, value)


# --- several operands


def relabelled(axis: Axis, labels: Copies) -> Axis:
    """The axis with the copies of its grids under other labels."""
    return tuple(atom._replace(copy=labels.get(atom.copy, atom.copy)) if isinstance(atom, Grid) else atom
                 for atom in leaves(axis))


def labels_of(axes: Sequence[Axis]) -> set:
    """The copies of grids that these axes belong to."""
    return {atom.copy for axis in axes for atom in leaves(axis) if isinstance(atom, Grid)}


def fresh_labels(axes: Sequence[Axis], taken: set, copies: Copies) -> Copies:
    """What the copies in axes of a second tensor are called beside those of a first one."""
    return {copy: copies.get(copy, object_label(copy, taken) if copy in taken else copy) for copy in labels_of(axes)}


def object_label(copy: object, taken: set) -> object:
    """A label that is not taken."""
    number = 1
    while (copy, number) in taken:
        number += 1
    return (copy, number)


def broadcast(site: Site, x: Features, y: Features, tie: Callable[..., Axis]) -> tuple[tuple[Axis, ...], list[Axis]]:
    """The axes of a result of two operands, and those along which one of them is one number."""
    ndim, copies = max(len(x.axes), len(y.axes)), {}
    padded = [((),) * (ndim - len(its.axes)) + its.axes for its in (x, y)]
    result, constant, own = [], [], []
    for a, b in zip(*padded):
        if axis_size(a) == axis_size(b):
            if axis_size(a) == 1:
                for axis in (a, b):
                    if len(tuple(leaves(axis))) and not len(tuple(leaves(a))) == len(tuple(leaves(b))):
                        site.ledger.still(site, axis, "one number", "axes of one length")
            result.append(tie(site, a, b, copies) if tuple(leaves(a)) and tuple(leaves(b)) else a or b)
        else:
            one, many = (a, b) if axis_size(a) == 1 else (b, a)
            site.ledger.still(site, one, "one number beside many", "axes of one length")
            constant.append(many)
            if many is b:
                own.append(len(result))
            result.append(many)
    labels = fresh_labels([result[k] for k in own], labels_of([axis for k, axis in enumerate(result) if k not in own]), copies)
    for k in own:
        result[k] = relabelled(result[k], labels)
    return tuple(result), constant


def alike(site: Site, a: Axis, b: Axis, copies: Copies) -> Axis:
    site.ledger.tie(site, a, b, copies)
    return a


def scaled(site: Site, a: Axis, b: Axis, copies: Copies) -> Axis:
    """The axis of a product of two features: signs multiply."""
    first, second = tuple(leaves(a)), tuple(leaves(b))
    for own, other in ((second, first), (first, second)):
        if len(own) == 1 and isinstance(own[0], Unknown) and own[0] not in [
                atom.of if isinstance(atom, Absolute) else atom for atom in other]:
            site.ledger.bind(site, own[0], tuple(map(absolute, other)))
            return other
    if tuple(map(absolute, first)) == second:
        return first
    if tuple(map(absolute, second)) == first:
        return second
    site.ledger.tie(site, a, b, copies)
    return tuple(map(absolute, leaves(a)))


@rule("add", "sub", "rsub", "subtract", "__add__", "__radd__", "__sub__")
def add(site: Site, x: Any, y: Any, **options: Any) -> Features:
    """A sum, whose terms are moved alike from here on."""
    if not _is_tensor(x) or not _is_tensor(y):
        x, number = (x, y) if _is_tensor(x) else (y, x)
        return odd(site, x) if number == 0 else pointwise(site, x)
    x, y = as_features(site, x), as_features(site, y)
    axes, constant = broadcast(site, x, y, alike)
    site.ledger.unsigned(site, constant, "one number that is added to features with signs")
    return Features(axes)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Features) or isinstance(value, Tensor) and value.ndim > 0


@rule("copy")
def copied(site: Site, x: Features, y: Any, *unused: object) -> Features:
    """Numbers written over others, which are moved alike."""
    return Features(broadcast(site, x, as_features(site, y), alike)[0])


@rule("mul", "div", "true_divide", "multiply", "divide", "__mul__", "__rmul__")
def multiply(site: Site, x: Any, y: Any, *, rounding_mode: str | None = None, **options: Any) -> Features:
    """A product or a quotient; signs multiply, and a factor without signs leaves those of the other."""
    if rounding_mode == "floor":
        return together(site, *(value for value in (x, y) if _is_tensor(value)))
    if not _is_tensor(x) or not _is_tensor(y):
        return odd(site, x if _is_tensor(x) else y)
    return Features(broadcast(site, as_features(site, x), as_features(site, y), scaled)[0])


@rule("maximum", "minimum", "max.other", "min.other", "fmax", "fmin", "atan2", "fmod", "remainder", "floor_divide", "lerp",
      "eq", "ne", "lt", "le", "gt", "ge", "greater", "less", "logical_and", "logical_or", "logical_xor", "where", "hypot",
      "bitwise_and", "bitwise_or", "masked_fill", "addcmul", "addcdiv", "logaddexp", "isclose", "copysign", "xlogy")
def together(site: Site, *operands: Any, **options: Any) -> Features:
    """A function of several numbers at each place: it commutes with permutations."""
    tensors = [as_features(site, value) for value in operands if _is_tensor(value)]
    result = tensors[0]
    for other in tensors:
        site.ledger.unsigned(site, other.axes, NOT_ODD)
        result = Features(broadcast(site, result, other, alike)[0]) if other is not tensors[0] else result
    return Features(result.axes)
