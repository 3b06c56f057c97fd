"""A Llama-like base in safetensors as a GGUF file in bf16, for llama.cpp.

Names and metadata are those of the GGUF specification (architecture `llama`). llama.cpp turns pairs of
neighbouring numbers by its rotary positions where transformers turns halves, so the rows of the query and key
weights change places. Vectors stay in float32, as llama.cpp wants them.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(base: Path, path: Path) -> None:
    """Write a base's weights and vocabulary.

    Args:
        base: its folder, with weights in float32 or bf16.
        path: the file to be written, which exists only when it is whole.
    """
    config = json.loads((base / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    temporary = path.with_suffix(".part")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name(base.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_size)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, base, config)
    for name, values in _tensors(base):
        reported = _gguf_name(name)
        if reported is None:
            continue
        if ".q_proj." in name:
            values = _pair_rows(values, heads)  # noqa: PLW2901 - the same tensor, other order
        elif ".k_proj." in name:
            values = _pair_rows(values, kv_heads)  # noqa: PLW2901
        _add_tensor(writer, reported, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)


def _add_vocabulary(writer: gguf.GGUFWriter, base: Path, config: dict) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    by_id = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    tokens = [by_id.get(number, f"[unused{number}]") for number in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.CONTROL
        if added.get(number, {}).get("special")
        else gguf.TokenType.NORMAL
        if number in by_id
        else gguf.TokenType.UNUSED
        for number in range(config["vocab_size"])
    ]
    merges = [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _gguf_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.{kind}"
    parts = stem.split(".", 3)
    if parts[:2] != ["model", "layers"] or parts[3] not in _LAYER_NAMES:
        return None
    return f"blk.{parts[2]}.{_LAYER_NAMES[parts[3]]}.{kind}"


def _pair_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of each head's first and second half in turn."""
    outputs, inputs = values.shape
    halves = values.reshape(num_heads, 2, outputs // num_heads // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _tensors(base: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Read every tensor of the safetensors files in float32 (format: 8 bytes of length, JSON, bytes)."""
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            begin = 8 + length
            for name, facts in header.items():
                if name == "__metadata__":
                    continue
                start, end = facts["data_offsets"]
                stream.seek(begin + start)
                yield name, _to_float32(stream.read(end - start), facts["dtype"], facts["shape"])


def _to_float32(content: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype == "BF16":
        wide = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    if dtype != "F32":
        raise ValueError(f"weights in {dtype} are not read here")
    return np.frombuffer(content, np.float32).reshape(shape)
