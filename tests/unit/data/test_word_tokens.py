"""Tokens counted by words: what the library counts, on every kind of tokenizer that is cut at words."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from luthier.data.mask import RenderedRow, Span, encode_rows, mask_tokens
from luthier.data.tokens import Tokenizer
from luthier.data.word_tokens import WordTokens, cuts_at_words

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace("{1,3}", "")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Marks that begin alike, and one with a space in it.
MARKS = ["<|end|>", "<|end|>x", "<|im_start|>", "<|a b|>"]
CORPUS = [
    "what is the colour of the sky on a clear day? it's the sky's own, they'll say:\n\n  blue   it is\n",
    'def count(self):\n    return [1, 22, 333]  # the same, the same\n\t"é" Ünïcode, the end.\r\n',
    "Привет, мир! Привет  всем , and 12 345 日本語のテキスト 日本語 と\u00a0\u3000x e\u0301 ... --- the the",
]


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


def split_first(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)]
    )


def make(pre_tokenizer, normalizer=None, stop="<|end|>"):
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return Tokenizer(inner, [inner.token_to_id(stop)])


TOKENIZERS = {
    "gpt-2": make(byte_level()),
    "smollm": make(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    "llama": make(split_first(LLAMA)),
    "qwen": make(split_first(QWEN), normalizers.NFC()),
    "gpt-4o": make(split_first(GPT_4O)),
}
COUNTERS = {name: WordTokens(tokenizer) for name, tokenizer in TOKENIZERS.items()}
SPACES = [
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\u180e",
    "\x1c",
    "\x85",
]
WORDS = [
    "the",
    "sky",
    "it's",
    "'ll",
    "'",
    "12",
    "345",
    "½",
    "...",
    "/",
    ",",
    "x",
    "ab",
    "CamelCase",
    "<|",
    "|>",
]
OTHERS = ["é", "e\u0301", "\u0301", "Привет", "日本語", "😀", "\u200b"]
PIECES = [*SPACES, *WORDS, *OTHERS, *MARKS]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join)


def told_by_the_library(tokenizer, row):
    [encoding] = encode_rows(tokenizer, [row])
    return len(encoding.ids), int(mask_tokens(encoding, row.spans, tokenizer.stop_token_ids).sum())


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(asked=texts, answered=texts, more=texts, last=texts, is_plain=st.booleans())
def test_a_row_counted_by_its_words_has_the_library_s_tokens(name, asked, answered, more, last, is_plain):
    assert cuts_at_words(TOKENIZERS[name])
    head = f"<|im_start|>user\n{asked}<|end|>\n<|im_start|>assistant\n"
    middle = f"{head}{answered}<|end|>\n{more}"
    row = RenderedRow(
        f"{middle}{last}<|end|>",
        [Span(1, len(head), len(middle) - len(more)), Span(3, len(middle), len(middle) + len(last) + 7)],
        len(middle) if is_plain else 0,
    )
    counted = COUNTERS[name].count(row)
    if counted is None:
        # Of these alone the library is asked: a mark at the end of a text made one longer with it.
        assert name == "qwen" or "<|end|>x" in row.text
    else:
        assert counted == told_by_the_library(TOKENIZERS[name], row)


def test_a_span_without_an_end_of_turn_and_one_that_goes_back_are_left_to_the_library():
    counter = COUNTERS["gpt-2"]
    assert counter.count(RenderedRow("the sky<|end|>", [Span(0, 4, 7)])) is None
    assert counter.count(RenderedRow("the sky<|end|>", [Span(0, 4, 14), Span(1, 0, 14)])) is None
    assert counter.count(RenderedRow("the sky<|end|>", [Span(0, 3, 14)])) == (3, 2)
    assert counter.count(RenderedRow("", [])) == (0, 0)


def test_a_tokenizer_whose_words_depend_on_their_neighbours_is_not_cut():
    mixed = make(byte_level())
    mixed.pipeline.add_tokens([AddedToken("sky", normalized=True)])
    stripped = make(byte_level())
    stripped.pipeline.add_special_tokens([AddedToken("<|s|>", lstrip=True, normalized=False)])
    with_dropout = make(byte_level())
    model = with_dropout.pipeline.model
    model.dropout = 0.1
    for tokenizer in (
        make(byte_level(add_prefix_space=True)),
        make(byte_level(use_regex=False)),
        make(pre_tokenizers.Metaspace()),
        make(split_first(r"\w+ \w+|\s+")),
        # The pattern would be matched with what bytes are written as.
        make(
            pre_tokenizers.Sequence(
                [byte_level(use_regex=False), pre_tokenizers.Split(Regex(LLAMA), "isolated")]
            )
        ),
        make(byte_level(), normalizers.NFKC()),
        make(byte_level(), stop="a"),
        Tokenizer(mixed.pipeline, mixed.stop_token_ids),
        Tokenizer(stripped.pipeline, stripped.stop_token_ids),
        with_dropout,
    ):
        assert not cuts_at_words(tokenizer)
