"""`luthier bases`: the catalogue of base models and what of it is on this machine."""

import time

from luthier.cli.output import print_json, print_table, size
from luthier.cli.settings import read_settings


def print_bases(*, as_json: bool) -> None:
    """Print every base of the catalogue."""
    from luthier.bases.catalogue import find_base_facts, load_catalogue

    settings = read_settings()
    bases = []
    for entry in load_catalogue(settings.models_file).bases.values():
        facts = find_base_facts(settings.bases_dir, entry.id)
        bases.append(
            {
                **entry.model_dump(exclude={"sha256"}),
                "is_fetched": facts is not None,
                "digest": facts.digest if facts else None,
            }
        )
    if as_json:
        print_json(bases)
        return
    rows = [
        (
            base["id"],
            "yes" if base["is_fetched"] else "no",
            base["context_length"],
            size(round(base["memory_gib"] * 1024**3)),
            base["licence"],
            base["source"],
        )
        for base in bases
    ]
    titles = ("ID", "FETCHED", "CONTEXT", "MEMORY", "LICENCE", "SOURCE")
    print_table(titles, rows, empty="models.toml lists no base.")


def fetch(base_id: str) -> None:
    """Fetch one base, telling each stage with its seconds."""
    from luthier.bases.catalogue import load_catalogue
    from luthier.bases.fetch import ensure_base

    started_at = time.monotonic()
    settings = read_settings()
    entry = load_catalogue(settings.models_file).resolve(base_id)
    facts = ensure_base(entry, settings.bases_dir, log=lambda line: print(line, flush=True))
    seconds = time.monotonic() - started_at
    print(f"{facts.id} is in {settings.bases_dir / facts.id}, digest {facts.digest[:19]}… ({seconds:.1f} s)")
