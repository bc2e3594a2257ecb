"""Reading sources: errors name file and line; limits, renamed columns, shares of a mixture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pytest

from align.config.parts import FileSource, HubSource, StageSource
from align.data.mixture import load_rows
from align.data.sources import source_chunks
from align.errors import UserError


def texts(rows):
    return [row["text"] for row in rows]


def test_jsonl_keeps_every_row_in_a_seeded_order(jsonl):
    path = jsonl([{"text": str(n)} for n in range(50)])
    one, again, other = (texts(load_rows([FileSource(path=path)], seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(map(str, range(50)))
    assert texts(load_rows([FileSource(path=path, limit=7)], seed=1)) == one[:7]


def test_parquet_folder_and_renames(tmp_path, jsonl):
    for part in range(2):
        rows = {"question": [f"q{part}{n}" for n in range(3)], "answer": ["a"] * 3, "completion": ["old"] * 3}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"part{part}.parquet")
    source = FileSource(path=str(tmp_path), columns={"prompt": "question", "completion": "answer"})
    rows = load_rows([source], seed=0, accepted=("prompt_completion",))
    assert {tuple(row) for row in rows} == {("prompt", "completion")}
    assert sorted(row["prompt"] for row in rows) == ["q00", "q01", "q02", "q10", "q11", "q12"]
    assert {row["completion"] for row in rows} == {"a"}
    jsonl([{"question": "q2", "answer": "b"}])
    assert sorted(row["completion"] for row in load_rows([source], seed=0)) == ["a"] * 6 + ["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n\n{"text": }\n',
            r"bad\.jsonl line 3: not valid JSON \(Expecting value at column 10\)",
        ),
        ('{"text": "a"}\n["b"]\n', r"line 2: a list, but a row must be a JSON object"),
        ("", r"bad\.jsonl: the source has no rows"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_lines(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows([FileSource(path=str(path))], seed=0)


def test_other_unreadable_sources(tmp_path, jsonl, monkeypatch):
    path = jsonl([{"question": "a", "text2": "b"}])
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (tmp_path / "no.parquet").write_text("not parquet")
    (tmp_path / "empty").mkdir()
    cases = [
        (FileSource(path=str(tmp_path / "none.jsonl")), "none.jsonl: does not exist"),
        (FileSource(path=str(tmp_path / "empty")), r"empty: no data file"),
        (FileSource(path=str(tmp_path / "no.parquet")), "not a readable Parquet"),
        (
            FileSource(path=path, columns={"prompt": "qestion"}),
            "refers to qestion, but the source's columns are question, text2",
        ),
        (
            FileSource(path=path),
            r"columns are question, text2, but this stage needs messages \(or conversations\), or prompt and comp",
        ),
        (StageSource(kind="stage", stage="sample"), "stage 'sample': it has no rows yet"),
        (
            HubSource(kind="hub", id="someone/nothing"),
            "'someone/nothing'.* cannot be loaded from the Hugging Face",
        ),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message):
            load_rows([source], seed=0, accepted=("messages", "prompt_completion"))
    with pytest.raises(UserError, match=r"does not exist; run that stage first"):
        load_rows([StageSource(kind="stage", stage="s")], seed=0, stage_dirs={"s": tmp_path})


def test_stage_rows(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "held_out.jsonl").write_text('{"text": "a"}\n')
    source = StageSource(kind="stage", stage="s", split="held_out")
    assert texts(load_rows([source], seed=0, stage_dirs={"s": Path(tmp_path)})) == ["a"]


def test_sources_without_weights_are_concatenated_and_weights_set_shares(jsonl):
    big = jsonl([{"text": f"big{n}"} for n in range(900)], "big.jsonl")
    small = jsonl([{"text": f"small{n}"} for n in range(300)], "small.jsonl")
    joined = texts(load_rows([FileSource(path=big), FileSource(path=small)], seed=0))
    assert len(joined) == len(set(joined)) == 1200
    assert 15 < sum(t.startswith("small") for t in joined[:120]) < 45  # mixed, not one after the other
    weighted = [FileSource(path=big, weight=1), FileSource(path=small, weight=3)]
    mixed = texts(load_rows(weighted, seed=0))
    assert len(mixed) == len(set(mixed))
    count = Counter(t.rstrip("0123456789") for t in mixed)
    assert count["small"] == 300  # this source runs out first, which ends the mixture
    assert 70 < count["big"] < 135  # 100 expected
    assert mixed == texts(load_rows(weighted, seed=0))


def test_rows_keep_their_own_columns_and_types(jsonl):
    talk = jsonl(
        [
            {"messages": [{"role": "user", "content": "a"}], "meta": 1},
            {"messages": "text", "meta": "x"},
            {"prompt": "p", "meta": {"n": None}},
        ],
        "a.jsonl",
    )
    text = jsonl([{"text": "b", "id": 2**80}], "b.jsonl")
    rows = load_rows([FileSource(path=talk), FileSource(path=text)], seed=0)
    assert sorted(map(str, rows)) == sorted(
        [
            "{'messages': [{'role': 'user', 'content': 'a'}], 'meta': 1}",
            "{'messages': 'text', 'meta': 'x'}",
            "{'prompt': 'p', 'meta': {'n': None}}",
            "{'text': 'b', 'id': 1208925819614629174706176}",
        ]
    )


def test_streaming(jsonl):
    path = jsonl([{"text": str(n), "n": n if n % 2 else str(n)} for n in range(30)])
    source = FileSource(path=path, streaming=True, limit=10)
    rows = load_rows([source], seed=3)
    assert not isinstance(rows, list)
    first = texts(rows)
    assert len(set(first)) == 10
    assert first == texts(rows) == texts(load_rows([source], seed=3))
    assert all(row["n"] == (int(row["text"]) if int(row["text"]) % 2 else row["text"]) for row in rows)
    both = load_rows([source, FileSource(path=path)], seed=3)
    assert isinstance(both, list)
    assert len(both) == 40
    with pytest.raises(UserError, match="needs messages"):
        load_rows([source], seed=3, accepted=("messages",))


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_the_order_is_that_of_datasets(jsonl, weights):
    """Witness: `datasets` shuffles and mixes the rows themselves."""
    tables = [datasets.Dataset.from_dict({"text": [f"{name}{n}" for n in range(40)]}) for name in "ab"]
    sources = [
        FileSource(path=jsonl(list(table), f"{n}.jsonl"), limit=30, **({"weight": weights[n]} if weights else {}))
        for n, table in enumerate(tables)
    ]
    parts = [table.shuffle(seed=5).select(range(30)) for table in tables]
    if weights:
        expected = datasets.interleave_datasets(parts, probabilities=[0.25, 0.75], seed=5)
    else:
        expected = datasets.concatenate_datasets(parts).shuffle(seed=5)
    assert texts(load_rows(sources, seed=5)) == expected["text"][:]


def test_a_column_may_appear_in_a_later_file(tmp_path, jsonl):
    for name, row in (("a", {"meta": 1}), ("b", {"q": "u", "answer": "a"}), ("c", {"q": "v", "answer": "b"})):
        jsonl([row], f"{name}.jsonl")
    source = FileSource(path=str(tmp_path), columns={"prompt": "q", "completion": "answer"})
    rows = [row for chunk in source_chunks(source, accepted=("prompt_completion",)) for row in chunk.rows()]
    assert rows == [{"meta": 1}, {"prompt": "u", "completion": "a"}, {"prompt": "v", "completion": "b"}]
    with pytest.raises(UserError, match="`columns` refers to r, but the source's columns are answer, meta, q"):
        next(source_chunks(source.model_copy(update={"columns": {"prompt": "r"}})))
