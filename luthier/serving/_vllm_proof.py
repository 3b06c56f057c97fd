"""Whether a model that vLLM loaded says what training recorded of it. Arithmetic on logits, no connections.

vLLM returns log-probabilities, which are logits less a number that is the same for all tokens. So both sides
are compared less their means.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from luthier.core.errors import SelfCheckError
from luthier.core.specs import Canary

# vLLM's number of tokens whose log-probabilities may be asked for is 20 by default.
_MAX_CANDIDATES = 16
# Gaps are shares of the recorded logits' norm. Serving in bfloat16 what was recorded in float32 makes 0.0035
# on SmolLM2-135M; where an older record was computed in bfloat16 too, its own rounding comes on top.
_NOISE = 0.01
_ROUNDED_NOISE = 0.02
# However far the model is from its base, unless training measured that its weights amplify rounding more.
_TOLERANCE = 0.1


def ask(canary: Canary, name: str) -> dict[str, Any]:
    """Return the completion that asks a model for the logits that training recorded."""
    candidates = canary.candidates[:_MAX_CANDIDATES]
    return {
        "model": name,
        "prompt": canary.token_ids,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": len(candidates),
        "logprob_token_ids": candidates,
        "return_tokens_as_token_ids": True,
        # Without vLLM's own start of a prompt: the recorded one has all its tokens.
        "add_special_tokens": False,
    }


def read(content: bytes) -> dict[int, float]:
    """Return the log-probabilities of an answer, by token id.

    Returns:
        Those of the first token's place.

    Raises:
        SelfCheckError: when there are none, or one is not finite.
    """
    try:
        (place,) = json.loads(content)["choices"][0]["logprobs"]["top_logprobs"]
        found = {int(name.removeprefix("token_id:")): float(value) for name, value in place.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SelfCheckError(
            "vLLM does not return what verifies the model; use version 0.11 or newer."
        ) from error
    if not all(math.isfinite(value) for value in found.values()):
        raise SelfCheckError("The model's logits are not finite; it is not served.")
    return found


def check(canary: Canary, model: Mapping[int, float], base: Mapping[int, float]) -> None:
    """Check that a model says what training recorded of it, and not what its base says."""
    pairs = zip(canary.candidates, canary.logits, strict=True)
    recorded = {token: logit for token, logit in pairs if token in model and token in base}
    if len(recorded) < min(len(canary.candidates), _MAX_CANDIDATES):
        raise SelfCheckError("vLLM does not return the logits that verify the model; it is not served.")
    if all(model[token] == base[token] for token in recorded):
        raise SelfCheckError("The model's artifact changes nothing about its base; it is not served.")
    norm = math.hypot(*recorded.values())
    gap = _distance(recorded, model) / norm
    base_gap = _distance(recorded, base) / norm
    is_exact = canary.precision == "float32" or canary.rounding > 0
    noise = _NOISE if is_exact else _ROUNDED_NOISE
    largest = max(_TOLERANCE, canary.allowed_rounding)
    # Beyond rounding it must be nearer to what was recorded than its base is.
    if gap > max(noise, min(base_gap / 2, largest)):
        raise SelfCheckError(
            f"The model does not say what training recorded of it (logits {gap:.2g} apart, the base's "
            f"{base_gap:.2g}); it is not served."
        )


def _distance(recorded: Mapping[int, float], found: Mapping[int, float]) -> float:
    shift = sum(found[token] - logit for token, logit in recorded.items()) / len(recorded)
    return math.hypot(*(found[token] - logit - shift for token, logit in recorded.items()))
