"""The command line's whole path against a served API: files, a job, its checkpoints, an answer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cli.commands.follow import thinned
from tests.conftest import Api
from tests.rows import colour_rows, jsonl

Run = Callable[..., str]


def _luthier(api: Api, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LUTHIER_BASE_URL": f"{api.base_url}/v1",
        "LUTHIER_API_KEY": api.key,
    }
    command = [sys.executable, "-m", "luthier.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def run(api: Api) -> Run:
    """Run a command against the API, which must succeed, and return what it printed."""

    def invoke(*arguments: str) -> str:
        done = _luthier(api, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

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
    printed = run(
        "jobs", "create", str(rows), "--model", "tiny-llama", "--method", "prefix", "--suffix", "cli"
    )
    assert "Uploaded rows.jsonl as file-" in printed
    [job] = json.loads(run("jobs", "list", "--json"))
    assert f"Job {job['id']} on tiny-llama" in printed
    assert job["tuning"]["type"] == "prefix"
    assert job["user_provided_suffix"] == "cli"
    assert run("jobs", "checkpoints", job["id"]) == "The job has no checkpoints yet.\n"


def test_a_job_is_made_of_a_file_that_is_uploaded_already(run: Run, rows: Path) -> None:
    file_id = run("files", "upload", str(rows)).split()[0]
    job = json.loads(run("jobs", "create", file_id, "--model", "tiny-llama", "--json"))
    assert job["training_file"] == file_id


def test_a_refused_job_says_why_and_keeps_the_uploaded_file(api: Api, run: Run, rows: Path) -> None:
    file_id = run("files", "upload", str(rows)).split()[0]
    refused = _luthier(api, "jobs", "create", file_id, "--model", "no-such")
    assert refused.returncode == 1
    assert refused.stderr.startswith("luthier: ")
    assert "no-such" in refused.stderr
    absent = _luthier(api, "jobs", "create", "none.jsonl", "--model", "tiny-llama")
    assert "none.jsonl can't be read" in absent.stderr
    assert file_id in run("files", "list")


def test_a_broken_file_lists_every_fault_that_was_found(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(jsonl(colour_rows(2)) + b'{"messages": 1}\n' * 7)
    refused = _luthier(api, "check", str(path))
    assert refused.returncode == 1
    assert "in 7 places" in refused.stderr
    missing = [number for number in range(3, 10) if f"line {number}" not in refused.stderr.lower()]
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
