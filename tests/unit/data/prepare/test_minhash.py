"""Near-duplicates: what counts as one, and that a split never parts them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import InvalidTrainingFileError
from luthier.data.formats.base import Row, Turn
from luthier.data.prepare.grouping import group_beside_template, group_near
from luthier.data.prepare.minhash import MIN_SIMILARITY, Signer, row_key, row_text, similarity
from luthier.data.prepare.prepared_rows import join_rows
from luthier.data.prepare.validation_split import split_rows
from luthier.data.reports.dedup import ExactIndex, NearIndex

WORDS = [f"w{n}" for n in range(4000)]
SIGNER = Signer()


def sentence(generator, num_words=40):
    return " ".join(generator.choices(WORDS, k=num_words))


def triples(text):
    words = text.split()
    return {tuple(words[place : place + 3]) for place in range(len(words) - 2)}


def jaccard(left, right):
    one, other = triples(left), triples(right)
    return len(one & other) / len(one | other)


def test_the_estimate_is_the_jaccard_similarity_of_word_triples_within_its_error():
    generator = random.Random(7)
    texts, edited = [], []
    for place in range(300):
        words = sentence(generator, 60).split()
        texts.append(" ".join(words))
        for _ in range(place % 12):
            words[generator.randrange(60)] = generator.choice(WORDS)
        edited.append(" ".join(words))
    estimates = similarity(SIGNER.sign(texts), SIGNER.sign(edited))
    errors = [
        estimate - jaccard(left, right)
        for estimate, left, right in zip(estimates, texts, edited, strict=True)
    ]
    # The standard error of 64 draws is at most 1 / 16.
    assert abs(np.mean(errors)) < 0.01
    assert max(map(abs, errors)) < 5 / 16


def test_a_signature_does_not_depend_on_its_neighbours_case_or_punctuation():
    alone = SIGNER.sign(["What, is THIS?! a lute"])
    among = Signer().sign(["x", "what is this a lute", "", "!!!", "日本語のテキスト"])
    assert (among[1] == alone[0]).all()
    assert len({tuple(one) for one in among.tolist()}) == 5


def test_the_system_s_turn_does_not_make_rows_alike_and_a_call_does():
    def row(question, answer="a"):
        system = Turn("system", "you are a very long and patient helper of luthiers", None, False)
        return Row([system, Turn("user", question, None, False), Turn("assistant", answer, None, True)])

    assert "luthiers" not in row_text(row("q"))
    assert row_key(row("q")) == row_key(row("q")) != row_key(row("q", "b"))


@pytest.fixture(scope="module")
def families():
    """Texts of 60 families: one text each, and up to three that differ by a word or an ending."""
    generator = random.Random(3)
    found = []
    for family in range(60):
        words = sentence(generator).split()
        found.append((family, " ".join(words)))
        for _ in range(family % 4):
            changed = [*words]
            changed[generator.randrange(2, 38)] = generator.choice(WORDS)
            found.append((family, " ".join(changed) + "!"))
    return found


def test_families_are_grouped_and_strangers_are_not(families):
    signatures = SIGNER.sign([text for _, text in families])
    groups = group_near(signatures)
    by_family = {}
    for (family, _), group in zip(families, groups.tolist(), strict=True):
        by_family.setdefault(family, set()).add(group)
    assert len(set(groups.tolist())) >= 60
    assert sum(len(found) == 1 for found in by_family.values()) >= 57
    owners = {}
    for family, found in by_family.items():
        for group in found:
            assert owners.setdefault(group, family) == family


def prepared(texts):
    tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
    masks = [np.ones(len(row), np.bool_) for row in tokens]
    return join_rows(tokens, masks, list(range(1, len(texts) + 1)), list(SIGNER.sign(texts)))


def sides(texts, share):
    training, validation = split_rows(prepared(texts), share)
    return [
        {bytes(side.row(place)[0].astype(np.uint8)).decode() for place in range(side.num_rows)}
        for side in (training, validation)
    ]


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.sampled_from([0.02, 0.1, 0.3, 0.5]))
def test_no_near_duplicate_is_parted_and_the_order_of_rows_does_not_matter(families, generator, share):
    texts = [text for _, text in families]
    training, validation = sides(texts, share)
    assert training | validation == set(texts)
    assert not training & validation
    assert 1 <= len(validation) <= max(1, round(share * len(texts)))
    left, right = SIGNER.sign(sorted(training)), SIGNER.sign(sorted(validation))
    for row in right:
        assert similarity(left, np.broadcast_to(row, left.shape)).max() < MIN_SIMILARITY
    shuffled = [*texts]
    generator.shuffle(shuffled)
    assert sides(shuffled, share) == [training, validation]


def test_rows_that_are_all_alike_can_not_be_split():
    generator = random.Random(1)
    text = sentence(generator, 60)
    texts = [f"{text} {word}" for word in WORDS[:30]]
    with pytest.raises(InvalidTrainingFileError, match="too few different rows"):
        split_rows(prepared(texts), 0.1)


@pytest.fixture(scope="module")
def templated():
    """Texts of one long template: 300 subjects, every third of them twice with another ending."""
    generator = random.Random(11)
    template = sentence(generator, 60)
    subjects = [sentence(generator, 12) for _ in range(300)]
    twice = [f"{template} {subject}!" for subject in subjects[::3]]
    return [f"{template} {subject}" for subject in subjects] + twice


def test_rows_of_one_template_are_distinguished_by_the_rest_of_their_texts(templated):
    signatures = SIGNER.sign(templated)
    assert len(set(group_near(signatures).tolist())) == 1
    groups = group_beside_template(signatures)
    assert len(set(groups.tolist())) == 300
    assert (groups[300:] == groups[:300:3]).all()


def test_a_file_of_one_template_is_split_with_its_repeats_on_one_side(templated):
    training, validation = sides(templated, 0.1)
    assert len(validation) == 40
    assert not {text.rstrip("!") for text in training} & {text.rstrip("!") for text in validation}
    assert sides(templated[::-1], 0.1) == [training, validation]


def test_what_was_seen_is_found_within_a_batch_and_across_batches(families):
    texts = [text for _, text in families]
    signatures = SIGNER.sign(texts)
    numbers = np.arange(1, len(texts) + 1)
    seen = NearIndex(1024)
    found = [
        seen.find_and_add(signatures[start : start + 7], numbers[start : start + 7])
        for start in range(0, len(texts), 7)
    ]
    for number, earlier in zip(numbers.tolist(), np.concatenate(found).tolist(), strict=True):
        family = families[number - 1][0]
        if earlier >= 0:
            assert earlier < number
            assert families[earlier - 1][0] == family
    num_repeats = len(texts) - 60
    assert (np.concatenate(found) >= 0).sum() >= 0.95 * num_repeats
    assert (seen.find(signatures) >= 0).all()


def test_a_full_window_forgets_the_oldest_and_nothing_else():
    generator = random.Random(5)
    signatures = SIGNER.sign([sentence(generator) for _ in range(200)])
    seen = NearIndex(64)
    seen.find_and_add(signatures, np.arange(200))
    found = seen.find(signatures)
    assert (found[-64:] == np.arange(136, 200)).sum() >= 60
    assert (found[:100] >= 0).sum() == 0


def test_equal_contents_are_found_by_the_first_that_had_them():
    seen = ExactIndex()
    assert [seen.find_or_add(key, number) for number, key in enumerate([5, 9, 5, 0, 0, 9 + 2**21])] == [
        None,
        None,
        0,
        None,
        3,
        None,
    ]
    assert (seen.find(9), seen.find(77)) == (1, None)
