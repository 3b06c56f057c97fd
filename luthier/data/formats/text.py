"""Plain texts: `{"text": "..."}`. No chat template; all of the text and an end of text are learnt."""

from luthier.data.formats._fields import FieldsFormat
from luthier.data.formats.base import Row, Turn


class TextFormat(FieldsFormat):
    def row_of(self, texts: dict[str, str]) -> Row:
        return Row([Turn("assistant", texts["text"], None, True)], is_plain=True)


FORMAT = TextFormat("text", required=("text",), learnt="text")
