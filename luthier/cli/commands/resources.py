"""`luthier files`, `keys`, `models`, `aliases` and `bases`. Imports of one command are inside it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import Json, client_command
from luthier.cli.output import Columns, local_time, print_list, print_object, printable, size

if TYPE_CHECKING:
    from luthier.client import LuthierClient

files_app = typer.Typer(help="Upload, list and delete files.", no_args_is_help=True)
keys_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
models_app = typer.Typer(help="List, download, pin and delete models.", no_args_is_help=True)
aliases_app = typer.Typer(
    help="Point names of your own to models, and back to what they pointed to.", no_args_is_help=True
)
bases_app = typer.Typer(help="List and fetch base models.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID")]
ModelName = Annotated[str, typer.Argument(help="The model's name.")]
AliasName = Annotated[str, typer.Argument(help="The alias.")]


@client_command(files_app, "upload")
def upload_file(
    client: "LuthierClient",
    file: Annotated[Path, typer.Argument(help="File on this machine.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    as_json: Json = False,
) -> None:
    """Upload a file; the service checks every row, and keeps nothing of a file that breaks its format."""
    made = client.upload_file(file, purpose=purpose)
    print_object(made, f"{made['id']}  {printable(made['filename'])}, {size(made['bytes'])}", as_json=as_json)


@client_command(files_app, "list")
def list_files(client: "LuthierClient", as_json: Json = False) -> None:
    """List the project's files, newest first."""
    columns: Columns = {"ID": "id", "NAME": "filename", "PURPOSE": "purpose", "SIZE": ("bytes", size)}
    columns |= {"CREATED": ("created_at", local_time)}
    print_list(client.list_files(), columns, empty="There are no files.", as_json=as_json)


@client_command(files_app, "delete")
def delete_file(client: "LuthierClient", file_id: Id) -> None:
    """Delete a file; refused while a job that has not ended reads it."""
    client.delete_file(file_id)
    print(f"Deleted {file_id}")


def uploaded_id(client: "LuthierClient", file: str, *, is_quiet: bool) -> str:
    """Return the id of an uploaded file: of one of this machine's, which is uploaded, else `file` itself."""
    if file.startswith("file-") and not Path(file).exists():
        return file
    made = client.upload_file(Path(file), purpose="fine-tune")
    if not is_quiet:
        print(f"Uploaded {made['filename']} as {made['id']}")
    return str(made["id"])


