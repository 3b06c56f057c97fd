"""Forms read as they arrive: the same parts wherever the body is cut."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.uploads.multipart import FieldPart, FileBegin, FileBytes, read_form
from luthier.core.errors import InvalidRequestError

_TYPE = "multipart/form-data; boundary=xy"
_PIECES = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\r\n-", b"\r\n--", b"\r\n--x", b"--xy", b"\r\n--xz", b"row", b"\0", b"-" * 40]
)


def _form(content: bytes) -> bytes:
    return (
        b'--xy\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
        b'--xy\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + content
        + b'\r\n--xy\r\nContent-Disposition: form-data; name="last"\r\n\r\n1\r\n--xy--\r\n'
    )


def _read(body: bytes, cuts: list[int]) -> tuple[list[object], bytes]:
    """Return what a form has beside its file's bytes, in order, and these bytes."""
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]

    async def chunks() -> AsyncIterator[bytes]:
        for start, end in itertools.pairwise(places):
            yield body[start:end]

    async def read() -> tuple[list[object], bytes]:
        others: list[object] = []
        content = b""
        async for part in read_form(_TYPE, chunks(), fields="a file"):
            if isinstance(part, FileBytes):
                content += part.content
            else:
                others.append(part)
        return others, content

    return asyncio.run(read())


@settings(deadline=None)
@given(st.lists(_PIECES, max_size=8).map(b"".join), st.lists(st.integers(0, 400), max_size=8))
# A boundary across two chunks, the second of which has no carriage return.
@example(b"row", [len(_form(b"row")) - 70 + place for place in (0, 2, 4)])
def test_a_file_comes_out_as_it_went_in_wherever_the_body_is_cut(content, cuts):
    parts = [FieldPart("purpose", "vision"), FileBegin("file", "a"), FieldPart("last", "1")]
    body = _form(content)
    if b"\r\n--xy" in content:
        return
    for more in (cuts, list(range(len(body)))):
        assert _read(body, more) == (parts, content)


@pytest.mark.parametrize("num_missing", [1, 3, 5, 40, 75, 200])
def test_a_form_that_ends_early_is_refused(num_missing):
    body = _form(b"row" * 100).removesuffix(b"\r\n")
    with pytest.raises(InvalidRequestError):
        _read(body[:-num_missing], [])
    with pytest.raises(InvalidRequestError):
        _read(body[:-num_missing], list(range(len(body))))
