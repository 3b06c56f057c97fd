"""The command line's whole path against a served API: files, a job, its checkpoints, an answer."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cli.commands.follow import thinned
from luthier.cli.main import main
from tests.conftest import Api
from tests.rows import colour_rows, jsonl

Run = Callable[..., str]
Luthier = Callable[..., tuple[int, str, str]]


@pytest.fixture
def luthier(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Luthier:
    """Run a command against the API, and return its exit code and what it printed to both streams."""
    monkeypatch.setenv("LUTHIER_BASE_URL", f"{api.base_url}/v1")
    monkeypatch.setenv("LUTHIER_API_KEY", api.key)
    # The API of this process would write its lines between those of the command.
    monkeypatch.setattr("api.middleware._log_request", lambda *_: None)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return invoke


@pytest.fixture
def run(luthier: Luthier) -> Run:
    """Run a command, which must succeed, and return what it printed."""

    def invoke(*arguments: str) -> str:
        code, printed, errors = luthier(*arguments)
        assert code == 0, errors
        return printed

    return invoke


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(colour_rows()))
    return path


def test_a_file_is_uploaded_listed_and_deleted(run: Run, rows: Path) -> None:
    file_id = run("files", "upload", str(rows)).split()[0]
    assert file_id in run("files", "list")
    assert "rows.jsonl" in run("files", "list")
    assert run("files", "delete", file_id) == f"Deleted {file_id}\n"
    assert run("files", "list") == "There are no files.\n"


def test_a_job_is_made_of_a_file_on_this_machine_by_a_named_method(run: Run, rows: Path) -> None:
    options = ("--model", "tiny-llama", "--method", "prefix", "--suffix", "cli")
    printed = run("jobs", "create", str(rows), *options)
    assert "Uploaded rows.jsonl as file-" in printed
    [job] = json.loads(run("jobs", "list", "--json"))
    assert f"Job {job['id']} on tiny-llama" in printed
    assert job["tuning"]["type"] == "prefix"
    assert job["user_provided_suffix"] == "cli"
    assert run("jobs", "checkpoints", job["id"]) == "The job has no checkpoints yet.\n"


def test_a_job_is_made_of_a_file_that_is_uploaded_already_or_refused_in_one_line(
    luthier: Luthier, run: Run, rows: Path
) -> None:
    file_id = run("files", "upload", str(rows)).split()[0]
    job = json.loads(run("jobs", "create", file_id, "--model", "tiny-llama", "--json"))
    assert job["training_file"] == file_id
    code, _, errors = luthier("jobs", "create", file_id, "--model", "no-such")
    assert code == 1
    assert errors.startswith("luthier: ")
    assert "no-such" in errors
    _, _, errors = luthier("jobs", "create", "none.jsonl", "--model", "tiny-llama")
    assert "none.jsonl can't be read" in errors
    assert file_id in run("files", "list")


def test_a_broken_file_lists_every_fault_that_was_found(luthier: Luthier, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(jsonl(colour_rows(2)) + b'{"messages": 1}\n' * 7)
    code, _, errors = luthier("check", str(path))
    assert code == 1
    assert "in 7 places" in errors
    missing = [number for number in range(3, 10) if f"line {number}" not in errors.lower()]
    assert missing == []


def test_the_version_is_an_option_too(run: Run) -> None:
    assert run("--version") == run("version")


def test_steps_are_thinned_and_nothing_else_is() -> None:
    steps = [
        {"type": "metrics", "data": {"step": step, "total_steps": 1000}, "message": f"step {step}"}
        for step in range(1, 1001)
    ]
    note = {"type": "message", "data": {}, "message": "A checkpoint is stored."}
    kept = list(thinned([*steps[:500], note, *steps[500:]]))
    assert note in kept
    assert kept[0] == steps[0]
    assert kept[-1] == steps[-1]
    assert 15 <= len(kept) <= 30
