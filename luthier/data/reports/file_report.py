"""The report on a file before a job is made: faults, tokens, duplicates, and what of the rows is supervised.

Rows are named by their line, of a JSON array and of Parquet by the row's number. A report holds texts of
rows (`shown`): it goes to the file's owner alone, and never into a log.
"""

from pydantic import Field

from luthier.core.specs import Frozen

# Goes up with every change of what is computed.
REPORT_VERSION = 1


class FileFault(Frozen):
    """One broken rule, with its place and what to do."""

    line: int
    row: int | None = Field(description="The row's number, in a JSON array or Parquet.")
    column: int | None
    field: str | None
    rule: str
    advice: str


class Bin(Frozen):
    """Rows of `start` to `end` tokens, the end not included."""

    start: int
    end: int
    rows: int


class RowLength(Frozen):
    """A row and its tokens."""

    line: int
    tokens: int


class TokenStatistics(Frozen):
    """Tokens of the rows that the base's template renders; of a preference those of both conversations.

    A row's length is that of its longer conversation.
    """

    total: int
    supervised: int
    supervised_share: float
    mean: float
    median: int
    p90: int
    p99: int
    max: int
    histogram: list[Bin]
    longest: list[RowLength]
    context_length: int
    over_context: int = Field(description="Rows longer than the base's context.")


class RepeatedRow(Frozen):
    """A row and an earlier one that it repeats; of an overlap a row of the other file."""

    line: int
    other: int


class Repeats(Frozen):
    """Rows that repeat another one, and the first of them."""

    rows: int
    pairs: list[RepeatedRow]


class Repetition(Frozen):
    """Rows that are the same as another, or nearly: `near` does not count those that are the same."""

    exact: Repeats
    near: Repeats


class Shown(Frozen):
    """A text that was rendered, cut at a bounded length, and which characters of it are supervised."""

    text: str
    is_cut: bool
    supervised: list[tuple[int, int]] = Field(description="Start and end of each part, end not included.")


class ShownRow(Shown):
    """One of the first rows as the base reads it; of a preference with the other conversation."""

    line: int
    rejected: Shown | None = None


class DataReport(Frozen):
    """The content of a file, seen with a base's template and tokenizer."""

    version: int = REPORT_VERSION
    format: str | None
    is_sample: bool = Field(
        default=False,
        description="Whether only the first rows were read, since all would have taken too long.",
    )
    rows: int
    rows_with_faults: int
    num_faults: int
    faults: list[FileFault] = Field(description="The first 100.")
    tokens: TokenStatistics | None = Field(description="Null where no row could be rendered.")
    duplicates: Repetition
    overlap: Repetition | None = Field(description="Rows that are in the validation file too.")
    shown: list[ShownRow]
