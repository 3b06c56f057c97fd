"""Schemathesis over the served OpenAPI document, every phase, in an environment of its own."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Api
from tests.integration.test_other_clients import make_environment

MIN_CASES = 2000
# Whether a request that fits the schema is taken also depends on what is there: a base, a file, a cursor. The
# schema can't say that, so a refusal of such a request is no finding; a failure of the server always is.
_NOT_DECIDED_BY_THE_SCHEMA = "positive_data_acceptance"


@pytest.mark.full
def test_no_request_breaks_what_the_document_says(api: Api, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", "schemathesis>=4")
    report = tmp_path / "report.json"
    command = [python.with_name("schemathesis"), "run", f"{api.base_url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {api.key}"]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "30"]
    command += ["--exclude-checks", _NOT_DECIDED_BY_THE_SCHEMA, "--max-time", "240"]
    # Answers of models are the fake's.
    command += ["--exclude-path-regex", "chat/completions", "--generation-deterministic"]
    command += ["--report", "json", "--report-json-path", report]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(report.read_text())
    assert found["failures"] == [], done.stdout[-8000:]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert found["test_cases"]["generated"] >= MIN_CASES, found["test_cases"]
