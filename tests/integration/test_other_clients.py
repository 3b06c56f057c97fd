"""Programs written for OpenAI with other clients than the newest package: older, Node, litellm, DSPy."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.client import LuthierClient
from luthier.core.settings import Settings
from tests.conftest import Api
from tests.environments import make_environment, make_node_folder
from tests.rows import colour_rows, jsonl
from tests.stack import real_stack
from tests.training import make_worker
from worker.processes import work

pytestmark = pytest.mark.full
_CLIENTS = Path(__file__).parents[1] / "clients"


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(api: Api, settings: Settings, tmp_path: Path) -> Run:
    """Run a client, do its jobs meanwhile, and return what it printed."""

    def run(*command: str | Path, folder: Path = tmp_path) -> dict[str, Any]:
        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(jsonl(colour_rows()))
        context = make_worker(settings, api)
        connection = {"OPENAI_BASE_URL": f"{api.base_url}/v1", "OPENAI_API_KEY": api.key, "ROWS": str(rows)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=folder, env=os.environ | connection, **pipes) as process:
            while process.poll() is None:
                if api.notified:
                    api.notified.clear()
                    work(context)
                else:
                    context.stopping.wait(0.05)
            output, errors = process.communicate()
        assert process.returncode == 0, errors
        return json.loads(output.strip().splitlines()[-1])

    return run


def check_main_path(reported: dict[str, Any]) -> None:
    assert reported["status"] == "succeeded"
    assert reported["model"].startswith("ft:tiny-llama:personal:mine:")
    assert reported["checkpoint"] == reported["model"]
    assert reported["last_event"] == "The job has successfully completed"
    assert reported["num_steps"] >= 1
    assert reported["is_listed"]
    assert reported["jobs"] == reported["made"]
    assert (reported["cancelled"], reported["refused"]) == ("cancelled", "model_not_available")
    assert reported["deleted"] == [True, True]


@pytest.mark.parametrize("requirement", ["openai>=1.60,<2", "openai>=2,<3"])
def test_older_python_packages_go_the_main_path(run: Run, tmp_path: Path, requirement: str) -> None:
    reported = run(make_environment(tmp_path / "environment", requirement), _CLIENTS / "python_openai.py")
    assert reported["version"].startswith(requirement.partition("=")[2][0])
    check_main_path(reported)


def test_this_package_goes_the_main_path(run: Run) -> None:
    check_main_path(run(sys.executable, _CLIENTS / "python_openai.py"))


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed")
def test_the_node_package_goes_the_main_path(run: Run, tmp_path: Path) -> None:
    folder = make_node_folder(tmp_path / "node", "openai")
    shutil.copy(_CLIENTS / "node_openai.mjs", folder)
    check_main_path(run("node", "node_openai.mjs", folder=folder))


def test_litellm_tunes_lists_and_cancels(run: Run, tmp_path: Path) -> None:
    reported = run(make_environment(tmp_path / "environment", "litellm"), _CLIENTS / "litellm_calls.py")
    assert reported["status"] == "succeeded"
    assert reported["model"].startswith("ft:tiny-llama:personal:")
    assert reported["cancelled"] == "cancelled"
    assert reported["jobs"][:1] == reported["made"][:1]


def test_dspys_bootstrap_finetune_tunes_the_small_base_and_asks_the_model(tmp_path: Path) -> None:
    """A whole service with the real small base: what DSPy then calls must answer in its format.

    DSPy names the tuned model without its provider, so that litellm does not know whose it is; the client
    puts it back.
    """
    python = make_environment(tmp_path / "environment", "dspy")

    with real_stack() as stack:
        connection = stack.connection()
        environment = os.environ | {
            "OPENAI_BASE_URL": connection["base_url"],
            "OPENAI_API_KEY": connection["api_key"],
            "MODEL": Settings(_env_file=None).preload_base,
            "DSPY_CACHEDIR": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [python, _CLIENTS / "dspy_finetune.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=540,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        reported = json.loads(done.stdout.splitlines()[-1])
        with LuthierClient(**connection) as client:
            (model,) = [one for one in client.list_models() if one["id"] == reported["model"]]
    assert model["id"].startswith("ft:smollm2-135m-instruct:personal:")
    # DSPy's adapter has read a category in each answer, and the model distinguishes messages.
    assert set(reported["answers"]) <= set(reported["expected"])
    num_right = sum(a == b for a, b in zip(reported["answers"], reported["expected"], strict=True))
    assert num_right > len(reported["expected"]) // 2
