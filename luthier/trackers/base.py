"""The interface of an experiment tracker: a job's `integrations` name it, and it records the metrics.

Checking happens in the API, writing in the worker. Neither knows a tracker by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.plugins import discover_plugins
from luthier.core.settings import Settings

Text = Annotated[str, Field(min_length=1, max_length=128)]
Tags = Annotated[list[Text], Field(max_length=32)]
RunStatus = Literal["succeeded", "failed", "cancelled", "interrupted"]


class TrackerConfig(BaseModel):
    """What a client says of a tracker, in the shape that OpenAI gives to `wandb`; null means unset."""

    model_config = ConfigDict(extra="forbid")
    project: Text
    name: Text | None = None


@dataclass(frozen=True)
class TrackedRun:
    """A job as a tracker sees it; no text of its rows or prompts."""

    job_id: str
    project_id: str
    base_id: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tags(self) -> list[str]:
        """Tags of every run, as OpenAI gives them."""
        return ["luthier/finetune", f"luthier/{self.base_id}", f"luthier/{self.job_id}"]


class TrackerRun(ABC):
    """One run, written from one thread; its errors don't affect the job."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write what was measured at a step."""

    @abstractmethod
    def close(self, status: RunStatus) -> None:
        """End the run; `interrupted` is one that another worker continues."""


class Tracker(ABC):
    # As `integrations` name it, also the member that holds its configuration.
    name: ClassVar[str]
    Config: ClassVar[type[TrackerConfig]] = TrackerConfig
    # The package that a worker needs for it, which the extra of the tracker's name brings; None needs none.
    package: ClassVar[str | None] = None

    @abstractmethod
    def missing_setting(self, settings: Settings) -> str | None:
        """Return the variable that an operator must set before it can be used, or None when all is set."""

    @abstractmethod
    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        """Begin a run, or continue that of an earlier attempt."""

    def check(self, config: TrackerConfig, settings: Settings, at: str) -> None:  # noqa: B027
        """Refuse a configuration, found at `at`, that the operator does not allow."""

    def is_installed(self) -> bool:
        """Whether this machine has the package that it needs."""
        return self.package is None or find_spec(self.package) is not None


@cache
def discover() -> dict[str, Tracker]:
    """Return every tracker by its name, in the order of the names. A new file is a new tracker."""
    return discover_plugins("luthier.trackers", [str(Path(__file__).parent)], "TRACKER")
