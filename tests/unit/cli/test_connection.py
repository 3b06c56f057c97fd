"""Where client commands find their service."""

from pathlib import Path

import pytest

from luthier.cli.connection import ConnectionUnknownError, find_connection
from luthier.cli.stack.home import write_connection


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LUTHIER_BASE_URL", "LUTHIER_API_KEY", "LUTHIER_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("options", "environment", "home", "expected"),
    [
        # Options go before the environment, and that before the home here; a home that is named, before both.
        (("option", "key"), ("env", "env-key"), ".luthier", ("option", "key")),
        ((None, None), (None, "env-key"), ".luthier", ("home", "env-key")),
        ((None, None), ("env", "env-key"), "named", ("home", "home-key")),
    ],
)
def test_a_connection_is_that_of_the_nearest_source(
    tmp_path, monkeypatch, options, environment, home, expected
):
    (tmp_path / home).mkdir()
    write_connection(tmp_path / home, base_url="home", api_key="home-key")
    for name, value in zip(("LUTHIER_BASE_URL", "LUTHIER_API_KEY"), environment, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    found = find_connection(*options, tmp_path / home if home == "named" else None)
    assert (found.base_url, found.api_key) == expected


def test_no_service_is_said_with_what_to_do(tmp_path):
    with pytest.raises(ConnectionUnknownError, match="luthier up"):
        find_connection(None, None, None)


def test_the_key_is_not_shown_by_repr():
    assert "secret" not in repr(find_connection("http://x/v1", "secret", None))
