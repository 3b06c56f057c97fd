"""Bases in an inference server's own process stay within their memory, and none leaves that is needed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.specs import BaseFacts
from tests.inference_server import BARE, COMPLETIONS
from tests.integration.inference.test_inference_process import served_process
from tests.tiny import BASE_ID


def copy_base(base_folder: Path, base_id: str, **changes: int) -> int:
    """Write the tiny base once more, under another name; return the bytes of its weights."""
    folder = shutil.copytree(base_folder, base_folder.with_name(base_id))
    facts = BaseFacts.model_validate_json((folder / FACTS_NAME).read_bytes())
    facts = facts.model_copy(update={"id": base_id, **changes})
    (folder / FACTS_NAME).write_text(facts.model_dump_json())
    return facts.num_parameters * 4


@pytest.fixture
def client(folder: Path, base_folder: Path) -> Iterator[httpx2.Client]:
    size = copy_base(base_folder, "tiny-b")
    copy_base(base_folder, "tiny-c")
    copy_base(base_folder, "tiny-large", num_parameters=size)  # four bytes each
    # Two of them, and not three.
    limit = str(size * 5 // 2)
    with served_process(folder, "bases.sock", LUTHIER_INFERENCE_MAX_BASES_BYTES=limit) as client:
        yield client


def _headers(base_id: str) -> dict[str, str]:
    return BARE.model_copy(update={"base_id": base_id}).to_headers()


def _ask(client: httpx2.Client, base_id: str) -> httpx2.Response:
    body = {"model": "m", "prompt": "a", "max_tokens": 1}
    return client.post(COMPLETIONS, json=body, headers=_headers(base_id))


def _bases(client: httpx2.Client) -> set[str]:
    return set(client.get("/internal/state").json()["bases"])


def test_an_idle_base_leaves_for_another_and_a_busy_or_preloaded_one_stays(client: httpx2.Client) -> None:
    assert _ask(client, "tiny-b").status_code == 200
    assert _bases(client) == {BASE_ID, "tiny-b"}
    assert _ask(client, "tiny-c").status_code == 200
    assert _bases(client) == {BASE_ID, "tiny-c"}
    # Enough work for seconds.
    body = {"model": "m", "prompt": ["a"] * 128, "max_tokens": 200, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body, headers=_headers("tiny-c")) as response:
        lines = response.iter_lines()
        next(lines)
        refused = _ask(client, "tiny-b")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
        assert int(refused.headers["retry-after"]) > 0
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert _ask(client, "tiny-b").status_code == 200
    assert _bases(client) == {BASE_ID, "tiny-b"}
    refused = _ask(client, "tiny-large")
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "out_of_memory")
    assert "LUTHIER_INFERENCE_MAX_BASES_BYTES" in refused.json()["error"]["message"]
    assert _bases(client) == {BASE_ID, "tiny-b"}
