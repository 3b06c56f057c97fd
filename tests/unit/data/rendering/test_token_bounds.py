"""How much of a text a token can stand for: never less than what any token does, or nothing."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from luthier.data.rendering import tokenizer as tokenizer_module
from luthier.data.rendering.token_bounds import find_bounds

CORPUS = ["the sky is blue and the sea is the same " * 3, "\u00e9t\u00e9 \uac01\uac02 \u1faa"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
FEWER = [letter for letter in ALPHABET if letter not in "9\u0120"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def make(
    pre_tokenizer: object = BYTE_LEVEL,
    normalizer: object = None,
    alphabet: list[str] = ALPHABET,
    mark: AddedToken | None = None,
) -> tokenizer_module.Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=1, show_progress=False, initial_alphabet=alphabet
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_special_tokens([mark or AddedToken("<|end|>", normalized=False)])
    return tokenizer_module.Tokenizer(inner)


def make_fallback(*, with_bytes: bool) -> tokenizer_module.Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if with_bytes else ["<unk>"]
    pieces += ["\u2581", "\u2581\u2581", "t", "h", "e", "th", "the", "\u2581the"]
    merges = [("\u2581", "\u2581"), ("t", "h"), ("th", "e"), ("\u2581", "the")]
    inner = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)},
            merges,
            byte_fallback=with_bytes,
            unk_token=None if with_bytes else "<unk>",
            fuse_unk=True,
        )
    )
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    inner.normalizer = normalizers.Sequence(steps)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer_module.Tokenizer(inner)


SPLIT = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
BOUNDED = {
    "byte level": make(),
    "digits": make(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])),
    "split": make(pre_tokenizers.Sequence([SPLIT, BYTE_LEVEL])),
    "composed": make(normalizer=normalizers.NFC()),
    "fewer": make(alphabet=FEWER),
    "fallback": make_fallback(with_bytes=True),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens_than_its_bytes_require(name):
    tokenizer = BOUNDED[name]
    bounds = find_bounds(tokenizer)
    assert bounds is not None and bounds.min_num_tokens("the sky" * 1000) > 50
    dice = random.Random(1)
    # Kelvin's sign and letters that are composed of three: what canonical composition makes shortest.
    parts = ["the sky", " ", "\n", "\u212a", "\u1100\u1161\u11a8", "\u2126\u0313\u0340\u0345"]
    parts += ["\u00e9", "<|end|>", "9", "\u2581" * 4]
    for _ in range(200):
        text = "".join(dice.choices(parts, k=dice.randint(1, 40))) * dice.randint(1, 5)
        assert len(tokenizer.encode(text)) >= bounds.min_num_tokens(text)


@pytest.mark.parametrize(
    "tokenizer",
    [
        make(normalizer=normalizers.NFKC()),
        make(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        make(pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTE_LEVEL])),
        make(pre_tokenizers.Whitespace()),
        make(mark=AddedToken("<|end|>", normalized=False, rstrip=True)),
        # The library drops bytes that have no token, and composition may make such bytes of others.
        make(normalizer=normalizers.NFC(), alphabet=FEWER),
        make_fallback(with_bytes=False),
    ],
)
def test_there_is_no_bound_where_text_may_vanish(tokenizer):
    assert find_bounds(tokenizer) is None
