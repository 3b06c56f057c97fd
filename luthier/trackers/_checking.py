"""The check of a job's `integrations`: their shape, and whether the operator has set them up."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from luthier.core.errors import (
    InvalidRequestError,
    InvalidValueError,
    UnsupportedValueError,
    field_error,
    shown_part,
)
from luthier.core.settings import Settings
from luthier.trackers.base import Tracker, TrackerConfig, discover


def check_integrations(integrations: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Return every integration of a request, checked, with null for what is unset.

    Raises:
        InvalidRequestError: names the first offending field as `integrations.<index>.<field>`.
    """
    checked = []
    for index, wanted in enumerate(integrations):
        at = f"integrations.{index}"
        tracker = _tracker_of(wanted, at)
        config = parse_config(tracker, wanted.get(tracker.name), at)
        missing = tracker.missing_setting(settings)
        if missing is not None:
            raise UnsupportedValueError(
                f"{at}.type: {tracker.name} is not set up here. Operator: set {missing} for API and workers.",
                param=f"{at}.type",
            )
        tracker.check(config, settings, f"{at}.{tracker.name}")
        checked.append({"type": tracker.name, tracker.name: config.model_dump(mode="json")})
    return checked


def _tracker_of(wanted: dict[str, Any], at: str) -> Tracker:
    trackers = discover()
    name = wanted.get("type")
    if name is None:
        raise field_error("missing", f"{at}.type", "")
    if not isinstance(name, str) or name not in trackers:
        raise InvalidValueError(
            f"Invalid value for '{at}.type': use one of {', '.join(trackers)}.", param=f"{at}.type"
        )
    for member in wanted:
        if member not in ("type", name):
            raise field_error("extra_forbidden", f"{at}.{shown_part(member)}", "")
    return trackers[name]


def parse_config(tracker: Tracker, config: Any, at: str) -> TrackerConfig:
    """Read the configuration of the integration at `at`, or name its first wrong field."""
    at = f"{at}.{tracker.name}"
    if config is None:
        raise field_error("missing", at, "")
    try:
        return tracker.Config.model_validate(config)
    except ValidationError as error:
        raise _first_fault(error, at) from error


def _first_fault(error: ValidationError, at: str) -> InvalidRequestError:
    fault = error.errors()[0]
    param = ".".join([at, *(shown_part(part) for part in fault["loc"])])
    return field_error(fault["type"], param, f"Invalid value for '{param}': {fault['msg']}.")
