"""What the engine's steps are counted by, and how Prometheus reads it. No tensors, no HTTP.

The engine's thread alone writes, once a step, and takes no lock; whoever reads may see a step half counted.
The text is Prometheus' exposition format 0.0.4.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping

from luthier.inference.sequence import Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
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


class StepMeasures:
    """Counts over all steps of the process."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_preempted = 0
        self.num_guesses = self.num_right_guesses = 0
        self.rows = Histogram(_ROW_BOUNDS)
        self.first_token_seconds = Histogram(_FIRST_TOKEN_BOUNDS)
        self.between_tokens_seconds = Histogram(_BETWEEN_BOUNDS)

    def count_step(self, num_rows: int, sequences: Iterable[Sequence], now: float | None = None) -> None:
        """Count a step, before its tokens are handed to their answers.

        Args:
            sequences: those that get a token; whoever wants none any more is not counted.
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

    def count_guesses(self, num_guesses: int, num_right: int) -> None:
        """Count guesses of an answer's next tokens; those that were right came with the token before them."""
        self.num_guesses += num_guesses
        self.num_right_guesses += num_right
        self.num_tokens += num_right
        self.between_tokens_seconds.observe(0.0, num_right)


class Exposition:
    """The text that Prometheus reads, metric by metric."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def number(self, name: str, kind: str, meaning: str, values: int | Mapping[str, int]) -> None:
        """Add a counter or a gauge.

        Args:
            kind: `counter` or `gauge`.
            values: the value, or one for each kind of models.
        """
        self._head(name, kind, meaning)
        if not isinstance(values, Mapping):
            self._lines.append(f"{_PREFIX}{name} {values}")
            return
        self._lines += [f'{_PREFIX}{name}{{kind="{label}"}} {value}' for label, value in values.items()]

    def histogram(self, name: str, meaning: str, histogram: Histogram) -> None:
        """Add a histogram."""
        self._head(name, "histogram", meaning)
        total = 0
        for bound, count in zip((*histogram.bounds, "+Inf"), list(histogram.counts), strict=True):
            total += count
            self._lines.append(f'{_PREFIX}{name}_bucket{{le="{bound}"}} {total}')
        self._lines += [f"{_PREFIX}{name}_sum {histogram.sum!r}", f"{_PREFIX}{name}_count {total}"]

    def text(self) -> str:
        """Return all of it."""
        return "\n".join(self._lines) + "\n"

    def _head(self, name: str, kind: str, meaning: str) -> None:
        self._lines += [f"# HELP {_PREFIX}{name} {meaning}", f"# TYPE {_PREFIX}{name} {kind}"]
