"""Signatures, against the specification's published example and the official SDK's own verification."""

import base64

import openai
import pytest

from luthier.core.states import TERMINAL_STATUSES
from luthier.webhooks.events import EVENT_TYPES, event_type_of, payload
from luthier.webhooks.signing import new_secret, secret_hint, sign, signed_headers

_ANY_AGE = 10**10


def test_a_signature_is_the_one_of_the_specifications_example():
    # The example that the libraries of Standard Webhooks share; computed anew with hmac and base64 alone.
    signature = sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        webhook_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        timestamp=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_sdk_accepts_each_active_secret_and_no_other():
    new, old = new_secret(), new_secret()
    body = payload("evt_1", EVENT_TYPES[0], created_at=5, job_id="ftjob-1")
    headers = signed_headers([new, old], webhook_id="wh_1", timestamp=7, body=body)
    client = openai.OpenAI(api_key="lt_none")
    for secret in (new, old):
        client.webhooks.verify_signature(body, headers, secret=secret, tolerance=_ANY_AGE)
    for wrong_body, secret in ((body, new_secret()), (body + b" ", new)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(wrong_body, headers, secret=secret, tolerance=_ANY_AGE)


def test_a_secret_is_32_random_bytes_and_its_hint_gives_none_of_the_key_away():
    secrets = {new_secret() for _ in range(50)}
    assert len(secrets) == 50
    for secret in secrets:
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
        assert len(set(secret_hint(secret)) - set("whsec_…")) <= 4


def test_every_end_of_a_job_has_a_type():
    assert {event_type_of(status) for status in TERMINAL_STATUSES} == set(EVENT_TYPES)


def test_the_payload_is_thin_and_the_same_every_time():
    body = payload("evt_1", "fine_tuning.job.failed", created_at=5, job_id="ftjob-1")
    assert body == (
        b'{"id":"evt_1","object":"event","created_at":5,"type":"fine_tuning.job.failed",'
        b'"data":{"id":"ftjob-1"}}'
    )
