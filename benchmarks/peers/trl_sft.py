"""TRL's SFTTrainer over given token rows; runs in an environment of its own and prints one JSON line.

Usage: python trl_sft.py SPEC.json, where SPEC holds base, rows (.npz with tokens, supervised, offsets),
rank, alpha, learning_rate, batch_size, seed, num_threads, and variant: `grouped` (bf16 autocast, length
groups), `grouped-bf16` (the same with bf16 weights) or `packed` (bf16 autocast, best-fit packing).
"""

import json
import os
import sys
import tempfile
import time

SPEC = json.load(open(sys.argv[1]))  # noqa: SIM115, PTH123
os.environ["OMP_NUM_THREADS"] = str(SPEC["num_threads"])
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Notes when the first step begins and the last one ends."""

    begin = end = 0.0

    def on_step_begin(self, _args, state, _control, **_kwargs):
        """Note the first step's begin."""
        if state.global_step == 0:
            self.begin = time.perf_counter()

    def on_step_end(self, _args, _state, _control, **_kwargs):
        """Note every step's end; the last one stays."""
        self.end = time.perf_counter()


def main() -> None:
    """Train one epoch and print what it took."""
    torch.set_num_threads(SPEC["num_threads"])
    data = np.load(SPEC["rows"])
    rows = [
        {
            "input_ids": data["tokens"][a:b].tolist(),
            "completion_mask": data["supervised"][a:b].astype(int).tolist(),
        }
        for a, b in zip(data["offsets"][:-1], data["offsets"][1:], strict=True)
    ]
    variant = SPEC["variant"]
    dtype = torch.bfloat16 if variant == "grouped-bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(SPEC["base"], dtype=dtype)
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            use_cpu=True,
            bf16=True,
            per_device_train_batch_size=SPEC["batch_size"],
            num_train_epochs=1,
            learning_rate=SPEC["learning_rate"],
            warmup_steps=1,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            max_length=1024,
            packing=variant == "packed",
            train_sampling_strategy="random" if variant == "packed" else "group_by_length",
            completion_only_loss=True,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=SPEC["seed"],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        lora = LoraConfig(
            r=SPEC["rank"],
            lora_alpha=SPEC["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        clock = Clock()
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(SPEC["base"]),
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "seconds": clock.end - clock.begin,
                "num_steps": len(losses),
                "first_loss": losses[0],
                "mean_loss": sum(losses) / len(losses),
                "peak_memory_bytes": int(
                    next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]  # noqa: PTH123, SIM115
                )
                * 1024,
            }
        )
    )


main()
