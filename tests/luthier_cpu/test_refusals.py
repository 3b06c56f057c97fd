"""Without numba, on other processors and on a GPU the package refuses, and the core computes everything."""

import platform

import pytest

import luthier_cpu
from luthier_cpu.decode.runner import PackedProvider
from tests.tiny_methods import LLAMA, Bench, Case, train


def test_a_gpu_and_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CPU" in str(luthier_cpu.refusal("cuda"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "x86" in str(luthier_cpu.refusal("cpu"))


def test_without_numba_a_llama_is_trained_by_the_reference_path_and_not_packed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luthier_cpu, "find_spec", lambda _name: None)
    case = Case(LLAMA, {"type": "lora"})
    assert "numba" in str(PackedProvider().refusal(bench.load(LLAMA)))
    model = bench.job_model(case)
    assert model.path == "plain"
    losses = train(model, case, 3)
    assert losses[-1] < losses[0]
