"""llama.cpp by llama-cpp-python, one stream, on a GGUF of the base in bf16. See _serving.py.

Options: Llama's own, and lookup (tokens that are guessed from what was said before).
"""

from pathlib import Path

from _serving import serve
from gguf_file import write_gguf
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def _load(order: dict) -> dict:
    path = Path(order["scratch"]) / "base-bf16.gguf"
    if not path.exists():
        write_gguf(Path(order["base"]), path)
    options = dict(order["options"])
    lookup = options.pop("lookup", None)
    model = Llama(
        str(path),
        n_ctx=order["max_length"],
        n_threads=order["num_threads"],
        n_threads_batch=order["num_threads"],
        n_batch=512,
        seed=0,
        verbose=False,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=lookup) if lookup else None,
        **options,
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
