"""The shapes of rows that people have, and their canonical forms.

`shape_of` recognises a row by its columns and values. `conversation`, `pair`, `prompt`, `text`, `unpaired` and
`token_ids` convert a row of any accepted shape; they raise `DropRow` with the reason if the row cannot be used, and
`UserError` with file and line if a column that is needed cannot be read. docs/data.md shows every shape.
"""

from align.data.rows import Row, Unreadable
from align.data.shapes.base import Conversation, DropRow, Message, Pair, Shape, TokenIds, Unpaired
from align.data.shapes.canonical import IGNORED, conversation, plain, prompt, text, token_ids, unpaired
from align.data.shapes.messages import REASONING, to_messages
from align.data.shapes.pairs import pair
from align.data.shapes.recognise import READS, SHAPES, no_shape, require_shape, shape_of, unused_columns
from align.data.shapes.variables import RESERVED, TEMPLATE_COLUMNS, template_variables, variables_problem

__all__ = [
    "IGNORED",
    "READS",
    "REASONING",
    "RESERVED",
    "SHAPES",
    "TEMPLATE_COLUMNS",
    "Conversation",
    "DropRow",
    "Message",
    "Pair",
    "Row",
    "Shape",
    "TokenIds",
    "Unpaired",
    "Unreadable",
    "conversation",
    "no_shape",
    "pair",
    "plain",
    "prompt",
    "require_shape",
    "shape_of",
    "template_variables",
    "text",
    "to_messages",
    "token_ids",
    "unpaired",
    "unused_columns",
    "variables_problem",
]
