"""Programs written for OpenAI with other clients than the newest package: older, Node, litellm, DSPy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.client import LuthierClient
from luthier.core.settings import Settings
from tests.conftest import Api
from tests.environments import make_environment, make_node_folder
from tests.rows import colour_rows, jsonl
from tests.stack import Stack, stack_folder, up_command
from tests.training import make_worker
from worker.processes import work

pytestmark = pytest.mark.full
_CLIENTS = Path(__file__).parents[1] / "clients"


def run_beside_worker(
    api: Api, settings: Settings, tmp_path: Path, command: list[str], folder: Path
) -> dict[str, Any]:
    """Run a client, do its jobs meanwhile, and return what it printed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(colour_rows()))
    context = make_worker(settings, api)
    environment = os.environ | {
        "OPENAI_BASE_URL": f"{api.base_url}/v1",
        "OPENAI_API_KEY": api.key,
        "ROWS": str(rows),
    }
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            if api.notified:
                api.notified.clear()
                work(context)
            else:
                context.stopping.wait(0.05)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    reported: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return reported


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
def test_older_python_packages_go_the_main_path(
    api: Api, settings: Settings, tmp_path: Path, requirement: str
) -> None:
    python = make_environment(tmp_path / "environment", requirement)
    reported = run_beside_worker(
        api, settings, tmp_path, [str(python), str(_CLIENTS / "python_openai.py")], tmp_path
    )
    assert reported["version"].startswith(requirement.partition("=")[2][0])
    check_main_path(reported)


def test_this_package_goes_the_main_path(api: Api, settings: Settings, tmp_path: Path) -> None:
    command = [sys.executable, str(_CLIENTS / "python_openai.py")]
    check_main_path(run_beside_worker(api, settings, tmp_path, command, tmp_path))


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed")
def test_the_node_package_goes_the_main_path(api: Api, settings: Settings, tmp_path: Path) -> None:
    folder = make_node_folder(tmp_path / "node", "openai")
    shutil.copy(_CLIENTS / "node_openai.mjs", folder)
    check_main_path(run_beside_worker(api, settings, tmp_path, ["node", "node_openai.mjs"], folder))


def test_litellm_tunes_lists_and_cancels(api: Api, settings: Settings, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", "litellm")
    command = [str(python), str(_CLIENTS / "litellm_calls.py")]
    reported = run_beside_worker(api, settings, tmp_path, command, tmp_path)
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

    with stack_folder() as folder:
        stack = Stack(folder, up_command)
        try:
            stack.start().until_ready()
            connection = json.loads((stack.home / "connection.json").read_text())
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
            with LuthierClient(connection["base_url"], connection["api_key"]) as client:
                (model,) = [one for one in client.list_models() if one["id"] == reported["model"]]
        finally:
            stack.stop()
    assert model["id"].startswith("ft:smollm2-135m-instruct:personal:")
    # DSPy's adapter has read a category in each answer, and the model distinguishes messages.
    assert set(reported["answers"]) <= set(reported["expected"])
    num_right = sum(a == b for a, b in zip(reported["answers"], reported["expected"], strict=True))
    assert num_right > len(reported["expected"]) // 2
