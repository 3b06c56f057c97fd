"""llama.cpp by llama-cpp-python, one stream, on a GGUF of the base in bf16. See _serving.py."""

from pathlib import Path

from _serving import serve
from gguf_file import write_gguf
from llama_cpp import Llama


def _load(order: dict) -> dict:
    path = Path(order["scratch"]) / "base-bf16.gguf"
    if not path.exists():
        write_gguf(Path(order["base"]), path)
    model = Llama(
        str(path),
        n_ctx=order["max_length"],
        n_threads=order["num_threads"],
        n_threads_batch=order["num_threads"],
        n_batch=512,
        seed=0,
        verbose=False,
        **order["options"],
    )

    def run(prompts, num_new, **_models):
        rows = []
        for prompt in prompts:
            row = []
            # Greedy; no penalty, no end: the caller counts.
            for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True):
                row.append(int(token))
                if len(row) == num_new:
                    break
            rows.append(row)
        return {"tokens": rows}

    return {"run": run}


serve(_load)
