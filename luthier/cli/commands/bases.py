"""`luthier bases`: the catalogue of base models, and which of them are on this machine."""

import time
from typing import Annotated

import typer

from luthier.cli.options import Json
from luthier.cli.output import print_list, size

bases_app = typer.Typer(help="List and fetch base models.", no_args_is_help=True)


@bases_app.command("list")
def list_bases(as_json: Json = False) -> None:
    """List the base models of models.toml and whether each is fetched."""
    from luthier.bases.catalogue import find_base_facts, load_catalogue
    from luthier.cli.settings import read_settings

    settings = read_settings()
    bases = []
    for entry in load_catalogue(settings.models_file).bases.values():
        facts = find_base_facts(settings.bases_dir, entry.id)
        fetched = {"is_fetched": facts is not None, "digest": facts.digest if facts else None}
        bases.append(entry.model_dump(exclude={"sha256"}) | fetched)
    columns = {
        "ID": lambda base: base["id"],
        "FETCHED": lambda base: "yes" if base["is_fetched"] else "no",
        "CONTEXT": lambda base: base["context_length"],
        "MEMORY": lambda base: size(round(base["memory_gib"] * 1024**3)),
        "LICENCE": lambda base: base["licence"],
        "SOURCE": lambda base: base["source"],
    }
    print_list(bases, columns, empty="models.toml lists no base.", as_json=as_json)


@bases_app.command("fetch")
def fetch_base(base_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Fetch a base model, and convert and seal it where that is needed."""
    from luthier.bases.catalogue import load_catalogue
    from luthier.bases.fetch import ensure_base
    from luthier.cli.settings import read_settings

    started_at = time.monotonic()
    settings = read_settings()
    entry = load_catalogue(settings.models_file).resolve(base_id)
    facts = ensure_base(entry, settings.bases_dir, log=lambda line: print(line, flush=True))
    seconds = time.monotonic() - started_at
    print(f"{facts.id} is in {settings.bases_dir / facts.id}, digest {facts.digest[:19]}… ({seconds:.1f} s)")
