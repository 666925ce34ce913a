"""Operations that sum over products: linear layers, products of matrices, attention, look-ups and recurrent layers."""

from collections.abc import Sequence
from itertools import count
from typing import Any

from torch import Tensor

from .axes import Axis, Still, axis_size
from .features import Features, Site
from .operations import add, alike, as_features, broadcast, fresh_labels, labels_of, relabelled, rule, scaled
from .views import Stacked, cat, index_select

SUM_OVER = "sums over it"
TOGETHER = ("nn.Flatten(1) before a linear layer, all axes together that are exchanged with each other, or a group that keeps "
            "them apart, such as flips()")


def contract(site: Site, x: Features, first: str, y: Features, second: str, out: str) -> Features:
    """The sum over products of two tensors whose axes have these letters, as in einsum; x and y are not broadcast.

    An axis of both that is summed over is moved alike in both, and its signs cancel; one that is kept is moved alike up
    to signs, which multiply; one of a single tensor goes through, or is summed over, which no sign survives.
    """
    ledger, copies = site.ledger, {}
    axes: dict[str, Axis] = dict(zip(first, x.axes))
    for letter, axis in zip(second, y.axes):
        if letter in first:
            tie = scaled if letter in out else alike
            axes[letter] = tie(site, axes[letter], axis, copies)
    own = [letter for letter in second if letter not in first]
    labels = fresh_labels([axis for letter, axis in zip(second, y.axes) if letter in own], labels_of(x.axes), copies)
    axes |= {letter: relabelled(axis, labels) for letter, axis in zip(second, y.axes) if letter in own}
    both = [letter for letter in first if letter in second and letter not in out]
    alone = [letter for letter in axes if letter not in out and letter not in both]
    if both or alone:
        ledger.closed(site, [axes[letter] for letter in (*both, *alone)], SUM_OVER, TOGETHER)
    ledger.unsigned(site, [axes[letter] for letter in alone], "a sum over features that change signs")
    return Features(tuple(axes[letter] for letter in out))


def letters(number: int, start: int = 0) -> str:
    """Names for so many axes."""
    return "".join(chr(ord("A") + start + k) for k in range(number))


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to."""
    return parameter.rpartition(".")[0]


def note_layer(site: Site, weight: Features, reads: Axis, writes: Axis) -> None:
    """Note which channels the layer of this weight reads and writes."""
    if weight.parameter:
        site.ledger.layers.setdefault(layer_of(weight.parameter), (reads, writes))


def with_bias(site: Site, y: Features, bias: Any, dim: int = -1) -> Features:
    """The sum with a bias along one axis."""
    if bias is not None:
        site.ledger.tie(site, y.axes[dim], as_features(site, bias).axes[0])
        rest = [axis for k, axis in enumerate(y.axes) if k != dim % len(y.axes)]
        site.ledger.unsigned(site, rest, "a bias that is the same for features with signs")
    return y


@rule("linear")
def linear(site: Site, x: Any, weight: Any, bias: Any = None) -> Features:
    """A linear map of the last axis: `W -> P_out W P_in^-1`."""
    x, weight = as_features(site, x), as_features(site, weight)
    lead = letters(len(x.axes) - 1)
    if len(weight.axes) == 1:
        return contract(site, x, lead + "i", weight, "i", lead)
    y = contract(site, x, lead + "i", weight, "oi", lead + "o")
    note_layer(site, weight, x.axes[-1], weight.axes[0])
    return with_bias(site, y, bias)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "__matmul__")
def matmul(site: Site, x: Any, y: Any) -> Features:
    """A product of matrices, over all leading axes."""
    x, y = as_features(site, x), as_features(site, y)
    a, b = len(x.axes), len(y.axes)
    rows, columns = ("r" if a > 1 else ""), ("c" if b > 1 else "")
    x, lead_x, y, lead_y = _led(site, x, max(a - 2, 0), y, max(b - 2, 0))
    lead = "".join(sorted(set(lead_x) | set(lead_y)))
    return contract(site, x, lead_x + rows + "i", y, lead_y + "i" + columns, lead + rows + columns)


def _led(site: Site, x: Features, a: int, y: Features, b: int) -> tuple[Features, str, Features, str]:
    """Letters for leading axes that are broadcast: an axis of length one beside a longer one is left out."""
    ndim, found = max(a, b), []
    for its, own, other, others in ((x, a, y, b), (y, b, x, a)):
        keep, names = [], ""
        for k in range(own):
            size, place = axis_size(its.axes[k]), ndim - own + k
            across = place - (ndim - others)
            if size == 1 and across >= 0 and axis_size(other.axes[across]) > 1:
                site.ledger.still(site, its.axes[k], "one matrix beside many", "axes of one length")
            else:
                keep.append(its.axes[k])
                names += letters(1, place)
        found += [Features((*keep, *its.axes[own:])), names]
    return tuple(found)  # type: ignore[return-value]


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(site: Site, bias: Any, x: Any, y: Any, **options: object) -> Features:
    """A sum with a product of matrices."""
    return add(site, matmul(site, x, y), bias)


@rule("outer", "ger")
def outer(site: Site, x: Any, y: Any) -> Features:
    """All products of the entries of two vectors."""
    return contract(site, as_features(site, x), "r", as_features(site, y), "c", "rc")


@rule("einsum")
def einsum(site: Site, equation: str, tensors: Sequence[Any], **options: object) -> Features:
    """A sum over products of several tensors."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    operands = [as_features(site, tensor) for tensor in tensors]
    free = iter(chr(ord("α") + k) for k in count())
    dots = max((len(its.axes) - len(term.replace("...", "")) for its, term in zip(operands, terms) if "..." in term), default=0)
    names = "".join(next(free) for _ in range(dots))
    if "->" not in equation:
        once = sorted(letter for letter in set(inputs) - {",", "."} if inputs.count(letter) == 1)
        out = ("..." if "..." in inputs else "") + "".join(once)
    for k, (its, term) in enumerate(zip(operands, terms)):
        own = len(its.axes) - len(term.replace("...", ""))
        terms[k] = term.replace("...", names[dots - own:] if own else "")
        if len(set(terms[k])) < len(terms[k]):
            site.refuse(f"the equation {equation!r}", "a diagonal, which is no rule's", "torch.diagonal, or other letters")
    out = out.replace("...", names)
    result, letters_ = operands[0], terms[0]
    for k, (other, term) in enumerate(zip(operands[1:], terms[1:]), 1):
        later = set(out).union(*terms[k + 1:])
        kept = "".join(letter for letter in dict.fromkeys(letters_ + term) if letter in later)
        result, letters_ = contract(site, result, letters_, other, term, kept), kept
    return contract(site, result, letters_, Features(()), "", out) if letters_ != out else result


