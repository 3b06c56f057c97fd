"""A device that is not the CPU, for tests of what only shows on an accelerator: launches and blocking reads.

Its tensors compute on the CPU and say that they are elsewhere. What takes the CPU's branch by `device.type`
takes the other here, what mixes devices raises, and kernels and blocking reads are counted. Registering it
changes torch for good, so only processes of its own import it.
"""

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
# Its tensors are made in Python, which inference mode does not allow.
torch.inference_mode = torch.no_grad
torch.__future__.set_overwrite_module_params_on_conversion(True)

KERNELS: collections.Counter[str] = collections.Counter()
READS: collections.Counter[str] = collections.Counter()

_NO_KERNEL = {
    *("view", "t", "transpose", "slice", "select", "expand", "detach", "alias", "unsqueeze", "squeeze"),
    *("split", "split_with_sizes", "permute", "unbind", "as_strided", "_unsafe_view"),
    *("empty", "new_empty", "empty_like"),
}
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
# Copies between devices, and indices that torch moves itself.
_MAY_MIX = {"copy_", "_to_copy"}


class PretendTensor(torch.Tensor):
    """A tensor on the device; `held` is its CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            dtype=held.dtype,
            storage_offset=held.storage_offset(),
            device=DEVICE,
        )
        made.held = held.detach()
        return made

    def tolist(self) -> Any:
        """Count a read of the whole."""
        READS["tolist"] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Counts, and makes tensors on the device where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FusedAttention(TorchFunctionMode):
    """Scaled dot product attention is one kernel, as it is on accelerators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], PretendTensor):
            KERNELS["attention"] += 1
            return PretendTensor(func(*_held(args), **_held(kwargs or {})))
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> tuple[int, int]:
    """Return how many kernels and blocking reads something takes; both modes must be on."""
    KERNELS.clear()
    READS.clear()
    run()
    return KERNELS.total(), READS.total()


def _held(values: Any) -> Any:
    return tree_map_only(PretendTensor, lambda one: one.held, values)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    ours = [one for one in tensors if isinstance(one, PretendTensor)]
    asked = kwargs.get("device")
    is_ours = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if ours and (name in _READS or not is_ours or _indexes_by_mask(name, args)):
        READS[name] += 1
    if (
        ours
        and name not in _MAY_MIX
        and any(one.dim() for one in tensors if not isinstance(one, PretendTensor))
    ):
        raise RuntimeError(f"{name} mixes devices.")
    if (ours or is_ours) and name not in _NO_KERNEL:
        KERNELS[name] += 1
    if asked is not None and is_ours:
        kwargs = {**kwargs, "device": "cpu"}
    found = func(*_held(args), **_held(kwargs))
    written = [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    returns = func._schema.returns
    if written and returns and all(one.alias_info is not None and one.alias_info.is_write for one in returns):
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map_only(torch.Tensor, PretendTensor, found) if is_ours and returns else found


def _indexes_by_mask(name: str, args: Any) -> bool:
    if name not in {"index", "index_put_"}:
        return False
    return any(one is not None and one.dtype == torch.bool for one in args[1])
