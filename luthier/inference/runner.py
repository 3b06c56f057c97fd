"""The plain path: transformers (with PEFT) on any causal language model, rows left-padded in one batch.

Legend: `B` rows, `T` tokens (padding on the left), `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from luthier.inference.bases import ServedModel
from luthier.inference.sequence import Sequence


@dataclass(eq=False)
class Batch:
    """The key/value cache of rows that run together.

    `mask_BT` is 1 where the cache holds a real token and 0 on the left padding; `lengths_B` counts the
    real tokens, which is the position of the next one.
    """

    served: ServedModel
    cache: DynamicCache
    mask_BT: torch.Tensor
    lengths_B: torch.Tensor


class Runner:
    """Run prompts and decode steps. Only the engine's thread may call it."""

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence], in_use: set[str]) -> tuple[Batch, torch.Tensor]:
        """Run the prompts of sequences of one model.

        Args:
            sequences: B sequences of one key.
            in_use: digests of adapters that running rows need, which must stay loaded.

        Returns:
            The new rows' state and the logits of the token after each prompt, float32 [B, V].

        Raises:
            JobError: when the adapter can't be loaded or fails its probe.
        """
        served: ServedModel = sequences[0].served
        served.base.slots.ensure(served, in_use)
        prompts = [sequence.prompt_ids for sequence in sequences]
        longest = max(map(len, prompts))
        device = served.base.device
        ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, longest - len(prompt) :] = 1
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        batch = Batch(served, DynamicCache(), mask_BT, mask_BT.sum(dim=-1))
        # Padding gets position 0; nothing looks at it.
        positions_BT = (mask_BT.cumsum(dim=-1) - 1).clamp_min(0)
        return batch, _forward(batch, ids_BT, positions_BT)

    @torch.inference_mode()
    def step(self, batch: Batch, token_ids: list[int]) -> torch.Tensor:
        """Run one more token of every row.

        Args:
            batch: the rows' state, which grows by one token.
            token_ids: the B tokens that were chosen last.

        Returns:
            The logits of the next tokens, float32 [B, V].
        """
        ids_B1 = torch.tensor(token_ids, device=batch.mask_BT.device).unsqueeze(1)
        batch.mask_BT = torch.nn.functional.pad(batch.mask_BT, (0, 1), value=1)
        positions_B1 = batch.lengths_B.unsqueeze(1)
        batch.lengths_B = batch.lengths_B + 1
        return _forward(batch, ids_B1, positions_B1)

    @torch.inference_mode()
    def keep(self, batch: Batch, rows: list[int]) -> None:
        """Drop all rows but these, and the padding that the rest no longer needs.

        Args:
            batch: the rows' state.
            rows: positions of the rows that stay, at least one.
        """
        index = torch.tensor(rows, device=batch.mask_BT.device)
        lengths_B = batch.lengths_B[index]
        start = batch.mask_BT.shape[1] - int(lengths_B.max())
        batch.mask_BT = batch.mask_BT[index, start:]
        batch.lengths_B = lengths_B
        for layer in batch.cache.layers:
            layer.keys = layer.keys[index, :, start:]
            layer.values = layer.values[index, :, start:]

    @torch.inference_mode()
    def merge(self, batch: Batch, other: Batch) -> None:
        """Append the rows of another batch of the same model, padding the shorter of the two.

        Args:
            batch: the rows' state, which takes the others in.
            other: the rows to append; not to be used afterwards.
        """
        width = max(batch.mask_BT.shape[1], other.mask_BT.shape[1])
        layers = batch.cache.layers
        pairs = list(zip(layers, other.cache.layers, strict=True))
        # All is built before any is put in place: memory that runs out must not leave a half-merged batch.
        keys = [torch.cat([_pad_left(part.keys, width, dim=2) for part in pair]) for pair in pairs]
        values = [torch.cat([_pad_left(part.values, width, dim=2) for part in pair]) for pair in pairs]
        mask_BT = torch.cat([_pad_left(part.mask_BT, width, dim=1) for part in (batch, other)])
        batch.lengths_B = torch.cat([batch.lengths_B, other.lengths_B])
        batch.mask_BT = mask_BT
        for layer, key, value in zip(layers, keys, values, strict=True):
            layer.keys, layer.values = key, value


def _pad_left(tensor: torch.Tensor, width: int, *, dim: int) -> torch.Tensor:
    missing = width - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _forward(batch: Batch, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
    base = batch.served.base
    model = base.slots.activate(batch.served.digest)
    arguments: dict[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": batch.mask_BT,
        "use_cache": True,
        base.cache_argument: batch.cache,
    }
    if base.takes_positions:
        arguments["position_ids"] = positions_BT
    if base.takes_logits_to_keep:
        arguments["logits_to_keep"] = 1
    return model(**arguments).logits[:, -1].float()
