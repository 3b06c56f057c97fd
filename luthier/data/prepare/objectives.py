"""Which rows which objective learns from: preferences are dpo's, every other format is supervised's."""

from typing import Literal

# Which of a job's files a file is.
Purpose = Literal["training", "validation"]

_PREFERENCE = "preference"


def learns_from(format_name: str, *, wants_pairs: bool) -> bool:
    """Say whether rows of a format are of the kind that a job learns from.

    Returns:
        Whether they are.
    """
    return (format_name == _PREFERENCE) == wants_pairs


def tell_wrong_format(purpose: Purpose, format_name: str) -> str:
    """Say what is wrong with a file whose rows its job does not learn from, and what to do."""
    if format_name == _PREFERENCE:
        return (
            f"The {purpose} file holds preferences (input, preferred_output, non_preferred_output), which "
            "belong to jobs of method dpo; a supervised job learns from rows such as chats. Set method.type "
            'to "dpo", or name a file of other rows.'
        )
    return (
        f"The {purpose} file holds rows of the format {format_name}, and a job of method dpo learns from "
        "preferences: input, preferred_output and non_preferred_output. Set method.type to "
        '"supervised", or name a file of preferences.'
    )
