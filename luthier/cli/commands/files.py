"""`luthier files`: upload, list and delete files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import Json, client_command
from luthier.cli.output import local_time, print_json, print_list, printable, size

if TYPE_CHECKING:
    from luthier.client import LuthierClient

files_app = typer.Typer(help="Upload, list and delete files.", no_args_is_help=True)


@files_app.command("upload")
@client_command
def upload_file(
    client: "LuthierClient",
    file: Annotated[Path, typer.Argument(help="File on this machine.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    as_json: Json = False,
) -> None:
    """Upload a file; the service checks every row, and keeps nothing of a file that breaks its format."""
    made = client.upload_file(file, purpose=purpose)
    if as_json:
        print_json(made)
        return
    print(f"{made['id']}  {printable(made['filename'])}, {size(made['bytes'])}")


@files_app.command("list")
@client_command
def list_files(client: "LuthierClient", as_json: Json = False) -> None:
    """List the project's files, newest first."""
    columns = {
        "ID": lambda file: file["id"],
        "NAME": lambda file: file["filename"],
        "PURPOSE": lambda file: file["purpose"],
        "SIZE": lambda file: size(file["bytes"]),
        "CREATED": lambda file: local_time(file["created_at"]),
    }
    print_list(client.list_files(), columns, empty="There are no files.", as_json=as_json)


@files_app.command("delete")
@client_command
def delete_file(client: "LuthierClient", file_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Delete a file; refused while a job that has not ended reads it."""
    client.delete_file(file_id)
    print(f"Deleted {file_id}")


def uploaded_id(client: "LuthierClient", file: str, *, is_quiet: bool) -> str:
    """Return the id of an uploaded file, after uploading one of this machine's.

    Args:
        file: a path, or an id that begins with `file-` where no such path exists.
    """
    if file.startswith("file-") and not Path(file).exists():
        return file
    made = client.upload_file(Path(file), purpose="fine-tune")
    if not is_quiet:
        print(f"Uploaded {made['filename']} as {made['id']}")
    return str(made["id"])
