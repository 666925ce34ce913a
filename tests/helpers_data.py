"""What the tests of the rooms on data share."""
import numpy as np

from symbnn.data.idx import IDX_TYPES


def typed(fix: str, **names):
    """What a user gets who types the fix of a refusal: its statements are executed, its last expression is returned."""
    *before, last = fix.split("; ")
    for statement in before:
        exec(statement, names)
    return eval(last, names)


def idx(array: np.ndarray, code=0x08) -> bytes:
    """An array as an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(IDX_TYPES[code]).tobytes()
