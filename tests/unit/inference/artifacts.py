"""Random artifacts of every method on the tiny base, sealed as training seals them; and references."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.specs import BaseFacts
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.models.base_models import LoadedBase
from luthier.inference.runners.registry import choose_runner
from luthier.methods import Attached, Method, Start, Workload, discover, method_of_artifact
from luthier.methods._tuning import parse_tuning
from luthier.modeling.load import load_base
from luthier.modeling.protocols import Budget, LoadedWeights
from luthier.storage.manifests import Manifest, read_manifest, seal_folder
from luthier_cpu.decode.runner import PackedProvider
from tests.tiny_shapes import facts_of

PROBE_IDS = [5, 6, 7]
BUDGET = Budget(max_cache_tokens=256, max_sequences=4)
WEIGHTS_NAME = "adapter_model.safetensors"

# What the tests ask of each method; one that is not here is asked for nothing special.
TUNINGS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rank": 4}, {"rank": 2, "use_dora": True}, {"rank": 3, "use_rslora": True}],
    "prefix": [{"num_virtual_tokens": 5, "init": "random"}],
    "prompt": [{"num_virtual_tokens": 3, "init": "random"}],
    "adapter": [{"bottleneck_dim": 8, "placement": place} for place in ("houlsby", "pfeiffer", "parallel")],
}


@dataclass(frozen=True)
class Artifact:
    """A sealed artifact on this disk."""

    digest: str
    folder: Path


def all_tunings() -> list[dict[str, Any]]:
    """Return `tuning` objects of every method there is."""
    return [{"type": name, **tuning} for name in discover() for tuning in TUNINGS.get(name, [{}])]


def tuning_name(tuning: dict[str, Any]) -> str:
    """Return a short name for a test's id."""
    return "-".join(str(value) for value in tuning.values())


def add_noise(attached: Attached, *, seed: int, scale: float) -> None:
    """Change all that is trained, as a few updates would, by noise that is small beside it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in attached.named_trained_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale * parameter.std(correction=0).clamp_min(0.1))


def build_method_artifact(
    folder: Path,
    base_folder: Path,
    tuning: dict[str, Any],
    *,
    seed: int,
    scale: float = 0.2,
    on: Artifact | None = None,
) -> Artifact:
    """Write an artifact of any method as its own `save` does, with random noise on all that is trained.

    It is for the base, or for a full model of it.
    """
    facts = BaseFacts.model_validate_json((base_folder / FACTS_NAME).read_bytes())
    method, params = parse_tuning(tuning)
    tokenizer = Tokenizer.load(base_folder)
    start = Start(seed=seed, base_id=facts.id, tokenize=tokenizer.encode, examples=[list(range(5, 30))] * 4)
    resolved = method.resolve(params, Workload(base=facts, num_rows=100, num_tokens=3000))
    attached = method.attach(load_plain(base_folder if on is None else on.folder), resolved, start)
    add_noise(attached, seed=seed, scale=scale)
    building = folder.with_name(f".{folder.name}.building")
    building.mkdir(parents=True)
    names = method.save(attached, building)
    digest = facts.digest if on is None else on.digest
    manifest = seal_folder(building, folder, digested=names, base_digest=digest)
    return Artifact(manifest.digest, folder)


def damage(artifact: Artifact, folder: Path, fault: str) -> Artifact:
    """Write a copy of an artifact with one fault in its weights or its base, sealed as a sound one is."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.copytree(artifact.folder, building)
    [path] = building.glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[-1]
    if fault == "missing":
        del weights[name]
    elif fault == "foreign":
        weights["foreign." + name] = weights[name].clone()
    elif fault == "shape":
        weights[name] = weights[name].flatten()[1:].contiguous()
    elif fault == "nan":
        weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, path, metadata={"format": "pt"})
    manifest = read_manifest(artifact.folder)
    base_digest = f"sha256:{1:064x}" if fault == "other base" else manifest.base_digest
    sealed = seal_folder(building, folder, digested=manifest.digested, base_digest=base_digest)
    if fault == "torn":
        (folder / path.name).write_bytes(b"torn")
    return Artifact(sealed.digest, folder)


def method_logits(base_folder: Path, folder: Path, ids: list[int]) -> torch.Tensor:
    """Return logits_TV of an artifact on a base of its own, as its method loads it."""
    method = method_of_artifact(folder)
    attached = method.load(load_plain(base_folder), folder)
    with torch.inference_mode():
        return method.logits(attached, torch.tensor([ids]))[0].float()


def method_greedy(base_folder: Path, folder: Path, ids: list[int], num_tokens: int) -> list[int]:
    """Return the likeliest tokens one by one, each from a forward pass over all before it."""
    method = method_of_artifact(folder)
    attached = method.load(load_plain(base_folder), folder)
    history = list(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            history.append(int(method.logits(attached, torch.tensor([history]))[0, -1].argmax()))
    return history[len(ids) :]


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


def make_artifact(base: Path, folder: Path, name: str, shape: str) -> Method:
    """Write a random artifact of a method on a base of one of the tiny shapes."""
    method, params = parse_tuning({"type": name, **TUNINGS.get(name, [{}])[0]})
    resolved = method.resolve(params, Workload(base=facts_of(shape), num_rows=100, num_tokens=3000))
    start = Start(seed=1, base_id=f"tiny-{shape}", tokenize=lambda text: list(text.encode()))
    attached = method.attach(load_plain(base), resolved, start)
    add_noise(attached, seed=1, scale=0.2)
    folder.mkdir()
    method.save(attached, folder)
    return method


def pack(
    model: Any, folder: Path, *, max_rows: int = 4, max_cache_tokens: int = 512, max_draft_tokens: int = 0
) -> BatchExecutor:
    """Return an executor of a packed model, which is used up."""
    budget = Budget(
        max_cache_tokens=max_cache_tokens, max_sequences=max_rows, max_draft_tokens=max_draft_tokens
    )
    return BatchExecutor(PackedProvider().load(LoadedWeights(model, folder), budget))


def load_tiny(base_folder: Path, dtype: torch.dtype = torch.float32, **given: Any) -> LoadedBase:
    """Return a base in memory without tokenizer and template, on the runner that takes it."""
    nothing: Any = None

    def load_model() -> Any:
        return load_base(base_folder, dtype=dtype, device="cpu")

    return LoadedBase(
        facts=BaseFacts.model_validate_json((base_folder / FACTS_NAME).read_bytes()),
        folder=base_folder,
        tokenizer=nothing,
        template=nothing,
        device=torch.device("cpu"),
        dtype=dtype,
        probe_ids=PROBE_IDS,
        executor=BatchExecutor(choose_runner(load_model, base_folder, BUDGET, PROBE_IDS)),
        **given,
    )
