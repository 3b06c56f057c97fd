"""The `adapters` library's AdapterTrainer: bottleneck layers in every block. See _shared.py.

Its `double_seq_bn` is the placement of Houlsby et al. 2019: one bottleneck after attention, one after the
feed-forward. It draws its own first weights, so losses agree with ours in their course, not step by step.
"""

import tempfile

import adapters
import torch
from _shared import Run
from adapters import AdapterTrainer, DoubleSeqBnConfig, SeqBnConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    TrainingArguments,
)


def main() -> None:
    """Train one epoch and report what it took."""
    run = Run()
    order, variant = run.order, run.variant
    tuning = order["tuning"]
    config = AutoConfig.from_pretrained(order["base"])
    # Its transformers is older than the name under which the base keeps its rotary base.
    config.rope_theta = config.rope_parameters["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(order["base"], config=config, dtype=run.dtype)
    if order["device"] == "cuda":
        model.to("cuda")
    torch.manual_seed(order["seed"])
    adapters.init(model)
    kinds = {"houlsby": DoubleSeqBnConfig, "pfeiffer": SeqBnConfig}
    config = kinds[tuning["placement"]](
        reduction_factor=model.config.hidden_size / tuning["bottleneck_dim"],
        non_linearity=tuning["activation"],
        dropout=tuning["dropout"],
    )
    model.add_adapter("bench", config=config)
    model.train_adapter("bench")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "adapter_up" in name:
                # As ours: the start equals the base.
                torch.nn.init.zeros_(parameter)
            parameter.data = parameter.data.to(torch.bfloat16 if variant.get("pure") else torch.float32)
    # Its transformers is too old for the tokenizer class that the base names.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{order['base']}/tokenizer.json")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    with tempfile.TemporaryDirectory() as out:
        trainer = AdapterTrainer(
            model=model,
            args=TrainingArguments(**run.training_arguments(out)),
            train_dataset=run.rows(),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[run.clock],
        )
        run.prepare(trainer)
        trainer.train()
        if order["save_to"]:
            model.save_adapter(order["save_to"], "bench")
    run.report(run.clock.losses)


main()
