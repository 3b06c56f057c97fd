"""What every peer's script shares: its order, the rows, the clock, the memory, the line it prints.

A script runs in an environment of its own as `python SCRIPT.py SPEC.json`; benchmarks/contestants.py
writes the order and reads the one JSON line. Keys of the order: base (folder), method, tuning (ours),
start (folder of the first adapter weights, or null), rows (.npz: tokens, supervised, offsets, already in
the order of our steps), batch_size, learning_rates (one a step), seed, num_threads, device, save_to (folder
or null), variant (see benchmarks/rows.py).
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "adapters", "llamafactory", "unsloth")


def status_bytes(field: str) -> int:
    """Return one line of /proc/self/status (proc(5)) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Run:
    """One training run of a peer; made right after the imports, whose memory it notes."""

    def __init__(self) -> None:
        self.order = json.loads(Path(sys.argv[1]).read_text())
        self.variant = self.order["variant"]
        self.imports_bytes = status_bytes("VmRSS")
        self.loaded_bytes = 0
        self.clock = Clock(self.order["learning_rates"], self.order["device"])
        self.num_tokens = self.num_supervised = self.num_padded = 0
        torch.set_num_threads(self.order["num_threads"])

    @property
    def dtype(self):
        """Type of the weights at rest; None leaves it to the library."""
        name = self.variant.get("weights")
        return None if name is None else getattr(torch, name)

    def attach_start(self, model):
        """Put our first adapter on the base, to be trained; a model without one is trained whole."""
        from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

        start = self.order["start"]
        if start is None:
            return model
        config = PeftConfig.from_pretrained(start)
        # Loading an adapter freezes it, and PEFT does not load virtual tokens to be trained.
        config.inference_mode = False
        model = get_peft_model(model, config, autocast_adapter_dtype=not self.variant.get("pure"))
        set_peft_model_state_dict(model, load_peft_weights(start, device="cpu"))
        if self.variant.get("pure"):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.dtype)
        return model

    def rows(self) -> list[dict[str, list[int]]]:
        """Return the rows as input_ids, attention_mask and labels (-100 where nothing is learnt)."""
        data = np.load(self.order["rows"])
        rows = []
        for begin, end in zip(data["offsets"][:-1], data["offsets"][1:], strict=True):
            tokens, supervised = data["tokens"][begin:end], data["supervised"][begin:end]
            labels = np.where(supervised, tokens, -100)
            rows.append(
                {
                    "input_ids": tokens.tolist(),
                    "attention_mask": [1] * len(tokens),
                    "labels": labels.tolist(),
                }
            )
        return rows

    def training_arguments(self, output_dir: str) -> dict:
        """Return what all tuned peers are given alike, in the words of transformers.TrainingArguments."""
        if self.variant.get("defaults"):
            return {
                "output_dir": output_dir,
                "per_device_train_batch_size": self.order["batch_size"],
                "num_train_epochs": 1,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "seed": self.order["seed"],
            }
        return {
            "output_dir": output_dir,
            "use_cpu": self.order["device"] == "cpu",
            "bf16": bool(self.variant.get("autocast")),
            "per_device_train_batch_size": 1 if self.variant.get("packing") else self.order["batch_size"],
            "num_train_epochs": 1,
            "learning_rate": max(self.order["learning_rates"]),
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": self.order["seed"],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def packed_length(self) -> int:
        """Return how long a packed row is: about the tokens of one of our steps."""
        offsets = np.load(self.order["rows"])["offsets"]
        lengths = np.diff(offsets)
        return max(int(lengths.max()), round(float(lengths.mean()) * self.order["batch_size"]))

    def prepare(self, trainer) -> None:
        """Count what the trainer is fed, keep our order where that is asked for; call before train()."""
        self.loaded_bytes = status_bytes("VmHWM")
        collate = trainer.data_collator

        def count(rows):
            batch = collate(rows)
            self.count(batch)
            return batch

        trainer.data_collator = count
        if self.variant.get("order") == "ours":
            trainer._get_train_sampler = lambda *_args, **_named: SequentialSampler(trainer.train_dataset)

    def count(self, batch) -> None:
        """Count a batch's real, padded and supervised tokens; a row's first token is never predicted."""
        self.num_padded += batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        if mask is None:
            self.num_tokens += batch["input_ids"].numel()
        elif mask.dim() == 4:
            # A block-diagonal mask to be added to scores: a real position sees itself, padding nothing.
            self.num_tokens += int((mask.diagonal(dim1=-2, dim2=-1) == 0).sum())
        else:
            self.num_tokens += int((mask > 0).sum())
        self.num_supervised += int((batch["labels"][:, 1:] != -100).sum())

    def report(self, losses: list[float]) -> None:
        """Print the run as one JSON line."""
        on_cuda = self.order["device"] == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_cuda else status_bytes("VmHWM") - self.imports_bytes
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        reported = {
            "seconds": self.clock.end - self.clock.begin,
            "losses": losses,
            "num_tokens": self.num_tokens,
            "num_padded_tokens": self.num_padded,
            "num_supervised_tokens": self.num_supervised,
            "memory_bytes": peak,
            "load_bytes": max(0, self.loaded_bytes - self.imports_bytes),
            "imports_bytes": self.imports_bytes,
            "versions": versions,
        }
        print(json.dumps(reported), flush=True)


class Clock(TrainerCallback):
    """Notes when the first step begins and the last one ends, and sets our rate at every step."""

    def __init__(self, learning_rates: list[float], device: str) -> None:
        self.begin = self.end = 0.0
        self.losses: list[float] = []
        self._learning_rates = learning_rates
        self._on_cuda = device == "cuda"

    def on_step_begin(self, _args, state, _control, optimizer=None, **_named) -> None:
        """Set the step's rate; note the first step's begin."""
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = self._learning_rates[min(state.global_step, len(self._learning_rates) - 1)]
        if state.global_step == 0:
            self._wait()
            self.begin = time.perf_counter()

    def on_step_end(self, _args, _state, _control, **_named) -> None:
        """Note every step's end; the last one stays."""
        self._wait()
        self.end = time.perf_counter()

    def on_log(self, _args, _state, _control, logs=None, **_named) -> None:
        """Keep the losses."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
