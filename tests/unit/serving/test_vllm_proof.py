"""What a record of logits proves when only log-probabilities are returned."""

import json

import pytest

from luthier.core.errors import SelfCheckError
from luthier.core.specs import Canary
from luthier.serving import _vllm_proof

_LOGITS = [20.0 - 0.7 * index for index in range(32)]
CANARY = Canary(token_ids=[1], candidates=list(range(100, 132)), logits=_LOGITS, precision="float32")


def logprobs(*, shift: float = -25.0, noise: float = 0.0) -> dict[int, float]:
    """Return log-probabilities of the first 16 candidates, every second one off by some noise."""
    pairs = list(zip(CANARY.candidates, CANARY.logits, strict=True))[:16]
    return {token: logit + shift + noise * (index % 2) for index, (token, logit) in enumerate(pairs)}


def test_logits_less_any_number_are_the_recorded_ones():
    for shift in (-25.0, 0.0, 3.0):
        _vllm_proof.check(CANARY, logprobs(shift=shift, noise=0.1), logprobs(noise=8.0))


def test_another_model_in_its_place_is_found_even_where_it_is_near():
    # Half of 1.2 is 0.6 from the mean, of logits that are some 15: 4 % of their norm.
    base = logprobs(noise=1.2)
    _vllm_proof.check(CANARY, logprobs(noise=0.2), base)
    for model in (logprobs(noise=0.9), logprobs(noise=9.0), logprobs(noise=-1.2)):
        with pytest.raises(SelfCheckError, match="does not say what training recorded"):
            _vllm_proof.check(CANARY, model, base)
    # Also where the model is hardly different from its base, or very.
    for base in (logprobs(noise=0.2), logprobs(noise=50.0)):
        with pytest.raises(SelfCheckError, match="does not say what training recorded"):
            _vllm_proof.check(CANARY, logprobs(noise=7.0), base)


def test_rounding_is_allowed_for_more_where_an_older_record_is_rounded():
    rounded = CANARY.model_copy(update={"precision": "bfloat16"})
    _vllm_proof.check(rounded, logprobs(noise=0.4), logprobs(noise=0.1))
    computed_in_float32 = rounded.model_copy(update={"rounding": 0.004})
    for record in (CANARY, computed_in_float32):
        with pytest.raises(SelfCheckError):
            _vllm_proof.check(record, logprobs(noise=0.4), logprobs(noise=0.1))


def test_rounding_that_training_measured_is_allowed_for_short_of_what_the_base_says():
    measured = CANARY.model_copy(update={"precision": "bfloat16", "rounding": 0.2})
    # Half of 4 is 2 from the mean, of logits that are some 15: 13 % of their norm.
    _vllm_proof.check(measured, logprobs(noise=4.0), logprobs(noise=50.0))
    for record, base in ((measured, logprobs(noise=6.0)), (CANARY, logprobs(noise=50.0))):
        with pytest.raises(SelfCheckError, match="does not say what training recorded"):
            _vllm_proof.check(record, logprobs(noise=4.0), base)


def test_an_adapter_that_changes_nothing_is_found_however_little_it_should_change():
    _vllm_proof.check(CANARY, logprobs(noise=0.1), logprobs(noise=0.11))
    with pytest.raises(SelfCheckError, match="changes nothing"):
        _vllm_proof.check(CANARY, logprobs(noise=0.1), logprobs(noise=0.1))


def test_what_is_missing_or_not_finite_proves_nothing():
    few = dict(list(logprobs().items())[:15])
    with pytest.raises(SelfCheckError, match="does not return the logits"):
        _vllm_proof.check(CANARY, few, logprobs())
    for place in ({"token_id:100": float("nan")}, {"a": 1.0}, None):
        content = json.dumps({"choices": [{"logprobs": {"top_logprobs": [place]}}]}).encode()
        with pytest.raises(SelfCheckError):
            _vllm_proof.read(content)
    content = json.dumps({"choices": [{"logprobs": {"top_logprobs": [{"token_id:100": -2}]}}]}).encode()
    assert _vllm_proof.read(content) == {100: -2.0}


def test_vllm_is_asked_for_no_more_tokens_than_it_returns_by_default():
    asked = _vllm_proof.ask(CANARY, "luthier-a")
    assert asked["logprobs"] == len(asked["logprob_token_ids"]) == 16
    assert asked["prompt"] == [1]
