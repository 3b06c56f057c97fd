"""TRL's SFTTrainer on given token rows and a given first adapter. See _shared.py.

Variants: weights, autocast, packing (best-fit packing into rows of about one step's tokens), loss (`nll`,
which in 1.16 is computed in chunks without whole logits, or `dft`, another objective).
"""

import tempfile

from _shared import Run
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train one epoch and report what it took."""
    run = Run()
    order, variant = run.order, run.variant
    model = AutoModelForCausalLM.from_pretrained(order["base"], dtype=run.dtype)
    if order["device"] == "cuda":
        model.to("cuda")
    model = run.attach_start(model)
    is_packed = bool(variant.get("packing"))
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            **run.training_arguments(out),
            max_length=run.packed_length() if is_packed else 8192,
            packing=is_packed,
            completion_only_loss=True,
            loss_type=variant.get("loss", "nll"),
        )
        rows = [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [int(label != -100) for label in row["labels"]],
            }
            for row in run.rows()
        ]
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(order["base"]),
            callbacks=[run.clock],
        )
        run.prepare(trainer)
        trainer.train()
        if order["save_to"]:
            trainer.save_model(order["save_to"])
    run.report(run.clock.losses)


main()
