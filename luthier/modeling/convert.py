"""A quantised GGUF file to a base folder in fp32 safetensors: `python -m luthier.modeling.convert GGUF DEST`.

Run as a process of its own, because luthier.bases never imports torch. The same file gives the same
bytes every time, so that a base has one digest wherever it was converted.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

# Facts of the machine or of the library's version, which would make the digest differ for nothing.
_DROPPED_KEYS = (
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "name_or_path",
    "is_local",
    "local_files_only",
)
_JSON_NAMES = ("config.json", "generation_config.json", "tokenizer_config.json")


def _pre_tokenizer(kind: str) -> Any | None:
    """Return the splitting that a GGUF names but transformers does not rebuild, or None where it does.

    "smollm" splits every digit off before the byte-level pattern, as the model's published tokenizer does;
    without it white space before digits gets other tokens than the base was trained on.
    """
    if kind != "smollm":
        return None
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _drop_local_facts(folder: Path) -> None:
    for name in _JSON_NAMES:
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in content.items() if key not in _DROPPED_KEYS}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def convert_gguf(source: Path, destination: Path) -> None:
    """Write a base folder from a GGUF file.

    Args:
        source: the file, of an architecture that transformers can read from GGUF.
        destination: the folder, made when absent: config.json, generation_config.json, model.safetensors
            (float32), tokenizer.json, tokenizer_config.json, chat_template.jinja.
    """
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    pre_tokenizer = _pre_tokenizer(str(field.contents())) if field is not None else None
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    # The weights are plain fp32 now; what says otherwise would make later loads quantise them again.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    # The library writes weights for their owner alone; other users of the machine may serve this base.
    for path in destination.glob("*.safetensors"):
        path.chmod(0o644)
    _drop_local_facts(destination)


def main() -> int:
    """Convert as the command line says; its failures go to standard error."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to a base folder in fp32 safetensors.")
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    convert_gguf(arguments.source, arguments.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
