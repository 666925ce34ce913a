"""Shapes at run time: a call that returns must have had the shapes and dtypes that its annotations declare.

Installed by conftest.py before the package is imported. Arguments are judged after the call and not before it, so that
whatever the library refuses is refused by the library; what it accepts is then held to the annotations.
"""
import functools
import inspect
import types
import typing
from collections.abc import Callable

import jaxtyping
from torch import Tensor


def disagrees(value: object, annotation: object) -> bool:
    """Whether a tensor, or a tensor in a tuple, list or dictionary, is none that the annotation allows."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return isinstance(value, Tensor) and not isinstance(value, annotation)
    if origin in (typing.Union, types.UnionType):
        return isinstance(value, Tensor) and any(is_array(one) for one in inside) and Tensor not in inside and all(
            disagrees(value, one) or not is_array(one) for one in inside)
    if isinstance(value, tuple) and origin is tuple and inside:
        kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        return len(kinds) == len(value) and any(map(disagrees, value, kinds))
    if isinstance(value, list) and origin is list:
        return any(disagrees(one, inside[0]) for one in value)
    if isinstance(value, dict) and origin is dict:
        return any(disagrees(one, inside[1]) for one in value.values())
    return False


def is_array(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def shown(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def checked(function: Callable) -> Callable:
    """What jaxtyping's import hook calls with a stub of each function: one before the call, one that has its output."""
    signature = inspect.signature(function)
    if signature.return_annotation is typing.Any:
        return function  # before the call

    @functools.wraps(function)
    def check(*arguments, **named):
        output = function(*arguments, **named)
        bound = signature.bind(*arguments, **named)
        pairs = [(name, value, signature.parameters[name].annotation) for name, value in bound.arguments.items()]
        for name, value, annotation in [*pairs, ("its result", output, signature.return_annotation)]:
            if disagrees(value, annotation):
                raise TypeError(f"{name} of {function.__qualname__} is {shown(value)}, and {annotation} is declared")
        return output

    return check
