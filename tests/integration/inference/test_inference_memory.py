"""What the inference server lends to a job, over a real socket, and what answers meanwhile."""

import socket
from pathlib import Path
from typing import Any

import pytest

from luthier.core.inference import LOANS_PATH, LoanRequest, ModelTarget
from tests.inference_server import BARE, CHAT, Served
from tests.integration.inference.test_inference_bases import copy_base


def _lend(served: Served, num_bytes: int, least_bytes: int = 1, **changes: Any) -> int:
    asked = LoanRequest(
        hostname=socket.gethostname(),
        device="cpu",
        loan_id="ftjob-1",
        num_bytes=num_bytes,
        least_bytes=least_bytes,
        seconds=60,
    )
    answer = served.client.post(LOANS_PATH, json=asked.model_copy(update=changes).model_dump())
    assert answer.status_code == 200, answer.text
    return answer.json()["lent_bytes"]


def test_unused_pages_are_lent_and_models_answer_as_before(
    served: Served, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    targets = [target for target, _ in artifacts]
    before = [served.chat("the sky", target, max_tokens=8)["choices"] for target in targets]
    assert _lend(served, 2**50, 2**50) == 0
    # All that is not in use, but pages for one long answer.
    lent = _lend(served, 2**50)
    assert 10_000_000 < lent < 2**40
    assert [served.chat("the sky", target, max_tokens=8)["choices"] for target in targets] == before
    held = served.service.models.loaded.held
    assert set(held) >= {target.digest for target in targets}
    assert _lend(served, 0, 0) == 0
    # The same is there again.
    assert _lend(served, lent // 2) == lent // 2
    assert _lend(served, 0, 0) == 0


def test_a_base_that_has_no_room_beside_a_loan_is_refused_until_it_is_given_back(served: Served) -> None:
    # As if it took 100 MB.
    copy_base(served.base_folder, "tiny-large", num_parameters=25_000_000)
    target = BARE.model_copy(update={"base_id": "tiny-large"})
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert _lend(served, 2**50) > 0
    refused = served.post(CHAT, target, **body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
    assert int(refused.headers["retry-after"]) > 0
    assert _lend(served, 0, 0) == 0
    assert served.post(CHAT, target, **body).status_code == 200


def test_nothing_is_lent_to_a_job_on_another_device_or_host(served: Served) -> None:
    assert _lend(served, 1_000_000, device="GPU-1") == 0
    assert _lend(served, 1_000_000, hostname="elsewhere") == 0
    assert _lend(served, 1_000_000, hostname=None) == 1_000_000
    assert _lend(served, 0, 0) == 0


@pytest.mark.parametrize("body", [{}, {"num_bytes": -1}, {"num_bytes": "x"}])
def test_a_request_for_a_loan_that_is_none_is_refused(served: Served, body: dict[str, Any]) -> None:
    answer = served.client.post(LOANS_PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
