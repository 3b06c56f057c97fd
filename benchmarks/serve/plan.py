"""The rows of streams: what we serve, beside which peer, in which of each peer's settings.

Every setting of a peer is tried once; the fastest is the one that the pairs are run with.
"""

from dataclasses import dataclass
from typing import Any

NUM_PAIRS = 5
NUM_STREAMS = 16
NUM_PROMPT_TOKENS = 64
NUM_NEW_TOKENS = 128
# Pages of 256 tokens of transformers' paged cache; by itself it takes nine tenths of the free memory.
NUM_CACHE_PAGES = 64
# Tokens that a peer proposes at a time: what llama-cpp-python advises without a GPU, as many as ours at most,
# and the default of both.
_LOOKUPS = (2, 7, 10)


@dataclass(frozen=True)
class Setting:
    """One way to run a peer; `options` go to its script.

    `sleeps`: its OpenMP threads sleep while they wait for each other, as ours do, where they spin by default.
    """

    name: str
    options: dict[str, Any]
    sleeps: bool = False


@dataclass(frozen=True)
class Contest:
    """A peer in a row: `script` runs in the environment `environment` of .venv-peers, or in our own.

    `in_process`: it is called directly, where ours and the others are asked over HTTP.
    """

    name: str
    title: str
    environment: str | None
    script: str
    settings: tuple[Setting, ...]
    in_process: bool = True


@dataclass(frozen=True)
class StreamRow:
    """Streams that run together: how many on how many tuned models of which methods, each on one of its own.

    `models` is empty where all streams run on the base. `beside` names another of our own rows that is run in
    the same turns; with `is_also_plain` our server runs once more, guessing nothing of what comes next.
    """

    name: str
    title: str
    num_streams: int
    models: dict[str, int]
    contests: tuple[Contest, ...]
    beside: str | None = None
    is_also_plain: bool = False


def _vllm(**options: Any) -> Contest:
    settings = (
        Setting("compiled", options),
        Setting("eager", options | {"eager": True}),
    )
    return Contest("vllm", "vLLM (CPU build), offline", "vllm", "serve_vllm", settings)


def _hf(way: str, title: str, *, compiled: bool = False) -> Contest:
    settings = [
        Setting("sdpa", {"way": way, "attention": "sdpa"}),
        Setting("sdpa, threads sleep", {"way": way, "attention": "sdpa"}, sleeps=True),
        Setting("eager", {"way": way, "attention": "eager"}),
    ]
    if compiled:
        settings.append(Setting("sdpa, compiled, static cache", {"way": way, "compile": True}))
    return Contest(f"hf-{way}".replace("_", "-"), title, "serving", "serve_hf", tuple(settings))


_SERVE = Contest(
    "transformers-serve",
    "`transformers serve`, continuous batching, HTTP",
    "serving",
    "transformers serve",
    (
        Setting("sdpa", {"attention": "sdpa"}),
        Setting("sdpa, threads sleep", {"attention": "sdpa"}, sleeps=True),
    ),
    in_process=False,
)
_LLAMA_CPP = Contest(
    "llama-cpp",
    "llama.cpp (llama-cpp-python), bf16 GGUF",
    "llamacpp",
    "serve_llamacpp",
    (Setting("as it comes", {}), Setting("flash attention", {"flash_attn": True})),
)

# The same peers, guessing as ours does.
_HF_LOOKUP = Contest(
    "hf-lookup",
    "transformers `generate`, prompt lookup",
    "serving",
    "serve_hf",
    tuple(
        Setting(f"sdpa, {number} tokens", {"way": "generate", "attention": "sdpa", "lookup": number})
        for number in _LOOKUPS
    ),
)
_LLAMA_CPP_LOOKUP = Contest(
    "llama-cpp-lookup",
    "llama.cpp, bf16 GGUF, prompt lookup",
    "llamacpp",
    "serve_llamacpp",
    tuple(
        Setting(f"{name}, {number} tokens", options | {"lookup": number})
        for name, options in (("as it comes", {}), ("flash attention", {"flash_attn": True}))
        for number in _LOOKUPS
    ),
)

_PAGED = Contest(
    "paged", "ours without compiled kernels, in process", None, "serve_paged", (Setting("bf16", {}),)
)

STREAM_ROWS: dict[str, StreamRow] = {
    row.name: row
    for row in (
        StreamRow(
            "lora-16",
            "16 streams on 16 LoRA models of rank 16, all linear layers",
            NUM_STREAMS,
            {"lora": NUM_STREAMS},
            (_vllm(lora=True), _hf("adapter_names", "PEFT `adapter_names`, rows sorted"), _PAGED),
        ),
        StreamRow(
            "base-16",
            "16 streams on the base",
            NUM_STREAMS,
            {},
            (_vllm(), _SERVE, _hf("batching", "transformers `generate_batch`, continuous batching"), _PAGED),
        ),
        StreamRow(
            "base-1",
            "one stream on the base",
            1,
            {},
            (
                _hf("generate", "transformers `generate`", compiled=True),
                _LLAMA_CPP,
                _HF_LOOKUP,
                _LLAMA_CPP_LOOKUP,
                _PAGED,
            ),
            is_also_plain=True,
        ),
        StreamRow(
            "mixed-16",
            "16 streams: 4 LoRA, 4 prefix, 4 prompt, 4 adapter, each on a model of its own",
            NUM_STREAMS,
            {"lora": 4, "prefix": 4, "prompt": 4, "adapter": 4},
            (_hf("groups", "PEFT, one group after another"), _PAGED),
            beside="lora-16",
        ),
    )
}
