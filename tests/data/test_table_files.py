"""Tables: what is read from which file, which column is the target and what it is, refusals."""
import numpy as np
import pytest
import torch

from symbnn.data.tables import read_table
from symbnn.errors import Refusal

ROWS = np.random.default_rng(0).normal(size=(30, 2)).round(3)
NUMBERS = {"a": ROWS[:, 0], "b": ROWS[:, 1], "sum": ROWS.sum(1)}
pandas = pytest.importorskip("pandas", reason="pandas is not installed")


def written(folder, suffix=".csv", columns=None, text=None, sep=","):
    """A file of these columns, or of this text."""
    path = folder / f"mine{suffix}"
    if text is not None:
        path.write_text(text)
        return path
    frame = pandas.DataFrame(NUMBERS if columns is None else columns)
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if suffix == ".tsv" else sep, index=False)
    return path


@pytest.mark.parametrize(("suffix", "sep"), [(".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", ","),
                                             (".parquet", ","), (".CSV", ",")])
def test_files_of_all_kinds_give_the_same_table(tmp_path, suffix, sep):
    table = read_table(written(tmp_path, suffix, sep=sep), dtype=torch.float64)
    assert (table.columns, table.target, table.task) == (("a", "b"), "sum", "regression")
    torch.testing.assert_close(table.inputs, torch.from_numpy(ROWS))
    torch.testing.assert_close(table.targets[:, 0], torch.from_numpy(ROWS.sum(1)))


def test_arrays_give_the_same_table(tmp_path):
    for y in (ROWS.sum(1), ROWS.sum(1)[:, None]):
        np.savez(tmp_path / "mine.npz", X=ROWS, y=y)
        table = read_table(tmp_path / "mine.npz", dtype=torch.float64)
        assert (table.columns, table.target) == (("x0", "x1"), "y")
        torch.testing.assert_close(table.targets[:, 0], torch.from_numpy(ROWS.sum(1)))


@pytest.mark.parametrize(("names", "given", "chosen"), [
    (("a", "b", "c"), None, "c"), (("y", "a", "b"), None, "y"), (("a", "Target", "b"), None, "Target"),
    (("label", "target", "b"), None, "target"), (("a", "b", "y"), "a", "a"),
])
def test_which_column_is_the_target(tmp_path, names, given, chosen):
    table = read_table(written(tmp_path, columns=dict(zip(names, (*ROWS.T, ROWS.sum(1))))), given)
    assert table.target == chosen and table.columns == tuple(name for name in names if name != chosen)


@pytest.mark.parametrize(("values", "task", "found", "classes"), [
    (["no", "yes"] * 15, None, "classification", ("no", "yes")), ([True, False] * 15, None, "classification",
                                                                  ("False", "True")),
    ([3, 7, 7] * 10, "classification", "classification", ("3", "7")), ([0, 2, 5] * 10, "counts", "counts", ()),
    ([1.0, 2.0] * 15, "classification", "classification", ("1.0", "2.0")),
    ([0, 2, 5] * 10, "regression", "regression", ()), ([0.5, 2, 5] * 10, None, "regression", ()),
    ([1.5, 2.5] * 15, "classification", "classification", ("1.5", "2.5")),
])
def test_what_the_target_is(tmp_path, values, task, found, classes):
    table = read_table(written(tmp_path, columns={"a": ROWS[:, 0], "t": values}), "t", task)
    assert (table.task, table.classes) == (found, classes)
    if classes:
        assert [classes[label] for label in table.targets] == [str(value) for value in values]
    else:
        assert table.targets[:, 0].tolist() == values
    data = table.dataset(seed=3)
    assert [len(split) for split in data.splits().values()] == [22, 2, 6] and data.classes == classes
    again, other = table.dataset(seed=3), table.dataset(seed=4)
    assert torch.equal(data.test.inputs, again.test.inputs) and not torch.equal(data.test.inputs, other.test.inputs)
    rows = torch.cat([split.inputs for split in data.splits().values()])[:, 0]
    assert torch.equal(rows.sort().values, table.inputs[:, 0].sort().values)


