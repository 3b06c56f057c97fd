"""The operator's settings as a command reads them, with invalid ones reported by name."""

from pydantic import ValidationError

from luthier.core.errors import LuthierError
from luthier.core.settings import Settings


class SettingsError(LuthierError):
    """A setting that is out of its range or of another type."""

    code = "invalid_setting"


def read_settings(log_level: str = "") -> Settings:
    """Read the settings from the environment and .env; `model_fields_set` names those that are set.

    Raises:
        SettingsError: when a value is invalid; names the variable.
    """
    try:
        return Settings(log_level=log_level) if log_level else Settings()
    except ValidationError as error:
        faults = "; ".join(
            f"LUTHIER_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()
        )
        raise SettingsError(f"A setting can't be used: {faults}") from error
