from __future__ import annotations

import json
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.data import content_hash, overlap, read_examples, row_fields, write_jsonl
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.types import Example


def chat(question="q", answer="a", **fields):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**fields, "messages": turns}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(source, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(source, **options)
    return str(caught.value)


def example(*contents, **first):
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    turns[-1] = {**turns[-1], **first}
    return Example("x", tuple(turns), b"", "")


# --- reading ------------------------------------------------------------------------------------------------------------


def test_a_jsonl_of_messages(tmp_path):
    path = lines(tmp_path / "pool.jsonl", [chat("q1", "a1", id="one", category="math", stars=5), chat("q2", "a2", id=2)])
    dataset = read_examples(path)
    assert dataset.format == "messages"
    assert dataset.sources == (str(path),)
    assert (dataset.repeated, dataset.notes) == (0, ())
    one, two = dataset.examples
    assert (one.id, one.category, one.origin) == ("one", "math", f"{path}:1")
    assert (two.id, two.category, two.origin) == ("2", None, f"{path}:2")
    assert [turn["content"] for turn in one.messages] == ["q1", "a1"]
    assert one.raw + b"\n" + two.raw + b"\n" == path.read_bytes()
    assert row_fields(one)["stars"] == 5


def test_a_file_each_can_be_the_category(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    maths = lines(tmp_path / "a" / "maths.v2.jsonl", [chat("q1", "a1"), chat("q2", "a2", category="code")])
    facts = lines(tmp_path / "b" / "facts.jsonl", [chat("q3", "a3")])
    same = lines(tmp_path / "b" / "maths.v2.jsonl", [chat("q4", "a4")])

    def categories(*files, **options):
        return [example.category for example in read_examples(files, **options).examples]

    assert categories(maths, facts) == [None, "code", None]
    assert categories(maths, facts, category_per_file=True) == ["maths.v2", "code", "facts"]
    assert categories(maths, category_per_file=True) == [None, "code"]  # one file tells nothing apart
    assert categories(maths, same, category_per_file=True) == [str(maths), "code", str(same)]
    notes = read_examples([maths, facts], category_per_file=True).notes
    assert f"{maths}: 1 of 2 rows have no \"category\"; theirs is the file's, 'maths.v2'" in notes


def test_files_of_several_shapes_are_told_one_by_one(tmp_path):
    a = lines(tmp_path / "a.jsonl", [chat("q", "a")])
    b = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "completion": "b"}]), b)
    c = tmp_path / "c.json"
    c.write_text(json.dumps([{"instruction": "q", "output": "c"}]))
    d = lines(tmp_path / "d.jsonl", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "d"}]}])
    dataset = read_examples([a, str(b), c, d])
    assert [e.messages[1]["content"] for e in dataset.examples] == ["a", "b", "c", "d"]
    assert dataset.format == f"{a}: messages, {b}: prompt-completion, {c}: alpaca, {d}: sharegpt"
    assert dataset.sources == (str(a), str(b), str(c), str(d))
    assert dataset.examples[1].raw == b'{"prompt":"q","completion":"b"}'
    assert len({e.id for e in dataset.examples}) == 4


