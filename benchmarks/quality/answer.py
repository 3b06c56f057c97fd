"""Greedy answers of a base or a tuned model, many at once, in this process.

Legend: B rows, T tokens, V vocabulary, N virtual tokens.
"""

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.task import Prompt, to_messages
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Tokenizer
from luthier.methods import Attached, Method, method_of_artifact
from luthier.modeling.load import load_base

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Answerer:
    """A model that answers.

    Args:
        base_folder: a fetched base.
        artifact: a folder of a tuned model; None for the base itself.
        dtype: type of the weights.
        num_threads: CPU threads.
    """

    def __init__(
        self, base_folder: Path, artifact: Path | None, *, dtype: torch.dtype, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        self._template = ChatTemplate.load(base_folder)
        self._tokenizer = Tokenizer.load(base_folder)
        causal_lm = load_base(base_folder, dtype=dtype, device="cpu")
        self._tuned: tuple[Method, Attached] | None = None
        if artifact is not None:
            method = method_of_artifact(artifact)
            self._tuned = (method, method.load(causal_lm, artifact))
            causal_lm = self._tuned[1].causal_lm
        self._model = causal_lm.eval()
        takes = inspect.signature(self._model.forward).parameters
        # transformers 5.2x renamed the argument.
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        with torch.no_grad():
            self._own = _virtual_key_values(self._tuned, self._model, self._cache_argument)
        # What lies before every row: the model's own virtual tokens and maybe a shared beginning.
        self._virtual, self._num_shared = self._own, 0

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int) -> list[str]:
        """Answer prompts greedily.

        Args:
            prompts: turns up to the question.
            max_new_tokens: longest answer.
            batch_size: how many are answered at once, those of like length together.

        Returns:
            The answers, in the prompts' order.
        """
        token_ids = [
            self._tokenizer.encode(self._template.render(to_messages(prompt), add_generation_prompt=True))
            for prompt in prompts
        ]
        # What all prompts begin with (template, task) is run once; a token of each is left to be run.
        shared = _common_beginning([ids[:-1] for ids in token_ids])
        self._virtual, self._num_shared = self._own, 0
        self._prove(token_ids[0])
        if shared:
            self._share(shared)
            self._prove(token_ids[0])
        order = sorted(range(len(prompts)), key=lambda number: len(token_ids[number]))
        answers: dict[int, str] = {}
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            for number, ids in zip(
                part,
                self._continue([token_ids[number][len(shared) :] for number in part], max_new_tokens),
                strict=True,
            ):
                answers[number] = self._tokenizer.decode(ids)
        return [answers[number] for number in range(len(prompts))]

    def _continue(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return the tokens that follow each prompt, without the one that ends the turn."""
        num_virtual = self._virtual[0][0].shape[1] if self._virtual else 0
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        real_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions_BT = (real_BT.cumsum(1) - 1).clamp(min=0) + num_virtual
        # Virtual tokens come first and are always seen; padding lies between them and a prompt, unseen.
        seen_BT = torch.cat([torch.ones(len(prompts), num_virtual, dtype=torch.int64), real_BT], dim=1)
        cache = self._start_cache(len(prompts))
        open_rows = list(range(len(prompts)))
        found: list[list[int]] = [[] for _ in prompts]
        for _ in range(max_new_tokens):
            next_B = self._forward(ids_BT, positions_BT, seen_BT, cache)[:, -1].argmax(-1)
            going = []
            for place, (row, token) in enumerate(zip(open_rows, next_B.tolist(), strict=True)):
                if token not in self._tokenizer.stop_token_ids:
                    found[row].append(token)
                    going.append(place)
            if not going:
                break
            if len(going) < len(open_rows):
                keep = torch.tensor(going)
                cache.batch_select_indices(keep)
                open_rows = [open_rows[place] for place in going]
                next_B, positions_BT, seen_BT = next_B[keep], positions_BT[keep], seen_BT[keep]
            ids_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
            seen_BT = torch.cat([seen_BT, torch.ones_like(ids_BT)], dim=1)
        return found

    def _forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        seen_BT: torch.Tensor,
        cache: "DynamicCache",
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {self._cache_argument: cache}
        logits_BTV: torch.Tensor = self._model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=seen_BT,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        ).logits
        return logits_BTV

    def _start_cache(self, num_rows: int) -> "DynamicCache":
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(self._virtual):
            cache.update(
                key[None].expand(num_rows, -1, -1, -1), value[None].expand(num_rows, -1, -1, -1), layer
            )
        return cache

    def _share(self, beginning: list[int]) -> None:
        """Put the keys and values of tokens that every prompt begins with before every row."""
        ids_1T = torch.tensor([beginning])
        num_virtual = self._own[0][0].shape[1] if self._own else 0
        cache = self._start_cache(1)
        seen_1T = torch.ones(1, num_virtual + len(beginning), dtype=torch.int64)
        self._forward(ids_1T, torch.arange(len(beginning))[None] + num_virtual, seen_1T, cache)
        self._virtual = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self._num_shared = len(beginning)

    def _prove(self, prompt: list[int]) -> None:
        """Compare this way to run a tuned model with the method's own, on one prompt."""
        if self._tuned is None:
            return
        method, attached = self._tuned
        expected_V = method.logits(attached, torch.tensor([prompt]))[0, -1].float()
        ids_1T = torch.tensor([prompt[self._num_shared :]])
        num_virtual = self._virtual[0][0].shape[1] if self._virtual else 0
        positions_1T = torch.arange(ids_1T.shape[1])[None] + num_virtual
        seen_1T = torch.ones(1, num_virtual + ids_1T.shape[1], dtype=torch.int64)
        found_V = self._forward(ids_1T, positions_1T, seen_1T, self._start_cache(1))[0, -1].float()
        gap = float((found_V - expected_V).norm() / expected_V.norm())
        if gap > _TOLERANCE[self._model.dtype]:
            raise SystemExit(
                f"{method.name}: answers would not be those of the trained model (logits {gap:.2g} apart)"
            )


def _common_beginning(rows: list[list[int]]) -> list[int]:
    together = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return [tokens[0] for tokens in together]


def _virtual_key_values(
    tuned: tuple[Method, Attached] | None, causal_lm: "PreTrainedModel", cache_argument: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what lies before every sequence, a pair a layer [heads, N, head size]; empty without any."""
    if tuned is None:
        return []
    method, attached = tuned
    key_values = method.virtual_key_values(attached)
    if key_values is not None:
        return [(key.to(causal_lm.dtype), value.to(causal_lm.dtype)) for key, value in key_values]
    embeddings_ND = method.virtual_embeddings(attached)
    if embeddings_ND is None:
        return []
    from transformers import DynamicCache

    arguments: dict[str, Any] = {cache_argument: DynamicCache()}
    causal_lm(inputs_embeds=embeddings_ND[None].to(causal_lm.dtype), use_cache=True, **arguments)
    return [(layer.keys[0], layer.values[0]) for layer in arguments[cache_argument].layers]
