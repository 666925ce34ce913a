"""Rules of one's own: how a group acts on an operator or layer that the library does not know, checked when it is taught."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import Refusal, check_kind, require
from .actions import Action
from .networks import Actions, intertwining_error, network_action
from .operations import LAYER_RULES, RULES, Rule

# --- teaching

TOLERANCE = 1e-9  # of the check, in float64, for outputs of order one


def rule(kind: type[nn.Module] | str, *, network: nn.Module, input: Actions, hidden: Any = "trivial",
         example: Any = None) -> Callable[[Rule], Rule]:
    """Teach how a group acts on a layer of this type, or on the operator of torch of this name.

    The function that follows gets a `Site`, the layer (for a type), the `Features` of its inputs, and by name those of
    its parameters; it ties axes or notes conditions on them, and returns the `Features` of the output. Before it is
    used it is checked: the action that is derived for `network`, in which the layer occurs, must intertwine to 1e-9 on
    random inputs and weights in float64. `input`, `hidden` and `example` are as in `network_action`. Raises `Refusal`
    for a rule that is wrong, which is then not kept, and for an operator that has a rule.
    """
    check_kind(kind, (type, str), "what a rule is for", "rule(MyLayer, network=..., input=...)")
    table: dict[Any, Rule] = RULES if isinstance(kind, str) else LAYER_RULES
    require(not isinstance(kind, str) or kind not in RULES, "an operator without a rule", f"{kind!r}, which has one",
            "a rule that is taught twice, or an operator that the library knows", f"RULES.pop({kind!r}), and then the rule")

    def teach(function: Rule) -> Rule:
        before = table.get(kind)
        table[kind] = function
        try:
            _check(kind, network, input, hidden, example)
        except Exception:
            table.pop(kind) if before is None else table.update({kind: before})
            raise
        return function

    return teach


def _check(kind: type | str, network: nn.Module, input: Actions, hidden: Any, example: Any) -> None:
    """Refuse a rule by which a network does not intertwine."""
    name = kind if isinstance(kind, str) else kind.__name__
    double = _randomised(network)
    action = network_action(double, input, hidden=hidden, example=example)
    generator = torch.Generator().manual_seed(0)

    def batch(its: Action) -> torch.Tensor:
        return torch.randn(5, *its.shape, dtype=torch.float64, generator=generator)

    x = example if example is not None else tree_map(batch, input, is_leaf=lambda its: isinstance(its, Action))
    error = intertwining_error(double, action, x)
    if not error < TOLERANCE:
        raise Refusal(f"a rule for {name} by which the network intertwines, to {TOLERANCE:g}",
                      got=f"an error of {error:.3g} on random inputs and weights",
                      cause="axes that are tied although the layer moves them differently, a condition that is not noted, or "
                            "parameters that are not tied to what they are multiplied with",
                      fix="ledger.tie for axes that are moved alike, ledger.unsigned, .still or .closed for what the layer asks")


def _randomised(network: nn.Module) -> nn.Module:
    """A copy in float64 with parameters of order one."""
    double, generator = copy.deepcopy(network).double().eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in double.parameters():
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=generator))
    return double
