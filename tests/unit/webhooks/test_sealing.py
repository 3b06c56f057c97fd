"""Sealed secrets: unreadable without their key, which comes as operators' tools make it."""

import base64

import pytest

from luthier.core.errors import SecretKeyError
from luthier.webhooks.sealing import Sealer, new_secret_key


def test_what_is_sealed_is_opened_by_any_of_the_keys_and_sealed_by_the_first():
    older, newer = new_secret_key(), new_secret_key()
    sealed = Sealer(older).seal("whsec_1")
    assert "whsec" not in sealed
    assert Sealer(f"{newer}, {older}").open(sealed) == "whsec_1"
    resealed = Sealer(f"{newer},{older}").seal("whsec_1")
    assert Sealer(newer).open(resealed) == "whsec_1"
    for keys in (newer, new_secret_key()):
        with pytest.raises(SecretKeyError, match="another key"):
            Sealer(keys).open(sealed)


def test_a_key_is_base64_of_32_bytes_in_either_alphabet():
    # Its base64 has both characters that differ.
    key = b"\xfb\xff" * 16
    plain, for_urls = base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode()
    assert Sealer(plain).open(Sealer(for_urls).seal("a")) == "a"
    for wrong in ("secret", "A" * 43, base64.b64encode(b"x" * 31).decode(), "ä" * 44):
        with pytest.raises(SecretKeyError, match="32 bytes"):
            Sealer(wrong)
    with pytest.raises(SecretKeyError, match=r"not sealed yet.*services\.bootstrap"):
        Sealer(plain).open("whsec_1")
    with pytest.raises(SecretKeyError, match="not set"):
        Sealer("").seal("a")
