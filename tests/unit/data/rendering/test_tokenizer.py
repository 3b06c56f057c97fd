import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from luthier.core.errors import BaseUnavailableError
from luthier.data.rendering.tokenizer import StreamDecoder, Tokenizer
from tests.tiny import VOCAB_SIZE, build_tiny_base

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def tiny(base):
    return Tokenizer.load(base)


@pytest.fixture(scope="module")
def fallback():
    """A tokenizer in the manner of Llama 2: spaces as U+2581, one in front, unknown characters as bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner)


@given(TEXTS)
def test_decoding_gives_back_the_text_exactly(tiny, text):
    assert tiny.decode(tiny.encode(text), skip_special=False) == text


@given(TEXTS)
def test_byte_fallback_tokens_give_back_the_text_exactly(fallback, text):
    assert fallback.decode(fallback.encode(text)) == text if text else True


PARTS = st.sampled_from(["<|im_start|>", "<|im_end|>", " ", "\n", "the sky", "né", "🎉", "日本"]) | TEXTS


@given(st.lists(st.lists(PARTS, max_size=6).map("".join), max_size=4))
def test_tokens_and_spans_of_many_texts_are_the_librarys_own(base, tiny, texts):
    library = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    expected = library.encode_batch(texts, add_special_tokens=False)
    for encoding, theirs in zip(tiny.encode_batch(texts), expected, strict=True):
        assert encoding.ids.tolist() == theirs.ids
        assert [tuple(span) for span in encoding.spans.tolist()] == theirs.offsets


def test_spans_of_a_tokenizer_that_changes_the_text_are_the_librarys(fallback):
    [encoding] = fallback.encode_batch(["a ab"])
    assert encoding.ids.tolist() == fallback.encode("a ab")
    assert encoding.spans[-1].tolist()[1] == len("a ab")


@given(TEXTS)
def test_the_bytes_of_the_tokens_joined_are_the_bytes_of_the_text(tiny, text):
    assert b"".join(map(tiny.token_bytes, tiny.encode(text))) == text.encode()


@given(st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=30), st.booleans())
def test_streamed_text_joined_equals_the_text_of_all_tokens(tiny, ids, skip_special):
    decoder = StreamDecoder(tiny, skip_special=skip_special)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == tiny.decode(ids, skip_special=skip_special)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30))
def test_decoding_equals_the_librarys_own(base, tiny, ids):
    library = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    assert tiny.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_streaming_never_cuts_a_character(tiny):
    decoder = StreamDecoder(tiny)
    pieces = [decoder.push(token_id) for token_id in tiny.encode("né 🎉 日本")]
    assert "\ufffd" not in "".join(pieces)
    assert decoder.flush() == ""
    assert "" in pieces


def test_a_character_left_unfinished_becomes_one_mark_at_the_end(tiny):
    decoder = StreamDecoder(tiny)
    first = tiny.encode("🎉")[0]
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    assert tiny.token_text(first) == "\ufffd"


def test_special_tokens_in_text_are_recognised_and_none_is_added(tiny):
    assert tiny.encode("<|im_start|><|im_end|>") == [1, 2]
    assert tiny.encode("") == []
    assert tiny.token_text(2) == "<|im_end|>"
    assert tiny.decode([1, 2]) == ""


def test_stop_tokens_come_from_every_file_that_names_them(base, tmp_path):
    folder = build_tiny_base(tmp_path / "base")
    assert Tokenizer.load(folder).stop_token_ids == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Tokenizer.load(folder).stop_token_ids == {0, 2}


def test_truncation_left_in_the_file_cuts_no_text(base, tmp_path):
    folder = build_tiny_base(tmp_path / "base")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))
    text = "a text that has many more tokens than three"
    assert Tokenizer.load(folder).encode(text) == Tokenizer.load(base).encode(text)


def test_an_id_outside_the_vocabulary_has_no_bytes(tiny):
    assert tiny.token_bytes(VOCAB_SIZE + 1000) == b""


def test_a_missing_or_unreadable_tokenizer_is_a_base_that_is_unavailable(tmp_path):
    with pytest.raises(BaseUnavailableError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseUnavailableError, match="can't be read"):
        Tokenizer.load(tmp_path)
