"""LLaMA-Factory's own trainer by its own entry point (run_exp), on given token rows. See _shared.py.

It takes rows that are tokenised already by `tokenized_path`; for neat packing they are joined here the
way its own PackedSupervisedDatasetProcessor does it: rows to a fixed length, a number per row in the mask.
Its `pure_bf16` asks for a GPU, so on a CPU it has bf16 weights with float32 adapters under autocast.
"""

import tempfile
from pathlib import Path

import llamafactory.data
from _shared import Run, status_bytes
from datasets import Dataset
from llamafactory.data import SFTDataCollatorWith4DAttentionMask
from llamafactory.train.tuner import run_exp
from transformers import AutoTokenizer, TrainerCallback


class LoadedMark(TrainerCallback):
    """Notes the memory once the model is there."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_train_begin(self, *_args, **_named) -> None:
        """Note it."""
        self._run.loaded_bytes = status_bytes("VmHWM")


def pack(rows: list[dict], length: int, pad_id: int) -> list[dict]:
    """Lay rows together, in their order, into rows of a fixed length and one more place."""
    packs: list[list[dict]] = []
    filled = length + 1
    for row in rows:
        if filled + len(row["input_ids"]) > length:
            packs.append([])
            filled = 0
        packs[-1].append(row)
        filled += len(row["input_ids"])
    packed = []
    for members in packs:
        one = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
        for number, row in enumerate(members, start=1):
            size = len(row["input_ids"])
            one["input_ids"] += row["input_ids"]
            one["attention_mask"] += [number] * size
            one["position_ids"] += range(size)
            # A row's first token must not be predicted from the row before it.
            one["labels"] += [-100, *row["labels"][1:]]
        missing = length + 1 - len(one["input_ids"])
        one["input_ids"] += [pad_id] * missing
        one["attention_mask"] += [0] * missing
        one["position_ids"] += [0] * missing
        one["labels"] += [-100] * missing
        packed.append(one)
    return packed


def main() -> None:
    """Train one epoch and report what it took."""
    run = Run()
    order, variant = run.order, run.variant
    tuning = order["tuning"]
    # With its one more place a multiple of 8, or its collator pads the rows and not their positions.
    packed_length = -(-(run.packed_length() + 1) // 8) * 8 - 1
    collate = SFTDataCollatorWith4DAttentionMask.__call__

    def count(collator, features):
        batch = collate(collator, features)
        run.count(batch)
        return batch

    SFTDataCollatorWith4DAttentionMask.__call__ = count
    assert llamafactory.data.SFTDataCollatorWith4DAttentionMask.__call__ is count
    with tempfile.TemporaryDirectory() as out:
        rows = run.rows()
        if variant.get("packing"):
            pad_id = AutoTokenizer.from_pretrained(order["base"]).pad_token_id
            rows = pack(rows, packed_length, pad_id)
        Dataset.from_list(rows).save_to_disk(str(Path(out) / "rows"))
        run_exp(
            {
                **run.training_arguments(order["save_to"] or str(Path(out) / "adapter")),
                "stage": "sft",
                "do_train": True,
                "finetuning_type": "lora",
                "model_name_or_path": order["base"],
                "adapter_name_or_path": order["start"],
                "lora_rank": tuning["rank"],
                "lora_alpha": int(tuning["alpha"]),
                "lora_target": "all",
                "template": "empty",
                # A name is asked for; with a tokenized_path it is not read.
                "dataset": "rows",
                "tokenized_path": str(Path(out) / "rows"),
                "neat_packing": bool(variant.get("packing")),
                "cutoff_len": packed_length if variant.get("packing") else 8192,
                "disable_shuffling": True,
                "disable_gradient_checkpointing": True,
                "flash_attn": "sdpa",
                "overwrite_cache": True,
            },
            callbacks=[run.clock, LoadedMark(run)],
        )
    run.report(run.clock.losses)


main()
