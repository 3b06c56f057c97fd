"""Encryption of signing secrets for the database: unlike API keys they must be read again.

Fernet (https://github.com/fernet/spec): AES-128-CBC and HMAC-SHA256 under a key of 32 bytes.
"""

import base64
import binascii
import secrets
from typing import TYPE_CHECKING

from luthier.core.errors import SecretKeyError

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

_NUM_KEY_BYTES = 32
# A token's version byte and the zeros of its time, in base64.
_TOKEN_START = "gAAAA"


def new_secret_key() -> str:
    """Return a fresh key: URL-safe base64 of 32 random bytes."""
    return base64.urlsafe_b64encode(secrets.token_bytes(_NUM_KEY_BYTES)).decode()


class Sealer:
    """Seals and opens texts with keys: base64 of 32 bytes each, separated by commas.

    The first key seals, all open. Without any, `seal` and `open` raise `SecretKeyError`, as a wrong key does.
    """

    def __init__(self, keys: str) -> None:
        self._keys = [_read_key(key.strip()) for key in keys.split(",") if key.strip()]

    def seal(self, text: str) -> str:
        """Return a token of printable characters, as it may be stored."""
        return self._fernet().encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """Open what `seal` returned.

        Raises:
            SecretKeyError: when there is no key, or it was sealed with none of them, or not at all.
        """
        from cryptography.fernet import InvalidToken

        if not sealed.startswith(_TOKEN_START):
            raise SecretKeyError(
                "A stored secret is not sealed yet. Operator: run `python -m services.bootstrap`."
            )
        try:
            return self._fernet().decrypt(sealed).decode()
        except InvalidToken as error:
            raise SecretKeyError(
                "A stored secret was sealed with another key than LUTHIER_SECRET_KEY holds. Operator: give "
                "API and workers the key that it was sealed with."
            ) from error

    def opens_with_first(self, sealed: str) -> bool:
        """Whether the first key opens it; False too for a text that is not sealed, or without a key."""
        from cryptography.fernet import Fernet, InvalidToken

        if not self._keys:
            return False
        try:
            Fernet(self._keys[0]).decrypt(sealed)
        except InvalidToken:
            return False
        return True

    def _fernet(self) -> "MultiFernet":
        if not self._keys:
            raise SecretKeyError(
                "Webhooks need a key for their signing secrets, and LUTHIER_SECRET_KEY is not set. Operator: "
                "set it for API and workers (openssl rand -base64 32)."
            )
        from cryptography.fernet import Fernet, MultiFernet

        return MultiFernet([Fernet(key) for key in self._keys])


def _read_key(text: str) -> bytes:
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _NUM_KEY_BYTES:
        raise SecretKeyError(
            f"LUTHIER_SECRET_KEY must be base64 of {_NUM_KEY_BYTES} bytes (openssl rand -base64 32), or "
            "several such keys separated by commas."
        )
    return base64.urlsafe_b64encode(key)
