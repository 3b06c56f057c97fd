"""Devices: the split of their memory, and GPUs by an identity that holds in every container."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.core.devices import find_device
from luthier.core.settings import Settings


def _name(_gpu: Any, uuid: Any, length: ctypes.c_uint) -> int:
    assert length.value == len(uuid)
    uuid.value = b"GPU-5f0e"
    return 0


def _measure(_gpu: Any, memory: Any) -> int:
    memory._obj.total = 1000
    return 0


def test_a_gpu_is_known_by_its_uuid_not_by_a_number_that_each_container_gives_anew(monkeypatch):
    driver = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlShutdown=lambda: 0,
        nvmlDeviceGetHandleByIndex_v2=lambda index, _gpu: index.value,
        nvmlDeviceGetUUID=_name,
        nvmlDeviceGetMemoryInfo=_measure,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = find_device(Settings(_env_file=None))
    # A tenth is left to everything else.
    assert (found.name, found.training_bytes, found.serving_bytes) == ("GPU-5f0e", 450, 450)


@pytest.mark.parametrize(("share", "training", "serving"), [(0.5, 500, 500), (0.0, 1000, 0), (0.9, 100, 900)])
def test_a_setting_splits_the_memory_between_training_and_serving(share, training, serving):
    settings = Settings(_env_file=None, device="cpu", device_memory_bytes=1000, serving_memory_share=share)
    found = find_device(settings)
    assert (found.name, found.training_bytes, found.serving_bytes) == ("cpu", training, serving)
    assert found.total_bytes == 1000
