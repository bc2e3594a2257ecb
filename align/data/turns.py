"""Training rows of a conversation: the tokens that the assistant generates, each in the context of its generation.

The tokens of an assistant turn are those that follow the prompt of the messages before it, through the end-of-turn
token. They are found without markers in the template.

Some templates render earlier turns differently once others follow; Qwen3's, for example, removes their reasoning. A
turn then trains in the last rendering that still begins with its prompt and its tokens. A conversation becomes several
rows, and each of its assistant turns is in the loss of exactly one of them.

Everything is decided on rendered texts. Only the texts of the rows are tokenised, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from align.data.shapes import REASONING, DropRow, Message
from align.data.templates import ChatTemplate, Variables

SHARED_TOKEN = "prompt and answer share a token"
HEADER = "the chat template renders a prompt differently when an answer follows"
NO_END = "the chat template writes no end-of-turn token after an assistant turn"
INNER_END = "an assistant turn contains the end-of-turn token"
WEIGHT = "a message's weight in the loss is neither 0 nor 1"


@dataclass(frozen=True)
class Turn:
    """An assistant turn in the context of its generation.

    number: index of its message.
    start: length of the prompt in characters.
    end: length of the prompt and the generated text, including the end-of-turn token.
    text: rendering of the conversation up to this turn, which may go on after `end`.
    """

    number: int
    start: int
    end: int
    text: str

    def begins(self, text: str) -> bool:
        """True if `text` begins with the prompt and the generated text."""
        return text.startswith(self.text[: self.end])


@dataclass(frozen=True)
class RowText:
    """The text of a row and the turns that train in it.

    marked: (first, last + 1) character of each `{% generation %}` block, if only these are in the loss.
    """

    text: str
    turns: list[Turn] = field(default_factory=list)
    marked: list[tuple[int, int]] | None = None


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
    prompt = template.render(before, variables, prompt=True)
    text = template.render([*before, message], variables)
    if not text.startswith(prompt):
        text = prompt + _generated_alone(template, before, message, variables)
    ends = [found.end() for found in template.end_pattern.finditer(text, len(prompt))]
    if template.ends.implied and not ends and (end := template.end_after(message)) is not None:
        text += template.name(end)
        ends = [len(text)]
    if not ends:
        if end_needed:
            raise DropRow(NO_END)
        ends = [len(text)]
    if len(ends) > 1:
        raise DropRow(INNER_END)
    return Turn(number, len(prompt), ends[0], text)


def _generated_alone(
    template: ChatTemplate, before: Sequence[Message], message: Message, variables: Variables | None
) -> str:
    """The text that the template writes for `message` after the prompt of `before`.

    gpt-oss's template removes the reasoning before a tool call once an answer follows the tool's result, although the
    answer is generated with it. So the turn is read from the conversation without earlier reasoning, which may also be
    the content of a message with tool calls.
    """
    bare = [{key: value for key, value in m.items() if key not in REASONING} for m in before]
    bare = [{**m, "content": ""} if m.get("tool_calls") else m for m in bare]
    prompt = template.render(bare, variables, prompt=True)
    text = template.render([*bare, message], variables)
    if not text.startswith(prompt):
        raise DropRow(HEADER + _fitting_mode(template, before, message, variables))
    return text.removeprefix(prompt)


def _fitting_mode(
    template: ChatTemplate, before: Sequence[Message], message: Message, variables: Variables | None
) -> str:
    """Advice for an answer without reasoning in the thinking mode, or with one in the other mode."""
    if "enable_thinking" not in template.text:
        return ""
    for mode in (False, True):
        changed = {**(variables or {}), "enable_thinking": mode}
        prompt = template.render(before, changed, prompt=True)
        if template.render([*before, message], changed).startswith(prompt):
            return f"; set enable_thinking to {str(mode).lower()} in chat_template_kwargs for this answer"
    return ""


def trained(message: Message) -> bool:
    """True if the message is an assistant turn in the loss. Its weight in the loss is `train`, by default 1."""
    if message["role"] != "assistant":
        return False
    weight = message.get("train", 1)
    if weight not in (0, 1):
        raise DropRow(WEIGHT)
    return bool(weight)


def training_texts(
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Variables | None = None,
    *,
    first: int = 0,
    keeps_turns: bool = False,
) -> list[RowText]:
    """Texts of the rows that train the assistant turns from message `first` on.

    messages: with hidden names of control tokens, see `ChatTemplate.hide`.
    keeps_turns: the template renders each turn the same in every context, and marks exactly what is generated. Then one
        rendering suffices.

    A template with markers decides which tokens of these turns are in the loss; otherwise all generated tokens are.
    Raises `DropRow` if a turn cannot be trained, or if the template would leave out a part of the conversation.
    """
    template.require_rendered(messages, variables)
    numbers = [n for n in range(first, len(messages)) if trained(messages[n])]
    if keeps_turns:
        return _marked_texts(template, messages, variables, numbers)
    turns = [read_turn(template, messages, number, variables) for number in numbers]
    if not turns:
        return []
    # Messages after the last trained turn are part of the row unless they change how the turns are rendered.
    text = turns[-1].text if numbers[-1] + 1 == len(messages) else template.render(messages, variables)
    if not all(turn.begins(text) for turn in turns):
        text, messages = turns[-1].text, messages[: numbers[-1] + 1]
    rows: list[RowText] = []
    while turns:
        marked = _markers(template, messages, variables, text) if template.has_markers else None
        rows.append(RowText(text, [turn for turn in turns if turn.begins(text)], marked))
        turns = [turn for turn in turns if not turn.begins(text)]
        if turns:
            text, messages = turns[-1].text, messages[: turns[-1].number + 1]
    return rows[::-1]


def _marked_texts(
    template: ChatTemplate, messages: Sequence[Message], variables: Variables | None, numbers: Sequence[int]
) -> list[RowText]:
    """The row of a conversation, by the markers of its template."""
    text, marked = template.render_marked(messages, variables)
    assistant = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [Turn(n, start, end, text) for n, (start, end) in zip(assistant, marked, strict=True)]
    turns = [turn for turn in turns if turn.number in numbers]
    return [RowText(text, turns)] if turns else []


def _markers(
    template: ChatTemplate, messages: Sequence[Message], variables: Variables | None, text: str
) -> list[tuple[int, int]]:
    """The template's `{% generation %}` blocks in `text`, which begins with the rendering of `messages`."""
    rendered, marked = template.render_marked(messages, variables)
    if not text.startswith(rendered):
        raise DropRow(HEADER)
    # The end-of-turn token, if only the next turn writes it.
    return marked if text == rendered else [*marked, (len(rendered), len(text))]


def completion_text(
    template: ChatTemplate, prompt: Sequence[Message], answer: Sequence[Message], variables: Variables | None = None
) -> tuple[RowText, int]:
    """(row that trains the assistant turns of `answer` after `prompt`, length of the prompt in characters)."""
    messages = [*prompt, *answer]
    template.require_rendered(messages, variables)
    numbers = [n for n in range(len(prompt), len(messages)) if messages[n]["role"] == "assistant"]
    if not numbers:
        raise DropRow("no assistant turn")
    if numbers[-1] + 1 < len(messages):
        raise DropRow("the answer does not end with an assistant turn")
    turns = [read_turn(template, messages, number, variables, end_needed=False) for number in numbers]
    last = turns[-1]
    if not all(turn.begins(last.text) for turn in turns):
        raise DropRow("the chat template renders an earlier turn of the answer differently")
    start = turns[0].start
    if numbers[0] > len(prompt):
        head = template.render(prompt, variables, prompt=True)
        if not last.text.startswith(head):
            raise DropRow(HEADER)
        start = len(head)
    return RowText(last.text[: last.end], [turn for turn in turns if trained(messages[turn.number])]), start
