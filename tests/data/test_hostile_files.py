"""Files that are damaged, foreign, or made to do harm: each is read or refused, without a traceback or gigabytes."""
import gzip
import io
import random
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

from symbnn import memory
from symbnn.data.idx import read_idx
from symbnn.data.own_images import load_npz
from symbnn.data.splits import OddData
from symbnn.errors import Refusal
from tolerances import assert_close

GENERATOR = np.random.default_rng(0)
IMAGES, LABELS = GENERATOR.integers(0, 256, (40, 4, 4), dtype=np.uint8), np.arange(40) % 4
NAMES = ("train_images", "train_labels", "test_images", "test_labels")
MEBIBYTE = 2**20


def npy(array: np.ndarray, version=None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), version=version)
    return buffer.getvalue()


def members(**changes) -> dict[str, bytes]:
    """The four arrays as .npy files; a change is an array or the bytes of a file."""
    arrays = dict(zip(NAMES, (IMAGES, LABELS, IMAGES[:8], LABELS[:8]))) | changes
    return {f"{name}.npy": its if isinstance(its, bytes) else npy(its) for name, its in arrays.items()}


def zipped(files: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def header(descr="'|u1'", shape="(40, 4, 4)", version=(1, 0), order="False", size=None) -> bytes:
    """The header of a .npy file as text, however wrong."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    size = len(text) if size is None else size
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", size) + text


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a data set of one's own."""
    def reader(content: bytes, **options):
        (tmp_path / "mine.npz").write_bytes(content)
        return load_npz(tmp_path / "mine.npz", **options)
    return reader


@pytest.fixture
def in_bounds():
    """At most 64 MiB are taken inside the test, and its data fit into 2 GiB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MEBIBYTE, f"{peak / MEBIBYTE:.0f} MiB"


# Numbers of other kinds


REAL = IMAGES / 255


@pytest.mark.parametrize("images", [
    REAL.astype(">f4"), REAL.astype(">f8"), REAL.astype("<f2"), REAL.astype(">f2"), REAL.astype(np.longdouble),
    np.asfortranarray(REAL), np.asfortranarray(REAL.astype(">f4")), IMAGES,
], ids=lambda its: f"{its.dtype.str} {'F' if np.isfortran(its) else 'C'}")
def test_numbers_in_any_order_of_bytes_are_read(images, read):
    labels = LABELS.astype(">i2")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = read(zipped(members(train_images=images, test_images=images[:8], train_labels=labels), compression),
                    dtype=torch.float64)
        assert_close(data.test.inputs[:, 0], REAL[:8], 1e-3 if images.dtype.itemsize == 2 else 1e-6)
        assert data.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(version, read):
    files = members(train_images=npy(IMAGES, version), train_labels=npy(LABELS, version))
    assert len(read(zipped(files)).train) == 36


STRUCTURED = np.zeros(40, [("image", "u1", (4, 4)), ("label", "i4")])


@pytest.mark.parametrize("change, reason", [
    ({"train_images": REAL > 0.5}, "type bool"), ({"train_images": REAL.astype(complex)}, "type complex128"),
    ({"train_images": IMAGES.astype("M8[s]")}, "type datetime64"), ({"train_images": IMAGES.astype("S3")}, "type .S3"),
    ({"train_images": STRUCTURED}, "type .*image"), ({"train_images": IMAGES.astype(object)}, "type object"),
    ({"train_images": np.uint8(3)}, r"shape \(\)"), ({"train_images": IMAGES[:0]}, "nothing in it"),
    ({"train_images": IMAGES[:, :0]}, "nothing in it"), ({"train_images": IMAGES[None, None]}, r"shape \(1, 1, 40"),
    ({"train_labels": LABELS > 1}, "type bool"), ({"train_labels": LABELS * 1.0}, "type float64, not integers"),
    ({"train_labels": LABELS[:0]}, "nothing in it"), ({"train_labels": np.int64(3)}, "one integer label for each"),
    ({"train_labels": LABELS.astype(object)}, "type object"), ({"train_labels": LABELS.astype("m8[s]")}, "timedelta"),
    ({"train_images": REAL * 1e300}, "which torch.float32 does not hold"),
    ({"train_images": np.where(REAL > 0.5, np.inf, REAL)}, "NaN or infinity"),
    ({"train_images": np.full((40, 4, 4), np.longdouble(10) ** 400)}, "NaN or infinity"),
])
def test_arrays_of_other_kinds_are_refused(change, reason, read):
    files = {f"{name}.npy": b"" for name in NAMES}
    for name, content in members(**{name: b"" for name in change}).items():
        files[name] = content
    for name, array in change.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        files[f"{name}.npy"] = buffer.getvalue()
    with pytest.raises(Refusal, match=reason):
        read(zipped(files))


# Labels and images that say something is wrong


def labels(*others: int, count: int = 40) -> np.ndarray:
    return np.concatenate([others, np.arange(count - len(others)) % 4]).astype(np.int64)


@pytest.mark.parametrize("wrong, reason", [
    (labels(10**9), "the label 1000000000 among 5 different labels of 40"), (labels(2**62), "no more than images"),
    (labels(255, 255), "the label 255 among"), (labels(20), "the label 20 among 5"), (labels(40), "the label 40"),
    (np.full(40, 2**64 - 1, np.uint64), "the label 18446744073709551615"), (labels(-1), "count from 0"),
    (np.zeros(40, int), "40 times the label 0"), (np.full(40, 3), "40 times the label 3"),
    (np.full(40, 10**9), "two classes or more"),
])
def test_labels_that_no_task_has_are_refused(wrong, reason, read, in_bounds):
    with pytest.raises(Refusal, match=reason) as caught:
        read(zipped(members(train_labels=wrong)))
    if "return_inverse" in caught.value.fix and len(np.unique(wrong)) > 1:  # the advice works
        counted = np.unique(wrong, return_inverse=True)[1]
        assert len(read(zipped(members(train_labels=counted))).classes) == len(np.unique(wrong))


def test_a_wrong_label_in_the_test_split_is_refused(read):
    for label in (255, 10**9, 2**62):
        with pytest.raises(Refusal, match=f"label {label} in the test split"):
            read(zipped(members(test_labels=labels(label, count=8))))
    with pytest.raises(Refusal, match=r"test_labels.*the label 18446744073709551615"):
        read(zipped(members(test_labels=np.full(8, 2**64 - 1, np.uint64))))


@pytest.mark.parametrize("change, said", [
    ({"train_labels": labels(7)}, "3 of the 8 classes of mine.npz have no training image, the first of them 4"),
    ({"train_labels": np.where(LABELS > 0, LABELS, 1)}, "1 of the 4 classes .* the first of them 0"),
    ({"train_images": np.full_like(IMAGES, 7)}, "all 36 training inputs are equal"),
    ({"train_images": np.repeat(IMAGES[:1], 40, 0)}, "all 36 training inputs are equal"),
    ({"train_images": np.arange(40, dtype=np.uint8)[:, None, None] + 0 * IMAGES}, "one number throughout"),
])
def test_what_is_odd_is_said(change, said, read):
    with pytest.warns(OddData, match=said) as caught:
        read(zipped(members(**change)))
    assert len(caught) == 1


# Archives


def test_archives_of_other_programs_are_refused(read):
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(Refusal, match="train_images, which is compressed in a way"):
            read(zipped(members(), compression))
    with pytest.raises(Refusal, match="0 arrays called test_labels"):
        read(zipped({name: its for name, its in members().items() if name != "test_labels.npy"}))
    with pytest.raises(Refusal, match="2 arrays called train_images"):
        read(zipped(members() | {"train_images": npy(IMAGES)}))
    twice = zipped(members() | {"test_label2.npy": npy(LABELS[:8])}).replace(b"test_label2", b"test_labels")
    with pytest.raises(Refusal, match="2 arrays called test_labels"):
        read(twice)


@pytest.mark.parametrize("flag, method, reason", [
    (0x1, 8, "encrypted"), (0x41, 8, "encrypted"), (0x20, 8, "NotImplementedError"), (0, 99, "compressed in a way"),
    (0, 1, "compressed in a way"), (0, 9, "compressed in a way"), (0x800, 8, None),
])
def test_flags_and_methods_of_an_archive(flag, method, reason, read):
    content = bytearray(zipped(members()))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(signature)
        while place >= 0:
            struct.pack_into("<HH", content, place + at, flag, method)
            place = content.find(signature, place + 4)
    if reason is None:
        assert len(read(bytes(content)).train) == 36
        return
    with pytest.raises(Refusal, match=reason):
        read(bytes(content))


HUGE = 10**15
HEADERS = {
    "petabytes": header(shape=f"({HUGE}, 4, 4)"), "digits": header(shape="(" + "9" * 4000 + ", 4, 4)"),
    "more digits": header(shape="(" + "9" * 5000 + ", 4, 4)"), "negative": header(shape="(-40, 4, 4)"),
    "one more": header(shape="(41, 4, 4)"), "one less": header(shape="(39, 4, 4)"),
    "float": header(shape="(4.0, 4, 4)"),
    "bool": header(shape="(True, 4, 4)"), "text": header(shape="'abc'"), "no shape": header(shape="None"),
    "axes": header(shape="(" + "1, " * 65 + ")"), "empty and huge": header(shape=f"(0, {HUGE}, {HUGE})"),
    "descr": header("'nonsense'"), "descr of code": header("__import__('os')"), "wide": header("'|V999999999999'"),
    "text descr": header("'<U1000000000'"), "old descr": header("'a8'"), "nested": header("(" * 500 + ")" * 500),
    "minus": header("-" * 9000 + "1"), "bytes": header("b'|u1'"), "order": header(order="7"),
    "version 0": header(version=(0, 0)), "version 9": header(version=(9, 9)), "long": header() + b" " * 20000,
    "promised long": header(version=(2, 0), size=2**32 - 1), "promised short": header(size=3), "python 2": header(
        shape="(40L, 4L, 5L)"), "no dictionary": b"\x93NUMPY\x01\x00\x10\x00" + b"[1, 2, 3]" + b" " * 7,
    "keys": b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': '|u1'}", "cut": header()[:20], "none": b"",
    "magic": b"\x93NUMPX" * 9, "pickle": b"\x80\x04\x95" + bytes(600), "brackets": header("[" * 9000),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_wrong_headers_are_refused(case, compression, read, in_bounds):
    with pytest.raises(Refusal, match=r"mine.npz") as caught:
        read(zipped(members(train_images=HEADERS[case] + IMAGES.tobytes()), compression))
    assert len(str(caught.value)) < 2000


def test_a_sound_header_of_the_same_kind_is_read(read):
    assert len(read(zipped(members(train_images=header() + IMAGES.tobytes()))).train) == 36


def bomb(size: int, beginning: bytes, **options) -> bytes:
    """An archive with a member of so many zeros after its beginning."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members().items():
            if name != "train_images.npy":
                archive.writestr(name, content)
        with archive.open("train_images.npy", "w", force_zip64=True) as file:
            file.write(beginning)
            for _ in range(size // MEBIBYTE):
                file.write(bytes(MEBIBYTE))
    return buffer.getvalue()


def test_an_archive_that_unpacks_into_more_than_it_says_is_refused(read):
    content = bomb(256 * MEBIBYTE, header())
    assert len(content) < MEBIBYTE
    tracemalloc.start()
    with pytest.raises(Refusal, match=r"train_images in 268435\d\d\d bytes with a header that promises uint8"):
        read(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MEBIBYTE


def test_sizes_are_added_up_before_anything_is_read(read, monkeypatch, in_bounds):
    monkeypatch.setattr(memory, "ROOM", 128 * MEBIBYTE)
    with pytest.raises(Refusal, match=r"the arrays of mine.npz of at most 134,217,728 bytes.*one of 209,7.*\[::10\]"):
        read(bomb(40 * MEBIBYTE, header(shape=f"({40 * MEBIBYTE // 16}, 4, 4)")))
    assert len(read(zipped(members())).train) == 36


# IDX files


def idx(shape, numbers: bytes, code=0x08, axes=None) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    return bytes([0, 0, code, len(shape) if axes is None else axes]) + sizes + numbers


@pytest.fixture
def read_bytes(tmp_path):
    """Reads bytes as an IDX file."""
    def reader(content: bytes):
        (tmp_path / "some-images").write_bytes(content)
        return read_idx(tmp_path / "some-images")
    return reader


LARGEST = 2**32 - 1


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("content", [
    idx((1,) * 33, b"0"), idx((1,) * 65, b"0"), idx((1,) * 255, b"0"), idx((LARGEST,) * 2, b""),
    idx((LARGEST,) * 4, b""), idx((LARGEST, LARGEST // 4), b""),
    idx((0, LARGEST, LARGEST), b""), idx((0,) * 40, b""), idx((2**31, 28, 28), b"1"),
    idx((2, 3), b"12345"), idx((2, 3), b"1234567"), idx((2, 3), bytes(5000)), idx((), b""), idx((2,), b"", axes=200),
    idx((2, 2), b"1234", code=0x0E), idx((2, 2), b"1234", code=0x0A),
], ids=lambda its: its[:12].hex())
def test_idx_files_of_impossible_shapes_are_refused(content, packed, read_bytes, in_bounds):
    with pytest.raises(Refusal, match="IDX file as some-images"):
        read_bytes(gzip.compress(content) if packed else content)


def test_idx_files_at_the_limits_are_read(read_bytes):
    assert read_bytes(idx((1,) * 32, b"7")).shape == (1,) * 32
    assert read_bytes(idx((0, 28, 28), b"")).shape == (0, 28, 28)
    for count in (1023 - 8, 1024 - 8, 1025 - 8, 2**20 - 8, 2**20 - 7):
        for content in (idx((count,), bytes(count)), gzip.compress(idx((count,), bytes(count)))):
            assert read_bytes(content).shape == (count,)


def test_gzip_is_unpacked_no_further_than_its_header_promises(read_bytes):
    content = gzip.compress(idx((2, 3), bytes(256 * MEBIBYTE)), compresslevel=1)
    tracemalloc.start()
    with pytest.raises(Refusal, match="more than 18 bytes"):
        read_bytes(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MEBIBYTE


def test_idx_files_beyond_memory_are_refused_before_they_are_read(read_bytes, monkeypatch, in_bounds):
    monkeypatch.setattr(memory, "ROOM", 2**19)
    with pytest.raises(Refusal, match="an IDX file as some-images of at most 524,288 bytes"):
        read_bytes(gzip.compress(idx((2**20,), bytes(2**20))))


@pytest.mark.parametrize("reader", [load_npz, read_idx])
def test_what_is_no_file_is_refused(reader, tmp_path):
    for path in (tmp_path, "/dev/zero", "/dev/null", tmp_path / "absent", "no\0byte", tmp_path / ("a" * 5000)):
        with pytest.raises(Refusal, match=r"IDX file|npz file"):
            reader(path)


# Whatever else happens to a file


def mutated(content: bytes, choice: random.Random) -> bytes:
    """The bytes with a few of them changed, removed, repeated or put elsewhere."""
    changed = bytearray(content)
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(len(changed) + 1)
        kind = choice.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << choice.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = choice.choice((0, 1, 0x7F, 0x80, 0xFF, choice.randrange(256)))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + choice.randint(1, 9)]
        else:
            changed[at:at] = choice.choice((bytes(4), b"\xff" * 4, b"9" * 30, bytes(changed[:at][-9:])))
    return bytes(changed)


def mutations(content: bytes, count: int, seed: int):
    choice = random.Random(seed)
    return [mutated(content, choice) for _ in range(count)]


def outcome(make) -> str:
    """Whether the file was read or refused; all other errors are raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make()
    except Refusal:
        return "refused"
    return "read"


@pytest.mark.parametrize("kind", ["stored", "deflated", "header"])
def test_mutated_archives_are_read_or_refused(kind, read, in_bounds):
    if kind == "header":  # in a sound archive
        start = npy(IMAGES)
        contents = [zipped(members(train_images=mutated_start + IMAGES.tobytes()), zipfile.ZIP_STORED)
                    for mutated_start in mutations(start[:-IMAGES.nbytes], 200, 2)]
    else:
        compression = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        contents = mutations(zipped(members(), compression), 200, 0)
    found = [outcome(lambda content=content: read(content)) for content in contents]
    assert found.count("refused") > 100


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_mutated_idx_files_are_read_or_refused(packed, read_bytes, in_bounds):
    content = idx((4, 3, 2), bytes(range(24)))
    contents = mutations(gzip.compress(content) if packed else content, 200, 3)
    contents += [gzip.compress(its) for its in mutations(content, 200, 4)] if packed else []
    found = [outcome(lambda its=its: read_bytes(its)) for its in contents]
    assert found.count("refused") > 100
