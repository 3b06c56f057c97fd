"""Texts with a class each: `{"text": "...", "label": "..."}`; the label a string or a whole number.

Rendered by the base's chat template: the text is a user's turn, the label the assistant's answer.
"""

from luthier.data.formats._fields import FieldsFormat, asked_and_answered
from luthier.data.formats.base import Row


class LabelsFormat(FieldsFormat):
    def row_of(self, texts: dict[str, str]) -> Row:
        return asked_and_answered(texts["text"], texts["label"])


FORMAT = LabelsFormat("labels", required=("text", "label"), learnt="label", whole_numbers=("label",))
