"""What every tracker promises, tested by its being in the folder."""

from typing import Any

import pytest
from pydantic import SecretStr

from luthier.core.errors import InvalidRequestError
from luthier.core.settings import Settings
from luthier.trackers import Tracker, check_integrations, discover

_TRACKERS = list(discover().values())


def _set_up(tracker: Tracker) -> Settings:
    """Return settings with what the tracker asks for, one after the other."""
    settings = Settings(_env_file=None)
    for _ in range(5):
        missing = tracker.missing_setting(settings)
        if missing is None:
            return settings
        name = missing.removeprefix("LUTHIER_").lower()
        is_secret = isinstance(getattr(settings, name), SecretStr)
        settings = settings.model_copy(update={name: SecretStr("set") if is_secret else "set"})
    raise AssertionError(f"{tracker.name} is never content")


def _refused(integration: dict[str, Any], settings: Settings) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_integrations([integration], settings)
    return caught.value


def test_openais_tracker_is_there() -> None:
    assert {"wandb", "mlflow", "tensorboard"} <= set(discover())


@pytest.mark.parametrize("tracker", _TRACKERS, ids=lambda tracker: tracker.name)
def test_a_tracker_is_refused_until_the_operator_has_set_it_up(tracker: Tracker) -> None:
    integration = {"type": tracker.name, tracker.name: {"project": "p"}}
    error = _refused(integration, Settings(_env_file=None))
    assert error.param == "integrations.0.type"
    assert error.message.count("LUTHIER_") == 1
    assert check_integrations([integration], _set_up(tracker))


@pytest.mark.parametrize("tracker", _TRACKERS, ids=lambda tracker: tracker.name)
def test_a_checked_integration_has_openais_shape_and_checks_again(tracker: Tracker) -> None:
    settings = _set_up(tracker)
    given = {"type": tracker.name, tracker.name: {"project": "p", "name": None}}
    (checked,) = check_integrations([given], settings)
    assert set(checked) == {"type", tracker.name}
    assert (checked["type"], checked[tracker.name]["project"]) == (tracker.name, "p")
    assert "set" not in str(checked), "no setting is reported"
    assert check_integrations([checked], settings) == [checked]


@pytest.mark.parametrize("tracker", _TRACKERS, ids=lambda tracker: tracker.name)
def test_a_fault_names_its_field(tracker: Tracker) -> None:
    settings, at = _set_up(tracker), f"integrations.0.{tracker.name}"
    for integration, param in (
        ({"type": tracker.name}, at),
        ({"type": tracker.name, tracker.name: {}}, f"{at}.project"),
        ({"type": tracker.name, tracker.name: {"project": 3}}, f"{at}.project"),
        ({"type": tracker.name, tracker.name: {"project": ""}}, f"{at}.project"),
        ({"type": tracker.name, tracker.name: {"project": "p", "key": "x"}}, f"{at}.key"),
        ({"type": tracker.name, tracker.name: {"project": "p"}, "other": {}}, "integrations.0.other"),
        ({"type": tracker.name, tracker.name: "p"}, at),
        ({tracker.name: {"project": "p"}}, "integrations.0.type"),
    ):
        assert _refused(integration, settings).param == param
