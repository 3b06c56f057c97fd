"""Random PEFT artifacts on the tiny base, sealed as training seals them, and PEFT's own view of them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.specs import BaseFacts
from luthier.modeling.load import load_base
from luthier.storage.manifests import Manifest, seal_folder


def load_plain(base_folder: Path) -> Any:
    """Return the base as transformers loads it, never wrapped."""
    return load_base(base_folder, dtype=torch.float32, device="cpu")


def build_artifact(folder: Path, base_folder: Path, *, seed: int, scale: float = 0.3) -> Manifest:
    """Write a LoRA artifact with random weights; `scale` 0 makes one that changes nothing."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.1
    )
    model = get_peft_model(load_plain(base_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=1.0).mul_(scale)
    building = folder.with_name(f".{folder.name}.building")
    model.save_pretrained(building, save_embedding_layers=False)
    facts = BaseFacts.model_validate_json((base_folder / FACTS_NAME).read_bytes())
    return seal_folder(
        building,
        folder,
        digested=["adapter_model.safetensors", "adapter_config.json"],
        base_digest=facts.digest,
    )


def load_reference(base_folder: Path, artifact: Path) -> Any:
    """Return a base of its own with one artifact, as a user of PEFT would load it."""
    return PeftModel.from_pretrained(load_plain(base_folder), str(artifact)).eval()


def greedy(model: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Return what `generate` answers without sampling."""
    ids_1T = torch.tensor([prompt_ids])
    with torch.inference_mode():
        answer_1T = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    answer: list[int] = answer_1T[0, len(prompt_ids) :].tolist()
    return answer
