"""Names of files in headers: whatever a client calls its file, it gets that name back."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.uploads.content_disposition import clean_filename, content_disposition, parse_disposition
from luthier.core.errors import InvalidValueError

_SCRIPTS = [
    "rows.jsonl",
    "дані.jsonl",
    "数据 集.jsonl",
    "क्\u200dष.jsonl",
    "é ü ß.jsonl",
    "👩\u200d🔬.jsonl",
]


@pytest.mark.parametrize("name", _SCRIPTS)
def test_a_name_in_any_script_may_be_written_raw(name):
    header = f'form-data; name="file"; filename="{name}"'.encode()
    assert parse_disposition(header) == ("file", name)
    assert clean_filename(name, param="file") == name


@pytest.mark.parametrize(
    ("header", "name"),
    [
        # RFC 5987, 3.2: the extended parameter goes before the plain one, wherever it stands.
        (b"form-data; name=file; filename=\"x\"; filename*=UTF-8''na%C3%AFve%20%22q%22", 'naïve "q"'),
        (b"form-data; name=\"file\"; filename*=utf-8'de'%e2%82%ac.jsonl; filename=x", "€.jsonl"),
        (b"form-data; name=\"file\"; filename*=iso-8859-1'en'%A3%20rates", "£ rates"),
        (b"form-data; name=\"file\"; filename*=koi8-r''%C1; filename=\"plain\"", "plain"),
        (b"form-data; name=\"file\"; filename*=UTF-8''%FF; filename=\"plain\"", "plain"),
        # RFC 2231, 3 and 4.1: pieces, encoded or not.
        (b"form-data; name=file; filename*0*=UTF-8''%D0%B4; filename*1=\"ani\"; filename*2*=%2Ea", "дani.a"),
        (b'form-data; name="file"; filename*0="long "; filename*1="name"', "long name"),
        # Quotes: escaped as in RFC 822, or as the HTML standard has it.
        (rb'form-data; name="file"; filename="say \"hi\".jsonl"', 'say "hi".jsonl'),
        (b'form-data; name="file"; filename="say %22hi%22.jsonl"', 'say "hi".jsonl'),
        (rb'form-data; name="file"; filename="a\\b; c.jsonl"', r"a\b; c.jsonl"),
        (b'form-data; name="file"; filename="C:\\rows\\a.jsonl"', r"C:\rows\a.jsonl"),
        (b"form-data; name=file; filename=bare.jsonl", "bare.jsonl"),
        (b'Form-Data ; NAME="file" ; FILENAME = "spaced.jsonl"', "spaced.jsonl"),
        ('form-data; name="file"; filename="é.jsonl"'.encode("latin-1"), "é.jsonl"),
        (b'form-data; name="file"; filename=""', ""),
        (b'form-data; name="file"', None),
    ],
)  # fmt: skip
def test_every_way_to_write_a_name_is_read(header, name):
    assert parse_disposition(header) == ("file", name)


@given(st.binary(max_size=200))
def test_no_header_breaks_the_reading(header):
    parse_disposition(b"form-data; " + header)


_NAMES = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"), min_size=1, max_size=60
).filter(lambda name: name not in (".", ".."))


@given(_NAMES)
def test_the_name_of_an_answer_is_ascii_on_the_wire_and_whole_when_read(name):
    header = content_disposition(name)
    assert header.isascii()
    assert not any(unicodedata.category(c) == "Cc" for c in header)
    assert parse_disposition(header.encode()) == ("", name)


def test_an_answer_names_no_folder_to_save_in():
    assert content_disposition("../../etc/passwd") == 'attachment; filename="passwd"'
    assert content_disposition("C:\\rows\\a.jsonl") == 'attachment; filename="a.jsonl"'
    assert content_disposition("..") == 'attachment; filename="file"'


def test_a_clean_name_has_no_control_characters_and_at_most_255_others():
    assert clean_filename("a\r\nX-Evil: 1\0.jsonl", param="file") == "aX-Evil: 1.jsonl"
    assert clean_filename("\r\n", param="file") == clean_filename("", param="file") == "upload"
    assert clean_filename("数" * 255, param="file") == "数" * 255
    with pytest.raises(InvalidValueError, match="256 characters") as caught:
        clean_filename("x" * 256, param="filename")
    assert caught.value.param == "filename"
