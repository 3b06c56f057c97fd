"""The base as all sides get it: its own weights, and an end token that no text has.

So an answer ends when the number of tokens that was asked for is there, on every side alike, without telling
any program to look away from an end, which changes the next token in some.
"""

import json
import os
import shutil
from pathlib import Path

from luthier.data.rendering.tokenizer import Tokenizer


def copy_without_end(base: Path, bases_dir: Path) -> Path:
    """Make a copy of a base whose end token never comes.

    Args:
        base: a fetched base.
        bases_dir: where the copy goes, under the same name.

    Returns:
        The copy's folder; large files are links.
    """
    folder = bases_dir / base.name
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            _link(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    never_id, never = _rare_token(base)
    for name in ("config.json", "generation_config.json"):
        _change(folder / name, {"eos_token_id": never_id, "pad_token_id": never_id})
    _change(folder / "tokenizer_config.json", {"eos_token": never, "pad_token": never})
    if Tokenizer.load(folder).stop_token_ids != {never_id}:
        raise SystemExit(f"The end tokens of {base.name} can't be changed.")
    return folder


def _rare_token(base: Path) -> tuple[int, str]:
    """Return the last token that stands for no text and ends nothing."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    ends = Tokenizer.load(base).stop_token_ids
    marks = [token for token in tokenizer["added_tokens"] if token["special"] and token["id"] not in ends]
    return marks[-1]["id"], marks[-1]["content"]


def _change(path: Path, values: dict[str, object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values, indent=1))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # On another file system.
        shutil.copyfile(source, target)
