"""A random base model that every test can build in well under a second, with a real tokenizer.

Two Llama layers with grouped-query attention and a tied head, a byte-level BPE tokenizer with ChatML
marks, and all the files of a fetched base. Its answers mean nothing; its shapes and rules are real.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.specs import (
    BaseFacts,
    DpoOptions,
    Hyperparameters,
    RunInputs,
    TrainingOptions,
    TrainingSpec,
    TunedModel,
)
from luthier.data.prepare.prepared_rows import PreparedRows, join_rows, write_prepared
from luthier.methods._tuning import check_tuning, resolve_spec
from luthier.storage.manifests import seal_folder

BASE_ID = "tiny-llama"
CONTEXT_LENGTH = 256
HIDDEN_SIZE = 64
NUM_LAYERS = 2
VOCAB_SIZE = 300

_NUM_HEADS = 4
_NUM_KV_HEADS = 2
_HEAD_SIZE = HIDDEN_SIZE // _NUM_HEADS
_FEED_FORWARD_SIZE = 128
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = [
    "system\nBe brief.\n",
    "user\nwhat is the colour of the sky on a clear day in the summer?\n",
    "assistant\nthe answer is that the sky is blue and the sea is the same.\n",
    '{"colour": "red", "number": 12, "note": "an answer with the same keys"}',
]


def write_tokenizer(folder: Path) -> None:
    """Write the byte-level BPE tokenizer with its ChatML template into an existing folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_config(folder: Path) -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": _HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": _FEED_FORWARD_SIZE,
        "max_position_embeddings": CONTEXT_LENGTH,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": _NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": _NUM_KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
        **tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2))


def _write_weights(folder: Path, seed: int) -> int:
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    kv_size = _NUM_KV_HEADS * _HEAD_SIZE
    weights = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE)}
    for layer in range(NUM_LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
            "self_attn.k_proj": (kv_size, HIDDEN_SIZE),
            "self_attn.v_proj": (kv_size, HIDDEN_SIZE),
            "self_attn.o_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
            "mlp.gate_proj": (_FEED_FORWARD_SIZE, HIDDEN_SIZE),
            "mlp.up_proj": (_FEED_FORWARD_SIZE, HIDDEN_SIZE),
            "mlp.down_proj": (HIDDEN_SIZE, _FEED_FORWARD_SIZE),
        }
        for name, (rows, columns) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN_SIZE, np.float32)
    weights["model.norm.weight"] = np.ones(HIDDEN_SIZE, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.size for weight in weights.values())


def make_facts(**changes: Any) -> BaseFacts:
    """Return the facts of a base, the tiny one's where nothing else is said."""
    values: dict[str, Any] = {
        "id": BASE_ID,
        "source": "path:/none",
        "licence": "apache-2.0",
        "digest": "sha256:" + "0" * 64,
        "tokenizer_digest": "sha256:" + "a" * 64,
        "context_length": CONTEXT_LENGTH,
        "num_parameters": 1,
        "num_layers": NUM_LAYERS,
        "hidden_size": HIDDEN_SIZE,
    }
    return BaseFacts(**(values | changes))


def build_tiny_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the random base as a sealed folder with the layout of a fetched one, and return the folder."""
    building = folder.with_name(f".{folder.name}.building")
    building.mkdir(parents=True)
    write_tokenizer(building)
    _write_config(building)
    num_parameters = _write_weights(building, seed)
    facts = make_facts(digest=f"sha256:{seed:064x}", num_parameters=num_parameters)
    (building / FACTS_NAME).write_text(facts.model_dump_json(indent=1))
    seal_folder(building, folder)
    return folder


def build_tiny_rows(num_rows: int, *, seed: int = 0) -> PreparedRows:
    """Make rows that a tiny model can learn from: a random prompt, then an answer that repeats its start.

    They have 12 to 47 tokens each, the last 5 to 8 of them supervised, and stand on lines 1, 2, and so on.
    """
    return _join(num_rows, seed, are_pairs=False)


def build_tiny_pairs(num_pairs: int, *, seed: int = 0) -> PreparedRows:
    """Make preferences that a tiny model can learn: an answer that repeats the prompt's start, or not.

    Each is two rows of one line, the preferred one first.
    """
    return _join(num_pairs, seed, are_pairs=True)


def _join(num_prompts: int, seed: int, *, are_pairs: bool) -> PreparedRows:
    generator = np.random.default_rng(seed)
    tokens, supervised, lines = [], [], []
    for line in range(1, num_prompts + 1):
        prompt = generator.integers(3, 40, generator.integers(7, 40)).astype(np.int32)
        answers = [np.resize(prompt[:2], generator.integers(5, 9)).astype(np.int32)]
        if are_pairs:
            answers.append(generator.integers(3, 40, generator.integers(5, 9)).astype(np.int32))
        for answer in answers:
            tokens.append(np.concatenate([prompt, answer]))
            supervised.append(np.arange(len(prompt) + len(answer)) >= len(prompt))
            lines.append(line)
    return join_rows(tokens, supervised, lines)


@dataclass(frozen=True)
class Parent:
    """A tuned model that a run builds on, and where its artifact is."""

    folder: Path
    method: str
    digest: str

    @property
    def model(self) -> TunedModel:
        return TunedModel(
            model_id="model_parent",
            name=f"ft:tiny-llama:org:{self.method}:ABCDEFGH",
            method=self.method,
            digest=self.digest,
        )


def build_tiny_run(
    folder: Path,
    base: Path,
    *,
    num_rows: int = 24,
    num_validation_rows: int = 6,
    tuning: dict[str, Any] | None = None,
    hyperparameters: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    beta: float | None = None,
    parent: Parent | None = None,
    foundation: Parent | None = None,
) -> Path:
    """Write a run directory that `python -m luthier.training` accepts, with one thread on a CPU.

    With a beta the objective is dpo, and the rows are pairs. `parent` is the tuned model that the job
    continues from, `foundation` the whole model below its artifact.
    """
    folder.mkdir(parents=True)
    build_rows = build_tiny_rows if beta is None else build_tiny_pairs
    rows = build_rows(num_rows)
    write_prepared(rows, folder / "train.safetensors")
    if num_validation_rows:
        write_prepared(build_rows(num_validation_rows, seed=1), folder / "validation.safetensors")
    facts = BaseFacts.model_validate_json((base / FACTS_NAME).read_bytes())
    spec = TrainingSpec(
        base_id=facts.id,
        tuning=check_tuning(tuning if tuning and "type" in tuning else {"rank": 4, **(tuning or {})}),
        hyperparameters=Hyperparameters(**(hyperparameters or {})),
        training=TrainingOptions(**{"precision": "float32", **(training or {})}),
        dpo=None if beta is None else DpoOptions(beta=beta),
        seed=11,
        parent=None if parent is None else parent.model,
        foundation=None if foundation is None else foundation.model,
    )
    spec = resolve_spec(spec, base=facts, num_rows=num_rows, num_tokens=rows.num_tokens, num_threads=1)
    (folder / "spec.json").write_text(spec.model_dump_json())
    inputs = RunInputs(
        job_id="ftjob-tiny",
        model_name="ft:tiny-llama:org::abcdefgh",
        base_path=str(base),
        device="cpu",
        parent_path=None if parent is None else str(parent.folder),
        foundation_path=None if foundation is None else str(foundation.folder),
    )
    (folder / "inputs.json").write_text(inputs.model_dump_json())
    return folder
