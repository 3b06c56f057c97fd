"""The loss mask of a row: supervised are each trained assistant turn and its end-of-turn token.

Tool calls are part of their turn. In a row without a template the last text and an end of text are
supervised. The newline that templates put after the end of a turn is not: the model never writes it. Spans
are found by rendering the conversation up to each turn, so they hold for any template that only appends.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.core.errors import InvalidValueError
from luthier.data.formats.base import Row, Turn
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Encoding, Tokenizer

# The fault of a row with an empty mask.
NOTHING_SUPERVISED = "No token of the row is trained: leave out weight 0 on at least one assistant message."

_PROBE = [{"role": "user", "content": "x"}]


class Span(NamedTuple):
    """Characters `start` to `end` of a rendered row: one assistant turn, after its header."""

    message: int
    start: int
    end: int


class RenderedRow(NamedTuple):
    """A conversation as text, and where its trained turns are.

    `cut` is where the text is split before it is tokenised: after the prompt of a row without a template,
    with which alone the model will be called. 0 where there is no such place. `is_raw`: no template wrote
    it, so its tokens begin as the base's raw text does.
    """

    text: str
    spans: list[Span]
    cut: int = 0
    is_raw: bool = False


class MaskedText(NamedTuple):
    """A text of a row, its tokens, and which of them are supervised, bool [T]."""

    text: str
    encoding: Encoding
    mask: npt.NDArray[np.bool_]


class Refusal(NamedTuple):
    """Why a row has no tokens or no mask."""

    rule: str
    param: str | None
    message: str


def mask_rows(
    template: ChatTemplate, tokenizer: Tokenizer, rows: Sequence[Row]
) -> list[tuple[MaskedText, ...] | Refusal]:
    """Return the texts of each row, of a preference two, the preferred first; or why it is refused."""
    rendered = [_try_render(template, row) for row in rows]
    texts = [one for found in rendered if isinstance(found, list) for one in found]
    encodings = iter(encode_rows(tokenizer, texts))
    masked: list[tuple[MaskedText, ...] | Refusal] = []
    for found in rendered:
        if isinstance(found, Refusal):
            masked.append(found)
            continue
        pairs = [(one, next(encodings)) for one in found]
        try:
            masked.append(
                tuple(
                    MaskedText(one.text, encoding, mask_tokens(encoding, one.spans, tokenizer.stop_token_ids))
                    for one, encoding in pairs
                )
            )
        except InvalidValueError as error:
            masked.append(Refusal("row.mask", error.param, error.message))
    return masked


def _try_render(template: ChatTemplate, row: Row) -> list[RenderedRow] | Refusal:
    try:
        preferred = render_row(template, row)
        if row.rejected is None:
            return [preferred]
        return [preferred, render_turns(template, row.rejected, row.tools)]
    except InvalidValueError as error:
        return Refusal("row.template", error.param, error.message)


def render_row(template: ChatTemplate, row: Row) -> RenderedRow:
    """Render a row and find its trained turns; of a preference the conversation that is preferred.

    Raises:
        InvalidValueError: when the template refuses the conversation, has no place for a part of it, or
            renders a turn differently once more turns follow it.
    """
    if row.is_plain:
        return _render_raw(template, row.turns)
    return render_turns(template, row.turns, row.tools)


def render_turns(
    template: ChatTemplate, turns: Sequence[Turn], tools: list[dict[str, Any]] | None = None
) -> RenderedRow:
    """Render a conversation and find its trained turns; refused as render_row refuses."""
    _check_places(template, turns, tools)
    messages = [turn.to_message() for turn in turns]
    text = template.render(messages, add_generation_prompt=False, tools=tools)
    spans = []
    for place, turn in enumerate(turns):
        if not turn.is_trained:
            continue
        so_far = text
        if place < len(turns) - 1:
            so_far = template.render(messages[: place + 1], add_generation_prompt=False, tools=tools)
        start = _find_start(template, messages[:place], so_far, tools)
        if start is None or not text.startswith(so_far):
            raise InvalidValueError(
                "The base's chat template renders this assistant message differently when it stands last, "
                "so that its tokens are ambiguous. Give it weight 0, or end the row with it.",
                param=f"messages[{place}]",
            )
        spans.append(Span(place, start, len(so_far)))
    return RenderedRow(text, spans)


def _check_places(template: ChatTemplate, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> None:
    """Refuse what the template would silently leave out."""
    if tools and not template.supports("tools"):
        raise InvalidValueError(
            "The base's chat template has no place for tools. Remove them, or choose a base that was made "
            "for tools.",
            param="tools",
        )
    for place, turn in enumerate(turns):
        for name, is_there in (("tool_calls", turn.tool_calls), ("reasoning_content", turn.reasoning)):
            if is_there and not template.supports(name):
                raise InvalidValueError(
                    f"The base's chat template has no place for {name}. Write it as content, or choose "
                    "another base.",
                    param=f"messages[{place}].{name}",
                )


def _render_raw(template: ChatTemplate, turns: Sequence[Turn]) -> RenderedRow:
    """Join texts without a template; an end of text follows the last, and is supervised with it."""
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
    """Return the tokens of each row, with their spans in the row's text."""
    pieces = [(row.text[: row.cut], row.text[row.cut :]) if row.cut else (row.text,) for row in rows]
    encodings = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(pieces))))
    found: list[Encoding] = []
    for row in rows:
        encoding = next(encodings)
        if row.is_raw:
            encoding = tokenizer.add_raw_prefix(encoding)
        if row.cut:
            rest = next(encodings)
            encoding = Encoding(
                np.concatenate([encoding.ids, rest.ids]),
                np.concatenate([encoding.spans, rest.spans + row.cut]),
            )
        found.append(encoding)
    return found


def _find_start(
    template: ChatTemplate,
    before: Sequence[dict[str, Any]],
    so_far: str,
    tools: list[dict[str, Any]] | None,
) -> int | None:
    """Return where the turn's own text begins: after the generation prompt of what precedes it."""
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
    """Return which tokens of a row are supervised, bool [T].

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
