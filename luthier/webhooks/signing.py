"""Signatures of Standard Webhooks (the specification's symmetric scheme, v1), which OpenAI's SDKs verify.

A signature is base64 of HMAC-SHA256 over `ID.TIMESTAMP.BODY`, keyed with the bytes of the secret.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

_PREFIX = "whsec_"
_NUM_SECRET_BYTES = 32


def new_secret() -> str:
    """Return a fresh signing secret: `whsec_` and base64 of 32 random bytes."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_NUM_SECRET_BYTES)).decode()


def is_secret(text: str) -> bool:
    """Whether a text is a secret as it is; a sealed one is none."""
    return text.startswith(_PREFIX)


def secret_hint(secret: str) -> str:
    """Return the end of a secret, by which clients recognise it."""
    return secret[-4:]


def shown_hint(hint: str) -> str:
    """Return the end of a secret as clients see it."""
    return f"{_PREFIX}…{hint}"


def sign(secret: str, *, webhook_id: str, timestamp: int, body: bytes) -> str:
    """Return one signature, `v1,` and base64; `timestamp` is when this try is sent, in Unix seconds."""
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def signed_headers(
    signing_secrets: Sequence[str], *, webhook_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """Return the three headers of a delivery; every active secret signs, and a receiver accepts any."""
    signatures = [
        sign(secret, webhook_id=webhook_id, timestamp=timestamp, body=body) for secret in signing_secrets
    ]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }
