"""Which tokens of a row are learnt: the content of each trained assistant turn and its end-of-turn token.

The newline that templates put after the end of a turn is not learnt: the model never writes it. Spans are
found by rendering the conversation up to each turn, so they hold for any template that only appends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.core.errors import InvalidValueError
from luthier.data.formats.base import Turn
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Encoding

_PROBE = [{"role": "user", "content": "x"}]


class Span(NamedTuple):
    """Characters `start` to `end` of a rendered row: one assistant turn, after its header."""

    message: int
    start: int
    end: int


class RenderedRow(NamedTuple):
    """A conversation as text, and where its trained turns are."""

    text: str
    spans: list[Span]


def render_row(template: ChatTemplate, turns: Sequence[Turn]) -> RenderedRow:
    """Render a row and find its trained turns.

    Args:
        template: the base's.
        turns: the conversation, an assistant's turn last.

    Returns:
        The text and the spans of the trained turns.

    Raises:
        InvalidValueError: when the template refuses the conversation, or renders a turn otherwise once more
            turns follow it.
    """
    messages = [turn.to_message() for turn in turns]
    text = template.render(messages, add_generation_prompt=False)
    spans = []
    for place, turn in enumerate(turns):
        if not turn.is_trained:
            continue
        is_last = place == len(turns) - 1
        so_far = text if is_last else template.render(messages[: place + 1], add_generation_prompt=False)
        start = _find_start(template, messages[:place], so_far)
        if start is None or not text.startswith(so_far):
            raise InvalidValueError(
                "The base's chat template renders this assistant message otherwise when it stands last, so "
                "it can't be told what to train. Give it weight 0, or end the row with it.",
                param=f"messages[{place}]",
            )
        spans.append(Span(place, start, len(so_far)))
    return RenderedRow(text, spans)


def _find_start(template: ChatTemplate, before: Sequence[dict[str, str]], so_far: str) -> int | None:
    """Return where the turn's own text begins: after what an answer's prompt would have ended with."""
    if before:
        prompt = template.render(before, add_generation_prompt=True)
        return len(prompt) if so_far.startswith(prompt) else None
    # Templates may refuse an empty conversation or leave out a default system turn then, so the header
    # is taken from another conversation and looked up.
    with_header = template.render(_PROBE, add_generation_prompt=True)
    header = with_header.removeprefix(template.render(_PROBE, add_generation_prompt=False))
    place = so_far.find(header)
    return place + len(header) if place >= 0 else None


def mask_tokens(
    encoding: Encoding, spans: Sequence[Span], stop_token_ids: frozenset[int]
) -> npt.NDArray[np.bool_]:
    """Mark the tokens of a row that are learnt.

    Args:
        encoding: of the row's text.
        spans: from render_row.
        stop_token_ids: tokens that end an assistant's turn.

    Returns:
        bool [T].

    Raises:
        InvalidValueError: when a turn has no end-of-turn token: a model trained so would never stop.
    """
    mask = np.zeros(len(encoding.ids), dtype=np.bool_)
    stops = np.isin(encoding.ids, list(stop_token_ids))
    for span in spans:
        first = int(np.searchsorted(encoding.spans[:, 0], span.start, side="left"))
        end = int(np.searchsorted(encoding.spans[:, 1], span.end, side="right"))
        ends_of_turn = np.flatnonzero(stops[first:end])
        if not len(ends_of_turn):
            raise InvalidValueError(
                "The base's chat template closes this assistant message with none of the base's stop tokens "
                "(eos_token_id in its generation_config.json); choose another base.",
                param=f"messages[{span.message}]",
            )
        mask[first : first + int(ends_of_turn[-1]) + 1] = True
    return mask
