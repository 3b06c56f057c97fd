"""Metrics of the engine's steps, in Prometheus' types. No tensors, no HTTP.

The engine's thread alone writes, once a step, and takes no lock; a reader may see a step half counted.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from luthier.inference.engine.sequence import Sequence

_PREFIX = "luthier_inference_"
_ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)
_FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How often values lay at or below each of some bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        # One more than there are bounds, for what is above them all.
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it came."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class StepMetrics:
    """Counts over all steps of the process."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_preempted = 0
        self.num_drafts = self.num_right_drafts = 0
        self.rows = Histogram(_ROW_BOUNDS)
        self.first_token_seconds = Histogram(_FIRST_TOKEN_BOUNDS)
        self.between_tokens_seconds = Histogram(_BETWEEN_BOUNDS)

    def count_step(self, num_rows: int, sequences: Iterable[Sequence], now: float | None = None) -> None:
        """Count a step, before its tokens are handed to their answers.

        Args:
            sequences: those that get a token; finished and cancelled ones are not counted.
            now: the monotonic clock, in seconds; read when None.
        """
        now = time.monotonic() if now is None else now
        self.num_steps += 1
        self.rows.observe(num_rows)
        since, times = 0.0, 0
        for sequence in sequences:
            if sequence.is_finished or sequence.is_cancelled:
                continue
            self.num_tokens += 1
            if sequence.num_completion_tokens == 0:
                self.num_prompt_tokens += len(sequence.prompt_ids)
                self.first_token_seconds.observe(now - sequence.made_at)
            elif sequence.last_token_at == since:
                times += 1
            else:
                # Most rows got their last token in the same step: they are counted together.
                if times:
                    self.between_tokens_seconds.observe(now - since, times)
                since, times = sequence.last_token_at, 1
            sequence.last_token_at = now
        if times:
            self.between_tokens_seconds.observe(now - since, times)

    def count_drafts(self, num_drafts: int, num_right: int) -> None:
        """Count draft tokens; the right ones came with the token before them."""
        self.num_drafts += num_drafts
        self.num_right_drafts += num_right
        self.num_tokens += num_right
        self.between_tokens_seconds.observe(0.0, num_right)


class MetricsCollector(Collector):
    """What prometheus-client asks for the metrics of the moment; it keeps no numbers of its own.

    Args:
        read: yields them, each of a name after `luthier_inference_`.
    """

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of this moment."""
        return self._read()


def counter(name: str, meaning: str, values: int | Mapping[str, int]) -> Metric:
    """Return a counter, or one for each kind of models; `name` without `_total`."""
    return _with_values(CounterMetricFamily, name, meaning, values)


def gauge(name: str, meaning: str, values: int | Mapping[str, int]) -> Metric:
    """Return a gauge, or one for each kind of models."""
    return _with_values(GaugeMetricFamily, name, meaning, values)


def histogram(name: str, meaning: str, measured: Histogram) -> Metric:
    """Return a histogram; a bound counts all that is at or below it."""
    bounds = [*(str(float(bound)) for bound in measured.bounds), "+Inf"]
    buckets = [*zip(bounds, accumulate(list(measured.counts)), strict=True)]
    return HistogramMetricFamily(_PREFIX + name, meaning, buckets=buckets, sum_value=measured.sum)


def _with_values(
    family: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    meaning: str,
    values: int | Mapping[str, int],
) -> Metric:
    if not isinstance(values, Mapping):
        return family(_PREFIX + name, meaning, value=values)
    made = family(_PREFIX + name, meaning, labels=["kind"])
    for kind, value in values.items():
        made.add_metric([kind], value)
    return made
