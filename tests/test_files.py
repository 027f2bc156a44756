"""Files of problems as they are found, and what is said of those that can't be read."""

import csv
import gzip
import io
import json
import sys
import tarfile

import pytest

from tasks import TASKS
from tasks.sources import load_splits, parse_row, read_rows

ROWS = [{"question": "1 + 1?", "answer": "So\u2028it is #### 2"}, {"question": "2", "answer": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PACKED = gzip.compress(LINES.encode(), mtime=0)  # the same for all workers


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@pytest.mark.parametrize("name, data", [
    ("a.jsonl", LINES),
    ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
    ("a.json", LINES),
    ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False)),
    ("a.json", json.dumps({"data": ROWS})),
    ("a.json", json.dumps({"version": 2, "of": ["a"], "problems": ROWS, "by": {}}, indent=1)),
    ("a.csv", as_csv(ROWS)),
    ("a.tsv", as_csv(ROWS, "\t")),
    ("a.jsonl.gz", PACKED),
    ("a.bin", PACKED),
    ("a.csv.gz", gzip.compress(as_csv(ROWS).encode(), mtime=0)),
    ("a.jsonl", json.dumps(ROWS)),  # a list is no row
    ("A.CSV", as_csv(ROWS)),
    ("a.csv", as_csv(ROWS).replace("answer", "answer,,", 1)),  # columns of nothing
])  # fmt: skip
def test_the_same_rows_are_read_of_every_kind_of_file(tmp_path, name, data):
    assert [row for _, row in read_rows(put(tmp_path / name, data))] == ROWS


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "a"}], "answer": "1"},
    {"query": "a", "tools": [{"name": "f"}]},
    {"question": [[{"role": "user"}]], "function": [{"name": "f"}]},
    {"nums": [1, 2], "target": 3},
    {"problem": "a", "test_imports": []},
])  # fmt: skip
def test_one_row_is_no_list_of_rows(tmp_path, row):
    for name in ("a.jsonl", "a.json"):
        assert [read for _, read in read_rows(put(tmp_path / name, json.dumps(row)))] == [row]
    steps = {"problem": "a", "steps": [{"say": "b"}]}
    assert read_rows(put(tmp_path / "b.jsonl", json.dumps(steps)))[0][1] == steps


