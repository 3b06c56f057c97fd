"""What follows from the evaluations alone."""

import pytest

from luthier.core.events import Evaluation
from luthier.core.specs import TrainingOptions
from luthier.training.loop.early_stopping import Decision, decide


def evaluations(losses: list[float | None], forgetting: list[float | None] | None = None) -> list[Evaluation]:
    """Return one evaluation a loss at steps 0, 10, 20 and so on, the base's first."""
    rises = forgetting or [None] * len(losses)
    return [
        Evaluation(step=10 * index, epoch=index, valid_loss=loss, forgetting=rise)
        for index, (loss, rise) in enumerate(zip(losses, rises, strict=True))
    ]


def test_without_options_the_last_checkpoint_is_the_result_and_nothing_ends_early():
    assert decide(TrainingOptions(), evaluations([3.0, 2.0, 9.0, 9.0])) == Decision(result_step=30)
    assert decide(TrainingOptions(), evaluations([None, None])) == Decision(result_step=10)


def test_before_the_first_checkpoint_there_is_no_result():
    options = TrainingOptions(patience=1, keep_best=True, max_forgetting=0.1)
    assert decide(options, []) == Decision()
    assert decide(options, evaluations([3.0])) == Decision()


@pytest.mark.parametrize(
    ("patience", "losses", "ends"),
    [
        (1, [1.0, 5.0, 5.0], True),
        (1, [1.0, 5.0, 4.9], False),
        (2, [1.0, 5.0, 5.1, 4.9, 5.0], False),
        (2, [1.0, 5.0, 5.1, 4.9, 5.0, 4.9], True),
        (3, [1.0, 5.0, 6.0, 6.0], False),
    ],
)
def test_patience_counts_evaluations_in_a_row_that_are_not_strictly_better(patience, losses, ends):
    verdict = decide(TrainingOptions(patience=patience), evaluations(losses))
    assert (verdict.reason is not None) == ends
    # Without keep_best the result is the last one, better or not.
    assert verdict.result_step == 10 * (len(losses) - 1)


def test_of_equal_losses_the_earlier_checkpoint_is_the_best():
    options = TrainingOptions(keep_best=True)
    assert decide(options, evaluations([1.0, 5.0, 4.0, 4.0, 4.5])).result_step == 20


def test_a_rise_at_the_limit_is_allowed_and_one_above_it_ends_training():
    options = TrainingOptions(max_forgetting=0.25)
    assert decide(options, evaluations([None] * 3, [None, 0.1, 0.25])) == Decision(result_step=20)
    verdict = decide(options, evaluations([None] * 4, [None, 0.1, 0.25, 0.2501]))
    assert (verdict.result_step, verdict.forgot_too_much) == (20, True)
    assert "0.2501 nats" in verdict.reason
    first = decide(options, evaluations([None] * 2, [None, 0.3]))
    assert (first.result_step, first.forgot_too_much) == (None, True)


def test_what_forgot_too_much_is_never_the_best():
    options = TrainingOptions(max_forgetting=0.25, keep_best=True)
    verdict = decide(options, evaluations([9.0, 5.0, 6.0, 1.0], [None, 0.1, 0.2, 0.3]))
    assert verdict.result_step == 10
