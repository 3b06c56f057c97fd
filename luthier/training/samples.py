"""Answers of the model in training to a few prompts, so that a user can watch it learn.

Greedy, one prompt at a time, through transformers' own forward with a cache of keys and values: slow
beside the inference engine, and independent of it. Legend: B rows (one), T tokens, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from luthier.core.errors import InvalidValueError
from luthier.core.reports import SampleAnswer
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Tokenizer
from luthier.methods import Attached, Method
from luthier.training.stopping import StoppedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 64


class SamplePrompts:
    """User messages as the base's chat template renders them.

    Args:
        prompts: the messages.
        base_folder: holds the chat template; read only when there are messages.
        tokenizer: the base's.
        context_length: the base's, in tokens, virtual tokens included.

    Raises:
        InvalidValueError: when a message leaves no room for an answer (param `training.sample_prompts`).
    """

    def __init__(
        self, prompts: list[str], base_folder: Path, tokenizer: Tokenizer, context_length: int
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._token_ids: list[list[int]] = []
        if not prompts:
            return
        template = ChatTemplate.load(base_folder)
        for number, prompt in enumerate(prompts, start=1):
            messages = [{"role": "user", "content": prompt}]
            token_ids = tokenizer.encode(template.render(messages, add_generation_prompt=True))
            if len(token_ids) >= context_length:
                raise InvalidValueError(
                    f"Sample prompt {number} has {len(token_ids)} tokens; the base's context has "
                    f"{context_length}. Shorten it.",
                    param="training.sample_prompts",
                )
            self._token_ids.append(token_ids)

    @torch.no_grad()
    def answer(
        self, method: Method, attached: Attached, should_stop: Callable[[], bool]
    ) -> list[SampleAnswer]:
        """Let the model answer every prompt.

        Args:
            method: how it is tuned.
            attached: the model, in evaluation mode.
            should_stop: asked between tokens.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            StoppedError: when `should_stop` said so.
        """
        return [
            SampleAnswer(prompt=prompt, answer=self._decode(method, attached, token_ids, should_stop))
            for prompt, token_ids in zip(self._prompts, self._token_ids, strict=True)
        ]

    def _decode(
        self, method: Method, attached: Attached, token_ids: list[int], should_stop: Callable[[], bool]
    ) -> str:
        generated = generate(
            method,
            attached,
            token_ids,
            context_length=self._context_length,
            stop_token_ids=self._tokenizer.stop_token_ids,
            should_stop=should_stop,
        )
        # Databases take no text with a zero in it, and a model may say anything.
        return self._tokenizer.decode(generated).replace("\0", "\N{REPLACEMENT CHARACTER}")


def generate(
    method: Method,
    attached: Attached,
    token_ids: list[int],
    *,
    context_length: int,
    stop_token_ids: frozenset[int],
    should_stop: Callable[[], bool],
) -> list[int]:
    """Go on from some tokens, always with the most likely one, for at most 64 of them.

    Args:
        method: how the model is tuned; its virtual tokens lie before the sequence.
        attached: the model, in evaluation mode, gradients switched off.
        token_ids: what to go on from, at least one token.
        context_length: the base's; virtual tokens, prompt and answer share it.
        stop_token_ids: ids that end the answer, and are no part of it.
        should_stop: asked between tokens.

    Returns:
        The new tokens.

    Raises:
        StoppedError: when `should_stop` said so.
    """
    causal_lm = attached.causal_lm
    pairs, virtual_TD = method.virtual_key_values(attached), method.virtual_embeddings(attached)
    # As PEFT does it: virtual tokens take positions 0 and up, and positions go on from the cache's length.
    cache = (
        DynamicCache() if pairs is None else DynamicCache([(key[None], value[None]) for key, value in pairs])
    )
    inputs = _first_inputs(causal_lm, token_ids, virtual_TD)
    num_virtual = cache.get_seq_length() + (0 if virtual_TD is None else len(virtual_TD))
    room = min(MAX_NEW_TOKENS, context_length - num_virtual - len(token_ids))
    generated: list[int] = []
    while len(generated) < room:
        if should_stop():
            raise StoppedError
        output = causal_lm(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token_id = int(output.logits[0, -1].argmax())
        if token_id in stop_token_ids:
            break
        generated.append(token_id)
        inputs = {"input_ids": torch.tensor([[token_id]], device=causal_lm.device)}
    return generated


def _first_inputs(
    causal_lm: "PreTrainedModel", token_ids: list[int], virtual_TD: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the first forward's inputs: the tokens, or their embeddings after the virtual ones."""
    token_ids_BT = torch.tensor([token_ids], device=causal_lm.device)
    if virtual_TD is None:
        return {"input_ids": token_ids_BT}
    embedded_BTD = causal_lm.get_input_embeddings()(token_ids_BT)
    return {"inputs_embeds": torch.cat([virtual_TD[None].to(embedded_BTD.dtype), embedded_BTD], dim=1)}
