"""Identifiers and API keys.

Every id has a prefix by kind; the rest is a UUIDv7, so that ids of one kind sort by creation. An API key is
`lt_<id8>_<secret><crc>`, random, recognisable to secret scanners; its checksum separates mistyped keys from
unknown ones without a query and is not secret.
"""

import hashlib
import secrets
import string
import zlib
from typing import Literal

import uuid_utils

IdKind = Literal[
    "organization",
    "project",
    "api_key",
    "file",
    "upload",
    "upload_part",
    "job",
    "event",
    "checkpoint",
    "model",
    "alias",
    "alias_version",
    "attempt",
    "webhook_endpoint",
    "webhook_delivery",
    "webhook_event",
    "permission",
    "chat_completion",
    "completion",
    "response",
    "response_message",
    "response_call",
    "request",
]

PREFIXES: dict[IdKind, str] = {
    "organization": "org-",
    "project": "proj_",
    "api_key": "key_",
    "file": "file-",
    "upload": "upload_",
    "upload_part": "part_",
    "job": "ftjob-",
    "event": "ftevent-",
    "checkpoint": "ftckpt_",
    "model": "model-",
    "alias": "alias_",
    "alias_version": "aliasver_",
    "attempt": "attempt-",
    "webhook_endpoint": "we_",
    "webhook_delivery": "wh_",
    "webhook_event": "evt_",
    "permission": "cp_",
    "chat_completion": "chatcmpl-",
    "completion": "cmpl-",
    "response": "resp_",
    "response_message": "msg_",
    "response_call": "fc_",
    "request": "req_",
}

_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_LENGTH = 43  # 43 of 36 characters: 222 bits
_CRC_LENGTH = 6


def new_id(kind: IdKind) -> str:
    """Return a fresh id such as `ftjob-0198…`; never reused, sortable by creation time."""
    return PREFIXES[kind] + uuid_utils.uuid7().hex


def new_model_suffix() -> str:
    """Return the 8 random lower-case alphanumerics that end a tuned model's name."""
    return _random(8)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(text: str) -> str:
    value = zlib.crc32(text.encode())
    digits = []
    for _ in range(_CRC_LENGTH):
        value, digit = divmod(value, 36)
        digits.append(_ALPHABET[digit])
    return "".join(digits)


def new_api_key() -> str:
    """Return a fresh key in plain text; only its hash is ever stored."""
    body = f"lt_{_random(8)}_{_random(_SECRET_LENGTH)}"
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
