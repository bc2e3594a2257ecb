"""The texts of a row that filters read."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.filters import Part


@dataclass(frozen=True)
class Texts:
    """The texts of one row.

    prompts  every turn that is not the assistant's, in order
    answers  every assistant turn; the text of a `text` row; both answers of a pair
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    def part(self, part: Part) -> str:
        """The texts of `part`, joined with line breaks."""
        chosen = {"prompt": self.prompts, "answer": self.answers, "all": self.prompts + self.answers}[part]
        return "\n".join(chosen)
