"""Clients of the chat surface that are not ours, before the real API, the real engine and the tiny base.

Each is a program of tests/clients in an environment of its own, with the newest of its packages or of an
older line. What it saw must be what plain HTTP says.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data.rendering.tokenizer import Tokenizer
from tests.conftest import Api
from tests.environments import make_environment, make_node_folder
from tests.unit.inference.artifacts import greedy, load_plain

pytestmark = pytest.mark.full
_CLIENTS = Path(__file__).parents[2] / "clients"
_CASES = [
    ("the sky is", " blue and the sea"),
    ("", "what is the colour"),
    ("an answer", " with the same keys \N{EURO SIGN}"),
    ("the", " sky"),
]


def run_client(api: Api, command: list[str | Path], folder: Path, **environment: str) -> dict[str, Any]:
    """Run a client and return what it printed."""
    connection = {
        "OPENAI_BASE_URL": f"{api.base_url}/v1",
        "OPENAI_API_KEY": api.key,
        # Nothing is to be looked up elsewhere.
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | connection | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def ask(api: Api, path: str, **body: Any) -> dict[str, Any]:
    return api.ok("POST", path, {"model": "tiny-llama", "temperature": 0} | body, timeout=60)


def check_chats(api: Api, reported: dict[str, Any]) -> None:
    """Compare what a client saw with what plain HTTP says."""
    messages = [{"role": "user", "content": "the sky"}]
    answer = ask(api, "/chat/completions", messages=messages, max_tokens=12)
    text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    assert reported["whole"] == reported["streamed"] == text
    # A token may be a part of a character.
    assert bytes(reported["bytes"]).decode(errors="replace") == text
    assert reported.get("later", text) == text
    # litellm asks for no shorter responses.
    longer = ask(api, "/chat/completions", messages=messages, max_tokens=16)
    assert reported["responded"] == longer["choices"][0]["message"]["content"]
    assert reported["reason"] == answer["choices"][0]["finish_reason"]
    assert reported["usage"] == [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]]
    assert reported["streamed_usage"] == usage["total_tokens"]
    assert reported["stopped"] == text[: text.index(text[5:8])]
    assert reported["num_top"] == [3] * usage["completion_tokens"]
    assert reported["parsed"] in {"red", "blue"}
    name, arguments, streamed = reported["called"]
    assert name == "go" and json.loads(arguments) == json.loads(streamed) == {}
    completion = ask(api, "/completions", prompt=["the sky", "a"], max_tokens=5, logprobs=0)
    texts = [choice["text"] for choice in completion["choices"]]
    assert reported["texts"] == texts
    assert reported.get("texts_streamed", texts) == texts
    rated = ["".join(choice["logprobs"]["tokens"]) for choice in completion["choices"]]
    assert reported.get("rated", rated) == rated
    if "scored" in reported:
        scored = ask(api, "/completions", prompt=["the sky", "a"], max_tokens=0, logprobs=1, echo=True)
        assert reported["scored"] == [choice["logprobs"]["token_logprobs"] for choice in scored["choices"]]
        assert reported["scored"][0][0] is None and len(reported["scored"][0]) > 1
    assert reported["refused"] == [404, "model_not_found", True]


def test_this_package_chats_under_strict_validation(chat_api: Api, tmp_path: Path) -> None:
    check_chats(chat_api, run_client(chat_api, [sys.executable, _CLIENTS / "chat_openai.py"], tmp_path))


@pytest.mark.parametrize("requirement", ["openai>=1.60,<2", "openai>=2,<3", "openai"])
def test_python_packages_chat_in_strict_mode(chat_api: Api, tmp_path: Path, requirement: str) -> None:
    python = make_environment(tmp_path / "environment", requirement)
    reported = run_client(chat_api, [python, _CLIENTS / "chat_openai.py"], tmp_path)
    assert reported["version"].startswith(requirement.partition("=")[2][:1])
    check_chats(chat_api, reported)


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node is not installed")
@pytest.mark.parametrize("packages", [["openai@6"], ["openai@7", "node@22"]], ids=" ".join)
def test_the_node_package_chats(chat_api: Api, tmp_path: Path, packages: list[str]) -> None:
    folder = make_node_folder(tmp_path / "node", *packages)
    shutil.copy(_CLIENTS / "chat_openai.mjs", folder)
    # The newest line of the package asks for a newer Node than some systems have.
    own = folder / "node_modules" / ".bin" / "node"
    command = [own if own.exists() else "node", "chat_openai.mjs"]
    check_chats(chat_api, run_client(chat_api, command, folder))


@pytest.mark.parametrize(
    ("requirement", "program"),
    [("litellm", "chat_litellm.py"), ("langchain-openai", "chat_langchain.py")],
)
def test_frameworks_chat(chat_api: Api, tmp_path: Path, requirement: str, program: str) -> None:
    python = make_environment(tmp_path / "environment", requirement)
    check_chats(chat_api, run_client(chat_api, [python, _CLIENTS / program], tmp_path))


def test_lm_eval_scores_texts_as_the_model_does(chat_api: Api, base_folder: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", "lm-eval[api]", "transformers")
    reported = run_client(
        chat_api,
        [python, _CLIENTS / "lm_eval_calls.py"],
        tmp_path,
        TOKENIZER=str(base_folder),
        CASES=json.dumps(_CASES),
    )
    tokenizer, model = Tokenizer.load(base_folder), load_plain(base_folder)

    def expected(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        with torch.inference_mode():
            logits_TV = model(torch.tensor([context + continuation])).logits[0]
        own_TV = torch.log_softmax(logits_TV, dim=-1)[len(context) - 1 : -1]
        ids_T1 = torch.tensor(continuation).unsqueeze(1)
        return float(own_TV.gather(1, ids_T1).sum()), own_TV.argmax(dim=-1).tolist() == continuation

    # A text without a context is scored after the mark that texts begin with.
    begin = tokenizer.encode("<|im_start|>")
    scored = [expected(tokenizer.encode(a) or begin, tokenizer.encode(b)) for a, b in _CASES]
    rolled = [expected(begin, tokenizer.encode(a + b))[0] for a, b in _CASES]
    for found in reported["scored"]:
        assert [pytest.approx(value, abs=1e-3) for value, _ in scored] == [value for value, _ in found]
        assert [is_greedy for _, is_greedy in scored] == [is_greedy for _, is_greedy in found]
    for found in reported["rolled"]:
        assert found == [pytest.approx(value, abs=1e-3) for value in rolled]
    for found in reported["made"]:
        for context, text in zip(filter(None, [context for context, _ in _CASES]), found, strict=True):
            made = tokenizer.decode(greedy(model, tokenizer.encode(context), 12))
            assert text == made.partition("e")[0]
    [chatted] = reported["chatted"]
    messages = [{"role": "user", "content": "the sky"}]
    answer = ask(chat_api, "/chat/completions", messages=messages, max_tokens=12)
    assert chatted == answer["choices"][0]["message"]["content"]
