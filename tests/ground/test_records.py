"""Records: every way in which JSON can be wrong is refused with its place; what is read is what was written."""
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import NotRequired, TypedDict

from helpers_ground import refusal_of
from symbnn.errors import Refusal, check_count
from symbnn.records import LARGEST, SEAL, json_values, parse, parse_value, read_record, write_record


@dataclass(frozen=True)
class Settings:
    epochs: int = 20
    rate: float = 0.1
    rule: Literal["elbo", "evidence"] = "elbo"
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        check_count(self.epochs, "epochs", "epochs=20")


class Row(TypedDict):
    settings: Settings
    metrics: dict[str, float | None]
    comment: NotRequired[str]


GOOD = {"settings": {"epochs": 3, "rate": 0.5, "rule": "elbo", "sizes": [4, 8]}, "metrics": {"nll": 0.3, "kl": None}}


def changed(**changes):
    return {**GOOD, **changes}


def test_what_is_written_is_read(tmp_path):
    write_record(tmp_path / "a" / "row.json", GOOD)
    found = read_record(tmp_path / "a" / "row.json", Row, "run it again", sealed=True)
    assert found == {**GOOD, "settings": Settings(3, 0.5, "elbo", (4, 8))}
    assert json.loads((tmp_path / "a" / "row.json").read_text())[SEAL]


@pytest.mark.parametrize("wrong, found", [
    (changed(settings={"epochs": "3"}), "'3' at settings.epochs"),
    (changed(settings={"epochs": 3.0}), "3.0 at settings.epochs"),
    (changed(settings={"epochs": True}), "True at settings.epochs"),
    (changed(settings={"epochs": None}), "None at settings.epochs"),
    (changed(settings={"rule": "elb"}), "'elb' at settings.rule"),
    (changed(settings={"sizes": [1, "2"]}), "'2' at settings.sizes.1"),
    (changed(settings={"epoch": 3}), "3 at settings.epoch"),
    (changed(settings=[3]), "[3] at settings"),
    (changed(metrics={"nll": "low"}), "'low' at metrics.nll"),
    (changed(metric={}), "{} at metric"),
    ({"metrics": {}}, "nothing at settings"),
    ([GOOD], "at the whole"),
    (3, "3 at the whole"),
])
def test_the_place_of_what_is_wrong_is_said(wrong, found):
    for refusal in (refusal_of(lambda: parse(json.dumps(wrong), Row, "row.json", "run it again")),
                    refusal_of(lambda: parse_value(wrong, Row, "row.json", "run it again"))):
        assert found in refusal.got and refusal.fix == "run it again" and "row.json" in refusal.expected


def test_what_a_type_refuses_is_passed_on_with_its_place():
    refusal = refusal_of(lambda: parse_value(changed(settings={"epochs": 0}), Row, "row.json", "again"))
    assert "at settings of row.json" in refusal.got and refusal.fix == "epochs=20"


@pytest.mark.parametrize("text, said", [
    ('{"metrics": NaN}', "NaN"), ('{"metrics": -Infinity}', "-Infinity"), ('{"metrics": 1e999}', "JSON compliant"),
    ('{"a": 1, "a": 2}', "'a' stands twice"), ("[" * 10**6, "recursion"), ('{"a":' * 10**5, "recursion"),
    ("", "Expecting value"), ('{"a": 1', "Expecting"), ('{"a": 1} x', "Extra data"), (b"\x80\xff", "decode"),
    ("9" * 5000, "digits"), ("nul", "Expecting"),
])
def test_what_is_no_json_is_refused(text, said):
    refusal = refusal_of(lambda: parse(text, dict, "row.json", "again"))
    assert said in refusal.got and len(str(refusal)) < 600


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(LARGEST + 1)  # takes no room on the disk
    for path, said in ((tmp_path / "missing", "No such file"), (tmp_path / "folder", "no file, but a folder"),
                       (Path("/dev/zero"), "or a device"), (tmp_path / "huge", "256 MiB")):
        assert said in refusal_of(lambda path=path: read_record(path, dict, "again")).got


def test_a_seal_tells_an_edit(tmp_path):
    path = tmp_path / "row.json"
    write_record(path, GOOD)
    text = path.read_text()
    path.write_text(text.replace("0.3", "0.2"))
    assert "does not agree" in refusal_of(lambda: read_record(path, Row, "again")).got
    path.write_text(json.dumps(GOOD))  # as earlier versions wrote it
    assert read_record(path, Row, "again")["metrics"] == GOOD["metrics"]
    assert "no seal" in refusal_of(lambda: read_record(path, Row, "again", sealed=True)).got
    path.write_text(json.dumps({**GOOD, SEAL: None}))
    assert "no seal" in refusal_of(lambda: read_record(path, Row, "again", sealed=True)).got
    path.write_text(json.dumps(json.loads(text), separators=(",", ":")))  # another layout of the same values
    assert read_record(path, Row, "again", sealed=True)["metrics"] == GOOD["metrics"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), Path("a"), {1, 2}])
def test_values_that_json_does_not_have_are_refused_before_writing(tmp_path, value):
    write_record(tmp_path / "row.json", GOOD)
    before = (tmp_path / "row.json").read_bytes()
    assert "as metrics" in refusal_of(lambda: write_record(tmp_path / "row.json", {"metrics": {"a": value}})).expected
    assert (tmp_path / "row.json").read_bytes() == before
    assert "JSON" in refusal_of(lambda: parse_value({"a": value}, dict, "row", "again")).expected


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | FINITE | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["settings", "metrics", "comment", "other"]), JSON))
def test_anything_is_read_or_refused(value):
    try:
        found = parse_value(value, Row, "row.json", "again")
    except Refusal:
        return
    assert json_values({**found, "settings": asdict(found["settings"])}).keys() == value.keys()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(text):
    try:
        parse(text, dict, "row.json", "again")
    except Refusal:
        return
    assert isinstance(json.loads(text), dict)
