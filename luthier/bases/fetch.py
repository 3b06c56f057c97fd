"""Fetching a base to this machine: under a lock, by sources.py, its facts read, sealed. Never torch."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from luthier.bases.catalogue import FACTS_NAME, CatalogueEntry, base_folder
from luthier.bases.sources import CONFIG_FILES, TOKENIZER_FILES, Log, fetch_source, stage
from luthier.core.errors import ArtifactCorruptError, BaseUnavailableError
from luthier.core.shapes import read_tensor_shapes
from luthier.core.specs import BaseFacts
from luthier.storage.manifests import (
    FileEntry,
    Manifest,
    compute_digest,
    file_sha256,
    read_manifest,
    seal_folder,
    verify_folder,
)

_REQUIRED_FILES = ("config.json", "tokenizer.json")


def ensure_base(entry: CatalogueEntry, bases_dir: Path, *, log: Log, verify: bool = False) -> BaseFacts:
    """Fetch a base unless it is in its folder, and return its facts, which are there as base.json.

    Two processes that need the same base fetch it once: the second waits for the first.

    Args:
        log: receives a sentence for each stage.
        verify: whether to hash an existing base instead of trusting its files' sizes.

    Raises:
        BaseUnavailableError: when the base can't be fetched, converted or read; the message says what to do.
    """
    folder = base_folder(bases_dir, entry.id)
    facts = _find_sealed(entry, folder, verify=verify)
    if facts is not None:
        return facts
    try:
        bases_dir.mkdir(parents=True, exist_ok=True)
        with _locked(bases_dir / f".{entry.id}.lock", log):
            facts = _find_sealed(entry, folder, verify=verify)
            return facts if facts is not None else _fetch(entry, folder, log)
    except OSError as error:
        raise BaseUnavailableError(
            f"The base {entry.id} can't be written to {bases_dir}: {error.strerror or error}. "
            "Check the folder's rights and free space, or set LUTHIER_BASES_DIR to another."
        ) from error


def _find_sealed(entry: CatalogueEntry, folder: Path, *, verify: bool) -> BaseFacts | None:
    """Return the facts of a base that is whole and came from the entry's source, else None."""
    try:
        manifest = verify_folder(folder) if verify else read_manifest(folder)
        facts = BaseFacts.model_validate_json((folder / FACTS_NAME).read_bytes())
        has_sizes = all((folder / name).stat().st_size == item.bytes for name, item in manifest.files.items())
    except (ArtifactCorruptError, OSError, ValueError):
        return None
    is_it = facts.digest == manifest.digest and facts.source == entry.source
    return facts if is_it and has_sizes else None


@contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Hold a lock file of the operating system, which is released when its holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("Another process is fetching this base; waiting for it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch(entry: CatalogueEntry, folder: Path, log: Log) -> BaseFacts:
    # Fixed names, so that the next process clears the files of a killed one.
    building = folder.with_name(f".{entry.id}.building")
    scratch = folder.with_name(f".{entry.id}.scratch")
    try:
        for path in (building, scratch):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        fetch_source(entry, building, scratch, log)
        with stage(log, f"Checking and sealing {entry.id}"):
            return _seal(entry, building, folder, log)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _seal(entry: CatalogueEntry, building: Path, folder: Path, log: Log) -> BaseFacts:
    weights = sorted(path.name for path in building.glob("*.safetensors"))
    missing = [name for name in _REQUIRED_FILES if not (building / name).is_file()]
    if missing or not weights:
        raise BaseUnavailableError(
            f"The source of {entry.id} lacks {', '.join(missing) or 'weights (*.safetensors)'}; "
            "it must hold config.json, tokenizer.json and safetensors."
        )
    names = [*weights, *CONFIG_FILES, *TOKENIZER_FILES]
    digested = [name for name in names if (building / name).is_file()]
    hashes = {
        name: FileEntry(sha256=file_sha256(building / name), bytes=(building / name).stat().st_size)
        for name in digested
    }
    facts = _read_facts(entry, building, weights, hashes, log)
    (building / FACTS_NAME).write_text(facts.model_dump_json(indent=1))
    manifest: Manifest = seal_folder(building, folder, digested=digested)
    if manifest.digest != facts.digest:
        raise BaseUnavailableError(f"The files of {entry.id} changed while they were hashed; fetch it again.")
    return facts


def _read_facts(
    entry: CatalogueEntry, building: Path, weights: list[str], hashes: dict[str, FileEntry], log: Log
) -> BaseFacts:
    try:
        config: dict[str, Any] = json.loads((building / "config.json").read_text(encoding="utf-8"))
        # Models that also see images keep the language model's shape one level down.
        shape = config | (config.get("text_config") or {})
        # Some of those leave the positions to their class's default; the catalogue has to know then.
        positions = int(shape.get("max_position_embeddings", entry.context_length))
        context_length = _check_context(entry, positions, log)
        num_layers, hidden_size = int(shape["num_hidden_layers"]), int(shape["hidden_size"])
        num_parameters = sum(
            math.prod(shape) for name in weights for shape in read_tensor_shapes(building / name).values()
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BaseUnavailableError(
            f"config.json or the weights of {entry.id} can't be read ({type(error).__name__}: {error})."
        ) from error
    return BaseFacts(
        id=entry.id,
        source=entry.source,
        licence=entry.licence,
        digest=compute_digest(hashes, hashes, None),
        tokenizer_digest=compute_digest(hashes, [n for n in TOKENIZER_FILES if n in hashes], None),
        context_length=context_length,
        num_parameters=num_parameters,
        num_layers=num_layers,
        hidden_size=hidden_size,
    )


def _check_context(entry: CatalogueEntry, positions: int, log: Log) -> int:
    """Return the context length to use: the model's own, or the catalogue's where that is shorter."""
    if entry.context_length > positions:
        raise BaseUnavailableError(
            f"models.toml gives {entry.id} a context_length of {entry.context_length}, but its config.json "
            f"says max_position_embeddings {positions}. Lower it in models.toml."
        )
    if entry.context_length < positions:
        log(f"{entry.id} is limited to {entry.context_length} of its {positions} positions by models.toml.")
    return entry.context_length
