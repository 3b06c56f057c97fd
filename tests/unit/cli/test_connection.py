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


def test_options_go_before_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_BASE_URL", "http://env/v1")
    monkeypatch.setenv("LUTHIER_API_KEY", "env-key")
    found = find_connection("http://option/v1", "option-key", None)
    assert (found.base_url, found.api_key) == ("http://option/v1", "option-key")


def test_the_environment_goes_before_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".luthier").mkdir()
    write_connection(tmp_path / ".luthier", base_url="http://home/v1", api_key="home-key")
    monkeypatch.setenv("LUTHIER_API_KEY", "env-key")
    found = find_connection(None, None, None)
    assert (found.base_url, found.api_key) == ("http://home/v1", "env-key")


def test_a_home_that_is_named_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_connection(tmp_path, base_url="http://home/v1", api_key="home-key")
    monkeypatch.setenv("LUTHIER_BASE_URL", "http://env/v1")
    monkeypatch.setenv("LUTHIER_API_KEY", "env-key")
    found = find_connection(None, None, tmp_path)
    assert (found.base_url, found.api_key) == ("http://home/v1", "home-key")


def test_no_service_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConnectionUnknownError, match="luthier up"):
        find_connection(None, None, None)


def test_the_key_is_not_shown_by_repr() -> None:
    assert "secret" not in repr(find_connection("http://x/v1", "secret", None))
