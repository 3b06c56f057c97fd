"""The command line: its exits, its words, and what it does not load."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from luthier.cli import doctor, options
from luthier.cli.doctor import Finding
from luthier.cli.main import app, main
from luthier.client import LuthierClient

Asked = tuple[str, list[httpx2.Request]]
Ask = Callable[..., Asked]
_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "check_device", lambda: Finding("device", "ok", "CPU"))
    return CliRunner()


@pytest.fixture
def ask(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run a client command with a service that always answers a body; return its output and the requests."""

    def ask(body: object, *command: str) -> Asked:
        requests: list[httpx2.Request] = []

        def answer(request: httpx2.Request) -> httpx2.Response:
            requests.append(request)
            return httpx2.Response(200, json=body)

        client = LuthierClient("http://service/v1", "lt_key", transport=httpx2.MockTransport(answer))
        monkeypatch.setattr(options, "open_client", lambda *_: client)
        return runner.invoke(app, command).output, requests

    return ask


def test_starting_the_command_line_loads_no_service_and_no_torch():
    code = (
        "import sys, luthier.cli.main, luthier.cli.stack.up, luthier.cli.doctor\n"
        "heavy = {'torch', 'transformers', 'peft', 'sqlalchemy', 'celery', 'fastapi', 'services', 'api'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_failure_is_one_line_without_a_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luthier", "jobs", "list"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("luthier: No service is known")
    assert error.count("\n") == 1


def test_a_good_file_is_checked_offline(runner, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(_ROW) + "\n" + json.dumps(_ROW) + "\n")
    result = runner.invoke(app, ["check", str(file)])
    assert result.exit_code == 0
    assert "2 rows" in result.output
    assert "a job needs at least 10 rows" in result.output
    file.write_text((json.dumps(_ROW) + "\n") * 10)
    assert "needs at least" not in runner.invoke(app, ["check", str(file)]).output


@pytest.mark.parametrize(
    ("content", "reported"), [(json.dumps(_ROW) + "\n{\n", "line 2"), (None, "rows.jsonl")]
)
def test_a_broken_or_absent_file_is_refused(runner, tmp_path, content, reported):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    result = runner.invoke(app, ["check", "rows.jsonl"])
    assert result.exit_code == 1
    assert reported in str(result.exception).lower()


def test_a_new_key_is_shown_and_its_project_is_sent(ask):
    answer = {"id": "key_1", "key": "lt_secret"}
    output, [request] = ask(answer, "keys", "create", "--name", "ci", "--project", "team")
    assert output.splitlines()[0] == "lt_secret"
    assert json.loads(request.content) == {"name": "ci", "project": "team"}


_JOB = {"id": "ftjob-1", "status": "failed", "model": "m", "fine_tuned_model": None, "created_at": 0}
_ALIAS = {"name": "prod", "model": "m2", "version": 2, "created_at": 0, "updated_at": 0}
_ALIAS |= {"restored_version": None, "created_by_key_id": "key_1"}


@pytest.mark.parametrize(
    ("command", "shown", "printed"),
    [
        (("jobs", "list"), _JOB, "ftjob-1  failed  m"),
        (("aliases", "list"), _ALIAS, "m2"),
        (("aliases", "history", "prod"), _ALIAS, "m2"),
    ],
)
def test_lists_are_tables_or_json(ask, command, shown, printed):
    page = {"data": [shown], "has_more": False}
    assert printed in ask(page, *command)[0]
    assert json.loads(ask(page, *command, "--json")[0]) == [shown]


def test_doctor_without_a_service_says_how_to_start_it_and_does_not_fail(runner):
    result = runner.invoke(app, ["doctor", "--json"])
    findings = {finding["name"]: finding for finding in json.loads(result.output)}
    for name in ("service", "database", "broker", "api"):
        assert findings[name]["status"] == "warn"
        assert "luthier up" in findings[name]["advice"]
    assert {"python", "packages", "memory", "disk", "storage", "catalogue"} <= set(findings)


@pytest.mark.parametrize(
    ("name", "value", "reported"),
    [
        ("LUTHIER_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none", "FAIL  database"),
        # Out of its range.
        ("LUTHIER_TRAINING_SLOTS", "0", "LUTHIER_TRAINING_SLOTS"),
    ],
)
def test_doctor_fails_when_a_check_fails(runner, monkeypatch, name, value, reported):
    monkeypatch.setenv(name, value)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert reported in result.output


def test_doctor_names_databases_whose_home_is_not_found_and_proposes_no_removal(
    runner, tmp_path, monkeypatch
):
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    for name, home in (("one", tmp_path), ("two", tmp_path / "gone")):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / "home").write_text(f"{home}\n")
    (finding,) = doctor.check_left_databases()
    assert f"{tmp_path / 'state' / 'two'} (of {tmp_path / 'gone'})" in finding.detail
    assert "rm " not in finding.advice


_DONE = "a/b is m2 now, version 2.\n"


@pytest.mark.parametrize(
    ("command", "method", "path", "body", "printed"),
    [
        ("jobs pause ftjob-1", "POST", "fine_tuning/jobs/ftjob-1/pause", None, "ftjob-1 is pausing.\n"),
        ("jobs resume ftjob-1", "POST", "fine_tuning/jobs/ftjob-1/resume", None, "ftjob-1 is pausing.\n"),
        ("jobs cancel ftjob-1", "POST", "fine_tuning/jobs/ftjob-1/cancel", None, "ftjob-1 is pausing.\n"),
        ("aliases put a/b m2", "PUT", "aliases/a%2Fb", {"model": "m2"}, _DONE),
        ("aliases rollback a/b", "POST", "aliases/a%2Fb/rollback", {}, _DONE),
        ("aliases rollback a/b --version 1", "POST", "aliases/a%2Fb/rollback", {"version": 1}, _DONE),
        ("aliases delete a/b", "DELETE", "aliases/a%2Fb", None, "Deleted a/b\n"),
    ],
)
def test_a_command_is_one_request_and_says_what_became_of_it(ask, command, method, path, body, printed):
    answer = {"id": "ftjob-1", "status": "pausing", "name": "a/b", "model": "m2", "version": 2}
    output, [request] = ask(answer, *command.split())
    assert output == printed
    assert (request.method, request.url.raw_path.decode()) == (method, f"/v1/{path}")
    assert (json.loads(request.content) if request.content else None) == body


def test_models_are_deleted_by_their_names(ask):
    output, requests = ask({"deleted": True}, "models", "delete", "ft:a:p::1", "ft:a:p::2")
    assert output == "Deleted ft:a:p::1\nDeleted ft:a:p::2\n"
    assert [(request.method, request.url.raw_path) for request in requests] == [
        ("DELETE", b"/v1/models/ft%3Aa%3Ap%3A%3A1"),
        ("DELETE", b"/v1/models/ft%3Aa%3Ap%3A%3A2"),
    ]


def test_the_next_command_to_run_names_the_home_that_was_given(ask, tmp_path):
    for home in ([], ["--home", str(tmp_path)]):
        answer = {"id": "ftjob-1", "model": "m"}
        output, _ = ask(answer, "jobs", "create", "file-1", "--model", "m", *home)
        assert output.endswith(f"Follow it: {' '.join(['luthier jobs follow ftjob-1', *home])}\n")


@pytest.mark.parametrize("command", [("put", "a", "m"), ("rollback", "a")])
def test_a_target_that_no_server_could_load_is_reported(ask, command):
    output, _ = ask({"name": "a", "model": "m", "version": 2, "proved": False}, "aliases", *command)
    assert output.startswith("a is m now, version 2.\nNo inference server has answered with it yet")
