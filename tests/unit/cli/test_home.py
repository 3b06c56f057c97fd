"""The home of an embedded service: lock, secrets, run folder, connection file."""

import json
import os
import stat
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from luthier.cli.stack.home import (
    RUN_LINK_NAME,
    StackError,
    find_lock_holder,
    load_secrets,
    locked_home,
    resolve_home,
    run_folder,
    write_connection,
)
from luthier.core.ids import is_well_formed


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_made_once_and_readable_by_the_owner_only(tmp_path):
    first = load_secrets(tmp_path)
    assert load_secrets(tmp_path) == first
    assert is_well_formed(first.api_key)
    assert _mode(tmp_path / "secrets.json") == 0o600


def test_a_home_of_a_version_without_the_sealing_key_gets_one_and_keeps_the_rest(tmp_path):
    first, path = load_secrets(tmp_path), tmp_path / "secrets.json"
    older = asdict(first)
    del older["secret_key"]
    path.write_text(json.dumps(older))
    before = path.read_bytes()
    assert load_secrets(tmp_path, only_reads=True) == replace(first, secret_key="")
    assert path.read_bytes() == before
    second = load_secrets(tmp_path)
    assert load_secrets(tmp_path) == second == load_secrets(tmp_path, only_reads=True)
    assert replace(second, secret_key=first.secret_key) == first
    assert _mode(path) == 0o600


def test_secrets_are_not_made_by_who_only_reads_and_damaged_ones_are_not_replaced(tmp_path):
    with pytest.raises(StackError, match=r"secrets\.json"):
        load_secrets(tmp_path, only_reads=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(StackError, match=r"secrets\.json"):
        load_secrets(tmp_path)
    assert (tmp_path / "secrets.json").read_text() == "{"


def test_secrets_are_not_shown_by_repr(tmp_path):
    secrets = load_secrets(tmp_path)
    for value in (secrets.api_key, secrets.secret_key, secrets.postgres_password, secrets.database_password):
        assert value not in repr(secrets)


def test_a_second_holder_of_the_lock_is_refused_and_the_first_is_named(tmp_path):
    home = tmp_path / "home"
    with locked_home(home):
        assert _mode(home) == 0o700
        assert find_lock_holder(home) == os.getpid()
        with pytest.raises(StackError, match=f"process {os.getpid()}"), locked_home(home):
            pass
    assert find_lock_holder(home) is None
    with locked_home(home):
        pass
    assert find_lock_holder(tmp_path / "never used") is None


def test_a_home_that_cannot_be_made_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match="--home"), locked_home(tmp_path / "file" / "home"):
        pass


def test_the_run_folder_is_private_linked_and_removed_at_the_end(tmp_path):
    with run_folder(tmp_path) as run:
        assert (tmp_path / RUN_LINK_NAME).resolve() == run.resolve()
        assert not _mode(run) & 0o066
    assert not run.exists()
    assert not (tmp_path / RUN_LINK_NAME).is_symlink()


def test_a_run_folder_that_a_killed_run_left_is_removed_and_those_of_other_homes_stay(tmp_path):
    other_home = tmp_path / "other"
    other_home.mkdir()
    with run_folder(other_home) as others, run_folder(tmp_path) as killed:
        (killed / "valkey.sock").write_text("")
        with run_folder(tmp_path) as fresh:
            assert not killed.exists()
            assert fresh.exists()
            assert others.exists()


def test_a_temporary_folder_with_a_long_path_is_passed_over(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with run_folder(tmp_path) as run:
        assert run.parent == Path("/tmp")


def test_the_connection_file_is_private(tmp_path):
    write_connection(tmp_path, base_url="http://127.0.0.1:1/v1", api_key="lt_x")
    path = tmp_path / "connection.json"
    assert json.loads(path.read_text()) == {"base_url": "http://127.0.0.1:1/v1", "api_key": "lt_x"}
    assert _mode(path) == 0o600


def test_the_home_is_the_option_else_the_setting_else_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_home(None) == tmp_path / ".luthier"
    (tmp_path / ".env").write_text("LUTHIER_HOME=/srv/from-file\n")
    assert resolve_home(None) == Path("/srv/from-file")
    monkeypatch.setenv("LUTHIER_HOME", "/srv/luthier")
    assert resolve_home(None) == Path("/srv/luthier")
    assert resolve_home(Path("here")) == tmp_path / "here"
