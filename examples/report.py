"""Prints the demo's figures as one table. Judges nothing."""

from typing import Any


def print_report(figures: dict[str, Any]) -> None:
    """Print the table.

    Args:
        figures: `base` and `tuned` with their shares and losses, speeds, and `seconds` by phase.
    """
    from rich.console import Console
    from rich.table import Table

    base, tuned = figures["base"], figures["tuned"]
    table = Table(title=f"{base['num_rows']} held-out rows")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    for title, key in (
        ("valid structure", "valid_structure_share"),
        ("labels right", "enumerated_right_share"),
    ):
        table.add_row(title, f"{base[key]:.1%}", f"{tuned[key]:.1%}")
    table.add_row("validation loss", _loss(base["valid_loss"]), _loss(tuned["valid_loss"]), end_section=True)
    table.add_row("training speed", "", f"{figures['training_tokens_per_second']:.0f} tokens/s")
    table.add_row("succeeded to first token", "", f"{figures['first_token_seconds']:.2f} s", end_section=True)
    for phase, seconds in figures["seconds"].items():
        table.add_row(phase, "", f"{seconds:.1f} s")
    console = Console()
    console.print()
    console.print(table)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
