"""Reading sources: errors name file and line; limits, renamed columns, shares of a mixture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pytest

from align.config.parts import FileSource, HubSource, StageSource
from align.data.files import text
from align.data.mixture import mixture_rows
from align.data.sources import source_chunks
from align.errors import UserError


def texts(rows):
    return [row["text"] for row in rows]


def read(source, **options):
    return [row for chunk in source_chunks(source, **options) for row in chunk.rows()]


def mixed(*sources, seed=0):
    return list(mixture_rows(sources, seed=seed))


def test_a_limit_is_a_seeded_choice(jsonl):
    path = jsonl([{"text": str(n)} for n in range(50)])
    assert texts(mixed(FileSource(path=path))) == [str(n) for n in range(50)]
    one, again, other = (texts(mixed(FileSource(path=path, limit=7), seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert one == sorted(one, key=int)
    # Witness: the shuffle of `datasets`.
    shuffled = datasets.Dataset.from_dict({"n": range(50)}).shuffle(seed=1)["n"][:7]
    assert sorted(map(int, one)) == sorted(shuffled)


def test_parquet_folder_and_renames(tmp_path, jsonl):
    for part in range(2):
        rows = {"question": [f"q{part}{n}" for n in range(3)], "answer": ["a"] * 3, "completion": ["old"] * 3}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"part{part}.parquet")
    source = FileSource(path=str(tmp_path), columns={"prompt": "question", "completion": "answer"})
    rows = read(source, accepted=("prompt_completion",))
    assert {tuple(row) for row in rows} == {("prompt", "completion")}
    assert sorted(row["prompt"] for row in rows) == ["q00", "q01", "q02", "q10", "q11", "q12"]
    assert {row["completion"] for row in rows} == {"a"}
    jsonl([{"question": "q2", "answer": "b"}])
    assert sorted(row["completion"] for row in read(source)) == ["a"] * 6 + ["b"]


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
        mixed(FileSource(path=str(path)))


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
            read(source, accepted=("messages", "prompt_completion"))
    with pytest.raises(UserError, match=r"does not exist; run that stage first"):
        read(StageSource(kind="stage", stage="s"), stage_dirs={"s": tmp_path})


def test_stage_rows(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "held_out.jsonl").write_text('{"text": "a"}\n')
    source = StageSource(kind="stage", stage="s", split="held_out")
    assert texts(mixture_rows([source], seed=0, stage_dirs={"s": Path(tmp_path)})) == ["a"]


def test_sources_without_weights_are_read_whole_and_weights_set_shares(jsonl):
    big = jsonl([{"text": f"big{n}"} for n in range(900)], "big.jsonl")
    small = jsonl([{"text": f"small{n}"} for n in range(300)], "small.jsonl")
    assert len(set(texts(mixed(FileSource(path=big), FileSource(path=small))))) == 1200
    weighted = [FileSource(path=big, weight=1), FileSource(path=small, weight=3)]
    found = texts(mixed(*weighted))
    assert len(found) == len(set(found))
    count = Counter(t.rstrip("0123456789") for t in found)
    assert count["small"] == 300  # this source runs out first, which ends the mixture
    assert 70 < count["big"] < 135  # 100 expected
    assert found == texts(mixed(*weighted))


def test_epochs_repeat_rows(jsonl):
    path = jsonl([{"text": str(n)} for n in range(10)])
    assert Counter(texts(mixed(FileSource(path=path, epochs=2)))) == {str(n): 2 for n in range(10)}
    half = Counter(texts(mixed(FileSource(path=path, epochs=1.5))))
    assert sorted(half.values()) == [1] * 5 + [2] * 5


def test_rows_keep_their_own_columns_and_types(jsonl):
    talk = jsonl(
        [
            {"messages": [{"role": "user", "content": "a"}], "meta": 1},
            {"messages": "text", "meta": "x"},
            {"prompt": "p", "meta": {"n": None}},
        ],
        "a.jsonl",
    )
    plain = jsonl([{"text": "b", "id": 2**80}], "b.jsonl")
    rows = mixed(FileSource(path=talk), FileSource(path=plain))
    assert sorted(map(str, rows)) == sorted(
        [
            "{'messages': [{'role': 'user', 'content': 'a'}], 'meta': 1}",
            "{'messages': 'text', 'meta': 'x'}",
            "{'prompt': 'p', 'meta': {'n': None}}",
            "{'text': 'b', 'id': 1208925819614629174706176}",
        ]
    )


def test_a_streaming_source_has_its_first_rows(jsonl):
    path = jsonl([{"text": str(n)} for n in range(30)])
    source = FileSource(path=path, streaming=True, limit=10)
    assert texts(mixed(source)) == [str(n) for n in range(10)]
    assert len(mixed(source, FileSource(path=path))) == 40
    assert set(texts(mixed(source, FileSource(path=path, limit=3)))) >= {str(n) for n in range(10)}


def test_rows_are_read_one_chunk_at_a_time(jsonl, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_BYTES", 200)
    path = Path(jsonl([{"text": f"{n:03d}"} for n in range(100)]))
    rows = mixture_rows([FileSource(path=str(path))], seed=0)
    assert next(rows) == {"text": "000"}
    with path.open("a") as file:  # what is appended now is read later
        file.write('{"text": "last"}\n')
    assert texts(rows)[-1] == "last"


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_the_rows_are_those_of_datasets(jsonl, weights):
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
        expected = datasets.concatenate_datasets(parts)
    assert Counter(texts(mixed(*sources, seed=5))) == Counter(expected["text"][:])


def test_a_column_may_appear_in_a_later_file(tmp_path, jsonl):
    for name, row in (("a", {"meta": 1}), ("b", {"q": "u", "answer": "a"}), ("c", {"q": "v", "answer": "b"})):
        jsonl([row], f"{name}.jsonl")
    source = FileSource(path=str(tmp_path), columns={"prompt": "q", "completion": "answer"})
    rows = read(source, accepted=("prompt_completion",))
    assert rows == [{"meta": 1}, {"prompt": "u", "completion": "a"}, {"prompt": "v", "completion": "b"}]
    with pytest.raises(UserError, match="`columns` refers to r, but the source's columns are answer, meta, q"):
        next(source_chunks(source.model_copy(update={"columns": {"prompt": "r"}})))
