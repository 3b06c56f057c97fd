"""The recorder: what it keeps of a job's live events."""

import json
from typing import Any

import httpx2
import pytest

from examples import recorder as recorder_module
from examples.recorder import EventRecorder

EVENTS: list[tuple[float, dict[str, Any]]] = [
    (1.0, {"type": "message", "message": "Fine-tuning job started", "data": None}),
    (2.0, {"type": "message", "message": "Base", "data": {"base": {"valid_loss": 4.0}}}),
    (10.0, {"type": "metrics", "data": {"step": 1, "num_tokens": 1000, "train_loss": 3.0}}),
    (12.0, {"type": "metrics", "data": {"step": 2, "num_tokens": 300, "valid_loss": 0.9}}),
    (14.0, {"type": "metrics", "data": {"step": 3, "num_tokens": 500, "full_valid_loss": 0.25}}),
    (15.0, {"type": "message", "message": "The job has successfully completed", "data": {}}),
]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> EventRecorder:
    times = iter(moment for moment, _ in EVENTS)
    monkeypatch.setattr(recorder_module, "monotonic", lambda: next(times))
    body = "".join(f"id: {n}\ndata: {json.dumps(event)}\n\n" for n, (_, event) in enumerate(EVENTS, 1))
    transport = httpx2.MockTransport(
        lambda _request: httpx2.Response(
            200, headers={"content-type": "text/event-stream"}, content=f"{body}data: [DONE]\n\n"
        )
    )
    return EventRecorder("http://service/v1", "key", transport=transport)


def test_events_are_passed_on_unchanged_and_times_speed_and_the_bases_loss_are_kept(recorder):
    assert list(recorder.follow_events("ftjob-1")) == [event for _, event in EVENTS]
    assert (recorder.first_step_at, recorder.ended_at) == (10.0, 15.0)
    assert recorder.base_valid_loss == 4.0
    # 300 + 500 tokens between the events at 10 s and 14 s; when the first step began is unknown.
    assert recorder.tokens_per_second == 200.0
