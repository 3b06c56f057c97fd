"""The renderer of messages: the base's own chat template in jinja2's sandbox. Nothing is tokenised here.

It is the only one: the API, prepare, the training process and the engine all use it. A template is a foreign
program: it can reach no attribute outside the sandbox, and its output is limited in size and time.
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.core.errors import BaseUnavailableError, InvalidValueError
from luthier.data.rendering.tokenizer import SpecialTokens, read_json

MAX_RENDERED_CHARS = 32 * 1024 * 1024
MAX_RENDER_SECONDS = 20.0

# What a template raises on messages that it was not written for: its own refusals, the sandbox's, and
# Python's on missing or mistyped values.
_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which would put \u003c where templates expect "<".
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, by which some templates mark what is trained."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

    def parse(self, parser: Any) -> Any:
        """Keep the block's content; the mask is found without the tag."""
        line_number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line_number)


def content_text(content: Any) -> str:
    """Join a message's content, a text or a list of text parts, to one text; None counts as empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise InvalidValueError("Only text is supported as a message's content.", param="messages")


def _to_template_message(message: Mapping[str, Any], *, with_argument_texts: bool) -> dict[str, Any]:
    # Bases know no `developer`; it is OpenAI's newer word for `system`.
    role, calls = message["role"], message.get("tool_calls")
    plain = {"role": "system" if role == "developer" else role, "content": content_text(message["content"])}
    if isinstance(message.get("name"), str):
        plain["name"] = message["name"]
    for key in ("tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            plain[key] = message[key]
    if calls:
        plain["tool_calls"] = [_to_template_call(call, as_text=with_argument_texts) for call in calls]
        # As in transformers: by null, templates distinguish a call alone from a call with a text.
        plain["content"] = None if message["content"] is None else plain["content"]
    return plain


def _to_template_call(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = _to_json(arguments)
    elif not as_text and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InvalidValueError("The arguments of a tool call are not JSON.", param="messages") from error
    return {**call, "function": {**function, "arguments": arguments}}


# A template is tried on this once, to find out how it takes the arguments of tool calls.
_CALL_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        ],
    },
]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _template_source(base_folder: Path, config: Mapping[str, Any]) -> str | None:
    path = base_folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


class ChatTemplate:
    """A base's chat template, compiled.

    `special_tokens` are names such as `bos_token` and their texts, which templates refer to; `spellings`
    are special tokens that stay text where a message spells them.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        spellings: SpecialTokens | None = None,
    ) -> None:
        self._spellings = spellings or SpecialTokens()
        self.special_tokens = dict(special_tokens or {})
        self._source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BaseUnavailableError(
                f"The base's chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from error

    @classmethod
    def load(cls, base_folder: Path) -> "ChatTemplate":
        """Read chat_template.jinja of a fetched base, or `chat_template` of its tokenizer_config.json.

        Raises:
            BaseUnavailableError: when the base has no template, or one that can't be compiled.
        """
        config = read_json(base_folder / "tokenizer_config.json")
        source = _template_source(base_folder, config)
        if source is None:
            raise BaseUnavailableError(
                f"The base {base_folder.name} has no chat template. Choose its chat (instruct) version, or "
                "put a chat_template.jinja into the base's folder and name that folder in models.toml."
            )
        return cls(source, _special_tokens(config), SpecialTokens.load(base_folder))

    def supports(self, member: str) -> bool:
        """Whether the template names `tools`, `tool_calls` or `reasoning_content`, and so renders them."""
        return re.search(rf"\b{member}\b", self._source) is not None

    @functools.cached_property
    def _takes_argument_texts(self) -> bool:
        """Whether the arguments of tool calls must be JSON texts.

        Transformers documents an object: most templates take one, and those that make JSON of it would quote
        a text twice. A few join it to a text, and fail on an object or write it as Python would.
        """
        for as_text in (False, True):
            messages = [_to_template_message(message, with_argument_texts=as_text) for message in _CALL_PROBE]
            with contextlib.suppress(InvalidValueError):
                text = self._render(messages, add_generation_prompt=False, tools=None)
                if "{'a': 1}" not in text:
                    return as_text
        return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a conversation to the text that the base was trained on.

        Args:
            messages: OpenAI's messages, of which `role`, `content`, `name`, `tool_calls` (arguments as an
                object or as its JSON text), `tool_call_id` and `reasoning_content` are used; `developer`
                counts as `system`.
            add_generation_prompt: whether to open an assistant's turn at the end.
            tools: definitions of tools as OpenAI has them.

        Returns:
            The text with the template's special tokens. Those that a message or a tool spells are split
            (luthier.data.rendering.tokenizer), so that Tokenizer.encode takes them for text.

        Raises:
            InvalidValueError: when the template refuses the messages or writes too much (param `messages`).
        """
        has_calls = any(message.get("tool_calls") for message in messages)
        as_text = has_calls and self._takes_argument_texts
        plain = [_to_template_message(message, with_argument_texts=as_text) for message in messages]
        return self._render(
            self._spellings.as_text(plain),
            add_generation_prompt=add_generation_prompt,
            tools=self._spellings.as_text(tools),
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        pieces: list[str] = []
        num_chars = 0
        deadline = time.monotonic() + MAX_RENDER_SECONDS
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS or time.monotonic() > deadline:
                    raise InvalidValueError(
                        "The conversation is too large for the base's chat template.", param="messages"
                    )
        except _TEMPLATE_FAILURES as error:
            # Only a template's own refusal is quoted; other errors may quote values.
            reason = str(error)[:160] if type(error) is jinja2.TemplateError else type(error).__name__
            raise InvalidValueError(
                f"The base's chat template refuses these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)
