"""Pinned models of one project leave memory for those of others, in an inference server's own process."""

from pathlib import Path

import torch

from luthier.core.inference import ModelTarget
from luthier.inference.models.loading import measure_weights
from tests.inference_server import COMPLETIONS
from tests.integration.inference.test_inference_process import served_process


def test_one_project_s_pinned_models_leave_room_for_another_project_s_model(
    folder: Path, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    room = measure_weights(artifacts[0][1], torch.float32) * 5 // 2
    limits = {"LUTHIER_INFERENCE_MAX_ADAPTERS_BYTES": str(room), "LUTHIER_MAX_PINNED_SHARE": "0.5"}
    with served_process(folder, "pins.sock", **limits) as client:

        def ask(target: ModelTarget) -> int:
            body = {"model": "m", "prompt": "a", "max_tokens": 1}
            return client.post(COMPLETIONS, json=body, headers=target.to_headers()).status_code

        first, second, third = (target for target, _ in artifacts)
        pinned = [target.model_copy(update={"is_pinned": True}) for target in (first, second)]
        assert [ask(target) for target in pinned] == [200, 200]
        assert ask(third.model_copy(update={"project_id": "proj_2"})) == 200
        state = client.get("/internal/state").json()
        # The first is within the share, and stays.
        assert state["digests"] == [first.digest, third.digest]
        assert state["room"]["packed"] == room
