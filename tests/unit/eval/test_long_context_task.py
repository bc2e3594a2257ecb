"""The long-context grid as a task: exact requests, scores from records alone, and cells as metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from align.errors import UserError
from align.eval import Options, evaluate, evaluation
from align.eval.answering import Sampling, plan
from align.eval.encoder import Encoder
from align.eval.long_context.task import LongContextTask
from align.eval.records import Place, Record, answer
from align.eval.report.evaluation import render_evaluation
from align.eval.resolve import resolve
from align.eval.results import Results, summarize_task, write_verdicts
from align.rollout.requests import Generation, Request
from tests.chat_templates import SHAPES, tokenizer_for
from tests.unit.eval.local_tasks import StandIn, make_tokenizer, save_checkpoint

GRID = """kind: long_context
name: needles
tasks: [multi_key, common_words]
lengths: [1500, 9000]
depths: [0, 50]
samples: 2
max_new_tokens: 32
haystacks: {en: text.txt}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The cat sat on the mat. It ran to the house by the sea. " * 60)
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "grid.yaml"


@pytest.mark.parametrize("chat", [False, True])
def test_the_grid_runs_as_a_task(file: Path, chat: bool) -> None:
    (task,) = resolve([str(file)], chat=chat).tasks
    assert isinstance(task, LongContextTask)
    assert len(task.documents()) == 2 * 2 * 2 + 2 * 2
    tokenizer = tokenizer_for(SHAPES["chatml"], make_tokenizer())
    records: list[Record] = []
    for one in plan(task, task.documents(), Encoder(tokenizer, 4096), Sampling(), "checkpoint"):
        if not isinstance(one.request, Request):
            assert one.record.reason == "length 9000 exceeds max_length 4096"
            records.append(one.record)
            continue
        assert len(one.request.prompt_ids) + one.request.max_new_tokens == 1500
        text = tokenizer.decode(one.request.prompt_ids)
        assert text.startswith("<|im_start|>user") is chat
        assert bool(re.search(r"(is|are)$", text)) is not chat
        key = re.findall(r"code of ([a-z-]+) in the text", text)
        found = re.findall(rf"code of {key[0]} is (\d+)", text)[0] if key else "none of them"
        forgets = "-50-" in one.record.document
        records.append(answer(one.record, one.request, Generation((1,), "0" if forgets else found, True)))
    scores = LongContextTask.read(file, chat=chat).score(records)  # another object: nothing is kept but the records
    values = {verdict.document: verdict.values["found"] for verdict in scores.verdicts}
    assert values == {
        document: None if "-9000-" in document else float(document.startswith("multi_key-en-1500-0-"))
        for document in task.documents()
    }
    assert {name: cell.value for name, cell in scores.corpus.items()} == {
        "multi_key (en), 1500 tokens, depth 0 %": 1.0,
        "multi_key (en), 1500 tokens, depth 50 %": 0.0,
        "common_words (en), 1500 tokens": 0.0,
    }
    assert set(scores.corpus) <= set(task.better)


def test_another_grid_has_another_version(file: Path) -> None:
    versions = [LongContextTask.read(file).version, LongContextTask.read(file, chat=True).version]
    file.write_text(GRID + "seed: 1\n")
    versions.append(LongContextTask.read(file).version)
    assert len(set(versions)) == 3
    file.write_text(GRID.replace("depths: [0, 50]", "depths: [0, 101]"))
    with pytest.raises(UserError, match=rf"{file}, line 5: depths\.1: "):
        LongContextTask.read(file)


def test_weak_places_and_heat_maps_are_in_the_report(file: Path, tmp_path: Path) -> None:
    """A planted model that forgets the needle in the middle."""
    grid = GRID.replace("multi_key, common_words", "single").replace("[1500, 9000]", "[1500, 3000]")
    file.write_text(grid.replace("samples: 2", "samples: 8").replace("[0, 50]", "[0, 50, 100]"))
    task = LongContextTask.read(file)

    def records(text: Callable[[str], str]) -> list[Record]:
        return [Record("needles", task.version, Place(d), "finished", text=text(d)) for d in task.documents()]

    expected = {v.document: v.shown["target"] for v in task.score(records(lambda document: "")).verdicts}
    found = task.score(records(lambda document: "0" if "-50-" in document else expected[document]))
    (sentence,) = found.notes
    assert sentence == "single (en) is weak at depth 50 % (0.00); the best depth has 1.00"
    assert list(found.figures) == ["single (en)"]
    assert found.figures["single (en)"].count("<rect") == 2 * 3
    result = summarize_task(task, found, [], documents=48, samples=1, truncated_prompts=0, unstable_seams=0, seed=0)
    content = {"align": "0", "settings": {}, "notes": [], "models": {"m": {"tasks": {"needles": asdict(result)}}}}
    (tmp_path / "m").mkdir()
    write_verdicts(tmp_path / "m" / "scores.jsonl", {"needles": found})
    page = render_evaluation(Results(content, tmp_path))
    assert "needles: single (en)</h3>" in page
    assert page.count('<svg class="heat"') == 1


class Forgetful(StandIn):
    """Finds the needle unless it is 40 to 60 % deep in the text."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        for index, request in enumerate(requests):
            prompt = self.tokenizer.decode(request.prompt_ids)
            text = prompt.split("\n\n", 1)[1].rpartition("\n\n")[0].rpartition("\n\n")[0]
            key = re.findall(r"code of ([a-z-]+) in the text", prompt)[0]
            note = re.search(rf"code of {key} is (\d+)", text)
            assert note is not None
            said = "none" if 0.4 <= note.start() / len(text) <= 0.6 else note[1]
            yield index, Generation((1,), said, True)


def test_an_evaluation_names_the_depth_that_a_model_forgets(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(tmp_path / "m")
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 8192'))
    grid = GRID.replace("multi_key, common_words", "multi_key").replace("[1500, 9000]", "[1500]")
    file.write_text(grid.replace("[0, 50]", "[0, 20, 50, 80, 100]").replace("samples: 2", "samples: 6"))
    notes = {}
    for model in (Forgetful, StandIn):
        monkeypatch.setattr(evaluation, "open_model", lambda *_, m=model: m(make_tokenizer(), 4096))
        out = tmp_path / model.__name__
        options = Options(dtype="float32", max_length=4096)
        results = evaluate({"m": checkpoint}, [str(file)], out=out, options=options)
        notes[model] = [note for note in results.content["notes"] if "weak" in note]
        found = results.content["models"]["m"]["tasks"]["needles"]["metrics"]
        cell = found["multi_key (en), 1500 tokens, depth 50 %"]
        assert (cell["mean"], found["multi_key (en), 1500 tokens, depth 80 %"]["mean"]) == (
            0.0,
            float(model is Forgetful),
        )
    (note,) = notes[Forgetful]
    assert note == "m, needles: multi_key (en) is weak at depth 50 % (0.00); the best depth has 1.00"
    assert note in (tmp_path / "Forgetful" / "results.md").read_text()
    assert notes[StandIn] == []  # it finds nothing at any depth
