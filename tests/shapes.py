"""Shapes at run time: a call that returns must have had the shapes and dtypes that its annotations declare.

`install`, called by conftest.py before the package is imported, wraps every function whose annotations name an array of
jaxtyping. Arguments are judged after the call and not before it, so that whatever the library refuses is refused by the
library; what it accepts is then held to the annotations. Of each function the first calls of every test are judged:
all of them would take five times as long.
"""
import ast
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

import jaxtyping
import torch
from torch import Tensor

CALLS = 4  # of each function, that are judged in a test
ARRAYS = {name for name, its in vars(jaxtyping).items() if isinstance(its, type) and hasattr(its, "dtypes")}
_seen: dict[types.CodeType, int] = {}


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


def watched(function: Callable) -> Callable:
    """The function, some of whose calls are judged."""

    @functools.wraps(function)
    def call(*arguments, **named):
        if torch.compiler.is_compiling():
            return function(*arguments, **named)
        output = function(*arguments, **named)
        count = _seen.get(function.__code__, 0)
        if count < CALLS:
            _seen[function.__code__] = count + 1
            judge(function, arguments, named, output)
        return output

    return call


def judge(function: Callable, arguments: tuple, named: dict, output: object) -> None:
    """Raise TypeError unless a call had the shapes that are declared."""
    signature = inspect.signature(function)
    bound = signature.bind(*arguments, **named).arguments
    pairs = [(name, value, signature.parameters[name].annotation) for name, value in bound.items()]
    with jaxtyping.jaxtyped("context"):
        for name, value, annotation in [*pairs, ("its result", output, signature.return_annotation)]:
            if disagrees(value, annotation):
                raise TypeError(f"{name} of {function.__qualname__} is {shown(value)}, and {annotation} is declared")


def begin_test() -> None:
    """Judge the first calls again."""
    _seen.clear()


class _Watch(ast.NodeTransformer):
    """Puts `watched` on functions whose annotations name an array."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations = [its.annotation for its in every] + [node.returns]
        names = {its.id for one in annotations if one is not None for its in ast.walk(one) if isinstance(its, ast.Name)}
        if names & ARRAYS:
            node.decorator_list.append(ast.parse("__import__('shapes').watched", mode="eval").body)
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        tree = _Watch().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "symbnn":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """From now on."""
    sys.meta_path.insert(0, _Finder())
