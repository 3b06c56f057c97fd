"""The pieces of a calibration: cut copies of a base, batches of random tokens, seconds and bytes of a run.

Legend: B rows, T tokens.
"""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.allocator import give_back_freed_memory
from luthier.core.estimates import MethodCost
from luthier.core.pricing import Part
from luthier.core.shapes import BaseShape
from luthier.methods import Attached, Method, Start
from luthier.training.batches import Batch
from luthier.training.device import peak_memory_bytes
from luthier.training.loss import full_logits_loss, head_loss
from luthier.training.trainee import Trainee

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESET_PEAK = "5"


def cut_base(causal_lm: "PreTrainedModel", num_layers: int) -> "PreTrainedModel":
    """Build a base of the first layers alone, over the same memory.

    Args:
        num_layers: layers of the copy, at most as many as it has.

    Returns:
        The copy, frozen, in evaluation mode; what is attached to it leaves the base as it is.
    """
    config = copy.deepcopy(causal_lm.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:num_layers]
    with torch.device("meta"):
        cut: PreTrainedModel = type(causal_lm)(config)
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    buffers = dict(causal_lm.named_buffers(remove_duplicate=False))
    # Weights of two names are one parameter here as there.
    own = {id(one): torch.nn.Parameter(one.detach(), requires_grad=False) for one in parameters.values()}
    for name, _ in list(cut.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        setattr(cut.get_submodule(owner), attribute, own[id(parameters[name])])
    for name, _ in list(cut.named_buffers(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        cut.get_submodule(owner)._buffers[attribute] = buffers[name]
    return cut.eval()


def cut_shape(shape: BaseShape, causal_lm: "PreTrainedModel") -> BaseShape:
    """Return the shape of a cut copy, for a method's own count of what it trains there."""
    names = {name for name, _ in causal_lm.named_parameters(remove_duplicate=False)}
    weights = {name: weight for name, weight in shape.weights.items() if name in names}
    num_layers = causal_lm.config.get_text_config().num_hidden_layers
    return BaseShape(
        num_layers=num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        vocabulary_size=shape.vocabulary_size,
        is_transposed=shape.is_transposed,
        weights=weights,
    )


def random_batch(num_rows: int, num_tokens: int, num_supervised: int, vocabulary_size: int) -> Batch:
    """Return rows of random tokens.

    Args:
        num_supervised: supervised tokens of each row, at its end.

    Returns:
        The batch, the same every time.
    """
    generator = torch.Generator().manual_seed(0)
    token_ids_BT = torch.randint(vocabulary_size, (num_rows, num_tokens), generator=generator)
    supervised_BT = torch.zeros((num_rows, num_tokens), dtype=torch.bool)
    supervised_BT[:, num_tokens - num_supervised :] = True
    return Batch(token_ids_BT, supervised_BT, num_rows * num_tokens)


class Cut:
    """A method on a cut copy, ready to train.

    Args:
        shape: of the whole base.
        device: where it lies.
    """

    def __init__(
        self,
        causal_lm: "PreTrainedModel",
        method: Method,
        params: Any,
        *,
        start: Start,
        shape: BaseShape,
        device: str,
        sample: Batch,
    ) -> None:
        self.num_layers: int = causal_lm.config.get_text_config().num_hidden_layers
        self._device = device
        # What is attached renames the layers.
        self.cost: MethodCost = method.cost(params, cut_shape(shape, causal_lm))
        before = begin_peak(device)
        began = time.perf_counter()
        self.attached: Attached = method.attach(causal_lm, params, start)
        self.trainee = Trainee(method, self.attached, device, sample)
        synchronise(device)
        self.attach_seconds = time.perf_counter() - began
        # Copies that the fast path makes; a real base lets go of what was copied, and it is given back.
        self.attached_bytes = max(0, begin_peak(device) - before)
        self.attached.model.train()

    @property
    def trains_head(self) -> bool:
        """Whether the output layer is trained."""
        head = self.attached.causal_lm.get_output_embeddings()
        return head is not None and bool(head.weight.requires_grad)

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens that run, virtual ones too."""
        num_rows, longest = batch.token_ids_BT.shape
        return Part(num_rows, longest, 0).num_tokens(self.trainee.path, self.cost.num_virtual_tokens)

    def seconds(self, batch: Batch, *, is_first_part: bool = True) -> float:
        """Return what a part of a step takes up to the output layer: forwards, and backwards from there."""
        if is_first_part:
            self.trainee.clear_gradients()
        return seconds_of(lambda: self._run(batch), self._device)

    def kept_bytes(self, batch: Batch) -> int:
        """Run a part and return the bytes that its forward pass kept for the backward one."""
        self.trainee.clear_gradients()
        own = {one.untyped_storage().data_ptr() for one in self.attached.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._run(batch)
        return sum(kept.values())

    def peak_bytes(self, batch: Batch) -> int:
        """Return how much more memory a part has in use at most than there was before it."""
        self.trainee.clear_gradients()
        before = begin_peak(self._device)
        self._run(batch)
        synchronise(self._device)
        return peak_memory_bytes(self._device) - before

    @torch.no_grad()
    def scoring_seconds(self, batch: Batch, *, on_plain_path: bool = False) -> float:
        """Return what a pass without gradients takes, up to the output layer."""
        trainee, token_ids_BT = self.trainee, batch.token_ids_BT.to(self._device)
        self.attached.model.eval()
        run = trainee.method.hidden_states if on_plain_path else None
        found = seconds_of(
            lambda: run(self.attached, token_ids_BT) if run else trainee.hidden_states(token_ids_BT),
            self._device,
        )
        self.attached.model.train()
        return found

    def head_seconds(self, num_tokens: int, *, is_scoring: bool = False) -> float:
        """Return what the output layer takes for some supervised tokens, with its gradients or without."""
        head = self.attached.causal_lm.get_output_embeddings()
        weight = head.weight
        hidden_ND = torch.zeros(num_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
        targets_N = torch.zeros(num_tokens, dtype=torch.int64, device=weight.device)
        is_plain = self.trainee.has_plain_head

        def run() -> None:
            leaf_ND = hidden_ND.detach().requires_grad_(not is_scoring)
            with torch.set_grad_enabled(not is_scoring):
                loss = (
                    head_loss(leaf_ND, weight, targets_N)
                    if is_plain
                    else full_logits_loss(head(leaf_ND), targets_N)
                )
                if not is_scoring:
                    self.trainee.add_gradients(loss.nll_sum)

        self.trainee.clear_gradients()
        return seconds_of(run, self._device)

    def embedding_seconds(self, batch: Batch) -> float:
        """Return what the gradient of the input embeddings takes, which are as large as the output layer."""
        embed = self.attached.causal_lm.get_input_embeddings()
        if not embed.weight.requires_grad:
            return 0.0
        self.trainee.clear_gradients()
        return seconds_of(
            lambda: self.trainee.add_gradients(embed(batch.token_ids_BT.to(self._device)).sum()), self._device
        )

    def _run(self, batch: Batch) -> None:
        hidden_BTD = self.trainee.hidden_states(batch.token_ids_BT.to(self._device))
        self.trainee.add_gradients(hidden_BTD.sum())


def seconds_of(act: Callable[[], object], device: str) -> float:
    """Return the seconds that something takes on a device."""
    synchronise(device)
    began = time.perf_counter()
    act()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: str) -> None:
    """Wait for a device to have done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def begin_peak(device: str) -> int:
    """Begin to measure a peak of memory anew; return what is in use now.

    On a CPU, memory that was freed is given back first: what comes then is new again.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return resident_bytes(device)


def resident_bytes(device: str) -> int:
    """Return the memory in use now: the device's on CUDA, this process's resident set on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def has_compiled() -> bool:
    """Whether kernels were compiled in this process, in place of being read from the disk."""
    module = sys.modules.get("luthier.modeling.kernels._compiled")
    stats = [getattr(one, "stats", None) for one in vars(module).values()] if module else []
    return any(sum(getattr(one, "cache_misses", {}).values()) for one in stats if one is not None)
