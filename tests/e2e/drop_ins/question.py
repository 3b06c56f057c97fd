"""Rows of `question` and `reply`."""

from luthier.data.formats._fields import FieldsFormat, asked_and_answered
from luthier.data.formats.base import Row


class QuestionFormat(FieldsFormat):
    """A question is a user's turn, its reply the assistant's."""

    def row_of(self, texts: dict[str, str]) -> Row:
        return asked_and_answered(texts["question"], texts["reply"])


FORMAT = QuestionFormat("question", required=("question", "reply"), learnt="reply")
