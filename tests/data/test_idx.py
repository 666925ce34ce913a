"""IDX files: read as they were written, and refused when they are damaged in any way."""
import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_data import idx
from symbnn.data.idx import IDX_TYPES, read_idx
from symbnn.errors import Refusal


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4), st.sampled_from(sorted(IDX_TYPES)), st.booleans())
@settings(deadline=None)
def test_idx_files_are_read_as_written(tmp_path_factory, shape, code, compressed):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 100
    content = idx(array, code)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert np.array_equal(read_idx(path), array)


@given(st.integers(0, 39), st.booleans())
@settings(deadline=None)
def test_every_truncation_is_refused_by_name(tmp_path_factory, length, compressed):
    content = idx(np.arange(24).reshape(2, 3, 4))
    path = tmp_path_factory.mktemp("idx") / "some-images"
    path.write_bytes(gzip.compress(content[:length]) if compressed else content[:length])
    with pytest.raises(Refusal, match="a complete IDX file as some-images"):
        read_idx(path)


def test_foreign_and_damaged_files_are_refused_by_name(tmp_path):
    path, content = tmp_path / "some-images", idx(np.arange(24).reshape(2, 3, 4))
    packed = gzip.compress(content)
    bad_sum = packed[:-8] + bytes(8)
    foreign = (content + b"\0", b"\x89PNG\r\n", b"\0\0\x07\x01" + content[4:], b"\1" + content)
    for broken in (*foreign, packed[:-1], packed[:5], bad_sum):
        path.write_bytes(broken)
        with pytest.raises(Refusal, match="a complete IDX file as some-images"):
            read_idx(path)
    with pytest.raises(Refusal, match="No such file"):
        read_idx(tmp_path / "absent")
    with pytest.raises(Refusal, match="cannot be read"):
        read_idx(tmp_path)