def test_files_of_one_shape_share_its_name(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", [chat("q", "a")]), lines(tmp_path / "b.jsonl", [chat("q", "b")])
    assert read_examples((a, b)).format == "messages"


def test_columns_of_nulls_do_not_count_for_the_shape(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [{**chat("q", "a"), "prompt": None, "completion": "x"}, {**chat("q", "b"), "prompt": None, "completion": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_examples(path).format == "messages"


def test_a_row_that_does_not_fit_is_named_with_its_line(tmp_path):
    path = lines(tmp_path / "pool.jsonl", [chat(), {"messages": [{"role": "user", "content": "q"}]}, chat()])
    assert error_of(path) == f'{path}:2: "messages" must end with an assistant turn, got role "user"'


def test_a_row_of_a_table_is_named_with_its_number(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}]), path)
    assert error_of(path) == f"{path}: row 1: \"completion\" must not be blank, got ''"


def test_the_shape_is_told_from_all_rows(tmp_path):
    late = lines(tmp_path / "late.jsonl", [chat(), chat(prompt="p", completion="c")])
    assert "which fit messages and prompt-completion; choose by --format" in error_of(late)
    assert len(read_examples(late, format="messages").examples) == 2
    mixed = lines(tmp_path / "mixed.jsonl", [chat(), {"prompt": "p", "completion": "c"}, {"instruction": "x"}])
    assert "which fit messages and prompt-completion" in error_of(mixed)


def test_the_first_row_may_be_the_one_that_does_not_fit(tmp_path):
    path = lines(tmp_path / "p.jsonl", [{"question": "q"}, chat(), chat()])
    expected = '"messages" must be there (this file is read as messages), got the keys "question"'
    assert error_of(path) == f"{path}:1: {expected}"


def test_a_broken_row_is_named_unless_the_keys_are_ambiguous(tmp_path):
    broken = {"messages": []}
    assert error_of(lines(tmp_path / "a.jsonl", [chat(), broken, chat()])).startswith(f"{tmp_path / 'a.jsonl'}:2: ")
    ambiguous = [chat(), broken, {"instruction": "i", "output": "o"}]
    assert "which fit messages and alpaca" in error_of(lines(tmp_path / "b.jsonl", ambiguous))


def test_of_several_broken_rows_the_first_is_named(tmp_path):
    path = lines(tmp_path / "p.jsonl", [chat(), {"messages": []}, chat(), {"messages": "x"}])
    assert error_of(path) == f'{path}:2: "messages" must hold at least one turn, got an empty list'
    path = lines(tmp_path / "q.jsonl", [{"text": "x"}, {"messages": []}, chat()])
    assert error_of(path).startswith(f'{path}:1: "messages" must be there')


def test_unknown_keys_are_named(tmp_path):
    assert 'got "answer", "question"; rename' in error_of(lines(tmp_path / "p.jsonl", [{"question": "q"}, {"answer": "a"}]))


def test_a_given_format_decides_and_must_fit(tmp_path):
    path = lines(tmp_path / "p.jsonl", [chat(prompt="p", completion="c")])
    assert read_examples(path, format="prompt-completion").examples[0].messages[0]["content"] == "p"
    assert '"instruction" must be there (this file is read as alpaca)' in error_of(path, format="alpaca")


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidArgument, match="sources must name at least one file"):
        read_examples([])
    with pytest.raises(InvalidArgument, match="format must be one of auto, messages"):
        read_examples("p.jsonl", format="chatml")  # type: ignore[arg-type]


def test_notes_of_the_files_are_kept(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(chat()) + "\n\n")
    assert read_examples(path).notes == (f"{path}: 1 blank lines were skipped",)


@pytest.mark.parametrize(("value", "got"), [(3, "a number"), (["x"], "a list")])
def test_the_category_is_a_string_of_the_named_field(tmp_path, value, got):
    path = lines(tmp_path / "p.jsonl", [chat(category="x", topic="algebra"), chat(category=None)])
    assert [e.category for e in read_examples(path).examples] == ["x", None]
    assert [e.category for e in read_examples(path, category_field="topic").examples] == ["algebra", None]
    path = lines(tmp_path / "q.jsonl", [chat(category=value)])
    assert error_of(path) == f'{path}:1: "category" must be a string, got {got}; name another field as the category'


def test_a_lone_surrogate_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "q", "completion": "bad \\ud83d"}\n')
    assert "p.jsonl:1: text and id must be valid Unicode, got the lone surrogate \\ud83d" in error_of(path)
    path.write_text('{"id": "\\ud83d", "prompt": "q", "completion": "good"}\n')
    assert "p.jsonl:1: text and id must be valid Unicode, got the lone surrogate \\ud83d" in error_of(path)


# --- ids and repeats ----------------------------------------------------------------------------------------------------


def test_ids_from_content_are_stable_and_repeats_are_kept_and_numbered(tmp_path):
    rows = [chat("q", "a"), chat("q", "b"), chat("q", "a", note=1), chat("q", "a")]
    dataset = read_examples(lines(tmp_path / "p.jsonl", rows))
    a, b = content_hash(dataset.examples[0])[:16], content_hash(dataset.examples[1])[:16]
    assert [e.id for e in dataset.examples] == [a, b, f"{a}-2", f"{a}-3"]
    assert dataset.repeated == 2
    shuffled = read_examples(lines(tmp_path / "s.jsonl", rows[::-1]))
    assert {e.id for e in shuffled.examples} == {e.id for e in dataset.examples}


def test_repeats_count_across_files_and_shapes(tmp_path):
    a = lines(tmp_path / "a.jsonl", [chat("q", "a")])
    b = lines(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}])
    dataset = read_examples([a, b])
    assert dataset.repeated == 1
    assert dataset.examples[1].id == dataset.examples[0].id + "-2"


