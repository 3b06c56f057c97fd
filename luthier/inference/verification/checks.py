"""Checks of an artifact's files and logits, of any method and on any runner.

Logits are those after short texts, by the ways that requests go, between two steps of the engine.

Legend: `V` vocabulary, `B` the first tokens of a text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.core.specs import CANARY_NAME, Canary
from luthier.inference.engine.step import BatchExecutor
from luthier.modeling.protocols import AdapterInfo, ScheduledBatch, TokenChunk
from luthier.storage.manifests import Manifest, read_manifest

# How far served logits may be from recorded ones, as the norm of the gap relative to that of the logits. In
# bfloat16 on either side rounding alone makes about 0.02; another adapter, or a wrong scale, makes more than
# the larger number wherever it changes answers at all.
CANARY_TOLERANCE = 1e-3
_ROUNDED_TOLERANCE = 0.1
# Of a text that training recorded; it takes four, and took up to sixteen.
_MAX_CANARY_TOKENS = 64
# Of fewer tokens none is left for a chunk of one token behind a longer one.
_LEAST_TOKENS = 3


def check_base(folder: Path, base_digest: str) -> Manifest:
    """Check that an artifact was trained on a base."""
    manifest = read_manifest(folder)
    if manifest.base_digest != base_digest:
        raise ArtifactCorruptError("The artifact was trained on another version of the base model.")
    return manifest


def check_finite_weights(folder: Path, names: list[str]) -> None:
    """Check every tensor of an artifact; a probe alone may not meet a value that is not finite.

    Args:
        names: names of its files; those that are not safetensors hold no weights.

    Raises:
        ArtifactCorruptError: when a file can't be read.
        SelfCheckError: when a value is not finite.
    """
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / name, framework="pt") as stored:
                check_finite(stored.get_tensor(tensor) for tensor in stored.keys())  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            raise ArtifactCorruptError("The artifact's weights can't be read.") from error


def check_finite(tensors: Iterable[torch.Tensor]) -> None:
    """Check every number of some weights.

    Raises:
        SelfCheckError: when a value is not finite.
    """
    for tensor in tensors:
        # The sum is not finite if a value is not, and takes one pass; a finite tensor may overflow it.
        if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
            raise SelfCheckError("The model's weights are not finite; it is not served.")


def read_canary(folder: Path) -> Canary | None:
    """Return what training recorded of a model, None for artifacts that are older than canaries.

    Raises:
        ArtifactCorruptError: when the file is no canary.
    """
    path = folder / CANARY_NAME
    if not path.exists():
        return None
    try:
        canary = Canary.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactCorruptError("What training recorded of the model can't be read.") from error
    if not canary.token_ids or not canary.candidates or len(canary.candidates) != len(canary.logits):
        raise ArtifactCorruptError("What training recorded of the model can't be read.")
    return canary


def check_canary(canary: Canary | None, dtype: str, logits_V: torch.Tensor) -> None:
    """Check that a model says what it said when it was trained.

    Args:
        dtype: of the runner's weights, as torch names it.
        logits_V: after the recorded text.
    """
    if canary is None:
        return
    if max(canary.candidates) >= len(logits_V) or min(canary.candidates) < 0:
        raise ArtifactCorruptError("The artifact has another vocabulary than its base.")
    gap = gap_between(logits_V.cpu()[canary.candidates], torch.tensor(canary.logits, dtype=torch.float32))
    is_exact = dtype == canary.precision == "float32"
    if not gap <= (CANARY_TOLERANCE if is_exact else max(_ROUNDED_TOLERANCE, canary.allowed_rounding)):
        raise SelfCheckError(
            f"The model does not say what training recorded of it (logits {gap:.2g} apart); it is not served."
        )


def gap_between(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the gap between logits, relative to the norm of those expected."""
    return float((found - expected).norm() / expected.norm())


def check_probe(logits_V: torch.Tensor, base_logits_V: torch.Tensor) -> None:
    """Check what a model says about a short text beside what its base says.

    Raises:
        ArtifactCorruptError: when the vocabularies differ.
        SelfCheckError: when the model's logits are not finite, or are those of the base.
    """
    if logits_V.shape != base_logits_V.shape:
        raise ArtifactCorruptError("The artifact has another vocabulary than its base.")
    check_finite_logits(logits_V)
    if torch.equal(logits_V, base_logits_V):
        raise SelfCheckError("The model's artifact changes nothing about its base; it is not served.")


def check_finite_logits(logits_V: torch.Tensor) -> None:
    """Check that a model says numbers."""
    if not bool(torch.isfinite(logits_V).all()):
        raise SelfCheckError("The model's logits are not finite; it is not served.")


@dataclass(frozen=True)
class Text:
    """A text and the adapter that it runs with. Its last token runs in a step after the others."""

    token_ids: list[int]
    adapter: AdapterInfo | None

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before it."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    @property
    def num_positions(self) -> int:
        """Positions that it takes."""
        return self.num_virtual + len(self.token_ids)


