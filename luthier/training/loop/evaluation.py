"""Evaluation without training: validation rows, the general text, answers to sample prompts.

Forgetting is measured on the bundled general text: prose of several registers, written for this. A blank line
ends a passage. The text is part of what reported numbers mean: changing it changes them.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.core.errors import NonFiniteLossError
from luthier.core.events import Evaluation
from luthier.data.prepare.batch_plan import split_micro
from luthier.data.prepare.preference_pairs import split_pairs
from luthier.data.prepare.prepared_rows import PreparedRows, join_rows
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.training.loop.sample_answers import SamplePrompts
from luthier.training.model.batches import ScoringOptions, micro_batches
from luthier.training.model.dpo import PairBatch, PairSums, Preferences, pair_loss
from luthier.training.model.training_model import JobModel

_PATH = Path(__file__).with_name("general_text.txt")
# Enough for any passage; a base with a shorter context reads them in pieces.
_MAX_ROW_TOKENS = 128


@cache
def general_passages() -> list[str]:
    return _PATH.read_text(encoding="utf-8").strip().split("\n\n")


def general_rows(tokenizer: Tokenizer, room: int) -> PreparedRows:
    """Turn the passages into rows, which begin as raw text does; all tokens but the first are predicted.

    Longer passages than `room` tokens become several rows. Lines are the passages' numbers, from 1.
    """
    prefix = np.asarray(tokenizer.raw_prefix_ids, np.int32)
    limit = max(2, min(_MAX_ROW_TOKENS, room) - len(prefix))
    tokens, lines = [], []
    for number, encoding in enumerate(tokenizer.encode_batch(general_passages()), start=1):
        for start in range(0, len(encoding.ids), limit):
            piece = encoding.ids[start : start + limit]
            if len(piece) > 1:
                tokens.append(np.concatenate([prefix, piece]))
                lines.append(number)
    return join_rows(tokens, [np.arange(len(row)) > 0 for row in tokens], lines)


@dataclass(frozen=True)
class Scores:
    """Mean negative log-likelihood in nats and share of right predictions, per supervised token.

    With preferences: the mean loss of a pair, and rewards (luthier.core.events.Metrics).
    """

    loss: float
    accuracy: float | None
    reward_accuracy: float | None = None
    reward_margin: float | None = None


@torch.no_grad()
def evaluate(model: JobModel, rows: PreparedRows, **options: Unpack[ScoringOptions]) -> Scores:
    """Score rows, of which one has a supervised token at least."""
    nll_sum, num_right, num_supervised = 0.0, 0, 0
    for _, batch in micro_batches(rows, split_micro, options):
        loss = model.loss(batch)
        nll_sum += loss.nll_sum.item()
        num_right += loss.num_right
        num_supervised += loss.num_supervised
    return Scores(loss=nll_sum / max(1, num_supervised), accuracy=num_right / max(1, num_supervised))


@torch.no_grad()
def evaluate_pairs(
    model: JobModel,
    rows: PreparedRows,
    reference_N: NDArray[np.float32],
    *,
    beta: float,
    **options: Unpack[ScoringOptions],
) -> Scores:
    """Score pairs beside the reference's log-likelihood of every row."""
    sums, num_pairs = PairSums(), rows.num_rows // 2
    for some, batch in micro_batches(rows, split_pairs, options):
        sums.add(pair_loss(model, PairBatch(batch, torch.from_numpy(reference_N[some])), beta))
    return Scores(sums.loss / num_pairs, None, sums.num_right / num_pairs, sums.margin / num_pairs)


@dataclass(frozen=True)
class Evaluator:
    """Everything that a model is scored on, the same at every evaluation of a run.

    `validation` may be absent, `general` is the bundled text. `preferences` is set when the validation rows
    are pairs.
    """

    validation: PreparedRows | None
    general: PreparedRows
    prompts: SamplePrompts
    options: ScoringOptions
    preferences: Preferences | None = None

    def evaluate(self, model: JobModel, *, step: int, epoch: float, loss_before: float | None) -> Evaluation:
        """Score a model, in evaluation mode meanwhile, and let it answer the sample prompts.

        Args:
            step: steps done; 0 for the base, or whatever else training starts from.
            loss_before: the loss on the general text at step 0; None when this is that step.

        Raises:
            StoppedError: when TERM came; nothing is kept of it.
            NonFiniteLossError: when a loss is no number.
        """
        with model.evaluation_mode():
            valid = None if self.validation is None else self._score(model, self.validation, step)
            general = self._score(model, self.general, step).loss
            answers = self.prompts.answer(model.method, model.attached, self.options["should_stop"])
        return Evaluation(
            step=step,
            epoch=epoch,
            valid_loss=None if valid is None else valid.loss,
            valid_mean_token_accuracy=None if valid is None else valid.accuracy,
            valid_reward_accuracy=None if valid is None else valid.reward_accuracy,
            valid_reward_margin=None if valid is None else valid.reward_margin,
            general_loss=general,
            forgetting=None if loss_before is None else general - loss_before,
            answers=answers,
        )

    def _score(self, model: JobModel, rows: PreparedRows, step: int) -> Scores:
        scores = self._compute(model, rows)
        if not math.isfinite(scores.loss):
            whose = "The base's loss" if step == 0 else f"The loss after step {step}"
            rows_name = "general text" if rows is self.general else "validation rows"
            raise NonFiniteLossError(
                f"{whose} on the {rows_name} is not finite. Nothing more is published. "
                + ("Fetch the base again." if step == 0 else "Use a lower learning rate.")
            )
        return scores

    def _compute(self, model: JobModel, rows: PreparedRows) -> Scores:
        preferences = self.preferences
        if preferences is None or preferences.validation_N is None or rows is self.general:
            return evaluate(model, rows, **self.options)
        return evaluate_pairs(model, rows, preferences.validation_N, beta=preferences.beta, **self.options)