@pytest.mark.parametrize("name, data, message", [
    ("a.jsonl", "", "a.jsonl: no problems in it"),
    ("a.csv", "question,answer\n", "a.csv: no problems in it"),
    ("a.json", "[]", "a.json: no problems in it"),
    ("a.json", '{"data": [{}, 3]}', "a.json, item 2 of 'data': not a JSON object"),
    ("a.json", '{"train": [{}], "test": [{}]}', "has the lists train, test: give each its own"),
    ("a.json", '{"data":\n [{"a": 1},\n {b}]}', r"a.json: not JSON \(.*line 3 column 3"),
    ("a.json", "{" * 99999, "a.json: not JSON"),
    ("a.txt", "question,answer\n1,2\n", "not JSON; if it is CSV, its name must end in .csv"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", "row 2 below the header: more values than the header"),
    ("a.csv", 'a,b\n1,"2\n', "a.csv: not CSV"),
    ("a.jsonl", LINES.encode("utf-16"), "a.jsonl: not UTF-8 text"),
    ("a.jsonl.gz", PACKED[:-9], "a.jsonl.gz is damaged .*get it again"),
    ("a.gz", b"\x1f\x8b" + bytes(30), "a.gz is damaged"),
    ("a.jsonl.bz2", b"BZh91AY", "a.jsonl.bz2 is packed otherwise than by gzip: unpack it"),
    ("a.csv", "a,b,a\n1,2,3\n", "a.csv: two columns have one name: a, b, a"),
    ("a.csv", "a;b\n1;2\n", "a.csv: one column, a;b: are its values separated by commas"),
    ("a.jsonl", LINES + '{"a": ["\\ud83d"]}', "line 3: a text has half a character"),
    ("a.json", '[{}, {"\\ude00\\ud83d": 1}]', "item 2: a text has half a character"),
    ("a.jsonl", '{"a": 1}\n[{"a": 1}]', "line 2: not a JSON object"),
    ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid 1\n", "git lfs pull"),
    ("a.zip", b"PK\x03\x04" + bytes(9), "a.zip is a zip archive, or an Excel table: save it"),
])  # fmt: skip
def test_a_file_that_is_no_data_is_one_line_that_says_what_to_do(tmp_path, name, data, message):
    path = put(tmp_path / name, data)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_an_archive_in_a_packed_file_is_no_text(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(put(tmp_path / "a.jsonl", LINES), "a.jsonl")
    with pytest.raises(ValueError, match="a.tar.gz is a tar archive: unpack it"):
        read_rows(str(tmp_path / "a.tar.gz"))


def test_a_directory_names_the_files_in_it(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory: name a file .*there is none in it"):
        read_rows(str(tmp_path))
    (tmp_path / "main").mkdir()
    for name in ("README.md", "b.jsonl", "main/train-0.parquet"):
        put(tmp_path / name, LINES)
    wanted = f"name a file in it: {tmp_path}/b.jsonl, {tmp_path}/main/train-0.parquet; several"
    with pytest.raises(ValueError, match=wanted):
        read_rows(str(tmp_path))


def tables(tmp_path, rows) -> list[str]:
    """`rows` as parquet, and in both of Arrow's formats."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist(rows)
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.arrow", "c.arrow")]
    parquet.write_table(table, paths[0])
    for path, kind in zip(paths[1:], (ipc.new_stream, ipc.new_file), strict=True):
        with kind(path, table.schema) as file:
            file.write_table(table)
    return paths


def test_tables_are_read_and_a_damaged_one_is_named(tmp_path):
    rows = [{"nums": [1, 2], "target": 3, "by": {"a": [{"b": 1.5}]}}]
    paths = tables(tmp_path, rows)
    assert [read_rows(path) for path in paths] == [[(f"{p}, row 1", rows[0])] for p in paths]
    assert type(read_rows(paths[0])[0][1]["nums"][0]) is int
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
        with pytest.raises(ValueError, match="is damaged .*get it again"):
            read_rows(put(tmp_path / "cut", data[:100] + data[-9:]))


def test_null_in_a_table_is_a_field_that_the_row_has_not(tmp_path):
    call, other = {"area": {"base": [10], "unit": ["cm", ""]}}, {"now": {"zone": ["utc"]}}
    row = {"question": [[{"role": "user", "content": "?"}]], "function": [{"name": "area"}]}
    rows = [row | {"ground_truth": [call], "id": 1}, row | {"ground_truth": [other]}]
    assert [r for _, r in read_rows(tables(tmp_path, rows)[0])] == rows
    without = {"nums": [1], "target": 1}
    assert parse_row(TASKS["countdown"], without | {"solution": None}) == without


def test_without_pyarrow_a_table_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet needs the package pyarrow: pip install pyarr"):
        read_rows(put(tmp_path / "a.parquet", b"PAR1"))


def problems(task, path) -> list[dict]:
    return [parse_row(TASKS[task], row) for _, row in read_rows(path)]


CALLS = {"query": "a", "tools": [{"name": "f"}], "answers": [{"name": "f", "arguments": {}}]}
TESTS = ["assert f('a, b') == [1]", 'assert f("\'") == "\\n"']
MBPP = {"task_id": 7, "text": "a", "code": "  x = 1\n", "test_list": TESTS}


@pytest.mark.parametrize("task, row", [
    ("countdown", {"nums": [3, 7], "target": -4, "solution": "3 - 7"}),
    ("function_call", CALLS),
    ("mbpp", MBPP | {"test_setup_code": ""}),
])  # fmt: skip
@pytest.mark.parametrize("written", [json.dumps, repr])
def test_lists_and_numbers_of_a_csv_are_those_that_were_written(tmp_path, task, row, written):
    cells = {key: x if isinstance(x, str) else written(x) for key, x in row.items()}
    [problem] = problems(task, put(tmp_path / "a.csv", as_csv([cells])))
    assert problem == TASKS[task].parse(row)


def test_an_empty_cell_is_no_field_of_its_row(tmp_path):
    path = put(tmp_path / "a.csv", 'nums,target,solution\n"[1, 2]",3,\n"[1, 2]",,1 + 2\n')
    assert [row for _, row in read_rows(path)] == [
        {"nums": "[1, 2]", "target": "3"},
        {"nums": "[1, 2]", "solution": "1 + 2"},
    ]


@pytest.mark.parametrize("cell", [
    "['assert 1' 'assert 2']",  # as numpy writes it: Python would read one text
    "assert 1", "{'a': 1}", "7", "['a', f()]", "[" * 9999,
])  # fmt: skip
def test_no_other_text_is_taken_for_a_list(cell):
    with pytest.raises(ValueError, match="field 'test_list' is empty or no list"):
        TASKS["mbpp"].parse(MBPP | {"test_list": cell})


@pytest.mark.parametrize("cell", ["3.0", "1e2", "٣", "3 ", "0x3", "true", "-"])
def test_no_other_text_is_taken_for_a_whole_number(cell):
    with pytest.raises(ValueError, match="field 'target' is empty or no whole number"):
        TASKS["countdown"].parse({"nums": [1, 2], "target": cell})


def test_mbpp_sanitized_asks_in_its_prompt_and_brings_its_imports():
    row = {"task_id": 7, "prompt": "Add.", "code": "x = 1", "test_list": ["assert math.pi"]}
    whole = TASKS["mbpp"].parse(row | {"test_imports": ["import math", "import re"]})
    assert whole["text"] == "Add." and whole["tests"] == [
        "import math\nimport re",
        *row["test_list"],
    ]
    assert TASKS["mbpp"].parse(row | {"test_imports": []})["tests"] == row["test_list"]
    assert TASKS["mbpp"].parse(row | {"text": "Sum.", "test_imports": "[]"})["text"] == "Sum."
    for imports in ("['import math' 'import re']", "import math", [1], 1):  # numpy's writing first
        with pytest.raises(ValueError, match="field 'test_imports' must be a list of texts"):
            TASKS["mbpp"].parse(row | {"test_imports": imports})


def test_a_field_that_is_missing_is_said_with_those_that_are_wanted_and_found(tmp_path):
    path = put(tmp_path / "a.csv", "What?,4\nWho?,5\n")  # no header
    said = "row 1 below the header: field 'question' is missing: wanted question; "
    with pytest.raises(ValueError, match=said + r"this row has What\?, 4$"):
        load_splits(TASKS["gsm8k"], path, 0, ())
    with pytest.raises(ValueError, match="'ground_truth' is missing: BFCL has it in possible_ans"):
        TASKS["function_call"].parse({"id": 1, "question": [], "function": [{}]})


@pytest.mark.parametrize("task, data, meant", [
    ("gsm8k", "openai/gsm8k", "hub:openai/gsm8k:main"),
    ("gsm8k", "test=openai/gsm8k", "hub:openai/gsm8k:main"),
    ("math", "openai/gsm8k", "hub:openai/gsm8k"),
    ("math", "some-one/MATH_500.v2", "hub:some-one/MATH_500.v2"),
    ("mbpp", "google-research-datasets/mbpp", "hub:google-research-datasets/mbpp:full"),
    ("math", "gsm8k", None),
    ("gsm8k", "gsm", None),
    ("gsm8k", "nowhere.jsonl", None),
    ("gsm8k", "data/train.jsonl.gz", None),
    ("gsm8k", "a/b/c", None),
    ("gsm8k", "./gsm8k/main", None),
    ("gsm8k", "/openai/gsm8k", None),
    ("gsm8k", "openai/gsm8k/", None),
])  # fmt: skip
def test_a_name_of_the_hub_that_is_no_file_suggests_how_to_write_it(task, data, meant):
    with pytest.raises(ValueError, match=": no such file") as error:
        load_splits(TASKS[task], data, 0, ())
    said = str(error.value).partition("; if a dataset of the hub is meant: ")[2]
    assert said == (meant or "")


@pytest.mark.parametrize("data", ["", "hub:", "test=hub:"])
def test_data_that_names_nothing_says_what_to_name(data):
    with pytest.raises(ValueError, match="--data '.*': name a file, or a dataset as hub:NAME"):
        load_splits(TASKS["gsm8k"], data, 0, ())
