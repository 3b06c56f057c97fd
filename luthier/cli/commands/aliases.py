"""`luthier aliases`: a project's own names for models. What a command needs is imported when it runs."""

from typing import Annotated, Any

import typer

from luthier.cli import options
from luthier.cli.options import ApiKey, BaseUrl, Home, Json

aliases_app = typer.Typer(
    help="Point names of your own to models, and back to what they pointed to.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="The alias.")]


@aliases_app.command("put")
def put_alias(
    name: Name,
    model: Annotated[str, typer.Argument(help="Base, tuned model or checkpoint.")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Point an alias to a model; it is made when it is new. The next request is answered by that model."""
    with options.open_client(base_url, api_key, home) as client:
        _print_alias(client.put_alias(name, model), as_json=as_json)


@aliases_app.command("list")
def list_aliases(
    home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """List the aliases and what they point to."""
    from luthier.cli.output import local_time, print_json, print_table

    with options.open_client(base_url, api_key, home) as client:
        aliases = client.list_aliases()
    if as_json:
        print_json(aliases)
        return
    rows = [
        (alias["name"], alias["model"], alias["version"], local_time(alias["updated_at"]))
        for alias in aliases
    ]
    print_table(("NAME", "MODEL", "VERSION", "SINCE"), rows, empty="There are no aliases.")


@aliases_app.command("history")
def list_versions(
    name: Name,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List what an alias has pointed to, newest first."""
    from luthier.cli.output import local_time, print_json, print_table

    with options.open_client(base_url, api_key, home) as client:
        versions = client.list_alias_versions(name)
    if as_json:
        print_json(versions)
        return
    rows = [
        (
            version["version"],
            version["model"],
            version["restored_version"] or "-",
            version["created_by_key_id"] or "-",
            local_time(version["created_at"]),
        )
        for version in versions
    ]
    print_table(("VERSION", "MODEL", "RESTORED", "BY KEY", "SINCE"), rows, empty="There are no versions.")


@aliases_app.command("rollback")
def roll_back_alias(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Version; else the one before.", min=1)] = None,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Point an alias to what it pointed to before."""
    with options.open_client(base_url, api_key, home) as client:
        _print_alias(client.roll_back_alias(name, version=version), as_json=as_json)


@aliases_app.command("delete")
def delete_alias(name: Name, home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None) -> None:
    """Forget an alias with its history; the model that it points to stays."""
    from luthier.cli.output import printable

    with options.open_client(base_url, api_key, home) as client:
        client.delete_alias(name)
    print(f"Deleted {printable(name)}")


def _print_alias(alias: dict[str, Any], *, as_json: bool) -> None:
    from luthier.cli.output import print_json, printable

    if as_json:
        print_json(alias)
        return
    print(f"{printable(alias['name'])} is {printable(alias['model'])} now, version {alias['version']}.")
    # Null of a base; a service of an older version does not say it.
    if alias.get("proved") is False:
        print("No inference server has answered with it yet: its first request will tell whether one can.")
