"""Answers of the model in training to a few prompts, so that a user can watch it learn.

Greedy, through transformers' own forward with a cache of keys and values: slow beside the inference
engine, and independent of it. Legend: B rows, T tokens, D hidden size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from luthier.core.errors import InvalidValueError
from luthier.core.events import SampleAnswer
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.methods import Attached, Method
from luthier.training.process_io import StoppedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 64


class SamplePrompts:
    """User messages as the base's chat template renders them.

    Args:
        base_folder: holds the chat template; read only when there are messages.
        context_length: the base's, in tokens, virtual tokens included.
        room: what virtual tokens leave of it.

    Raises:
        InvalidValueError: when a message leaves no room for an answer (param `training.sample_prompts.<i>`).
    """

    def __init__(
        self, prompts: list[str], base_folder: Path, tokenizer: Tokenizer, context_length: int, room: int
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
            if len(token_ids) >= room:
                raise InvalidValueError(
                    f"Sample prompt {number} has {len(token_ids)} tokens; the base's context has room for "
                    f"{room}. Shorten it.",
                    param=f"training.sample_prompts.{number - 1}",
                )
            self._token_ids.append(token_ids)

    @torch.no_grad()
    def answer(
        self, method: Method, attached: Attached, should_stop: Callable[[], bool]
    ) -> list[SampleAnswer]:
        """Let the model answer every prompt, in their order; stops as `generate` does."""
        if not self._prompts:
            return []
        answers = generate(
            method,
            attached,
            self._token_ids,
            context_length=self._context_length,
            stop_token_ids=self._tokenizer.stop_token_ids,
            should_stop=should_stop,
        )
        return [
            # Databases take no text with a zero in it, and a model may say anything.
            SampleAnswer(prompt=prompt, answer=self._tokenizer.decode(answer).replace("\0", "\ufffd"))
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]


def generate(
    method: Method,
    attached: Attached,
    prompts: list[list[int]],
    *,
    context_length: int,
    stop_token_ids: frozenset[int],
    should_stop: Callable[[], bool],
) -> list[list[int]]:
    """Continue some prompts, always with the most likely token, for at most 64 of them.

    Every prompt is read alone, then all answers grow together: one token of five answers costs hardly more
    than one token of one.

    Args:
        prompts: at least one, each of at least one token.
        context_length: the base's; virtual tokens, prompt and answer share it.
        stop_token_ids: ids that end an answer, and are no part of it.

    Raises:
        StoppedError: when `should_stop`, called between tokens, returned True.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    caches, tokens = [], []
    for prompt in prompts:
        _raise_if(should_stop)
        cache, token_id = _read(method, attached, prompt)
        caches.append(cache)
        tokens.append(token_id)
    lengths = [cache.get_seq_length() for cache in caches]
    rooms = [min(MAX_NEW_TOKENS, context_length - length) for length in lengths]
    cache, mask_BT = _join(caches)
    for num_before in range(MAX_NEW_TOKENS):
        for answer, token_id, room in zip(answers, tokens, rooms, strict=True):
            # An answer that is over has fewer tokens than were made before.
            if len(answer) == num_before < room and token_id not in stop_token_ids:
                answer.append(token_id)
        if all(len(answer) <= num_before for answer in answers):
            break
        _raise_if(should_stop)
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        # Answers that are over still run, unread; no position of theirs may leave the context.
        positions = [min(length + num_before, context_length - 1) for length in lengths]
        output = attached.causal_lm(
            input_ids=torch.tensor(tokens, device=mask_BT.device)[:, None],
            attention_mask=mask_BT,
            position_ids=torch.tensor(positions, device=mask_BT.device)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        tokens = output.logits[:, -1].argmax(dim=-1).tolist()
    return answers


def _raise_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StoppedError


def _read(method: Method, attached: Attached, prompt: list[int]) -> tuple[DynamicCache, int]:
    """Read a prompt after the virtual tokens; return keys and values of both, and the first new token."""
    pairs = method.virtual_key_values(attached)
    # As PEFT does it: virtual tokens take positions 0 and up, and positions continue from the cache's length.
    cache = DynamicCache(None if pairs is None else [(key[None], value[None]) for key, value in pairs])
    inputs = _first_inputs(attached.causal_lm, prompt, method.virtual_embeddings(attached))
    output = attached.causal_lm(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, int(output.logits[0, -1].argmax())


def _join(caches: list[DynamicCache]) -> tuple[DynamicCache, torch.Tensor]:
    """Put sequences side by side, padded on the left; return their cache and its mask, int64 [B, T]."""
    longest = max(cache.get_seq_length() for cache in caches)
    gaps = [longest - cache.get_seq_length() for cache in caches]

    def joined(layer: int, name: str) -> torch.Tensor:
        parts = [getattr(cache.layers[layer], name) for cache in caches]
        padded = [
            torch.nn.functional.pad(part, (0, 0, gap, 0)) for part, gap in zip(parts, gaps, strict=True)
        ]
        return torch.cat(padded)

    layers = range(len(caches[0].layers))
    cache = DynamicCache([(joined(layer, "keys"), joined(layer, "values")) for layer in layers])
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return cache, torch.tensor(mask, device=cache.layers[0].keys.device)


def _first_inputs(
    causal_lm: "PreTrainedModel", token_ids: list[int], virtual_TD: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the first forward's inputs: the tokens, or their embeddings after the virtual ones."""
    token_ids_BT = torch.tensor([token_ids], device=causal_lm.device)
    if virtual_TD is None:
        return {"input_ids": token_ids_BT}
    embedded_BTD = causal_lm.get_input_embeddings()(token_ids_BT)
    return {"inputs_embeds": torch.cat([virtual_TD[None].to(embedded_BTD.dtype), embedded_BTD], dim=1)}
