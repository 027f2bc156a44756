"""Files of problems as they are found: JSON, CSV, parquet, packed or not -> rows.

What a file is its first bytes say, not its name; but a text is CSV by name only, and a JSON object
on the one line of a .jsonl is a row, whatever lists are in it.
"""

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path

GZIP = b"\x1f\x8b"
OTHERS = (b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00")  # zstd, bzip2, xz
ARCHIVES = dict.fromkeys(OTHERS, "packed otherwise than by gzip: unpack it")
ARCHIVES[b"PK\x03\x04"] = "a zip archive, or an Excel table: save it as CSV, or unpack it"
# parquet, an Arrow file, an Arrow stream (what datasets.save_to_disk writes)
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
DATA_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow)(\.\w+)?$")
# lists of objects that belong to one row, and so are no list of rows
PARTS = ("messages", "prompt", "completion", "conversations")
PARTS += ("tools", "function", "answers", "ground_truth")


def read_rows(path: str) -> list[tuple[str, dict]]:
    """(where, row) of every object in a file; ValueError if there is none, or what is no object.

    JSONL; JSON with one list, which may stand in an object ({"data": [...]}); CSV, whose values are
    texts; parquet and Arrow, with pyarrow. All may be packed by gzip.
    """
    data = read_bytes(path)
    if data.startswith(TABLES):
        rows = read_table(data, path)
    else:
        rows = read_lines(decode(data, path), path)
    if not rows:
        raise ValueError(f"{path}: no problems in it; it must have a row for each")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object")
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: a text has half a character (\\ud800 to \\udfff)") from None
    return rows


def read_text(path: str) -> str:
    return decode(read_bytes(path), path)


def read_bytes(path: str) -> bytes:
    """What is in a file, unpacked."""
    try:
        data = Path(path).read_bytes()
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory: {what_to_name(Path(path))}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    try:
        data = gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from None
    kinds = [kind for magic, kind in ARCHIVES.items() if data.startswith(magic)]
    kinds += ["a tar archive: unpack it, and name a file of it"] * (data[257:262] == b"ustar")
    if kinds:
        raise ValueError(f"{path} is {kinds[0]}")
    return data


def what_to_name(folder: Path) -> str:
    inside = [file for depth in ("*", "*/*") for file in sorted(folder.glob(depth))]
    files = [str(file) for file in inside if DATA_FILE.search(file.name) and file.is_file()]
    if not files:
        return "name a file of problems (JSONL, JSON, CSV or parquet); there is none in it"
    more = f" or one of {len(files) - 5} more" if len(files) > 5 else ""
    several = "; several as train=FILE,test=FILE" if len(files) > 1 else ""
    return f"name a file in it: {', '.join(files[:5])}{more}{several}"


def decode(data: bytes, path: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}): save it as UTF-8") from None
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path} only points to a file of Git LFS: fetch that with git lfs pull")
    return text


def read_table(data: bytes, path: str) -> list[tuple[str, dict]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        source = pyarrow.BufferReader(data)
        if data.startswith(b"PAR1"):
            table = parquet.read_table(source)
        else:
            open_ = ipc.open_file if data.startswith(b"ARROW1") else ipc.open_stream
            table = open_(source).read_all()
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is damaged ({reason}): get it again") from None
    return [(f"{path}, row {number}", without_nulls(row)) for number, row in enumerate(rows, 1)]


def without_nulls(value):
    """A column's objects have the keys of all rows, and null for those that a row has not."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def read_lines(text: str, path: str) -> list[tuple[str, object]]:
    names = {*Path(path.lower()).suffixes}
    if text.lstrip().startswith(("{", "[")):
        return read_json(text, path, names)
    if {".csv", ".tsv"} & names:
        return read_csv(text, path, "\t" if ".tsv" in names else ",")
    if text.strip():
        raise ValueError(f"{path}: not JSON; if it is CSV, its name must end in .csv or .tsv")
    return []


def read_csv(text: str, path: str, delimiter: str) -> list[tuple[str, dict]]:
    """An empty cell is no field of its row."""
    csv.field_size_limit(2**31 - 1)  # some tests of programs are longer than its own limit
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        names = [name for name in lines.fieldnames or () if name]
        if len({*names}) < len(names):
            raise ValueError(f"{path}: two columns have one name: {', '.join(names)}")
        if len(names) == 1 and ";" in names[0]:
            raise ValueError(f"{path}: one column, {names[0]}: are its values separated by commas?")
        for row in lines:
            where = f"{path}, row {len(rows) + 1} below the header"
            if None in row:
                raise ValueError(f"{where}: more values than the header has names")
            rows.append((where, {name: value for name, value in row.items() if value}))
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV (line {lines.line_num}: {error})") from None
    return rows


def read_json(text: str, path: str, names: set[str]) -> list[tuple[str, object]]:
    lines = enumerate(text.split("\n"), 1)  # splitlines() would break at U+2028 in a text
    lines = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    one_row = len(lines) == 1 and {".jsonl", ".ndjson"} & names and text.lstrip()[0] == "{"
    if one_row or len(lines) > 1 and is_json(lines[0][1]):
        return [(where, parse_json(line, where)) for where, line in lines]
    whole, of = parse_json(text, path), ""
    if isinstance(whole, dict):
        lists = {key: rows for key, rows in whole.items() if is_rows(rows) and key not in PARTS}
        if not lists:
            return [(path, whole)]
        if len(lists) > 1:
            raise ValueError(f"{path} has the lists {', '.join(lists)}: give each its own file")
        [(key, whole)] = lists.items()
        of = f" of '{key}'"
    return [(f"{path}, item {number}{of}", row) for number, row in enumerate(whole, 1)]


def is_json(text: str) -> bool:
    try:
        return json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def is_rows(value) -> bool:
    return isinstance(value, list) and value != [] and isinstance(value[0], dict)


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
