"""vLLM's CPU build, offline: no HTTP between it and its caller. See _serving.py.

Options: eager (no compilation), lora.
"""

import os

# Read when vLLM is imported. One process: what stands still when the other side runs must be all of it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from _serving import serve


def _load(order: dict) -> dict:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{order['num_threads'] - 1}")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = order["options"]
    lora = {"enable_lora": True, "max_loras": len(order["models"]), "max_lora_rank": 16}
    engine = LLM(
        model=order["base"],
        dtype="bfloat16",
        max_model_len=order["max_length"],
        max_num_seqs=order["max_rows"],
        enforce_eager=bool(options.get("eager")),
        seed=0,
        disable_log_stats=True,
        **(lora if options.get("lora") else {}),
    )
    requests = {
        one["name"]: LoRARequest(one["name"], number + 1, one["folder"])
        for number, one in enumerate(order["models"])
    }

    def run(prompts, models, num_new):
        sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        found = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=[requests[name] for name in models] if options.get("lora") else None,
            use_tqdm=False,
        )
        return {"tokens": [list(one.outputs[0].token_ids) for one in found]}

    return {"run": run}


if __name__ == "__main__":
    serve(_load)
