"""All calls of a judge: in order, several at a time, recorded as they arrive, within a budget.

    calls.jsonl     one line for each call that was made

A call is found again by its key (judge, messages, vote), so a second run makes only the calls that are missing or have
failed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from align.config.judges import Judge, Prices
from align.errors import UserError
from align.eval.judges.calls import Reply
from align.eval.judges.prompts import VERSION
from align.run.folder import disk_error

CHARACTERS_PER_TOKEN = 2
"""Estimate of the tokens of a prompt before its call, on the safe side for English and code."""
FAILURES_TO_GIVE_UP = 5
"""Number of failed calls after which a run ends if no call has succeeded."""


@dataclass(frozen=True)
class Call:
    """One verdict to request.

    messages: prompt of the judge.
    vote: number of the vote on the same messages.
    """

    messages: tuple[dict[str, str], ...]
    vote: int = 0

    def key(self, judge: Judge) -> str:
        """Hash of all that affects the verdict."""
        facts = [VERSION, judge.model, judge.temperature, judge.max_tokens, list(self.messages), self.vote]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Spent:
    """Consumption of the calls. known: False if the server did not report tokens."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    known: bool = True

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def money(self, prices: Prices | None) -> float | None:
        """Cost of the tokens; None without prices."""
        if prices is None:
            return None
        return (self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion) / 1e6

    def add(self, reply: Reply) -> None:
        self.calls += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.known &= reply.text is None or reply.prompt_tokens > 0


@dataclass(frozen=True)
class Answers:
    """Replies to some calls.

    replies: one for each call, in order; None if the budget did not allow the call.
    spent: what all calls of this judge used, those of earlier runs included.
    stopped: the limit that was reached, or "".
    """

    replies: list[Reply | None]
    spent: Spent
    stopped: str = ""


def ask_all(
    calls: Sequence[Call], judge: Judge, ask: Callable[[Sequence[dict[str, str]], int], Reply], path: Path
) -> Answers:
    """Make the calls that `path` does not have, in order, and append their replies to it.

    ask: f(messages, seed) -> reply, called from several threads. The calls that a budget allows are a prefix of the
    missing ones. A budget of tokens or money counts a call that is being made by an estimate of its largest use. Raises
    UserError if no call succeeds.
    """
    log = _Log(path)
    keys = [call.key(judge) for call in calls]
    missing = [i for i, key in enumerate(keys) if (found := log.replies.get(key)) is None or found.text is None]
    missing = list({keys[i]: i for i in reversed(missing)}.values())[::-1]  # equal calls are made once
    waiting = deque(calls[i] for i in missing)
    running: dict[Future[Reply], Call] = {}
    stopped, failed, answered = "", 0, False
    with ThreadPoolExecutor(judge.workers) as pool, closing(log):
        while waiting or running:
            while waiting and len(running) < judge.workers:
                stopped = _over(judge, log.spent, [*running.values(), waiting[0]])
                if stopped:
                    break  # until a call that is being made has used less than its estimate
                call = waiting.popleft()
                running[pool.submit(ask, call.messages, call.vote)] = call
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                reply = future.result()
                log.add(running.pop(future).key(judge), reply)
                answered, failed = answered or reply.text is not None, failed + (reply.text is None)
            if failed >= FAILURES_TO_GIVE_UP and not answered:
                raise UserError(
                    f"judge {judge.url}: the first {failed} calls failed (the last one: {reply.problem}). Start the "
                    "server, or correct the judge's `url`."
                )
    return Answers([log.replies.get(key) for key in keys], log.spent, stopped if waiting else "")


def _over(judge: Judge, spent: Spent, calls: Sequence[Call]) -> str:
    """The limit that these calls could exceed, or ""."""
    budget = judge.budget
    if budget.calls is not None and spent.calls + len(calls) > budget.calls:
        return f"budget.calls {budget.calls}"
    prompts = sum(len(message["content"]) for call in calls for message in call.messages) // CHARACTERS_PER_TOKEN
    largest = Spent(0, spent.prompt_tokens + prompts, spent.completion_tokens + judge.max_tokens * len(calls))
    if budget.tokens is not None and largest.tokens > budget.tokens:
        return f"budget.tokens {budget.tokens}"
    money = largest.money(judge.prices)
    if budget.money is not None and money is not None and money > budget.money:
        return f"budget.money {budget.money:g}"
    return ""


class _Log:
    """Replies in a JSONL file, by key. An incomplete last line, which a killed process may leave, is removed."""

    def __init__(self, path: Path):
        self.path, self.replies, self.spent = path, dict[str, Reply](), Spent()
        end = 0
        if path.is_file():
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
                try:
                    fields = json.loads(line)
                    self._remember(fields.pop("key"), Reply(**fields))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise UserError(
                        f"{path}, line {number}: this is not a call of this version of align ({error}). Remove the "
                        "file, or choose another folder."
                    ) from None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
            self._file.truncate(end)
        except OSError as error:
            raise disk_error(path, error) from error

    def add(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"
        try:
            self._file.write(line.encode("utf-8", errors="replace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._remember(key, reply)

    def close(self) -> None:
        self._file.close()

    def _remember(self, key: str, reply: Reply) -> None:
        self.spent.add(reply)
        self.replies[key] = reply
