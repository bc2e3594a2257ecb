"""Tasks of lm-evaluation-harness: its prompts, filters and metrics, with our model and records."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import UserError
from align.eval.encoder import Encoder, Unscorable
from align.eval.harness_index import LOADERS, HarnessIndex, Leaf, local_dataset
from align.eval.records import Record
from align.eval.task import CorpusValue, Item, Scores, Verdict, by_sample, unscored
from align.rollout.requests import Request

FEWSHOT_SEED = 1234
"""Seed of the harness's own commands, so that a task's examples are the same here and there."""
MAX_NEW_TOKENS = 256
"""The harness's default."""
KNOWN_SETTINGS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
UNANSWERED = "[invalid]"
"""Returned by the harness's filters if a completion has no answer."""
RESAMPLES = 200
SHOWN_CHARACTERS = 4000


class HarnessTask:
    """A task of the harness, without subtasks.

    name: its name in the harness.
    task: the harness's object.
    shots: number of examples in the prompt; None keeps the task's own.
    fixed_shots: the first examples for every document, so that documents share the beginning of their prompt. Otherwise
        the harness's own choice, which for most tasks draws examples anew for each document.
    chat: render prompts with the tokenizer's chat template, with the examples as turns.
    settings: changes of the task's generation settings.
    """

    def __init__(
        self,
        name: str,
        task: Any,
        *,
        shots: int | None = None,
        fixed_shots: bool = False,
        chat: bool = False,
        settings: Mapping[str, Any] | None = None,
    ):
        self.name, self.task, self.chat = name, task, chat
        self.shots = int(shots if shots is not None else task.config.num_fewshot or 0)
        task.set_config("num_fewshot", self.shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
        self._settings = dict(settings or {})
        if fixed_shots and self.shots:
            self._fix_shots()
        self.version = f"{task.VERSION}, {self.shots} shots{', chat' if chat else ''}"
        self.text = f"lm-evaluation-harness: {name}, version {self.version}"
        higher = task.higher_is_better()
        self.better: Mapping[str, int] = {
            self._label(metric, part.name): 1 if higher.get(metric, True) else -1
            for metric in task.aggregation()
            for part in task._filters
        }

    @cached_property
    def _docs(self) -> Sequence[dict[str, Any]]:
        docs: Sequence[dict[str, Any]] = self.task.eval_docs
        return docs

    def documents(self) -> Sequence[str]:
        return [str(number) for number in range(len(self._docs))]

    # --- requests --------------------------------------------------------------------------------------------

    def requests(self, documents: Sequence[str], encoder: Encoder) -> Iterator[Item]:
        """See `Task`. A document's examples do not depend on which other documents are chosen."""

        def chat_template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return encoder.chat_text(messages)

        wanted = {int(document) for document in documents}
        draws = self.shots > 0 and not self._shots_are_fixed
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        for number in range(max(wanted, default=-1) + 1):
            if number not in wanted and not draws:
                continue
            doc = self._docs[number]
            context = self.task.fewshot_context(
                doc,
                num_fewshot=self.shots,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
                chat_template=chat_template if self.chat else None,
                gen_prefix=self.task.doc_to_prefix(doc) if hasattr(self.task, "doc_to_prefix") else None,
            )
            if number not in wanted:
                continue  # it was made for the state of the harness's random generator
            made = self.task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(self.name, number, self.task.config.repeats),
                apply_chat_template=self.chat,
                chat_template=chat_template if self.chat else None,
            )
            for index, instance in enumerate(made if isinstance(made, list) else [made]):
                yield from self._items(str(number), index, instance, encoder)

    def _items(self, document: str, number: int, instance: Any, encoder: Encoder) -> Iterable[Item]:
        try:
            if instance.request_type == "loglikelihood":
                context, continuation = instance.args
                pair = encoder.pair(context, continuation, task=self.name, rendered=self.chat and bool(context))
                return [Item(document, pair, number)]
            if instance.request_type == "loglikelihood_rolling":
                windows = encoder.windows(instance.args[0])
                return [Item(document, pair, number, part) for part, pair in enumerate(windows)]
            context, settings = instance.args
            request = self._request(context, {**settings, **self._settings}, encoder)
            return [Item(document, request, number, part) for part in range(self.task.config.repeats or 1)]
        except Unscorable as reason:
            return [Item(document, str(reason), number)]

    def _request(self, context: str, settings: dict[str, Any], encoder: Encoder) -> Request:
        until = settings.pop("until", None) or []
        limits = [settings.pop(name) for name in MAX_TOKENS_NAMES if name in settings]
        if unknown := sorted(settings.keys() - KNOWN_SETTINGS):
            raise UserError(
                f"task '{self.name}': its generation setting {unknown[0]} is not supported. Choose another task."
            )
        samples = settings.get("do_sample", bool(settings.get("temperature")))
        return encoder.request(
            context,
            task=self.name,
            max_new_tokens=int(limits[0]) if limits else MAX_NEW_TOKENS,
            temperature=float(settings.get("temperature", 1.0)) if samples else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            stop=[until] if isinstance(until, str) else until,
            rendered=self.chat,
        )

    # --- scores ----------------------------------------------------------------------------------------------

    def score(self, records: Sequence[Record]) -> Scores:
        """The harness's filters and metrics on the answers of each sample."""
        groups: dict[int, dict[int, list[Record]]] = defaultdict(dict)
        for (document, sample), found in by_sample(records).items():
            groups[sample][int(document)] = found
        verdicts: list[Verdict] = []
        items: dict[str, list[Any]] = defaultdict(list)
        for sample, documents in sorted(groups.items()):
            verdicts += self._score_sample(sample, dict(sorted(documents.items())), items)
        return Scores(verdicts, {label: self._corpus(label, found) for label, found in items.items()})

    def _score_sample(
        self, sample: int, documents: dict[int, list[Record]], items: dict[str, list[Any]]
    ) -> Iterator[Verdict]:
        reasons = {number: unscored(records) for number, records in documents.items()}
        instances = {n: self._answered(n, records) for n, records in documents.items() if not reasons[n]}
        flat = [instance for found in instances.values() for instance in found]
        if flat:
            for part in self.task._filters:
                part.apply(flat)
        none = dict.fromkeys((label for label in self.better if self._is_mean(label)), None)
        for number, reason in reasons.items():
            if reason:
                yield Verdict(str(number), sample, none, reason)
                continue
            values, answers = {}, {}
            try:
                for part in self.task._filters:
                    answers[part.name] = [instance.filtered_resps[part.name] for instance in instances[number]]
                    for metric, value in self.task.process_results(self._docs[number], answers[part.name]).items():
                        label = self._label(metric, part.name)
                        if self._is_mean(label):
                            values[label] = float(value)
                        else:
                            items[label].append(value)
            except Exception as error:  # a metric of the harness may fail in any way
                yield Verdict(str(number), sample, none, f"{type(error).__name__}: {error}")
                continue
            unanswered = all(answer == [UNANSWERED] for answer in answers.values())
            yield Verdict(
                str(number),
                sample,
                values,
                unanswered=unanswered,
                shown=self._shown(number, documents[number], answers),
            )

    def _answered(self, number: int, records: list[Record]) -> list[Any]:
        """The harness's requests of a document, with the answers."""
        from lm_eval.api.instance import Instance

        by_request: dict[int, list[Record]] = defaultdict(list)
        for record in records:
            by_request[record.place.number].append(record)
        kind = "loglikelihood" if self.task.OUTPUT_TYPE == "multiple_choice" else self.task.OUTPUT_TYPE
        found = []
        for index, parts in sorted(by_request.items()):
            instance = Instance(kind, self._docs[number], (), index, (self.name, number, len(parts)))
            if parts[0].status != "scored":
                instance.resps = [record.text for record in parts]
            elif kind == "loglikelihood_rolling":
                instance.resps = [sum(record.logprob for record in parts)]
            else:
                instance.resps = [(parts[0].logprob, parts[0].greedy)]
            found.append(instance)
        return found

    def _shown(self, number: int, records: list[Record], answers: dict[str, list[Any]]) -> dict[str, str]:
        doc = self._docs[number]
        shown = {"question": str(self.task.doc_to_text(doc)), "target": str(self.task.doc_to_target(doc))}
        if records[0].status == "scored":
            shown["log-probabilities"] = ", ".join(f"{record.logprob:.3f}" for record in records)
            if self.task.OUTPUT_TYPE == "multiple_choice":
                shown["choices"] = str(self.task.doc_to_choice(doc))
        else:
            shown["answer"] = records[0].text
            shown |= {f"extracted ({name})": str(found[0]) for name, found in answers.items() if name != "none"}
        return {key: text[:SHOWN_CHARACTERS] for key, text in shown.items()}

    def _corpus(self, label: str, items: list[Any]) -> CorpusValue:
        """A metric with an aggregation of its own, and the percentile bootstrap over documents."""
        aggregate = self.task.aggregation()[label.partition(" ")[0]]
        value = float(aggregate(items))
        if len(items) < 2:
            return CorpusValue(value)
        generator = np.random.default_rng(0)
        try:
            draws = generator.integers(0, len(items), size=(RESAMPLES, len(items)))
            means = [float(aggregate([items[i] for i in draw])) for draw in draws]
        except (ValueError, ZeroDivisionError):  # undefined on some resamples
            return CorpusValue(value)
        low, high = np.quantile(means, [0.025, 0.975])
        return CorpusValue(value, float(low), float(high), "bootstrap")

    # --- parts -----------------------------------------------------------------------------------------------

    @staticmethod
    def _label(metric: str, part: str) -> str:
        return metric if part == "none" else f"{metric} ({part})"

    def _is_mean(self, label: str) -> bool:
        from lm_eval.api.metrics import mean

        return self.task.aggregation().get(label.partition(" ")[0]) is mean

    @property
    def _shots_are_fixed(self) -> bool:
        from lm_eval.api.samplers import FirstNSampler

        return isinstance(getattr(self.task, "sampler", None), FirstNSampler)

    def _fix_shots(self) -> None:
        from lm_eval.api.samplers import FirstNSampler

        if not hasattr(self.task, "sampler") or self._shots_are_fixed:
            return
        pool = list(self.task.fewshot_docs())
        if len(pool) <= self.shots:
            raise UserError(
                f"task '{self.name}': it has {len(pool)} documents to take examples from, too few for {self.shots} "
                "shots. Set fewer shots."
            )
        self.task.sampler = FirstNSampler(pool)


def silence() -> None:
    """Hide the harness's log, which has a line for each task and setting."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_leaf(index: HarnessIndex, leaf: Leaf, data: Path | None) -> Any:
    """The harness's object of a task, with its data read. Raises `UserError` if the data cannot be read."""
    path, _ = local_dataset(leaf.dataset, data)
    spec = {**leaf.spec, **({"dataset_path": path} if path is not None else {})}
    try:
        loaded = index.manager.load([{"group": "align", "task": [spec]}])
    except UserError:
        raise
    except Exception as error:  # the harness and the library for data sets raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        fix = "Check the folder" if data is not None else "Pass --data with a folder of data sets"
        if leaf.dataset in LOADERS:
            fix = "Check data_files in dataset_kwargs; a relative path is relative to the working directory"
        raise UserError(f"task '{leaf.name}': its data cannot be read from '{path}' ({reason}). {fix}.") from error
    (task,) = loaded["tasks"].values()
    return task
