"""When training ends before its last step, and which checkpoint is the result.

A function of the evaluations alone, which every save point holds: a resumed attempt decides the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.core.events import Evaluation
from luthier.core.specs import TrainingOptions


@dataclass(frozen=True)
class Decision:
    """What follows from the evaluations so far.

    `result_step` is the step whose checkpoint would be the result if training ended now, None without any.
    `reason` says why training ends now, None when it continues. `forgot_too_much` says that the last
    evaluation is of a model that must not be published.
    """

    result_step: int | None = None
    reason: str | None = None
    forgot_too_much: bool = False


def decide(options: TrainingOptions, evaluations: Sequence[Evaluation]) -> Decision:
    """Decide from all evaluations so far, in order; the base's, at step 0, is no candidate."""
    best: Evaluation | None = None
    last: Evaluation | None = None
    num_without_gain = 0
    reason, forgot_too_much = None, False
    limit = options.max_forgetting
    for evaluation in evaluations:
        if evaluation.step == 0:
            continue
        if limit is not None and evaluation.forgetting is not None and evaluation.forgetting > limit:
            forgot_too_much = True
            reason = (
                f"Training ends after step {evaluation.step}: the loss on general text has risen by "
                f"{evaluation.forgetting:.4f} nats per token, above training.max_forgetting ({limit:g})."
            )
            break
        last = evaluation
        if best is None or _is_better(evaluation, best):
            best, num_without_gain = evaluation, 0
            continue
        num_without_gain += 1
        if options.patience is not None and num_without_gain >= options.patience:
            reason = (
                f"Training ends after step {evaluation.step}: the validation loss was not better than "
                f"{best.valid_loss:.4f}, that of step {best.step}, in {num_without_gain} evaluations."
            )
            break
    chosen = best if options.keep_best else last
    return Decision(None if chosen is None else chosen.step, reason, forgot_too_much)


def _is_better(evaluation: Evaluation, best: Evaluation) -> bool:
    if evaluation.valid_loss is None or best.valid_loss is None:
        return False
    return evaluation.valid_loss < best.valid_loss
