"""Which tokens of a row are learnt: the content of each trained assistant turn and its end-of-turn token.

Tool calls are part of their turn, so they are learnt. A plain row has no template: its last text and an end
of text are learnt.

The newline that templates put after the end of a turn is not learnt: the model never writes it. Spans are
found by rendering the conversation up to each turn, so they hold for any template that only appends.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.core.errors import InvalidValueError
from luthier.data.formats.base import Row, Turn
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Encoding, Tokenizer

# Told of a row with an empty mask, whoever finds it.
NOTHING_SUPERVISED = "No token of the row is trained: leave out weight 0 on at least one assistant message."

_PROBE = [{"role": "user", "content": "x"}]


class Span(NamedTuple):
    """Characters `start` to `end` of a rendered row: one assistant turn, after its header."""

    message: int
    start: int
    end: int


class RenderedRow(NamedTuple):
    """A conversation as text, and where its trained turns are.

    `cut` is where the text is parted before it is made into tokens: after the prompt of a plain row, which
    a model will be asked with by itself. 0 where there is no such place. `is_raw`: no template wrote it, so
    its tokens begin as the base's raw text does.
    """

    text: str
    spans: list[Span]
    cut: int = 0
    is_raw: bool = False


def render_row(template: ChatTemplate, row: Row) -> RenderedRow:
    """Render a row and find its trained turns; of a preference the conversation that is preferred.

    Returns:
        The text and the spans of the trained turns.

    Raises:
        InvalidValueError: when the template refuses the conversation, has no place for a part of it, or
            renders a turn otherwise once more turns follow it.
    """
    if row.is_plain:
        return _render_plain(template, row.turns)
    return render_turns(template, row.turns, row.tools)


def render_parts(template: ChatTemplate, row: Row) -> tuple[RenderedRow, ...]:
    """Render all that a row becomes: one text, of a preference two, the preferred first.

    Returns:
        Each text and the spans of its trained turns.

    Raises:
        InvalidValueError: as render_row does.
    """
    preferred = render_row(template, row)
    if row.rejected is None:
        return (preferred,)
    return preferred, render_turns(template, row.rejected, row.tools)


def render_turns(
    template: ChatTemplate, turns: Sequence[Turn], tools: list[dict[str, Any]] | None = None
) -> RenderedRow:
    """Render a conversation and find its trained turns.

    Args:
        tools: definitions of tools, as OpenAI has them.

    Returns:
        The text and the spans of the trained turns.

    Raises:
        InvalidValueError: as render_row does.
    """
    _check_places(template, turns, tools)
    messages = [turn.to_message() for turn in turns]
    text = template.render(messages, add_generation_prompt=False, tools=tools)
    spans = []
    for place, turn in enumerate(turns):
        if not turn.is_trained:
            continue
        is_last = place == len(turns) - 1
        so_far = text
        if not is_last:
            so_far = template.render(messages[: place + 1], add_generation_prompt=False, tools=tools)
        start = _find_last_start(template, turn, so_far) if is_last and not tools else None
        if start is None:
            start = _find_start(template, messages[:place], so_far, tools)
        if start is None or not text.startswith(so_far):
            raise InvalidValueError(
                "The base's chat template renders this assistant message otherwise when it stands last, so "
                "it can't be told what to train. Give it weight 0, or end the row with it.",
                param=f"messages[{place}]",
            )
        spans.append(Span(place, start, len(so_far)))
    return RenderedRow(text, spans)


def _check_places(template: ChatTemplate, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> None:
    """Refuse what the template would leave out without a word."""
    if tools and not template.has_place_for("tools"):
        raise InvalidValueError(
            "The base's chat template has no place for tools. Remove them, or choose a base that was made "
            "for tools.",
            param="tools",
        )
    for place, turn in enumerate(turns):
        for name, is_there in (("tool_calls", turn.tool_calls), ("reasoning_content", turn.reasoning)):
            if is_there and not template.has_place_for(name):
                raise InvalidValueError(
                    f"The base's chat template has no place for {name}. Write it as content, or choose "
                    "another base.",
                    param=f"messages[{place}].{name}",
                )


def _render_plain(template: ChatTemplate, turns: Sequence[Turn]) -> RenderedRow:
    """Join texts with no template; an end of text follows the last, and is learnt with it."""
    end_of_text = template.special_tokens.get("eos_token")
    if end_of_text is None:
        raise InvalidValueError(
            "The base names no end of text (eos_token in its tokenizer_config.json), so a model could not "
            "learn to stop after it; choose another base."
        )
    prompt = "".join(turn.content or "" for turn in turns[:-1])
    text = f"{prompt}{turns[-1].content or ''}{end_of_text}"
    return RenderedRow(text, [Span(len(turns) - 1, len(prompt), len(text))], len(prompt), is_raw=True)


def encode_rows(tokenizer: Tokenizer, rows: Sequence[RenderedRow]) -> list[Encoding]:
    """Make tokens of rendered rows.

    Returns:
        The tokens of each row, their spans within the row's text.
    """
    firsts = [row.text[: row.cut] if row.cut else row.text for row in rows]
    rests = iter(tokenizer.encode_batch([row.text[row.cut :] for row in rows if row.cut]))
    templated = iter(
        tokenizer.encode_batch([text for text, row in zip(firsts, rows, strict=True) if not row.is_raw])
    )
    raw = iter(
        tokenizer.encode_raw_batch([text for text, row in zip(firsts, rows, strict=True) if row.is_raw])
    )
    found: list[Encoding] = []
    for row in rows:
        encoding = next(raw if row.is_raw else templated)
        if row.cut:
            rest = next(rests)
            encoding = Encoding(
                np.concatenate([encoding.ids, rest.ids]),
                np.concatenate([encoding.spans, rest.spans + row.cut]),
            )
        found.append(encoding)
    return found


def _find_last_start(template: ChatTemplate, turn: Turn, text: str) -> int | None:
    """Return where the last turn's own text begins, with no rendering more, where that is plain to see."""
    marks = template.last_answer_marks
    if marks is None or turn.tool_calls or turn.reasoning or turn.content is None:
        return None
    opening, closing = marks
    if not opening or not text.endswith(f"{opening}{turn.content}{closing}"):
        return None
    return len(text) - len(closing) - len(turn.content)


def _find_start(
    template: ChatTemplate,
    before: Sequence[dict[str, Any]],
    so_far: str,
    tools: list[dict[str, Any]] | None,
) -> int | None:
    """Return where the turn's own text begins: after what an answer's prompt would have ended with."""
    if before:
        prompt = template.render(before, add_generation_prompt=True, tools=tools)
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
        stop_token_ids: tokens that end an assistant's turn.

    Returns:
        bool [T].

    Raises:
        InvalidValueError: when a turn has no end-of-turn token: a model trained so would never stop.
    """
    mask = np.zeros(len(encoding.ids), dtype=np.bool_)
    stops = np.zeros(len(encoding.ids), dtype=np.bool_)
    for token_id in stop_token_ids:
        stops |= encoding.ids == token_id
    starts, ends = encoding.spans[:, 0], encoding.spans[:, 1]
    for span in spans:
        first = int(starts.searchsorted(span.start, side="left"))
        end = int(ends.searchsorted(span.end, side="right"))
        (ends_of_turn,) = stops[first:end].nonzero()
        if not len(ends_of_turn):
            raise InvalidValueError(
                "The base's chat template closes this assistant message with none of the base's stop tokens "
                "(eos_token_id in its generation_config.json); choose another base.",
                param=f"messages[{span.message}]",
            )
        mask[first : first + int(ends_of_turn[-1]) + 1] = True
    return mask