@rule("bilinear")
def bilinear(site: Site, x: Features, y: Features, weight: Features, bias: Any = None) -> Features:
    """A bilinear layer."""
    lead = letters(len(x.axes) - 1)
    half = contract(site, x, lead + "i", weight, "oij", lead + "oj")
    return with_bias(site, contract(site, half, lead + "oj", y, lead + "j", lead + "o"), bias)


@rule("scaled_dot_product_attention")
def attention(site: Site, q: Features, k: Features, v: Features, mask: Any = None, dropout: float = 0.0,
              causal: bool = False, **options: Any) -> Features:
    """softmax(q k^T) v: tokens are permuted for every weight, and the units of q and k, and those of v, by actions of their own."""
    ledger = site.ledger
    q, k, v = (as_features(site, its) for its in (q, k, v))
    if options.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        for its in (q, k, v):
            ledger.still(site, its.axes[-3], "heads that share keys and values", "as many heads for keys as for queries")
        groups = q.shape[-3] // k.shape[-3]
        k, v = (Features((*its.axes[:-3], (Still(groups * its.shape[-3]),), *its.axes[-2:])) for its in (k, v))
    scores = matmul(site, q, Features((*k.axes[:-2], k.axes[-1], k.axes[-2])))
    if causal:
        for axis in scores.axes[-2:]:
            ledger.still(site, axis, "causal attention, which depends on the order of the tokens", "is_causal=False")
    if mask is not None:
        scores = Features(broadcast(site, scores, as_features(site, mask), alike)[0])
    ledger.unsigned(site, scores.axes, "an exponential, which does not commute with a change of sign")
    ledger.closed(site, scores.axes[-1:], "takes a softmax over all tokens", TOGETHER)
    return matmul(site, scores, v)


@rule("embedding")
def embedding(site: Site, weight: Any, index: Any, *unused: object, **options: object) -> Features:
    """Rows of a table by their numbers: nothing may move along the numbers, as a group acts on places and not on values."""
    weight = as_features(site, weight)
    if isinstance(index, Tensor) and index.ndim != 1:
        rows = index_select(site, weight, 0, index.reshape(-1, index.shape[-1])[0]) if _rows_alike(index) else None
        if rows is not None:
            return Features((*((Still(size),) for size in index.shape[:-1]), *rows.axes))
    site.ledger.write(weight.axes[1], layer_of(weight.parameter))
    note_layer(site, weight, weight.axes[0], weight.axes[1])
    return index_select(site, weight, 0, index)


