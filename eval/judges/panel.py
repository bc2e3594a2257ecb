"""The judges of an evaluation: language models at servers, and reward models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from align.config.judges import Judge
from align.config.own_task import read_task
from align.config.server_url import is_server_url
from align.errors import UserError
from align.eval.judges.ask import Spent
from align.eval.judges.calls import JudgeClient, Reply, served_models
from align.eval.judges.grading import Comparing, Grading, ModelAnswers, compare, grade
from align.eval.judges.prompts import Question
from align.eval.judges.scores import Messages, compare_by_scores, grade_by_scores
from align.run.checkpoint import require_checkpoint
from align.run.folder import MODEL

MICRO_BATCH_TOKENS = 8192


class AnyJudge(Protocol):
    """A judge.

    name: in metrics. unit: of its grades, for the metric's name. is_local: it runs on this machine.
    """

    name: str
    unit: str
    is_local: bool

    def grade(self, questions: Sequence[Question], answers: ModelAnswers) -> Grading: ...

    def compare(self, questions: Sequence[Question], first: ModelAnswers, second: ModelAnswers) -> Comparing: ...

    def facts(self) -> dict[str, Any]:
        """Settings, for the results."""
        ...


class LanguageJudge:
    """A language model at a server.

    path: file with its calls. status: prints the number of calls.
    """

    unit, is_local = "grade", False

    def __init__(self, settings: Judge, path: Path, status: Callable[[str], None]):
        self.settings, self.path, self.status = settings, path, status
        self.name = settings.model.rpartition("/")[2]
        self.spent = Spent()
        self._client = JudgeClient(settings)
        self._calls = 0

    def grade(self, questions: Sequence[Question], answers: ModelAnswers) -> Grading:
        found = grade(questions, answers, self.settings, self._ask, self.path)
        self.spent = found.spent
        return found

    def compare(self, questions: Sequence[Question], first: ModelAnswers, second: ModelAnswers) -> Comparing:
        found = compare(questions, first, second, self.settings, self._ask, self.path)
        self.spent = found.spent
        return found

    def _ask(self, messages: Sequence[dict[str, str]], vote: int) -> Reply:
        reply = self._client.ask(messages, seed=vote)
        self._calls += 1
        self.status(f"judge {self.name}: {self._calls} calls")
        return reply

    def facts(self) -> dict[str, Any]:
        spent: dict[str, Any] = {"calls": self.spent.calls}
        if self.spent.known:
            spent["tokens"] = self.spent.tokens
        if (money := self.spent.money(self.settings.prices)) is not None:
            spent["cost"] = money
        return {"name": self.name, **self.settings.model_dump(exclude_defaults=True), "spent": spent}


class RewardJudge:
    """A reward model: its scores are the grades, and the answer with the higher score wins."""

    unit, is_local = "score", True

    def __init__(self, folder: Path, dtype: str | None):
        self.folder, self.dtype = folder, dtype
        self.name = folder.parent.name if folder.name == MODEL else folder.name
        self._scorer: Any = None

    def grade(self, questions: Sequence[Question], answers: ModelAnswers) -> Grading:
        return grade_by_scores(questions, answers, self._scores)

    def compare(self, questions: Sequence[Question], first: ModelAnswers, second: ModelAnswers) -> Comparing:
        return compare_by_scores(questions, first, second, self._scores)

    def _scores(self, conversations: list[Messages], answers: list[str]) -> list[float | None]:
        from align.eval.opening import default_dtype
        from align.eval.reward_model.score import score_answers
        from align.reward.model import ModelScorer

        if self._scorer is None:
            self._scorer = ModelScorer(self.folder, self.dtype or default_dtype(), MICRO_BATCH_TOKENS)
        encoded = [self._scorer.encode(c, answer, True) for c, answer in zip(conversations, answers, strict=True)]
        return score_answers(self._scorer, encoded)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "reward_model": str(self.folder)}


def open_judges(
    wanted: Sequence[str],
    folder: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    contact: bool = True,
    status: Callable[[str], None] = lambda line: None,
) -> list[AnyJudge]:
    """The judges of `--judge`: URLs of servers, YAML files with the settings of `Judge`, folders of reward models.

    folder: for the files with their calls. model: the model at a URL; default: the only one that the server has.
    contact: check that the servers respond.
    Raises UserError if a server does not respond, or two judges have the same name.
    """
    judges: list[AnyJudge] = []
    for text in wanted:
        if is_server_url(text):
            settings = Judge(url=text, model=_model(text, model, contact=contact))
        elif Path(text).suffix in (".yaml", ".yml"):
            settings = read_task(Path(text), Judge, "a judge; write a mapping with the keys url and model", "judge")
            if contact:
                served_models(settings.url)
        elif Path(text).is_dir():
            judges.append(RewardJudge(require_checkpoint(Path(text)), dtype))
            continue
        else:
            raise UserError(
                f"--judge {text}: it is neither a server's URL, nor a YAML file with a judge's settings, nor the "
                "folder of a reward model. Write a URL like http://127.0.0.1:8000/v1."
            )
        name = settings.model.rpartition("/")[2]
        judges.append(LanguageJudge(settings, folder / f"{name}.jsonl", status))
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UserError(f"--judge: two judges have the name {max(names, key=names.count)}. Remove one of the two.")
    return judges


def _model(url: str, wanted: str | None, *, contact: bool) -> str:
    """The wanted model, or the only one at a server."""
    if wanted is not None and not contact:
        return wanted
    models = served_models(url)
    if wanted is not None:
        return wanted
    if models is None or len(models) != 1:
        known = "does not list its models" if models is None else f"has {len(models)} models"
        listed = f" ({', '.join(models[:5])})" if models else ""
        raise UserError(f"--judge {url}: the server {known}{listed}. Name one with --judge-model.")
    return models[0]
