"""The type of served weights: on a CPU bfloat16 where the base's products are faster in it, else float32.

Never the weights themselves: products of the base's shapes with other numbers are timed.

Legend: N sequences, K inputs and O outputs of a product.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoConfig

from luthier.bases.catalogue import base_folder
from luthier.core.settings import MIB, Settings
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts
from luthier.modeling.load import class_of
from luthier.modeling.packed_linear import PackedLinear
from luthier.modeling.packed_llama import can_pack_llama
from luthier.storage.manifests import write_file_atomically

_LOG = logging.getLogger(__name__)

TYPES = (torch.float32, torch.bfloat16)
_NUM_SEQUENCES = (1, 16)
# Float32 weights that are timed: more than a processor's caches hold, and no whole base.
_MAX_BYTES = 256 * MIB
_NUM_RUNS = 5

_Product = Callable[[torch.Tensor], torch.Tensor]


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name as settings and answers have it: float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def find_dtype(settings: Settings, facts: BaseFacts, device: str) -> torch.dtype | None:
    """Return the type to serve a base in, None where its products are still to be timed here."""
    if settings.inference_dtype != "auto":
        return torch.bfloat16 if settings.inference_dtype == "bfloat16" else torch.float32
    if device != "cpu":
        # Older GPUs emulate it, many times slower.
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_it else torch.float32
    kept = _read_kept(_kept_path(settings, facts)).get(_key_of(facts))
    return next((one for one in TYPES if name_of(one) == kept), None)


def choose_dtype(settings: Settings, facts: BaseFacts, device: str) -> torch.dtype:
    """Return the type to serve a base in; the first time on a kind of processor its products are timed.

    Takes a second or so then; only the thread that loads weights may call it.
    """
    found = find_dtype(settings, facts, device)
    if found is not None:
        return found
    folder = base_folder(settings.bases_dir, facts.id)
    float32, bfloat16 = _time_products(folder, is_packed=_is_packed(folder))
    shares = [fast / slow for fast, slow in zip(bfloat16, float32, strict=True)]
    found = torch.bfloat16 if max(shares) < 1 else torch.float32
    _LOG.info(
        "%s is served in %s: in bfloat16 its products take %.2f times as long as in float32 for 1 sequence, "
        "%.2f times for 16.",
        facts.id,
        name_of(found),
        *shares,
    )
    _keep(_kept_path(settings, facts), _key_of(facts), name_of(found))
    return found


def _is_packed(folder: Path) -> bool:
    """Whether a base will be served packed, told without its weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return can_pack_llama(class_of(config)(config))


def _time_products(folder: Path, *, is_packed: bool) -> list[list[float]]:
    """Return the seconds of some layers' products, of each type for each number of sequences."""
    shapes, num_bytes = [], 0
    for shape in read_shape(folder).linear_shapes.values():
        shapes.append(shape)
        num_bytes += shape[0] * shape[1] * torch.float32.itemsize
        if num_bytes >= _MAX_BYTES:
            break
    made = [[_product(shape, dtype, is_packed=is_packed) for shape in shapes] for dtype in TYPES]
    inputs = [
        [[torch.ones(count, shape[0], dtype=dtype) for shape in shapes] for count in _NUM_SEQUENCES]
        for dtype in TYPES
    ]
    best = [[float("inf")] * len(_NUM_SEQUENCES) for _ in TYPES]
    with torch.inference_mode():
        for _ in range(_NUM_RUNS):
            # In turn, so that what else the machine does meanwhile falls on both.
            for place, products in enumerate(made):
                for number, own in enumerate(inputs[place]):
                    best[place][number] = min(best[place][number], _seconds(products, own))
    return best


def _product(shape: tuple[int, int], dtype: torch.dtype, *, is_packed: bool) -> _Product:
    weight_OK = torch.ones(shape[1], shape[0], dtype=dtype)
    if is_packed:
        return PackedLinear(weight_OK)
    return lambda x_NK: functional.linear(x_NK, weight_OK)


def _seconds(products: list[_Product], inputs: list[torch.Tensor]) -> float:
    started_at = time.perf_counter()
    for product, x_NK in zip(products, inputs, strict=True):
        product(x_NK)
    return time.perf_counter() - started_at


def _kept_path(settings: Settings, facts: BaseFacts) -> Path:
    """Return the file beside a base that keeps what was found for it, by processor."""
    return settings.bases_dir / f".{facts.id}.weight-types.json"


def _key_of(facts: BaseFacts) -> str:
    """Return what the answer depends on: the base, the processor, the library."""
    names = (line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name"))
    return f"{facts.digest} {next(names, 'unknown processor')} torch {torch.__version__}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _read_kept(path: Path) -> dict[str, str]:
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(path: Path, key: str, name: str) -> None:
    try:
        write_file_atomically(path, json.dumps(_read_kept(path) | {key: name}, indent=1).encode())
    except OSError as error:
        _LOG.info("What was timed is not kept and is timed at every start: %s.", error)
