"""The command line: its exits, its words, and what it does not load."""

import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from luthier.cli import doctor, options
from luthier.cli.doctor import Finding
from luthier.cli.main import app, main
from luthier.client import LuthierClient

_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def _serve(monkeypatch: pytest.MonkeyPatch, body: object) -> list[httpx2.Request]:
    """Let every client command meet a service that always answers `body`."""
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(200, json=body)

    client = LuthierClient("http://service/v1", "lt_key", transport=httpx2.MockTransport(answer))
    monkeypatch.setattr(options, "open_client", lambda *_: client)
    return requests


def test_starting_the_command_line_loads_no_service_and_no_torch() -> None:
    code = (
        "import sys, luthier.cli.main, luthier.cli.stack.up, luthier.cli.doctor\n"
        "heavy = {'torch', 'transformers', 'peft', 'sqlalchemy', 'celery', 'fastapi', 'services', 'api'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_failure_is_one_line_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["luthier", "jobs", "list"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("luthier: No service is known")
    assert error.count("\n") == 1


def test_a_good_file_is_checked_offline(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(_ROW) + "\n" + json.dumps(_ROW) + "\n")
    result = runner.invoke(app, ["check", str(file)])
    assert result.exit_code == 0
    assert "2 rows" in result.output
    assert "a job needs at least 10 rows" in result.output
    file.write_text((json.dumps(_ROW) + "\n") * 10)
    assert "needs at least" not in runner.invoke(app, ["check", str(file)]).output


def test_a_broken_file_is_refused_with_its_line(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(_ROW) + "\n{\n")
    result = runner.invoke(app, ["check", str(file)])
    assert result.exit_code == 1
    assert "line 2" in str(result.exception).lower()


def test_a_file_that_is_not_there_is_refused(runner: CliRunner) -> None:
    result = runner.invoke(app, ["check", "absent.jsonl"])
    assert result.exit_code == 1
    assert "absent.jsonl" in str(result.exception)


def test_a_new_key_is_shown_and_its_project_is_sent(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _serve(monkeypatch, {"id": "key_1", "key": "lt_secret"})
    result = runner.invoke(app, ["keys", "create", "--name", "ci", "--project", "team"])
    assert result.output.splitlines()[0] == "lt_secret"
    assert json.loads(requests[0].content) == {"name": "ci", "project": "team"}


def test_lists_are_tables_or_json(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [{"id": "ftjob-1", "status": "failed", "model": "m", "fine_tuned_model": None, "created_at": 0}]
    _serve(monkeypatch, {"data": jobs})
    assert "ftjob-1  failed  m" in runner.invoke(app, ["jobs", "list"]).output
    _serve(monkeypatch, {"data": jobs})
    assert json.loads(runner.invoke(app, ["jobs", "list", "--json"]).output) == jobs


def test_doctor_without_a_service_says_how_to_start_it_and_does_not_fail(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_device", lambda: Finding("device", "ok", "CPU"))
    result = runner.invoke(app, ["doctor", "--json"])
    findings = {finding["name"]: finding for finding in json.loads(result.output)}
    for name in ("service", "database", "broker", "api"):
        assert findings[name]["status"] == "warn"
        assert "luthier up" in findings[name]["advice"]
    assert {"python", "packages", "memory", "disk", "storage", "catalogue"} <= set(findings)


def test_doctor_fails_when_a_check_fails(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    monkeypatch.setattr(doctor, "check_device", lambda: Finding("device", "ok", "CPU"))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL  database" in result.output


def test_doctor_names_databases_whose_home_is_not_found_and_proposes_no_removal(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    for name, home in (("one", tmp_path), ("two", tmp_path / "gone")):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / "home").write_text(f"{home}\n")
    (finding,) = doctor.check_left_databases()
    assert f"{tmp_path / 'state' / 'two'} (of {tmp_path / 'gone'})" in finding.detail
    assert "rm " not in finding.advice


def test_doctor_names_a_setting_out_of_range(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_TRAINING_SLOTS", "0")
    monkeypatch.setattr(doctor, "check_device", lambda: Finding("device", "ok", "CPU"))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "LUTHIER_TRAINING_SLOTS" in result.output


@pytest.mark.parametrize(
    ("verb", "status"), [("pause", "pausing"), ("resume", "queued"), ("cancel", "cancelled")]
)
def test_a_jobs_verbs_are_posted_without_a_body_and_say_what_became_of_it(
    verb: str, status: str, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _serve(monkeypatch, {"id": "ftjob-1", "status": status})
    assert runner.invoke(app, ["jobs", verb, "ftjob-1"]).output == f"ftjob-1 is {status}.\n"
    (request,) = requests
    assert (request.method, request.url.path, request.content) == (
        "POST",
        f"/v1/fine_tuning/jobs/ftjob-1/{verb}",
        b"",
    )


@pytest.mark.parametrize(
    ("command", "method", "path", "body", "printed"),
    [
        (["put", "a/b", "m2"], "PUT", b"/v1/aliases/a%2Fb", {"model": "m2"}, "a/b is m2 now, version 2."),
        (["rollback", "a/b"], "POST", b"/v1/aliases/a%2Fb/rollback", {}, "a/b is m2 now, version 2."),
        (
            ["rollback", "a/b", "--version", "1"],
            "POST",
            b"/v1/aliases/a%2Fb/rollback",
            {"version": 1},
            "a/b is m2 now, version 2.",
        ),
        (["delete", "a/b"], "DELETE", b"/v1/aliases/a%2Fb", None, "Deleted a/b"),
    ],
)
def test_an_alias_is_changed_as_asked(
    runner: CliRunner,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    method: str,
    path: bytes,
    body: object,
    printed: str,
) -> None:
    requests = _serve(monkeypatch, {"name": "a/b", "model": "m2", "version": 2})
    assert runner.invoke(app, ["aliases", *command]).output == printed + "\n"
    [request] = requests
    assert (request.method, request.url.raw_path) == (method, path)
    assert (json.loads(request.content) if request.content else None) == body


def test_models_are_deleted_by_their_names(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _serve(monkeypatch, {"deleted": True})
    printed = runner.invoke(app, ["models", "delete", "ft:a:p::1", "ft:a:p::2"]).output
    assert printed == "Deleted ft:a:p::1\nDeleted ft:a:p::2\n"
    assert [(request.method, request.url.raw_path) for request in requests] == [
        ("DELETE", b"/v1/models/ft%3Aa%3Ap%3A%3A1"),
        ("DELETE", b"/v1/models/ft%3Aa%3Ap%3A%3A2"),
    ]


def test_the_next_command_to_run_names_the_home_that_was_given(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ["jobs", "create", "file-1", "--model", "m"]
    for home in ([], ["--home", str(tmp_path)]):
        _serve(monkeypatch, {"id": "ftjob-1", "model": "m"})
        printed = runner.invoke(app, [*command, *home]).output
        assert printed.endswith(f"Follow it: {' '.join(['luthier jobs follow ftjob-1', *home])}\n")


@pytest.mark.parametrize("command", [["put", "a", "m"], ["rollback", "a"]])
def test_a_target_that_no_server_could_load_is_reported(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    _serve(monkeypatch, {"name": "a", "model": "m", "version": 2, "proved": False})
    printed = runner.invoke(app, ["aliases", *command]).output
    assert printed.startswith("a is m now, version 2.\nNo inference server has answered with it yet")


@pytest.mark.parametrize("command", [["list"], ["history", "prod"]])
def test_aliases_and_their_history_are_tables_or_json(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    shown = {"name": "prod", "model": "m2", "version": 2, "created_at": 0, "updated_at": 0}
    shown |= {"restored_version": None, "created_by_key_id": "key_1"}
    page = {"data": [shown], "has_more": False}
    _serve(monkeypatch, page)
    assert "m2" in runner.invoke(app, ["aliases", *command]).output
    _serve(monkeypatch, page)
    assert json.loads(runner.invoke(app, ["aliases", *command, "--json"]).output) == [shown]
