from __future__ import annotations

import datetime
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.data.files import read_rows
from gradsieve.errors import DataError

ROWS = [{"a": 1, "text": "é\u2028 x"}, {"a": 2, "text": "second"}, {"a": 3, "text": '"quoted"\n'}]


def rows_of(source, notes=None):
    return list(read_rows(source, [] if notes is None else notes))


def error_of(source) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(source)
    return str(caught.value)


def compact(row) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()


# --- JSON lines ---------------------------------------------------------------------------------------------------------


def test_raw_is_the_line_without_its_terminator(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a":  1}\n  {"a":2} \r\n{"a":3}\r\r\n{"a":4}')
    rows = rows_of(path)
    assert [row.raw for row in rows] == [b'{"a":  1}', b'  {"a":2} ', b'{"a":3}\r', b'{"a":4}']
    assert [row.fields["a"] for row in rows] == [1, 2, 3, 4]
    assert [row.origin for row in rows] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans(), max_size=3), min_size=1))
def test_any_json_lines_come_back_byte_for_byte(tmp_path_factory, objects):
    path = tmp_path_factory.mktemp("any") / "p.jsonl"
    lines = [json.dumps(o, ensure_ascii=i % 2 == 0).encode("utf-8", "replace") for i, o in enumerate(objects)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert [row.raw for row in read_rows(path, [])] == lines


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.json", "p.jsonl.gz", "p.json.gz", "P.JSONL"])
def test_json_lines_are_told_by_name_and_first_byte(tmp_path, name):
    path = tmp_path / name
    data = b"".join(compact(row) + b"\n" for row in ROWS)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row.fields for row in rows_of(path)] == ROWS
    assert [row.raw for row in rows_of(path)] == [compact(row) for row in ROWS]


def test_blank_lines_are_skipped_and_noted_and_keep_the_line_numbers(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\n{"a":1}\n \t\r\n{"a":2}\n\n')
    notes = []
    assert [row.origin for row in rows_of(path, notes)] == [f"{path}:2", f"{path}:4"]
    assert notes == [f"{path}: 3 blank lines were skipped"]


def test_a_file_without_blank_lines_has_no_notes(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a":1}\n')
    notes = []
    rows_of(path, notes)
    assert notes == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1}\n{"a" 2}\n', ":2: not JSON at column 6: Expecting ':' delimiter"),
        (b'{"a":1}{"a":2}\n', ":1: not JSON at column 8: Extra data"),
        (
            b'{"a":1}\n[1]\n',
            ":2: the line must hold a JSON object, got a list; a file that is one JSON list must be named .json",
        ),
        (b'"text"\n', ":1: the line must hold a JSON object, got a string"),
        (b'{"a":1}\n{"a":NaN}\n', ":2: not JSON that can be read: NaN is not JSON; write null or leave the field out"),
        (b'{"a":-Infinity}\n', ":1: not JSON that can be read: -Infinity is not JSON"),
        (b'\xef\xbb\xbf{"a":1}\n', ":1: text must be UTF-8 without a byte-order mark, got one; remove it"),
        (b'{"a":1}\n{"a":"caf\xe9"}\n', ":2: text must be UTF-8, got byte 0xe9 at byte 10 of the line; convert it"),
        ('{"a":1}\n'.encode("utf-16"), ":1: text must be UTF-8, got byte 0xff at byte 1 of the line"),
        (b"{\n", ":1: not JSON at column 2: Expecting property name enclosed in double quotes; a file must hold one object a"),
        (b'{"a":' + b"[" * 100_000 + b"\n", ":1: not JSON that can be read"),
        (b'{"a":' + b"1" * 5000 + b"}\n", ":1: not JSON that can be read"),
        (b"", ": must hold at least one example, got none"),
        (b"\n\n", ": must hold at least one example, got none"),
    ],
)
def test_broken_json_lines_name_line_column_and_cause(tmp_path, data, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    assert error_of(path).startswith(f"{path}{message}")


def test_rows_before_a_broken_line_are_given_first(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a":1}\nbroken\n')
    reader = read_rows(path, [])
    assert next(reader).fields == {"a": 1}
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        next(reader)


@pytest.mark.parametrize(
    "damage", [lambda z: z[:-12], lambda z: z[:20], lambda z: b"no gzip", lambda z: z[:30] + b"xx" + z[32:]]
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b"".join(compact({"a": i, "b": i * i}) + b"\n" for i in range(50)))))
    assert error_of(path).startswith(f"{path}: must be a whole gzip file, got one that breaks after")


# --- JSON lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_a_json_list_gives_compact_lines_and_row_numbers_from_0(tmp_path, name):
    path = tmp_path / name
    data = json.dumps(ROWS, indent=2).encode()
    path.write_bytes(gzip.compress(b"\n " + data) if name.endswith(".gz") else b"\n " + data)
    rows = rows_of(path)
    assert [row.fields for row in rows] == ROWS
    assert [row.raw for row in rows] == [compact(row) for row in ROWS]
    assert rows[2].origin == f"{path}: row 2"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a":1},\n {"a" 2}]', ":2: not JSON at column 7"),
        (b'[{"a":1},\n{"a":"\xff"}]', ":2: text must be UTF-8, got byte 0xff at byte 7 of the line"),
        (b'[{"a":1}, 7]', ": row 1: the row must be a JSON object, got a number"),
        (b'[{"a":1}, {"a": NaN}]', ": not JSON that can be read: NaN is not JSON"),
        (b"[]", ": must hold at least one example"),
        (b'[{"a":"\\ud800"}]', ': row 0: "a" must be a JSON value'),
        (b'{\n "a": 1\n}', ":1: not JSON at column 2"),
    ],
)
def test_broken_json_lists_name_place_and_cause(tmp_path, data, message):
    path = tmp_path / "p.json"
    path.write_bytes(data)
    assert error_of(path).startswith(f"{path}{message}")


