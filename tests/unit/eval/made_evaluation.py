"""Evaluations whose records and scores are made up, written as `align eval` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.eval.harness_index import Group
from align.eval.records import Place, Record, RecordStore
from align.eval.results import Results, group_metrics, summarize_task, write_verdicts
from align.eval.task import Scores, Verdict


@dataclass(frozen=True)
class MadeTask:
    """A task with only the attributes that the results need."""

    name: str
    count: int
    better: Mapping[str, int] = field(default_factory=dict)
    version: str = "1, 0 shots"
    text: str = ""

    def documents(self) -> list[str]:
        return [str(number) for number in range(self.count)]

    def requests(self, documents: Sequence[str], encoder: Any) -> list[Any]:
        return []

    def score(self, records: Sequence[Record]) -> Scores:
        return Scores([])


def write_evaluation(
    folder: Path,
    tasks: Mapping[str, Mapping[str, Scores]],
    *,
    truncated: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    better: Mapping[str, Mapping[str, int]] | None = None,
    groups: Sequence[Group] = (),
    notes: Sequence[str] = (),
    contamination: Mapping[str, Any] | None = None,
) -> Results:
    """Write records, scores, results and the page.

    tasks: {task: {model: scores}}. truncated: {model: (task, document) of completions that reached max_new_tokens}.
    """
    models = dict.fromkeys(model for scores in tasks.values() for model in scores)
    content: dict[str, Any] = {"align": "0.1.0", "settings": {"seed": 0, "limit": None}, "models": {}}
    content["notes"] = list(notes)
    for model in models:
        of_model = {task: scores[model] for task, scores in tasks.items() if model in scores}
        with closing(RecordStore(folder / model / "records.jsonl")) as store:
            ended = set((truncated or {}).get(model, ()))
            records = [
                Record(task, "1, 0 shots", Place(v.document, sample=v.sample), status((task, v.document) in ended))
                for task, scores in of_model.items()
                for v in scores.verdicts
            ]
            store.add(records)
        results = {
            task: summarize_task(
                MadeTask(task, len({v.document for v in scores.verdicts}), (better or {}).get(task, {})),
                scores,
                [record for record in records if record.task == task],
                documents=len({v.document for v in scores.verdicts}),
                samples=1 + max(v.sample for v in scores.verdicts),
                truncated_prompts=0,
                unstable_seams=0,
                seed=0,
            )
            for task, scores in of_model.items()
        }
        found: dict[str, Any] = {}
        for group in groups:
            leaves = [results[leaf] for leaf in group.leaves]
            counts = ("documents", "total", "missing", "unscored", "truncated", "completions", "unanswered")
            found[group.name] = {
                "version": leaves[0].version,
                "members": group.leaves,
                **{key: sum(getattr(leaf, key) for leaf in leaves) for key in counts},
                "metrics": {k: asdict(m) for k, m in group_metrics(group, of_model, results, 0).items()},
            }
        found |= {task: asdict(result) for task, result in results.items()}
        content["models"][model] = {"checkpoint": f"runs/chat/{model}", "dtype": "bfloat16", "tasks": found}
        write_verdicts(folder / model / "scores.jsonl", of_model)
    if contamination is not None:
        content["contamination"] = dict(contamination)
    made = Results(content, folder)
    made.write()
    return made


def status(is_truncated: bool) -> Literal["truncated", "finished"]:
    return "truncated" if is_truncated else "finished"


def sums(model: str, count: int, right: int, *, metric: str = "exact_match", first: int = 17) -> Scores:
    """Sums; the answer to every `right`-th is wrong, 10 too low.

    Every 50th document is unscored, every 33rd has no answer.
    """
    verdicts = []
    for number in range(count):
        a, b = first + number, 25 + 3 * number % 70
        shown = {"question": f"Question: What is {a} + {b}?\nAnswer:", "target": str(a + b)}
        if number % 50 == 49:
            reason = "the prompt has 9,000 tokens with max_new_tokens; it exceeds max_length 4096"
            verdicts.append(Verdict(str(number), 0, {metric: None}, reason, shown=shown))
            continue
        if number % 33 == 32:
            shown["answer"] = "I would rather talk about the weather."
            verdicts.append(Verdict(str(number), 0, {metric: 0.0}, unanswered=True, shown=shown))
            continue
        said = a + b - (10 if number % right == right - 1 else 0)
        opening = "First I add the tens, then the ones." if model == "dpo" else "I add the tens, then the ones."
        shown["answer"] = f"{opening} {a} plus {b} makes {said}, so the answer is {said}."
        verdicts.append(Verdict(str(number), 0, {metric: float(said == a + b)}, shown=shown))
    return Scores(verdicts)
