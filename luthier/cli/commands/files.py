"""`luthier files`: upload, list and delete files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import options
from luthier.cli.options import ApiKey, BaseUrl, Home, Json

if TYPE_CHECKING:
    from luthier.client import LuthierClient

files_app = typer.Typer(help="Upload, list and delete files.", no_args_is_help=True)


@files_app.command("upload")
def upload_file(
    file: Annotated[Path, typer.Argument(help="File on this machine.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Upload a file; the service checks every row, and keeps nothing of a file that breaks its format."""
    from luthier.cli.output import print_json, printable, size

    with options.open_client(base_url, api_key, home) as client:
        made = client.upload_file(file, purpose=purpose)
    if as_json:
        print_json(made)
        return
    print(f"{made['id']}  {printable(made['filename'])}, {size(made['bytes'])}")


@files_app.command("list")
def list_files(
    home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """List the project's files, newest first."""
    from luthier.cli.output import local_time, print_json, print_table, size

    with options.open_client(base_url, api_key, home) as client:
        files = client.list_files()
    if as_json:
        print_json(files)
        return
    rows = [
        (file["id"], file["filename"], file["purpose"], size(file["bytes"]), local_time(file["created_at"]))
        for file in files
    ]
    print_table(("ID", "NAME", "PURPOSE", "SIZE", "CREATED"), rows, empty="There are no files.")


@files_app.command("delete")
def delete_file(
    file_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Delete a file; refused while a job that has not ended reads it."""
    with options.open_client(base_url, api_key, home) as client:
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
    file_id: str = made["id"]
    return file_id
