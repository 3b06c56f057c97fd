"""The shape of an API key: `lt_<id8>_<secret><crc>`, random, recognisable to secret scanners.

The checksum tells a mistyped key from an unknown one without a look into the database; it is no secret.
"""

import hashlib
import secrets
import string
import zlib

_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_LENGTH = 43  # 43 of 36 characters: 222 bits
_CRC_LENGTH = 6


def _checksum(text: str) -> str:
    value = zlib.crc32(text.encode())
    digits = []
    for _ in range(_CRC_LENGTH):
        value, digit = divmod(value, 36)
        digits.append(_ALPHABET[digit])
    return "".join(digits)


def new_api_key() -> str:
    """Return a fresh key in plain text; only its hash is ever stored."""
    head = "lt_" + "".join(secrets.choice(_ALPHABET) for _ in range(8))
    body = f"{head}_" + "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    return body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Whether a text has the shape and the checksum of a key."""
    parts = key.split("_")
    if len(parts) != 3 or parts[0] != "lt" or len(parts[1]) != 8:
        return False
    body, checksum = key[:-_CRC_LENGTH], key[-_CRC_LENGTH:]
    return len(parts[2]) == _SECRET_LENGTH + _CRC_LENGTH and _checksum(body) == checksum


def key_prefix(key: str) -> str:
    """Return the part by which a key is looked up and shown: `lt_<id8>`."""
    return key[:11]


def hash_api_key(key: str) -> str:
    """Return the sha256 of a key as 64 hex digits. A fast hash is right: the secret is random, not chosen."""
    return hashlib.sha256(key.encode()).hexdigest()
