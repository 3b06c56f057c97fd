"""What LoRA promises beyond what every method does, and what guards its fast path."""

from pathlib import Path

import pytest
import torch

from luthier.core.errors import InvalidValueError, SelfCheckError
from luthier.training.output.verification import check_artifact
from tests.tiny_methods import LLAMA, Bench, Case, batch

LORA = Case(LLAMA, {"type": "lora"})


def test_weights_that_are_no_numbers_are_refused_even_where_no_sample_meets_them(
    bench: Bench, tmp_path: Path
) -> None:
    job_model = bench.trained(LORA, 1)
    job_model.method.save(job_model.attached, tmp_path)
    with torch.no_grad():
        job_model.parameters[0][0, 0] = float("inf")
    with pytest.raises(SelfCheckError, match="weights are not all finite"):
        check_artifact(job_model, tmp_path, batch(1))


def test_the_start_depends_on_the_seed(bench: Bench) -> None:
    starts = [bench.attach(LORA, seed=seed)[1].named_trained_parameters()[0][1] for seed in (1, 2)]
    assert not torch.equal(*starts)


def test_a_rank_that_a_layer_cannot_hold_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidValueError, match="24") as caught:
        bench.attach(Case(LLAMA, {"type": "lora", "rank": 25}))
    assert caught.value.param == "tuning.rank"


@pytest.mark.parametrize("target_modules", [["nope"], "nope", ["lm_head"], ["embed_tokens"]])
def test_unknown_layers_are_refused_with_the_known(bench: Bench, target_modules: str | list[str]) -> None:
    with pytest.raises(InvalidValueError, match="q_proj") as caught:
        bench.attach(Case(LLAMA, {"type": "lora", "target_modules": target_modules}))
    assert caught.value.param == "tuning.target_modules"
