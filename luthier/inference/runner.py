"""The plain path: transformers on any causal language model, rows left-padded in one batch.

Virtual tokens are the first real tokens of their row: from the second step on nothing tells them from text.

Legend: `B` rows, `T` tokens of the longest prompt, `W` cached tokens of a row with its padding on the left,
`V` vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from luthier.inference.bases import ReadyModel
from luthier.inference.engine.sequence import Sequence
from luthier.inference.forward import forward, run_prompts, run_prompts_whole
from luthier.inference.scoring import score_stretch


@dataclass(eq=False)
class Batch:
    """The key/value cache of rows that run together.

    `mask_BW` is 1 where the cache holds a real or a virtual token and 0 on the left padding; `lengths_B`
    counts these tokens, which is the position of the next one.
    """

    ready: ReadyModel
    cache: DynamicCache
    mask_BW: torch.Tensor
    lengths_B: torch.Tensor


class Runner:
    """Run prompts and decode steps. Only the engine's thread may call it."""

    @torch.inference_mode()
    def prefill(self, sequences: list[Sequence]) -> tuple[Batch, torch.Tensor]:
        """Run the prompts of sequences of one model, and score those of which this is asked.

        Returns:
            The new rows' state and the logits of the token after each prompt, float32 [B, V].
        """
        ready: ReadyModel = sequences[0].served
        prompts = [sequence.prompt_ids for sequence in sequences]
        scored = [row for row, sequence in enumerate(sequences) if sequence.wants_prompt_scores]
        if scored:

            def see(first: int, logits_BTV: torch.Tensor) -> None:
                for row in scored:
                    num_left = len(prompts[row]) - first
                    if num_left > 0:
                        score_stretch(sequences[row], first, logits_BTV[row, :num_left])

            cache, logits_BV = run_prompts_whole(ready.activate(), prompts, ready.prefix, see)
        else:
            cache, logits_BV = run_prompts(ready.activate(), prompts, ready.prefix)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=logits_BV.device)
        lengths_B += ready.num_virtual_tokens
        _lean_right(cache, lengths_B)
        width = int(lengths_B.max())
        columns_1W = torch.arange(width, device=lengths_B.device).unsqueeze(0)
        mask_BW = (columns_1W >= width - lengths_B.unsqueeze(1)).long()
        return Batch(ready, cache, mask_BW, lengths_B), logits_BV

    @torch.inference_mode()
    def step(self, batch: Batch, token_ids: list[int]) -> torch.Tensor:
        """Run one more token of every row.

        Args:
            batch: the rows' state, which grows by one token.
            token_ids: the B tokens that were chosen last.

        Returns:
            The logits of the next tokens, float32 [B, V].
        """
        ids_B1 = torch.tensor(token_ids, device=batch.mask_BW.device).unsqueeze(1)
        batch.mask_BW = torch.nn.functional.pad(batch.mask_BW, (0, 1), value=1)
        positions_B1 = batch.lengths_B.unsqueeze(1)
        batch.lengths_B = batch.lengths_B + 1
        model = batch.ready.activate()
        return forward(model, batch.cache, ids_B1, batch.mask_BW, positions_B1)[:, -1].float()

    @torch.inference_mode()
    def keep(self, batch: Batch, rows: list[int]) -> None:
        """Drop all rows but these, and the padding that the rest no longer needs.

        Args:
            rows: positions of the rows that stay, at least one.
        """
        index = torch.tensor(rows, device=batch.mask_BW.device)
        lengths_B = batch.lengths_B[index]
        start = batch.mask_BW.shape[1] - int(lengths_B.max())
        batch.mask_BW = batch.mask_BW[index, start:]
        batch.lengths_B = lengths_B
        for layer in batch.cache.layers:
            layer.keys = layer.keys[index, :, start:]
            layer.values = layer.values[index, :, start:]

    @torch.inference_mode()
    def merge(self, batch: Batch, other: Batch) -> None:
        """Append the rows of another batch of the same model, padding the shorter of the two.

        Args:
            other: the rows to append; not to be used afterwards.
        """
        width = max(batch.mask_BW.shape[1], other.mask_BW.shape[1])
        layers = batch.cache.layers
        pairs = list(zip(layers, other.cache.layers, strict=True))
        # All is built before any is put in place: memory that runs out must not leave a half-merged batch.
        keys = [torch.cat([_pad_left(part.keys, width, dim=2) for part in pair]) for pair in pairs]
        values = [torch.cat([_pad_left(part.values, width, dim=2) for part in pair]) for pair in pairs]
        mask_BW = torch.cat([_pad_left(part.mask_BW, width, dim=1) for part in (batch, other)])
        batch.lengths_B = torch.cat([batch.lengths_B, other.lengths_B])
        batch.mask_BW = mask_BW
        for layer, key, value in zip(layers, keys, values, strict=True):
            layer.keys, layer.values = key, value


def _lean_right(cache: DynamicCache, lengths_B: torch.Tensor) -> None:
    """Move every row's tokens to the end of the cache, so that its padding lies before them."""
    width = int(lengths_B.max())
    shifts_B1 = width - lengths_B.unsqueeze(1)
    if not bool(shifts_B1.any()):
        return
    index_BW = (torch.arange(width, device=lengths_B.device).unsqueeze(0) - shifts_B1) % width
    index_B1W1 = index_BW[:, None, :, None]
    for layer in cache.layers:
        layer.keys = torch.take_along_dim(layer.keys, index_B1W1, dim=2)
        layer.values = torch.take_along_dim(layer.values, index_B1W1, dim=2)


def _pad_left(tensor: torch.Tensor, width: int, *, dim: int) -> torch.Tensor:
    missing = width - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
