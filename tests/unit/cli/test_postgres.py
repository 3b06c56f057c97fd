"""What a killed server leaves behind does not block the next one."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.cli.stack import postgres, postgres_programs
from luthier.cli.stack.home import Secrets, StackError
from luthier.cli.stack.postgres import end_old_server, open_postgres
from luthier.cli.stack.postgres_programs import find_user
from luthier.cli.stack.processes import UnixUser
from tests.folders import TEMPORARY_FOLDER


def _write_pid(data: Path, pid: int) -> Path:
    path = data / "postmaster.pid"
    path.write_text(f"{pid}\n{data}\n1700000000\n5432\n")
    return path


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_clean_data_folder_is_left_alone(tmp_path):
    end_old_server(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_servers_pid_file_is_left_to_postgresql(tmp_path):
    path = _write_pid(tmp_path, _dead_pid())
    before = path.read_text()
    end_old_server(tmp_path)
    assert path.read_text() == before


def test_a_pid_that_another_process_has_now_is_replaced_by_ours_and_the_rest_is_kept(tmp_path):
    path = _write_pid(tmp_path, os.getppid())
    rest = path.read_text().split("\n", 1)[1]
    end_old_server(tmp_path)
    assert path.read_text() == f"{os.getpid()}\n{rest}"


def test_a_server_that_still_runs_is_ended_by_immediate_shutdown(tmp_path, monkeypatch):
    monkeypatch.setattr(postgres, "_OLD_SERVER_SECONDS", 0.2)
    # Stands in for a server: its arguments name the data folder, and it ends on SIGQUIT.
    code = (
        "import signal, time; signal.signal(signal.SIGQUIT, signal.SIG_DFL); "
        "print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "-D", str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    _write_pid(tmp_path, process.pid)
    try:
        end_old_server(tmp_path)
        assert process.wait(timeout=10) == -3
    finally:
        process.kill()
        process.stdout.close()


def test_data_of_another_version_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "PG_VERSION").write_text("9\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "postgres").write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    (programs / "postgres").chmod(0o755)
    with pytest.raises(StackError, match=r"made by PostgreSQL 9, and version 18 .* pg_dump"):
        postgres._check_version(tmp_path, programs)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may pass through, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(dir=TEMPORARY_FOLDER))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts for another user")
# A user of no name, who owns nothing.
_USER = UnixUser(64_123, 64_123)


@as_root
def test_a_link_of_the_databases_user_leads_root_to_no_other_file(open_folder):
    target = open_folder / "preload"
    target.write_text(f"{os.getppid()}\nof root\n")
    data = open_folder / "data"
    data.mkdir()
    (data / "postmaster.pid").symlink_to(target)
    os.chown(data, _USER.uid, _USER.gid)
    with pytest.raises(StackError, match="can't be used by its user"):
        end_old_server(data, _USER)
    assert target.read_text() == f"{os.getppid()}\nof root\n"
    assert target.stat().st_uid == 0


@as_root
def test_the_first_password_is_written_into_no_folder_of_the_databases_user(open_folder, monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", str(open_folder / "state"))
    target = open_folder / "target"
    target.write_text("of root")
    run = open_folder / "run"
    (run / "pg").mkdir(parents=True)
    (run / "pg" / "password").symlink_to(target)
    secrets = Secrets("id", "lt_key", "owner-password", "role-password", "key")
    server = open_postgres(open_folder, run, secrets, say=lambda _line: None)
    assert (server.data / "PG_VERSION").exists()
    assert (target.read_text(), target.stat().st_uid) == ("of root", 0)


def test_an_unprivileged_user_runs_the_database_only_where_that_is_asked_for(tmp_path, monkeypatch):
    users = {"nobody": UnixUser(65534, 65534)}
    monkeypatch.setattr(postgres_programs, "_user_of", lambda name: users[name])
    monkeypatch.setattr(postgres_programs, "_USERADD", ("false", "luthier"))
    with pytest.raises(StackError, match="LUTHIER_DATABASE_USER"):
        find_user(tmp_path / "data", "", lambda _line: None)
    assert find_user(tmp_path / "data", "nobody", lambda _line: None) == users["nobody"]