def test_duplicate_given_ids_name_both_places(tmp_path):
    a = lines(tmp_path / "a.jsonl", [chat("q", "1", id=7), chat("q", "2", id="x")])
    b = lines(tmp_path / "b.jsonl", [chat("q", "3", id="7")])
    assert error_of([a, b]) == f"{b}:1: \"id\" must be unique, got '7', which {a}:1 has as well; rename one of them"
    twice = lines(tmp_path / "c.jsonl", [chat(id="y"), chat(id="y")])
    assert error_of(twice).startswith(f'{twice}:2: "id" must be unique')


def test_ids_of_some_rows_only_are_not_used_and_noted(tmp_path):
    path = lines(tmp_path / "p.jsonl", [chat("q", "a", id="x"), chat("q", "b"), chat("q", "c", id=None)])
    dataset = read_examples(path)
    assert [e.id for e in dataset.examples] == [content_hash(e)[:16] for e in dataset.examples]
    assert dataset.notes == (f'{path}: only 1 of 3 rows have an "id", so ids are made from the content',)


@pytest.mark.parametrize("value", [1.5, True, "", ["x"]])
def test_an_id_of_another_type_is_refused(tmp_path, value):
    assert '"id" must be a string that is not empty or an integer' in error_of(lines(tmp_path / "p.jsonl", [chat(id=value)]))


def test_made_ids_keep_clear_of_given_ones(tmp_path):
    made = read_examples(lines(tmp_path / "a.jsonl", [chat()])).examples[0].id
    given = lines(tmp_path / "b.jsonl", [chat("other", "x", id=made), chat("other", "y", id=f"{made}-2")])
    ids = [e.id for e in read_examples([tmp_path / "a.jsonl", given]).examples]
    assert ids == [f"{made}-3", made, f"{made}-2"]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=12))
def test_any_pool_keeps_its_bytes_and_has_unique_ids(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pool")
    raw = [json.dumps(chat(q, a), ensure_ascii=ascii).encode() for q, a, ascii in pairs]
    (folder / "p.jsonl").write_bytes(b"\r\n".join(raw))
    dataset = read_examples(folder / "p.jsonl")
    assert [e.raw for e in dataset.examples] == raw
    assert [(e.messages[0]["content"], e.messages[1]["content"]) for e in dataset.examples] == [(q, a) for q, a, _ in pairs]
    assert len({e.id for e in dataset.examples}) == len(pairs)
    assert dataset.repeated == len(pairs) - len({(q, a) for q, a, _ in pairs})
    write_jsonl(folder / "out.jsonl", dataset.examples)
    again = read_examples(folder / "out.jsonl")
    assert [(e.id, e.raw) for e in again.examples] == [(e.id, e.raw) for e in dataset.examples]


# --- hashes and overlap -------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_roles_and_contents_alone():
    base = content_hash(example("q", "a"))
    assert len(base) == 32
    assert base == content_hash(Example("other", example("q", "a").messages, b"raw", "o", "category"))
    assert base == content_hash(example("q", "a", weight=0))
    differing = [example("q", "A"), example("q ", "a"), example("q", "a", role="user"), example("q", "a", "b", "c")]
    differing += [example("q", "a", tool_calls=[{"name": "f"}]), example("q", None, tool_calls=[{"name": "f"}])]
    differing += [example("q", None, tool_calls=[{"name": "g"}])]
    assert len({base, *map(content_hash, differing)}) == len(differing) + 1


def test_contents_cannot_imitate_the_borders_between_turns():
    joined = example("q", "a", "b", "c")
    for content in ("auser:1:bassistant:1:c", "auser:bassistant:c", "ausrbassistantc"):
        assert content_hash(example("q", content)) != content_hash(joined)


@given(st.lists(TEXT, min_size=2, max_size=6), st.lists(TEXT, min_size=2, max_size=6))
def test_equal_hashes_mean_equal_conversations(a, b):
    assert (content_hash(example(*a)) == content_hash(example(*b))) == (a == b)


def test_overlap_gives_every_pair_in_order():
    a = [example("q", str(i)) for i in (1, 2, 3, 2)]
    b = [example("q", str(i)) for i in (2, 4, 2)]
    naive = [(x, y) for x in a for y in b if x.messages == y.messages]
    found = overlap(a, b)
    assert [(id(x), id(y)) for x, y in found] == [(id(x), id(y)) for x, y in naive]
    assert len(found) == 4
    assert overlap(a, []) == overlap([], b) == []


# --- the whole ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, gradsieve.data; print([m for m in ('transformers', 'datasets', 'pyarrow', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_is_fast_enough_for_a_million_rows(tmp_path):
    path = lines(tmp_path / "p.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(20_000)])
    begin = time.process_time()
    assert len(read_examples(path).examples) == 20_000
    assert time.process_time() - begin < 1.2  # a million rows in a minute; 0.2 s where this was written