@dataclass(frozen=True)
class Said:
    """Logits, float32: after each token of a text's first chunk, and after its last token."""

    begun_BV: torch.Tensor
    last_V: torch.Tensor


@torch.inference_mode()
def probe(executor: BatchExecutor, texts: Sequence[Text]) -> list[Said]:
    """Run short texts beside each other, in blocks that are not shared.

    Raises:
        OutOfMemoryError: when there are too few blocks.
    """
    with executor.scheduler.temporary_blocks(*(text.num_positions for text in texts)) as blocks:
        chunks = [_chunks(text, own) for text, own in zip(texts, blocks, strict=True)]
        begun = _run(executor, [first for first, *_ in chunks])
        last = iter(_run(executor, [rest[0] for _, *rest in chunks if rest]))
        return [
            Said(rows_BV, next(last)[-1] if rest else rows_BV[-1])
            for rows_BV, (_, *rest) in zip(begun, chunks, strict=True)
        ]


def _run(executor: BatchExecutor, chunks: list[TokenChunk]) -> list[torch.Tensor]:
    """Return the logits of each chunk."""
    if executor.runner.limits.mixes_adapters:
        batches = [chunks] if chunks else []
    else:
        batches = [[chunk] for chunk in chunks]
    found: list[torch.Tensor] = []
    for batch in batches:
        logits = executor.runner.execute(ScheduledBatch(batch))
        counts = [chunk.num_logit_rows for chunk in batch]
        # A copy: the next step may overwrite the logits.
        found += logits.rows(range(sum(counts))).clone().split(counts)
    return found


def _chunks(text: Text, blocks: list[int]) -> list[TokenChunk]:
    adapter = None if text.adapter is None else text.adapter.adapter
    ids, num_virtual = text.token_ids, text.num_virtual
    end = len(ids) if len(ids) < _LEAST_TOKENS else len(ids) - 1
    begin = [*range(-1, -num_virtual - 1, -1), *ids[:end]]
    chunks = [TokenChunk(begin, 0, blocks, adapter, num_virtual)]
    return [*chunks, TokenChunk(ids[end:], len(begin), blocks, adapter, 0)] if end < len(ids) else chunks


def _check_tokens(executor: BatchExecutor, canary: Canary, num_virtual: int) -> None:
    """Check a recorded text before it runs: a digest does not say that it is one."""
    limits, ids = executor.runner.limits, canary.token_ids
    are_known = min(ids) >= 0 and max(ids) < limits.vocabulary_size
    if not are_known or len(ids) > min(_MAX_CANARY_TOKENS, limits.context_length - num_virtual):
        raise ArtifactCorruptError("What training recorded of the model is no short text of its base.")


def verify_adapter(
    executor: BatchExecutor, adapter: AdapterInfo, probe_ids: list[int], canary: Canary | None
) -> None:
    """Check that an adapter's logits are finite, others than the base's, and those that training recorded.

    Args:
        executor: the adapter's; only its thread may call this.
        probe_ids: the text that is run where training recorded none.
        canary: what training recorded; None for artifacts that are older than that.

    Raises:
        ArtifactCorruptError: when the vocabularies differ.
        OutOfMemoryError: when there are too few blocks.
        SelfCheckError: when it fails.
    """
    ids = probe_ids
    if canary is not None:
        _check_tokens(executor, canary, adapter.num_virtual_tokens)
        ids = canary.token_ids
    wholes, firsts = ([Text(own, one) for one in (adapter, None)] for own in (ids, ids[:1]))
    said, base_said, row, base_row = probe(executor, [*wholes, *firsts])
    check_finite_logits(torch.cat([said.begun_BV, said.last_V[None], row.last_V[None]]))
    # A decoded token, which other kernels run, has the adapter that a prefilled one has. Of a smaller change
    # rounding may leave nothing on one of the ways.
    first_gap = gap_between(said.begun_BV[0], base_said.begun_BV[0])
    if first_gap > CANARY_TOLERANCE and torch.equal(row.last_V, base_row.last_V):
        raise SelfCheckError("Token by token the base answers for the model; it is not served.")
    if gap_between(said.begun_BV, base_said.begun_BV) <= CANARY_TOLERANCE:
        # Beside others rounding may make a small change where there is none: each in a step of its own.
        (found,), (expected,) = (probe(executor, [whole]) for whole in wholes)
        check_probe(found.begun_BV, expected.begun_BV)
    check_canary(canary, executor.runner.limits.dtype, said.last_V)


def verify_full(
    executor: BatchExecutor, probe_ids: list[int], base_logits_V: torch.Tensor, canary: Canary | None
) -> None:
    """Check that a full model's logits are finite, others than its base's, and those that training recorded.

    Args:
        base_logits_V: the base's after `probe_ids`, float32.
        canary: what training recorded; None for artifacts that are older than that.
    """
    texts = [Text(probe_ids, None)]
    if canary is not None:
        _check_tokens(executor, canary, 0)
        texts.append(Text(canary.token_ids, None))
    said = probe(executor, texts)
    check_probe(said[0].last_V, base_logits_V)
    check_canary(canary, executor.runner.limits.dtype, said[-1].last_V)
