"""Loading a base from its folder: safetensors only, no remote code, no network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import safe_open

from luthier.core.errors import BaseUnavailableError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MAX_HEADER_BYTES = 100 * 1024**2
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_base(
    folder: Path, *, dtype: torch.dtype, device: str, refuse_extra: bool = False
) -> "PreTrainedModel":
    """Load a causal language model with every weight frozen.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        refuse_extra: also refuse tensors that the architecture has no place for.

    Returns:
        The model in evaluation mode.

    Raises:
        BaseUnavailableError: when the folder can't be read as a model, or lacks some of its tensors.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = class_of(config)
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=read_weights(folder, dtype),
            dtype=dtype,
            attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise BaseUnavailableError(
            f"The base in {folder.name!r} can't be loaded: {type(error).__name__}. Fetch it again."
        ) from error
    # What is missing was filled with random numbers.
    if found["missing_keys"] or (refuse_extra and found["unexpected_keys"]):
        raise BaseUnavailableError(
            f"The base in {folder.name!r} can't be loaded: its weights are not those of its architecture. "
            "Fetch it again."
        )
    _take_generation_settings(model, folder)
    return model.to(device).requires_grad_(False).eval()


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read all weights of a folder, each turned into a type as it comes.

    The library maps the files into memory, and what it has converted stays resident beside them until the
    end: three times the memory of bf16 weights from float32 files. Here one tensor at a time is read.

    Raises:
        OSError: when there is no such file or it can't be read.
        ValueError: when a header is none.
        EOFError: when a file ends too early.
    """
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in iterate_weights(folder)
    }


def iterate_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read all weights of a folder, one in memory at a time, in the type of the file.

    Raises:
        OSError: when there is no such file or it can't be read.
        ValueError: when a header is none.
        EOFError: when a file ends too early.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder.name} holds no safetensors file.")
    for path in files:
        yield from _read_file(path)


def read_weight(folder: Path, module: str) -> torch.Tensor:
    """Return the weight of one module of a model's files.

    Raises:
        KeyError: when they have none.
    """
    name = f"{module}.weight"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            if name in stored.keys():  # noqa: SIM118 - not a dict
                tensor: torch.Tensor = stored.get_tensor(name)
                return tensor
    raise KeyError(name)


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Read the start of a safetensors file: 8 bytes for the header's size, then the header as JSON.

    Returns:
        What it says of each tensor by name, and where in the file the numbers begin.

    Raises:
        ValueError: when it is no header.
    """
    size = int.from_bytes(stream.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError("This is no safetensors header.")
    header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError("This is no safetensors header.")
    header.pop("__metadata__", None)
    return header, 8 + size


def _read_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of one file, one at a time."""
    with path.open("rb") as stream:
        header, start = _read_header(stream)
        for name, facts in header.items():
            if facts["dtype"] not in _TYPES:
                raise ValueError(f"{path.name}: {name} is of type {facts['dtype']}, which is not read here.")
            tensor = torch.empty(facts["shape"], dtype=_TYPES[facts["dtype"]])
            begin, end = facts["data_offsets"]
            stream.seek(start + begin)
            if end - begin != tensor.nbytes:
                raise ValueError(f"{path.name}: {name} has another size than its shape says.")
            if stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy()) != tensor.nbytes:
                raise EOFError(f"{path.name} ends within {name}.")
            yield name, tensor


def class_of(config: "PretrainedConfig") -> Any:
    """Return the library's own class for a configuration; code that comes with a base is never run."""
    import transformers

    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"This version of transformers knows no architecture {names}.")
    return found


def _take_generation_settings(model: "PreTrainedModel", folder: Path) -> None:
    """Let a model know the folder that it came from and the generation settings there."""
    from transformers import GenerationConfig

    # The library finds the folder by both.
    model.name_or_path = model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
