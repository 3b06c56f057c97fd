"""transformers' Trainer with PEFT (lora, prefix, prompt) or alone (full). See _shared.py.

The variant `defaults` is what a user gets who names only batch size, epochs and rate: float32 as the base is
stored, rows in random order padded to the longest of each batch.
"""

import tempfile

from _shared import Run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    """Train one epoch and report what it took."""
    run = Run()
    order = run.order
    types = {} if run.dtype is None else {"dtype": run.dtype}
    model = AutoModelForCausalLM.from_pretrained(order["base"], **types)
    if order["device"] == "cuda":
        model.to("cuda")
    model = run.attach_start(model)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**run.training_arguments(out)),
            train_dataset=run.rows(),
            data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(order["base"])),
            callbacks=[run.clock],
        )
        run.prepare(trainer)
        trainer.train()
        if order["save_to"]:
            trainer.save_model(order["save_to"])
    run.report(run.clock.losses)


main()