def _rows_alike(index: Tensor) -> bool:
    flat = index.reshape(-1, index.shape[-1])
    return bool((flat == flat[:1]).all())


# --- recurrent layers

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
ORDER = "a recurrent layer, which depends on the order along time"


@rule(*GATES)
def recurrent(site: Site, x: Features, states: Any, weights: Sequence[Features], has_biases: bool, num_layers: int,
              dropout: float, train: bool, bidirectional: bool, batch_first: bool = False) -> tuple:
    """Recurrent layers: each permutes its own units, all gates alike; nothing moves along time."""
    ledger, kind = site.ledger, site.operator
    kind = next(name for name in GATES if name in kind)
    if isinstance(x, Features) and not isinstance(x.axes, tuple) or len(x.axes) != 3:
        site.refuse("packed sequences", "sequences of several lengths in one tensor", "padded sequences")
    ledger.still(site, x.axes[1 if batch_first else 0], ORDER, "a group that leaves time as it is")
    directions, read, last, cells = 1 + bidirectional, x.axes[2], [], []
    given = list(states) if isinstance(states, (list, tuple)) else [states]
    each = len(weights) // (num_layers * directions)
    for layer in range(num_layers):
        written = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            own = [as_features(site, its) for its in weights[start:start + each]]
            hidden, cell = _cell(site, kind, read, own, has_biases)
            written.append(hidden)
            last.append(hidden)
            cells.append(cell)
        read = written[0] if directions == 1 else cat(site, [Features((axis,)) for axis in written]).axes[0]
    batch = x.axes[0 if batch_first else 1]
    _tie_states(site, given, (last, cells))
    outputs = Features((x.axes[0], x.axes[1], read))
    ends = [Stacked([Features((batch, axis)) for axis in axes]) for axes in (last, cells)]
    return (outputs, *ends) if kind == "lstm" else (outputs, ends[0])


def _cell(site: Site, kind: str, read: Axis, weights: Sequence[Features], has_biases: bool) -> tuple[Axis, Axis]:
    """The axes of the state and of the cell that the weights of one layer and direction write."""
    ledger, gates = site.ledger, GATES[kind]
    inner, outer = weights[0], weights[1]
    projected = len(weights) == (5 if has_biases else 3)
    size = axis_size(inner.axes[0]) // gates
    hidden: Axis = (ledger.unknown(size, layer_of(inner.parameter)),)
    state: Axis = (ledger.unknown(axis_size(outer.axes[1]), layer_of(inner.parameter)),) if projected else hidden
    stacked = (Still(gates), *hidden) if gates > 1 else hidden
    ledger.tie(site, read, inner.axes[1])
    ledger.tie(site, state, outer.axes[1])
    for tensor in weights[:4 if has_biases else 2]:
        ledger.tie(site, stacked, tensor.axes[0])
    if projected:
        ledger.tie(site, state, weights[-1].axes[0])
        ledger.tie(site, hidden, weights[-1].axes[1])
    if kind != "rnn_tanh":
        ledger.unsigned(site, (hidden, state), "gates, which do not commute with a change of sign")
    note_layer(site, inner, read, hidden)
    return state, hidden


def _tie_states(site: Site, given: Sequence[Any], written: tuple[list[Axis], list[Axis]]) -> None:
    """What layers start from is moved as what they write; nothing is asked of zeros."""
    for value, axes in zip(given, written):
        if isinstance(value, Tensor) and not bool(value.any()):
            continue
        start = value.items if isinstance(value, Stacked) else [Features(as_features(site, value).axes[1:])] * len(axes)
        for its, axis in zip(start, axes):
            site.ledger.tie(site, axis, its.axes[-1])


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(site: Site, x: Features, states: Any, *weights: Any) -> Any:
    """One step of a recurrent layer."""
    kind = next(name for name in GATES if name in site.operator)
    given = list(states) if isinstance(states, (list, tuple)) else [states]
    found = [as_features(site, its) for its in weights if its is not None]
    state, cell = _cell(site, kind, x.axes[-1], found, len(found) > 2)
    for value, axis in zip(given, (state, cell)):
        if isinstance(value, Features) or bool(value.any()):
            site.ledger.tie(site, axis, as_features(site, value).axes[-1])
    result = Features((*x.axes[:-1], state))
    return (result, Features((*x.axes[:-1], cell))) if kind == "lstm" else result
