"""Steps are counted once each, and written as Prometheus reads them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from luthier.inference.engine.sequence import Choice, Sequence
from luthier.inference.engine.step import Histogram, StepMetrics
from luthier.inference.server.status import counter, gauge, histogram
from tests.unit.inference.sequences import ask


def make_sequence(made_at: float, num_prompt_tokens: int = 3) -> Sequence:
    sequence = ask([5] * num_prompt_tokens).sequence
    sequence.made_at = made_at
    return sequence


def step(measures: StepMetrics, now: float, *sequences: Sequence, num_rows: int | None = None) -> None:
    measures.count_step(len(sequences) if num_rows is None else num_rows, sequences, now)
    for sequence in sequences:
        sequence.accept(Choice(7))


def test_first_tokens_and_gaps_are_distinguished():
    measures = StepMetrics()
    early, late = make_sequence(10.0), make_sequence(10.5, num_prompt_tokens=4)
    step(measures, 10.4, early, num_rows=2)
    step(measures, 10.6, early, late)
    step(measures, 10.7, early, late)
    assert (measures.num_steps, measures.num_tokens, measures.num_prompt_tokens) == (3, 5, 7)
    assert abs(measures.first_token_seconds.sum - (0.4 + 0.1)) < 1e-9
    assert sum(measures.first_token_seconds.counts) == 2
    assert abs(measures.between_tokens_seconds.sum - (0.2 + 0.1 + 0.1)) < 1e-9
    assert sum(measures.between_tokens_seconds.counts) == 3
    assert measures.rows.sum == 6


def test_rows_whose_gaps_differ_are_counted_each_by_its_own():
    measures = StepMetrics()
    rows = [make_sequence(0.0) for _ in range(3)]
    step(measures, 1.0, rows[0])
    step(measures, 2.0, rows[1], rows[2])
    step(measures, 3.0, rows[1], rows[0], rows[2])
    assert sum(measures.between_tokens_seconds.counts) == 3
    assert measures.between_tokens_seconds.sum == 1.0 + 2.0 + 1.0


def test_a_cancelled_answer_and_a_step_of_prompts_count_no_token():
    measures = StepMetrics()
    gone = make_sequence(0.0)
    gone.cancel()
    measures.count_step(2, [gone], 1.0)
    measures.count_step(4, [], 2.0)
    assert (measures.num_steps, measures.num_tokens, measures.rows.sum) == (2, 0, 6)


def test_the_text_is_prometheus_own():
    measured = Histogram((0.5, 1.0))
    for value in (0.25, 0.5, 0.75, 4.0):
        measured.observe(value)

    class Metrics(Collector):
        def collect(self) -> Iterator[Metric]:
            yield counter("steps", "Steps.", 3)
            yield gauge("models", "Models.", {"packed": 2, "whole": 0})
            yield histogram("wait_seconds", "Waits.", measured)

    registry = CollectorRegistry()
    registry.register(Metrics())
    # A bound counts what is at or below it, and everything that a smaller bound counts.
    assert generate_latest(registry).decode() == (
        "# HELP luthier_inference_steps_total Steps.\n"
        "# TYPE luthier_inference_steps_total counter\n"
        "luthier_inference_steps_total 3.0\n"
        "# HELP luthier_inference_models Models.\n"
        "# TYPE luthier_inference_models gauge\n"
        'luthier_inference_models{kind="packed"} 2.0\n'
        'luthier_inference_models{kind="whole"} 0.0\n'
        "# HELP luthier_inference_wait_seconds Waits.\n"
        "# TYPE luthier_inference_wait_seconds histogram\n"
        'luthier_inference_wait_seconds_bucket{le="0.5"} 2.0\n'
        'luthier_inference_wait_seconds_bucket{le="1.0"} 3.0\n'
        'luthier_inference_wait_seconds_bucket{le="+Inf"} 4.0\n'
        "luthier_inference_wait_seconds_count 4.0\n"
        "luthier_inference_wait_seconds_sum 5.5\n"
    )
