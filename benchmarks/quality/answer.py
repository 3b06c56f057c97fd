"""Greedy answers of a base or a tuned model, many at once, by the serving engine itself in this process.

Legend: V vocabulary.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.quality.task import Prompt, to_messages
from luthier.core.shapes import read_shape
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import StreamDecoder, Tokenizer
from luthier.inference.engine.sequence import Failure, Piece, SamplingOptions, Sequence, SequenceEvent
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.runners.registry import choose_runner
from luthier.inference.verification.checks import Text, probe
from luthier.methods import method_of_artifact
from luthier.modeling.load import load_base
from luthier.modeling.protocols import AdapterInfo, AdapterSource, Budget

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_NUM_TOKENS_A_ROW = 2048
_PROBE_IDS = [5, 6, 7]


@dataclass(frozen=True)
class _Served:
    """What the scheduler asks of a model."""

    adapter: AdapterInfo | None


class Answerer:
    """A model that answers.

    Args:
        base_folder: a fetched base, of a kind that is served packed.
        artifact: a folder of a tuned model; None for the base itself.
        dtype: type of the weights.
        num_threads: CPU threads.
        num_rows: questions that are answered at once.
    """

    def __init__(
        self,
        base_folder: Path,
        artifact: Path | None,
        *,
        dtype: torch.dtype,
        num_threads: int,
        num_rows: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._template = ChatTemplate.load(base_folder)
        self._tokenizer = Tokenizer.load(base_folder)
        self._base_folder, self._artifact, self._dtype = base_folder, artifact, dtype
        is_whole = artifact is not None and method_of_artifact(artifact).is_whole_model
        folder = artifact if artifact is not None and is_whole else base_folder
        load_model = partial(load_base, folder, dtype=dtype, device="cpu")
        budget = Budget(max_cache_tokens=num_rows * _NUM_TOKENS_A_ROW, max_sequences=num_rows)
        self._executor = BatchExecutor(choose_runner(load_model, folder, budget, _PROBE_IDS))
        self._adapter = None if artifact is None or is_whole else _add(artifact, base_folder, self._executor)

    def answer(self, prompts: Many[Prompt], *, max_new_tokens: int) -> list[str]:
        """Answer prompts greedily.

        Args:
            prompts: turns up to the question.
            max_new_tokens: longest answer.

        Returns:
            The answers, in the prompts' order.
        """
        token_ids = [
            self._tokenizer.encode(self._template.render(to_messages(prompt), add_generation_prompt=True))
            for prompt in prompts
        ]
        self._prove(token_ids[0])
        events: list[list[SequenceEvent]] = [[] for _ in prompts]
        for ids, own in zip(token_ids, events, strict=True):
            self._executor.scheduler.add(
                Sequence(
                    key=("base", None),
                    served=_Served(self._adapter),
                    prompt_ids=ids,
                    options=SamplingOptions(max_tokens=max_new_tokens, temperature=0.0),
                    decoder=StreamDecoder(self._tokenizer),
                    stop_token_ids=self._tokenizer.stop_token_ids,
                    emit=own.append,
                )
            )
        while self._executor.scheduler.has_work:
            self._executor.step()
        return [_text_of(own) for own in events]

    def _prove(self, prompt: list[int]) -> None:
        """Compare this way to run a tuned model with the method's own, on one prompt."""
        if self._artifact is None:
            return
        method = method_of_artifact(self._artifact)
        attached = method.load(load_base(self._base_folder, dtype=self._dtype, device="cpu"), self._artifact)
        with torch.inference_mode():
            expected_V = method.logits(attached, torch.tensor([prompt]))[0, -1].float()
        found_V = probe(self._executor, [Text(prompt, self._adapter)])[0].last_V
        gap = float((found_V - expected_V).norm() / expected_V.norm())
        if not gap <= _TOLERANCE[self._dtype]:
            raise SystemExit(
                f"{method.name}: answers would not be those of the trained model (logits {gap:.2g} apart)"
            )


def _add(artifact: Path, base_folder: Path, executor: BatchExecutor) -> AdapterInfo:
    parts = method_of_artifact(artifact).read_parts(artifact, read_shape(base_folder))
    return executor.runner.add_adapter(AdapterSource(artifact, parts))


def _text_of(events: list[SequenceEvent]) -> str:
    last = events[-1]
    if isinstance(last, Failure):
        raise SystemExit(f"an answer failed: {last.error.message}")
    return "".join(event.text for event in events if isinstance(event, Piece))