def test_columns_are_skipped(tmp_path):
    columns = NUMBERS | {"name": ["x"] * 30, "date": ["2026-01-01"] * 30}
    assert read_table(written(tmp_path, columns=columns), "sum", skip=("name", "date")).columns == ("a", "b")


@pytest.mark.parametrize(("columns", "options", "said"), [
    (NUMBERS | {"name": ["x"] * 30}, {"target": "sum"}, "--skip name"), (NUMBERS, {"target": "weight"}, "a, b, sum"),
    (NUMBERS, {"skip": ("weight",)}, "to skip"), (NUMBERS, {"skip": ("sum",)}, "to skip"),
    (NUMBERS, {"task": "ranking"}, "task"), (NUMBERS, {"task": "counts"}, "counts 0, 1, 2"),
    (NUMBERS, {"task": "classification"}, "--task regression"), (NUMBERS, {"skip": ("a", "b")}, "0 columns"),
    (NUMBERS | {"k": [1, 2] * 15}, {}, "--task regression"), (NUMBERS | {"k": ["x"] * 30}, {}, "two classes"),
    (NUMBERS | {"k": [-1, 2] * 15}, {"task": "counts"}, "counts 0, 1, 2"),
    (NUMBERS | {"k": [f"name {i}" for i in range(30)]}, {}, "another target"),
    (NUMBERS | {"sum": [np.nan, *ROWS.sum(1)[1:]]}, {}, "dropna"), ({"a": [np.nan, *ROWS[1:, 0]], "s": ROWS.sum(1)},
                                                                   {}, "first row 1"),
    (NUMBERS | {"k": ["x", None] * 15}, {}, "15 rows without"), ({"a": ROWS[:, 0]}, {}, "0 columns"),
    ({"a": ROWS[:, 0] * 1e300, "s": ROWS.sum(1)}, {}, "float32"),
    ({"a": [np.inf, 1.0], "s": [0.5, 1.5]}, {}, "a number"),
])
def test_columns_that_cannot_be_meant_are_refused(tmp_path, columns, options, said):
    with pytest.raises(Refusal, match=said):
        read_table(written(tmp_path, columns=columns), **options)


@pytest.mark.parametrize(("suffix", "text", "said"), [
    (".csv", "", "EmptyDataError"), (".csv", "a,b\n", "0 rows"), (".csv", "a,b\n1,2\n3,4,5,6\n", "ParserError"),
    (".csv", "a,a,b\n1,2,3.5\n4,5,6.5\n", "a column of inputs|names of their own|numbers|columns"),
    (".parquet", "no parquet", "Arrow|parquet"), (".npz", "no archive", "arrays X and y"), (".txt", "a,b", "csv"),
    (".csv", "a b\n1 2\n3 4\n", "0 columns"),
])
def test_files_that_are_no_tables_are_refused(tmp_path, suffix, text, said):
    if (suffix, text[:5]) == (".csv", "a,a,b"):
        assert read_table(written(tmp_path, suffix, text=text)).columns == ("a", "a.1")  # as pandas names them
        return
    with pytest.raises(Refusal, match=said):
        read_table(written(tmp_path, suffix, text=text))


def test_arrays_that_are_no_table_are_refused(tmp_path):
    path = tmp_path / "mine.npz"
    for arrays, said in [({"X": ROWS}, "arrays X and y"), ({"X": ROWS[:, 0], "y": ROWS[:, 0]}, "N, columns"),
                         ({"X": ROWS, "y": ROWS[:5, 0]}, "N, columns"), ({"train_images": ROWS}, "--dataset mine.npz"),
                         ({"X": np.array([["a"]], object), "y": ROWS[:1, 0]}, "allow_pickle|Object arrays|X and y")]:
        np.savez(path, **arrays)
        with pytest.raises(Refusal, match=said):
            read_table(path)
    with pytest.raises(Refusal, match="missing"):
        read_table(tmp_path / "other.npz")
