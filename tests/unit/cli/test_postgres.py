"""What a killed server leaves behind does not block the next one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.stack import postgres
from luthier.cli.stack.home import StackError
from luthier.cli.stack.postgres import end_leftover


def _write_pid(data: Path, pid: int) -> Path:
    path = data / "postmaster.pid"
    path.write_text(f"{pid}\n{data}\n1700000000\n5432\n")
    return path


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_clean_data_folder_is_left_alone(tmp_path: Path) -> None:
    end_leftover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_servers_pid_file_is_left_to_postgresql(tmp_path: Path) -> None:
    path = _write_pid(tmp_path, _dead_pid())
    before = path.read_text()
    end_leftover(tmp_path)
    assert path.read_text() == before


def test_a_pid_that_another_process_has_now_is_replaced_by_ours_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = _write_pid(tmp_path, os.getppid())
    rest = path.read_text().split("\n", 1)[1]
    end_leftover(tmp_path)
    assert path.read_text() == f"{os.getpid()}\n{rest}"


def test_a_server_that_still_runs_is_ended_by_immediate_shutdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_LEFTOVER_SECONDS", 0.2)
    # Stands in for a server: its arguments name the data folder, and it ends on SIGQUIT.
    code = (
        "import signal, time; signal.signal(signal.SIGQUIT, signal.SIG_DFL); "
        "print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "-D", str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    _write_pid(tmp_path, process.pid)
    try:
        end_leftover(tmp_path)
        assert process.wait(timeout=10) == -3
    finally:
        process.kill()
        process.stdout.close()


def test_data_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_text("9\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "postgres").write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    (programs / "postgres").chmod(0o755)
    with pytest.raises(StackError, match=r"made by PostgreSQL 9, and version 18 .* pg_dump"):
        postgres._check_version(tmp_path, programs)
