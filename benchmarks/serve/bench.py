"""What all rows of one run share: the base, the client, the artifacts made so far, prompts, results."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Shape, read_shape
from benchmarks.results_file import ResultsFile
from benchmarks.serve.artifacts import Published, make_artifacts
from benchmarks.serve.engine import Client, Place
from benchmarks.serve.limits import Limits, measure_limits
from benchmarks.serve.prompts import Prompts
from luthier.data.rendering.tokenizer import Tokenizer


@dataclass
class Bench:
    """One run of the benchmark.

    `base` is the copy without an end token that all sides load.
    """

    options: argparse.Namespace
    base: Path
    place: Place
    client: Client
    tokenizer: Tokenizer
    prompts: Prompts
    results: ResultsFile
    scratch: Path
    _made: dict[str, list[Published]] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The base's."""
        return read_shape(self.base)

    def models(self, kind: str, count: int) -> list[Published]:
        """Return tuned models of a method, made when they are first wanted.

        Args:
            kind: the method.
            count: how many.
        """
        held = self._made.setdefault(kind, [])
        missing = count - len(held)
        if missing > 0:
            print(f"  making {missing} {kind} models", flush=True)
            made = make_artifacts(
                {kind: missing},
                base=self.base,
                objects=self.place.objects,
                scratch=self.scratch,
                label=f"m{len(held)}",
                first_seed=len(held) + 1,
            )
            held += made[kind]
        return held[:count]

    def limits(self, num_streams: int) -> Limits:
        """Measure the machine; every process of the benchmark must stand still."""
        return measure_limits(self.shape, num_streams, self.options.threads)

    def folder(self, name: str) -> Path:
        """Return a folder for a row's files."""
        folder = self.scratch / name
        folder.mkdir(exist_ok=True)
        return folder

    def wants(self, peer: str) -> bool:
        """Whether a peer is to be run."""
        return self.options.peer is None or peer in self.options.peer

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Store what a row has found so far."""
        self.results.content["rows"][name] = found
        self.results.save()