# --- columns ------------------------------------------------------------------------------------------------------------


def write_parquet(table, path):
    pq.write_table(table, path, row_group_size=2)


def write_ipc_file(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_ipc_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


COLUMNAR = [
    ("p.parquet", write_parquet),
    ("p.arrow", write_ipc_file),
    ("p.arrow", write_ipc_stream),
    ("p.feather", write_ipc_file),
]


@pytest.mark.parametrize(("name", "write"), COLUMNAR)
def test_columnar_files_give_compact_lines_and_row_numbers_over_all_batches(tmp_path, name, write):
    path = tmp_path / name
    write(pa.Table.from_pylist(ROWS), path)
    rows = rows_of(path)
    assert [row.fields for row in rows] == ROWS
    assert [row.raw for row in rows] == [compact(row) for row in ROWS]
    assert [row.origin for row in rows] == [f"{path}: row {n}" for n in range(3)]


def test_more_rows_than_one_batch_stay_in_order(tmp_path):
    path = tmp_path / "p.arrow"
    with pa.OSFile(str(path), "wb") as sink:
        table = pa.table({"a": range(2500)})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    rows = rows_of(path)
    assert [row.fields["a"] for row in rows] == list(range(2500))
    assert rows[2400].origin == f"{path}: row 2400"


def test_dates_become_iso_text(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"day": [datetime.date(2024, 5, 1)]}), path)
    assert rows_of(path)[0].raw == b'{"day":"2024-05-01"}'


@pytest.mark.parametrize(
    ("column", "cause"), [([b"\x00"], "got bytes"), ([float("nan")], "Out of range float values are not JSON compliant")]
)
def test_values_that_are_not_json_name_row_and_column(tmp_path, column, cause):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"fine": [1], "image": column}), path)
    assert error_of(path).startswith(f'{path}: row 0: "image" must be a JSON value: {cause}')


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow"])
@pytest.mark.parametrize("data", [b"", b"not columns at all", b"ARROW1\0\0 broken"])
def test_broken_columnar_files_are_named(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert error_of(path).startswith(f"{path}: not a")


def test_an_empty_table_is_an_error(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), path)
    assert "must hold at least one example" in error_of(path)


# --- dataset folders ----------------------------------------------------------------------------------------------------


def test_a_saved_dataset_is_read_and_keeps_its_selected_rows(tmp_path):
    folder = tmp_path / "ds"
    datasets.Dataset.from_list(ROWS).select([2, 0]).save_to_disk(folder)
    rows = rows_of(folder)
    assert [row.fields for row in rows] == [ROWS[2], ROWS[0]]
    assert rows[1].origin == f"{folder}: row 1"


def test_the_arrow_file_inside_a_saved_dataset_can_be_read_by_itself(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "ds")
    assert [row.fields for row in rows_of(next((tmp_path / "ds").glob("*.arrow")))] == ROWS


@pytest.fixture
def splits(tmp_path):
    folder = tmp_path / "ds"
    parts = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_a_split_is_named_after_a_colon(splits):
    assert [row.fields for row in rows_of(f"{splits}:test")] == ROWS[2:]
    assert rows_of(f"{splits}:train")[1].origin == f"{splits}:train: row 1"


def test_several_splits_are_an_error_that_names_them_and_the_cure(splits):
    assert error_of(splits) == f"{splits}: one of its splits must be named, got train, test; write {splits}:train"


def test_an_unknown_split_names_the_known_ones(splits):
    assert error_of(f"{splits}:dev") == f"{splits}: the split must be one of train, test, got 'dev'; write {splits}:train"


def test_a_single_split_needs_no_name(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "ds")
    assert len(rows_of(tmp_path / "ds")) == 3


def test_a_split_of_a_single_dataset_is_an_error(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "ds")
    assert error_of(f"{tmp_path / 'ds'}:train").endswith(f"no split 'train'; write {tmp_path / 'ds'}")


def test_another_folder_is_an_error_that_shows_its_content(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"")
    assert error_of(tmp_path).endswith(
        "must be a folder written by datasets.save_to_disk, got one with train.parquet; name files"
    )


# --- places -------------------------------------------------------------------------------------------------------------


def test_a_missing_file_suggests_the_nearest_name(tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(b"{}")
    assert (
        error_of(tmp_path / "pol.jsonl") == f"{tmp_path / 'pol.jsonl'}: no such file; did you mean {tmp_path / 'pool.jsonl'}?"
    )
    assert error_of(tmp_path / "nothing-alike.parquet").endswith("no such file")
    assert error_of(tmp_path / "no" / "folder.jsonl").endswith("no such file")


def test_a_split_of_a_file_is_an_error(tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(b"{}")
    assert "a split can only be named for a dataset folder" in error_of(f"{tmp_path}/pool.jsonl:train")


@pytest.mark.parametrize("name", ["p.csv", "p", "p.parquet.gz", "p.gz"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert "the name must end in one of .jsonl" in error_of(tmp_path / name)