@client_command(keys_app, "create")
def create_key(
    client: "LuthierClient",
    name: Annotated[str, typer.Option(help="What the key is for.")],
    project: Annotated[str | None, typer.Option(help="Project that it opens, made when new.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once."""
    made = client.create_key(name, project=project)
    text = f"{made['key']}\nThis key is shown this once; its id is {made['id']}."
    print_object(made, text, as_json=as_json)


@client_command(keys_app, "list")
def list_keys(client: "LuthierClient", as_json: Json = False) -> None:
    """List keys, without their secret part."""
    columns: Columns = {
        "ID": "id",
        "NAME": "name",
        "KEY": ("prefix", lambda prefix: f"{prefix}…"),
        "PROJECT": "project",
    }
    columns |= {"CREATED": ("created_at", local_time)}
    print_list(client.list_keys(), columns, empty="There are no keys.", as_json=as_json)


@client_command(keys_app, "revoke")
def revoke_key(client: "LuthierClient", key_id: Id) -> None:
    """Make a key useless from now on."""
    client.revoke_key(key_id)
    print(f"Revoked {key_id}")


@client_command(models_app, "list")
def list_models(client: "LuthierClient", as_json: Json = False) -> None:
    """List the models that can be called."""
    columns: Columns = {"NAME": "id", "OWNER": "owned_by", "CREATED": ("created", local_time), "NOTE": _note}
    print_list(client.list_models(), columns, empty="There are no models.", as_json=as_json)


def _note(model: dict[str, Any]) -> str:
    """Return where an alias points, and whether a model is pinned."""
    notes = [f"points to {model['alias_of']}"] if model.get("alias_of") else []
    return ", ".join([*notes, *(["pinned"] if model.get("pinned") else [])])


@client_command(models_app, "download")
def download_model(
    client: "LuthierClient",
    name: ModelName,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where its files go.")],
) -> None:
    """Download a tuned model's files, verified by sha256; an interrupted download is resumed."""
    for path in client.download_model(name, folder):
        print(path)


@client_command(models_app, "pin")
def pin_model(client: "LuthierClient", name: ModelName) -> None:
    """Let servers keep a tuned model in memory from its next request on."""
    print(f"{client.pin_model(name)['id']} stays in memory once it is there.")


@client_command(models_app, "unpin")
def unpin_model(client: "LuthierClient", name: ModelName) -> None:
    """Let a tuned model leave the memory again when others need its room."""
    print(f"{client.pin_model(name, is_pinned=False)['id']} may leave the memory when it is idle.")


@client_command(models_app, "delete")
def delete_models(
    client: "LuthierClient",
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The models' names.")],
) -> None:
    """Delete tuned models with their files; refused while an alias, a job or another model needs one."""
    for name in names:
        client.delete_model(name)
        print(f"Deleted {printable(name)}")


@client_command(aliases_app, "put")
def put_alias(
    client: "LuthierClient",
    name: AliasName,
    model: Annotated[str, typer.Argument(help="Base, tuned model or checkpoint.")],
    as_json: Json = False,
) -> None:
    """Point an alias to a model; it is made when it is new. The next request is answered by that model."""
    _print_alias(client.put_alias(name, model), as_json=as_json)


@client_command(aliases_app, "list")
def list_aliases(client: "LuthierClient", as_json: Json = False) -> None:
    """List the aliases and what they point to."""
    columns: Columns = {
        "NAME": "name",
        "MODEL": "model",
        "VERSION": "version",
        "SINCE": ("updated_at", local_time),
    }
    print_list(client.list_aliases(), columns, empty="There are no aliases.", as_json=as_json)


@client_command(aliases_app, "history")
def list_versions(client: "LuthierClient", name: AliasName, as_json: Json = False) -> None:
    """List what an alias has pointed to, newest first."""
    columns: Columns = {"VERSION": "version", "MODEL": "model", "RESTORED": "restored_version"}
    columns |= {"BY KEY": "created_by_key_id", "SINCE": ("created_at", local_time)}
    print_list(client.list_alias_versions(name), columns, empty="There are no versions.", as_json=as_json)


@client_command(aliases_app, "rollback")
def roll_back_alias(
    client: "LuthierClient",
    name: AliasName,
    version: Annotated[int | None, typer.Option(help="Version; else the one before.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Point an alias to what it pointed to before."""
    _print_alias(client.roll_back_alias(name, version=version), as_json=as_json)


@client_command(aliases_app, "delete")
def delete_alias(client: "LuthierClient", name: AliasName) -> None:
    """Delete an alias with its history; the model that it points to stays."""
    client.delete_alias(name)
    print(f"Deleted {printable(name)}")


def _print_alias(alias: dict[str, Any], *, as_json: bool) -> None:
    text = f"{printable(alias['name'])} is {printable(alias['model'])} now, version {alias['version']}."
    # Null for a base; absent in answers of an older version.
    if alias.get("proved") is False:
        text += "\nNo inference server has answered with it yet: its first request shows whether one can."
    print_object(alias, text, as_json=as_json)


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
    columns: Columns = {
        "ID": "id",
        "FETCHED": ("is_fetched", lambda is_fetched: "yes" if is_fetched else "no"),
        "CONTEXT": "context_length",
        "MEMORY": ("memory_gib", lambda gib: size(round(gib * 1024**3))),
        "LICENCE": "licence",
        "SOURCE": "source",
    }
    print_list(bases, columns, empty="models.toml lists no base.", as_json=as_json)


@bases_app.command("fetch")
def fetch_base(base_id: Id) -> None:
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
