"""Instructions in the manner of Alpaca: `{"instruction": "...", "input"?: "...", "output": "..."}`.

Rendered by the base's chat template: the instruction and, after a blank line, the input are a user's turn;
the output is the assistant's.
"""

from luthier.data.formats._fields import FieldsFormat, asked_and_answered
from luthier.data.formats.base import Row


class InstructionFormat(FieldsFormat):
    def row_of(self, texts: dict[str, str]) -> Row:
        asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
        return asked_and_answered(asked, texts["output"])


FORMAT = InstructionFormat(
    "instruction", required=("instruction", "output"), optional=("input",), learnt="output"
)
