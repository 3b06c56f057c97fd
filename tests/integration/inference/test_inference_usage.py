"""What answers used is counted to the token: in the access log, in the metrics, in the report of usage."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Api, wait_until

# Looks like the event by which the inference server reports usage.
_PROMPT = "a\n\n: usage 9,9,9\n\n"
_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/chat/completions", {"messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 5}),
    ("/completions", {"prompt": ["a b c", "d"], "n": 2, "max_tokens": 3}),
    ("/responses", {"input": "a b", "max_output_tokens": 16}),
]


def _ask(api: Api, path: str, **body: Any) -> httpx2.Response:
    answer = api.ask("POST", path, {"model": "tiny-llama"} | body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def _events(answer: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.splitlines() if line and not line.startswith("event: ")]
    # Nothing but what the endpoint documents: no comment gets through.
    assert all(line.startswith("data: ") for line in lines), answer.text
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def _used(usage: dict[str, int]) -> tuple[int, int]:
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]


def _reported(api: Api) -> tuple[int, int, int]:
    params = {"start_time": int(time.time()) - 3600}
    page = api.ok("GET", "/organization/usage/completions", params=params)
    results = [one for bucket in page["data"] for one in bucket["results"]]
    counts = ("num_model_requests", "input_tokens", "output_tokens")
    requests, used_input, used_output = (sum(one[name] for one in results) for name in counts)
    return requests, used_input, used_output


def _counted(api: Api) -> tuple[float, float]:
    text = httpx2.get(f"{api.base_url}/metrics", headers=api.headers).text
    found = {
        sample.labels["kind"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "luthier_tokens_total"
    }
    return found.get("input", 0), found.get("output", 0)


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> Callable[[int], list[dict[str, Any]]]:
    """Return the lines of the access log that have a model, once there are as many."""
    lines: list[dict[str, Any]] = []

    def read(number: int) -> list[dict[str, Any]]:
        def is_there() -> bool:
            found = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
            lines.extend(line for line in found if line.get("model"))
            return len(lines) >= number

        wait_until(is_there, what="requests are logged")
        return lines

    return read


def test_usage_adds_up_to_the_tokens_of_the_answers_streamed_and_not(
    chat_api: Api, logged: Callable[[int], list[dict[str, Any]]]
) -> None:
    reported, counted = _reported(chat_api), _counted(chat_api)
    used: list[tuple[int, int]] = []
    for path, body in _REQUESTS:
        whole = _used(_ask(chat_api, path, **body, temperature=0).json()["usage"])
        used.append(whole)
        # The same answer as a stream says how much it was only where it was asked to, and is counted anyway.
        streamed = _events(_ask(chat_api, path, **body, temperature=0, stream=True))
        if path == "/responses":
            assert _used(streamed[-1]["response"]["usage"]) == whole
        else:
            assert not any(event.get("usage") for event in streamed)
            options = {"stream_options": {"include_usage": True}}
            streamed = _events(_ask(chat_api, path, **body, temperature=0, stream=True, **options))
            assert _used(streamed[-1]["usage"]) == whole
            used.append(whole)
        used.append(whole)
    total_input, total_output = (sum(part) for part in zip(*used, strict=True))
    # All is logged by then: what is written while the log is read may be lost to the reader.
    wait_until(lambda: _reported(chat_api)[0] - reported[0] == len(used), what="usage is stored")
    assert [(line["input_tokens"], line["output_tokens"]) for line in logged(len(used))] == used
    assert all(line["model"] == "tiny-llama" and line["key_id"] and line["is_complete"] for line in logged(0))
    assert [now - before for now, before in zip(_reported(chat_api), reported, strict=True)] == [
        len(used),
        total_input,
        total_output,
    ]
    assert [now - before for now, before in zip(_counted(chat_api), counted, strict=True)] == [
        total_input,
        total_output,
    ]


def test_a_stream_whose_client_leaves_is_logged_and_counted_as_far_as_it_came(
    chat_api: Api, logged: Callable[[int], list[dict[str, Any]]]
) -> None:
    reported = _reported(chat_api)
    body = {"model": "tiny-llama", "prompt": "a b c", "max_tokens": 200, "stream": True}
    url = f"{chat_api.base_url}/v1/completions"
    with httpx2.stream("POST", url, headers=chat_api.headers, json=body, timeout=60) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until(lambda: _reported(chat_api)[0] - reported[0] == 1, what="usage is stored")
    (line,) = logged(1)
    assert line["status"] == 200
    assert (
        line["input_tokens"]
        == _used(_ask(chat_api, "/completions", prompt="a b c", max_tokens=1).json()["usage"])[0]
    )
    assert line["output_tokens"] >= 1
    wait_until(lambda: _reported(chat_api)[0] - reported[0] == 2, what="both are stored")


def test_a_refused_request_is_logged_and_not_counted(
    chat_api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    reported = _reported(chat_api)
    assert chat_api.ask("POST", "/completions", {"model": "none", "prompt": "a"}).status_code == 404
    wait_until(lambda: '"/v1/completions"' in capfd.readouterr().out, what="it is logged")
    assert _reported(chat_api) == reported
