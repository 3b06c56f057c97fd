"""A weights file in memory has the tensors that its own library reads; what is no such file is told."""

import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError
from luthier.inference import mapped_file
from luthier.inference.mapped_file import map_file
from luthier.inference.weights_file import tensors_of


def write(path: Path, header: object, numbers: bytes, *, length: int | None = None) -> Path:
    held = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(held) if length is None else length).to_bytes(8, "little") + held + numbers)
    return path


def test_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    path, generator = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    expected = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(2, 1, 3, generator=generator).half(),
        "nothing": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
    }
    save_file(expected, path, metadata={"format": "pt"})
    found, again = tensors_of(map_file(path)), load_file(path)
    assert found.keys() == expected.keys() == again.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_numbers_that_begin_anywhere_are_read(tmp_path: Path) -> None:
    numbers = torch.arange(4.0)
    for begin in range(5):
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [begin, begin + 16]}
        content = b"\0" * begin + numbers.numpy().tobytes()
        path = write(tmp_path / str(begin), {"a": entry}, content)
        assert torch.equal(tensors_of(map_file(path))["a"], numbers)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]},
        {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        [1],
    ],
)
def test_a_tensor_that_is_not_in_the_file_is_refused(tmp_path: Path, entry: object) -> None:
    path = write(tmp_path / "a", {"a": entry}, b"\0" * 16)
    with pytest.raises(ArtifactCorruptError, match="no safetensors file"):
        tensors_of(map_file(path))


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    given = ((b"{", None), ([], None), ({}, 1 << 40), (b"\xff\xfe", None), (deep, None))
    for number, (header, length) in enumerate(given):
        path = write(tmp_path / str(number), header, b"", length=length)
        with pytest.raises(ArtifactCorruptError, match="no safetensors file"):
            tensors_of(map_file(path))
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(ArtifactCorruptError, match="no safetensors file"):
        tensors_of(map_file(tmp_path / "short"))
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(ArtifactCorruptError, match=f"{name} can't be read"):
            map_file(tmp_path / name)


def test_a_file_that_is_cut_short_while_it_is_mapped_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever read it there would be ended by the system."""
    path, map_whole = tmp_path / "a", mmap.mmap
    path.write_bytes(b"a" * 100_000)

    def cut(*arguments: Any, **options: Any) -> mmap.mmap:
        mapped = map_whole(*arguments, **options)
        os.truncate(path, 10)
        return mapped

    monkeypatch.setattr(mapped_file.mmap, "mmap", cut)
    with pytest.raises(ArtifactCorruptError, match="can't be read"):
        map_file(path)
