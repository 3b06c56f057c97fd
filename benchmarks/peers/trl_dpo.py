"""TRL's DPOTrainer on given pairs of token rows and a given first adapter, or the whole base. See _shared.py.

The rows come two a pair, the preferred one first, with one prompt; batch_size counts pairs. Variants:
weights, beta.
"""

import tempfile

from _shared import Run
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class _AsGiven(DPOTrainer):
    """Takes tokens as they come, in their order."""

    def _prepare_dataset(self, dataset, *_args, **_named):
        return dataset

    def _get_train_sampler(self, *_args, **_named):
        return SequentialSampler(self.train_dataset)


def main() -> None:
    """Train one epoch and report its losses."""
    run = Run()
    order = run.order
    model, reference = _load(run), None
    if order["start"] is None:
        # With an adapter the reference is the base under it.
        reference = _load(run)
    model = run.attach_start(model)
    with tempfile.TemporaryDirectory() as out:
        arguments = run.training_arguments(out) | {"per_device_train_batch_size": order["batch_size"]}
        trainer = _AsGiven(
            model=model,
            ref_model=reference,
            args=DPOConfig(**arguments, beta=run.variant["beta"], max_length=None),
            train_dataset=Dataset.from_list(_pairs(run)),
            processing_class=AutoTokenizer.from_pretrained(order["base"]),
            callbacks=[run.clock],
        )
        trainer.train()
    run.report(run.clock.losses)


def _load(run: Run):
    return AutoModelForCausalLM.from_pretrained(run.order["base"], dtype=run.dtype)


def _pairs(run: Run) -> list[dict[str, list[int]]]:
    """Return the pairs in TRL's words, cut after the last supervised token: TRL would learn what follows."""
    rows = []
    for row in run.rows():
        learnt = [place for place, label in enumerate(row["labels"]) if label != -100]
        rows.append((row["input_ids"][: learnt[0]], row["input_ids"][learnt[0] : learnt[-1] + 1]))
        run.num_tokens += len(row["input_ids"])
        run.num_supervised += len(learnt)
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(rows[0::2], rows[1::2], strict=True)
    ]


main()
