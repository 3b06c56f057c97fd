"""Unsloth with TRL's SFTTrainer, by its own loader, checkpointing off. Needs a GPU. See _shared.py.

It attaches its own first adapter (B is zero there too), so losses agree in their course, not step by step.
"""

import tempfile

import unsloth  # isort: skip - it must come before transformers and trl
from _shared import Run
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train one epoch and report what it took."""
    run = Run()
    order = run.order
    tuning = order["tuning"]
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        order["base"], max_seq_length=8192, dtype=run.dtype, load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=tuning["rank"],
        lora_alpha=tuning["alpha"],
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
        random_state=order["seed"],
    )
    rows = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in run.rows()
    ]
    with tempfile.TemporaryDirectory() as out:
        arguments = run.training_arguments(out) | {"bf16": True}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments, max_length=8192, completion_only_loss=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[run.clock],
        )
        run.prepare(trainer)
        trainer.train()
        if order["save_to"]:
            trainer.save_model(order["save_to"])
    run.report(run.clock.losses)


main()
