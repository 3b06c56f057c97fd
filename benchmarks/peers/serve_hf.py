"""transformers and PEFT in process. See _serving.py.

Options: way (generate, batching, adapter_names, groups, load_adapter), attention, compile, lookup (tokens
that `generate` proposes from the text so far).
"""

import os
import sys
from pathlib import Path

import torch
from _serving import serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

_DTYPE = torch.bfloat16


def _load(order: dict) -> dict:
    torch.set_num_threads(order["num_threads"])
    way = {
        "generate": _generate,
        "batching": _batching,
        "adapter_names": _adapter_names,
        "groups": _groups,
        "load_adapter": _load_adapter,
    }[order["options"]["way"]]
    return way(order)


def _base(order: dict):
    model = AutoModelForCausalLM.from_pretrained(
        order["base"], dtype=_DTYPE, attn_implementation=order["options"].get("attention", "sdpa")
    )
    return model.eval()


def _continue(model, prompts: list[list[int]], num_new: int, **more) -> list[list[int]]:
    """Continue prompts of one length by the most probable tokens."""
    input_ids = torch.tensor(prompts)
    with torch.inference_mode():
        found = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_new,
            do_sample=False,
            **more,
        )
    return [row[input_ids.shape[1] :].tolist() for row in found]


def _generate(order: dict) -> dict:
    model = _base(order)
    more = {}
    if order["options"].get("compile"):
        # A cache of fixed size lets transformers compile the step by itself.
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
        more = {"cache_implementation": "static"}
        model.forward = torch.compile(model.forward, dynamic=False)
    if "lookup" in order["options"]:
        more = {"prompt_lookup_num_tokens": order["options"]["lookup"]}

    def run(prompts, num_new, **_models):
        return {"tokens": _continue(model, prompts, num_new, **more)}

    return {"run": run}


def _batching(order: dict) -> dict:
    """Continuous batching in process: what `transformers serve` does without its HTTP."""
    model = _base(order)
    eos_id = model.generation_config.eos_token_id

    def run(prompts, num_new, **_models):
        config = GenerationConfig(
            max_new_tokens=num_new, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id
        )
        found = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=order["num_cache_pages"]),
            progress_bar=False,
        )
        ordered = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
        return {"tokens": [one.generated_tokens for one in ordered]}

    return {"run": run}


def _with_adapters(order: dict, models: list[dict]):
    """Return a base with adapters on it by PEFT, in bf16 as the base."""
    from peft import PeftModel

    model = None
    for one in models:
        if model is None:
            model = PeftModel.from_pretrained(
                _base(order), one["folder"], adapter_name=one["name"], autocast_adapter_dtype=False
            )
        else:
            model.load_adapter(one["folder"], adapter_name=one["name"], autocast_adapter_dtype=False)
    return model.to(_DTYPE).eval()


def _sorted_rows(prompts: list, models: list[str]) -> list[int]:
    """Return the rows' places with those of one adapter beside each other."""
    return sorted(range(len(prompts)), key=lambda place: models[place])


def _adapter_names(order: dict) -> dict:
    model = _with_adapters(order, order["models"])

    def run(prompts, models, num_new):
        places = _sorted_rows(prompts, models)
        names = [models[place] for place in places]
        rows = _continue(model, [prompts[place] for place in places], num_new, adapter_names=names)
        found = dict(zip(places, rows, strict=True))
        return {"tokens": [found[place] for place in range(len(prompts))]}

    return {"run": run}


def _groups(order: dict) -> dict:
    """Methods that PEFT can't mix in one batch, one group after another.

    LoRA's rows run together; every prefix and prompt alone, since a batch takes one of them; bottlenecks by
    the loader that our model cards give, each on a base of its own.
    """
    sys.path.insert(0, str(Path(order["loader"]).parent))
    loader = __import__(Path(order["loader"]).stem)
    by_kind: dict[str, list[dict]] = {}
    for one in order["models"]:
        by_kind.setdefault(one["kind"], []).append(one)
    kinds = {one["name"]: one["kind"] for one in order["models"]}
    tuned = {}
    if "lora" in by_kind:
        together = _with_adapters(order, by_kind["lora"])
        tuned |= {one["name"]: together for one in by_kind["lora"]}
    for one in (*by_kind.get("prefix", ()), *by_kind.get("prompt", ())):
        tuned[one["name"]] = _with_adapters(order, [one])
    for one in by_kind.get("adapter", ()):
        tuned[one["name"]] = loader.load_adapter(_base(order), one["folder"])

    def run(prompts, models, num_new):
        found: dict[int, list[int]] = {}
        loras = [place for place, name in enumerate(models) if kinds[name] == "lora"]
        if loras:
            names = [models[place] for place in loras]
            rows = [prompts[place] for place in loras]
            reported = _continue(tuned[names[0]], rows, num_new, adapter_names=names)
            found |= dict(zip(loras, reported, strict=True))
        for name in dict.fromkeys(name for name in models if kinds[name] != "lora"):
            places = [place for place, other in enumerate(models) if other == name]
            reported = _continue(tuned[name], [prompts[place] for place in places], num_new)
            found |= dict(zip(places, reported, strict=True))
        return {"tokens": [found[place] for place in range(len(prompts))]}

    return {"run": run}


def _load_adapter(order: dict) -> dict:
    """Adapters that come and go while others are loaded."""
    model = _with_adapters(order, order["models"])

    def swap(folder, name, prompt):
        """Load one more, let it say one token, and take it off again outside of the clock."""
        import time

        begin = time.perf_counter()
        model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        model.set_adapter(name)
        loaded = time.perf_counter()
        _continue(model, [prompt], 1)
        cold = time.perf_counter()
        _continue(model, [prompt], 1)
        warm = time.perf_counter()
        model.delete_adapter(name)
        return {"load_seconds": loaded - begin, "added_seconds": (cold - begin) - (warm - cold)}

    return {"swap": swap}


serve(_load)
