"""Training rows of a conversation: the tokens that the assistant generates, each in the context of its generation.

The tokens of an assistant turn are those that follow the prompt of the messages before it, through the end-of-turn
token. They are found without markers in the template.

Some templates render earlier turns differently once others follow; Qwen3's, for example, removes their reasoning. A
turn then trains in the last rendering that still begins with its prompt and its tokens. A conversation becomes several
rows, and each of its assistant turns is in the loss of exactly one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.data.shapes import DropRow, Message
from align.data.templates import REASONING, ChatTemplate, Variables, render

Masked = tuple[list[int], list[int]]
"""(input_ids [T], mask [T]); the mask is 1 on tokens in the loss, otherwise 0."""

SHARED_TOKEN = "prompt and answer share a token"
HEADER = "the chat template renders a prompt differently when an answer follows"
NO_END = "the chat template writes no end-of-turn token after an assistant turn"
INNER_END = "an assistant turn contains the end-of-turn token"


@dataclass(frozen=True)
class Turn:
    """An assistant turn in the context of its generation.

    number: index of its message.
    start: length of the prompt.
    end: length of the prompt and the generated tokens, including the end-of-turn token.
    rendered: ids [T] of the conversation up to this turn, which may go on after `end`.
    """

    number: int
    start: int
    end: int
    rendered: list[int]

    def begins(self, ids: list[int]) -> bool:
        """True if `ids` begin with the prompt and the generated tokens."""
        return ids[: self.end] == self.rendered[: self.end]


def read_turn(
    template: ChatTemplate,
    messages: Sequence[Message],
    number: int,
    variables: Variables | None = None,
    *,
    end_needed: bool = True,
) -> Turn:
    """The assistant turn `messages[number]`. Raises `DropRow` if generation could not produce its rendering.

    end_needed: refuse a turn without end-of-turn token; otherwise it ends with the rendering.
    """
    before, message = messages[:number], messages[number]
    head = template.ids(before, variables, prompt=True)
    ids = template.ids([*before, message], variables)
    if ids[: len(head)] != head:
        ids = head + _generated_alone(template, before, message, variables)
    end_ids, start = template.end_ids, len(head)
    ends = [t + 1 for t in range(start, len(ids)) if ids[t] in end_ids]
    if template.ends.implied and not ends and (end_id := template.end_after(message)) is not None:
        ids.append(end_id)
        ends = [len(ids)]
    if not ends:
        if end_needed:
            raise DropRow(NO_END)
        ends = [len(ids)]
    if len(ends) > 1:
        raise DropRow(INNER_END)
    return Turn(number, start, ends[0], ids)


def _generated_alone(
    template: ChatTemplate, before: Sequence[Message], message: Message, variables: Variables | None
) -> list[int]:
    """The ids that the template writes for `message` after the prompt of `before`.

    gpt-oss's template removes the reasoning before a tool call once an answer follows the tool's result, although the
    answer is generated with it. So the turn is read from the conversation without earlier reasoning.
    """
    before = [{key: value for key, value in m.items() if key not in REASONING} for m in before]
    prompt = str(render(template.tokenizer, before, variables, prompt=True))
    text = str(render(template.tokenizer, [*before, message], variables))
    head, ids = template.tokens(prompt), template.tokens(text)
    if ids[: len(head)] != head:
        # White space at the start of an answer may merge with the header into a token that generation cannot produce.
        raise DropRow(SHARED_TOKEN if text.startswith(prompt) else HEADER)
    return ids[len(head) :]


def training_rows(
    template: ChatTemplate, messages: Sequence[Message], variables: Variables | None = None, *, first: int = 0
) -> list[Masked]:
    """Rows that train the assistant turns from message `first` on; one row if the template keeps earlier turns.

    A template with markers decides which tokens of these turns are in the loss; otherwise all generated tokens are.
    Raises `DropRow` if a turn cannot be trained, or if the template would leave out a part of the conversation.
    """
    template.require_rendered(messages, variables)
    numbers = [n for n in range(first, len(messages)) if messages[n]["role"] == "assistant"]
    turns = [read_turn(template, messages, number, variables) for number in numbers]
    if not turns:
        return []
    # Messages after the last assistant turn are part of the row unless they change how the turns are rendered.
    ids = turns[-1].rendered if numbers[-1] + 1 == len(messages) else template.ids(messages, variables)
    if not all(turn.begins(ids) for turn in turns):
        ids, messages = turns[-1].rendered, messages[: numbers[-1] + 1]
    rows: list[Masked] = []
    while turns:
        mask = [0] * len(ids)
        for turn in turns:
            if turn.begins(ids):
                mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
        if template.has_markers:
            mask = [kept and inside for kept, inside in zip(mask, _markers(template, messages, variables, ids))]
        rows.append((ids, mask))
        turns = [turn for turn in turns if not turn.begins(ids)]
        if turns:
            ids, messages = turns[-1].rendered, messages[: turns[-1].number + 1]
    return rows[::-1]


def _markers(
    template: ChatTemplate, messages: Sequence[Message], variables: Variables | None, ids: list[int]
) -> list[int]:
    """Mask [T] of the template's `{% generation %}` blocks in `ids`, the rendering of `messages`."""
    rendered, mask = marked_tokens(template, messages, variables)
    if ids[: len(rendered)] != rendered:
        raise DropRow(HEADER)
    return mask + [1] * (len(ids) - len(rendered))  # the end-of-turn token, if only the next turn writes it


def marked_tokens(template: ChatTemplate, messages: Sequence[Message], variables: Variables | None = None) -> Masked:
    """Ids of a conversation and the tokens inside the template's `{% generation %}` blocks."""
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = render(template.tokenizer, messages, variables, **options)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def completion(
    template: ChatTemplate, prompt: Sequence[Message], answer: Sequence[Message], variables: Variables | None = None
) -> Masked:
    """(prompt ids [P], answer ids [N] through its last end-of-turn token). The answer may have several turns."""
    messages = [*prompt, *answer]
    template.require_rendered(messages, variables)
    numbers = [n for n in range(len(prompt), len(messages)) if messages[n]["role"] == "assistant"]
    if not numbers:
        raise DropRow("no assistant turn")
    turns = [read_turn(template, messages, number, variables, end_needed=False) for number in numbers]
    last = turns[-1]
    if not all(turn.begins(last.rendered) for turn in turns):
        raise DropRow("the chat template renders an earlier turn of the answer differently")
    start = turns[0].start
    if numbers[0] > len(prompt):
        head = template.ids(prompt, variables, prompt=True)
        if last.rendered[: len(head)] != head:
            raise DropRow(HEADER)
        start = len(head)
    return last.rendered[:start], last.rendered[start : last.end]
