"""Prompt and completion: `{"prompt": "...", "completion": "..."}`, OpenAI's rows of its older models.

No chat template: the prompt is context, the completion and an end of text are learnt. What a model learns
so is asked for by /v1/completions.
"""

from luthier.data.formats._fields import FieldsFormat, asked_and_answered
from luthier.data.formats.base import Row


class CompletionFormat(FieldsFormat):
    def row_of(self, texts: dict[str, str]) -> Row:
        return asked_and_answered(texts["prompt"], texts["completion"], is_plain=True)


FORMAT = CompletionFormat("completion", required=("prompt", "completion"), learnt="completion")
