"""A prompt as its answers repeat it: its text, and where in it each token begins."""

from dataclasses import dataclass

from luthier.data.rendering.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Echo:
    """A prompt's text; `starts` are the characters at which its tokens begin, empty where nobody asks."""

    text: str
    starts: tuple[int, ...] = ()


def make_echo(tokenizer: Tokenizer, prompt: str | list[int], *, with_starts: bool) -> Echo:
    """Return what an answer begins with.

    Args:
        prompt: as the client sent it, a text or its token ids.
        with_starts: whether to find out where the tokens begin.

    Returns:
        The echo; of token ids the text with all marks spelled out.
    """
    if isinstance(prompt, str):
        if not with_starts:
            return Echo(prompt)
        [encoding] = tokenizer.encode_raw_batch([prompt])
        return Echo(prompt, tuple(encoding.spans[:, 0].clip(0).tolist()))
    decoder = StreamDecoder(tokenizer, skip_special=False)
    pieces, starts, end = [], [], 0
    for token_id in prompt:
        starts.append(end)
        pieces.append(decoder.push(token_id))
        end += len(pieces[-1])
    text = "".join(pieces) + decoder.flush()
    return Echo(text, tuple(starts) if with_starts else ())
