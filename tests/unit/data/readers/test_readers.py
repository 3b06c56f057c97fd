"""Containers: each yields the same rows, however it is cut, and a broken one is reported by its place."""

import csv
import gzip
import io
import itertools
import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import InvalidFileFormatError
from luthier.data.readers.base import Limits, RawRow
from luthier.data.readers.file_checker import check_rows
from luthier.data.readers.file_rows import FileRows
from luthier.data.readers.stream import RowStream

ROWS = [
    {"prompt": "p", "completion": "c"},
    {"prompt": 'a "quote", a comma\nand a line', "completion": "é 日本 🎉 \\ { [ } ]"},
    {"prompt": "", "completion": "]}"},
]
LIMITS = Limits(max_row_bytes=5000)


def as_csv(rows, delimiter=",", **options):
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue().encode()


FILES = {
    "jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    "jsonl unescaped": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "array": json.dumps(ROWS).encode(),
    "array in lines": json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n\n",
    "array with a mark": b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(),
    "csv": as_csv(ROWS),
    "csv with a mark": b"\xef\xbb\xbf" + as_csv(ROWS, lineterminator="\n"),
    "csv by semicolon": as_csv(ROWS, ";"),
    "csv by tab": as_csv(ROWS, "\t"),
    "csv all quoted": as_csv(ROWS, quoting=csv.QUOTE_ALL),
}
FILES |= {f"{name}, gzip": gzip.compress(content) for name, content in FILES.items()}
FILES["gzip of two members"] = (
    gzip.compress(FILES["jsonl"][:50]) + gzip.compress(FILES["jsonl"][50:]) + b"\0" * 9
)


def rows_of(content, cuts=(), limits=LIMITS):
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    stream = RowStream((content[start:end] for start, end in itertools.pairwise(places)), limits)
    return list(stream), stream.container


@pytest.mark.parametrize("name", FILES)
def test_every_container_gives_the_same_rows_however_it_is_cut(name):
    content = FILES[name]
    generator = random.Random(name)
    for _ in range(30):
        found, container = rows_of(content, [generator.randrange(len(content)) for _ in range(8)])
        assert [json.loads(row.content) for row in found] == ROWS
        assert container.removesuffix("+gzip") == name.split()[0].replace("array", "json").replace(
            "gzip", "jsonl"
        ).removesuffix(",")
        assert container.endswith("+gzip") == ("gzip" in name)


def test_rows_have_the_line_where_they_begin_and_of_an_array_their_number():
    found, _ = rows_of(FILES["csv"])
    assert [row.number for row in found] == [2, 3, 5]
    found, _ = rows_of(FILES["array in lines"])
    assert [(row.number, row.line, row.column) for row in found] == [(1, 2, 3), (2, 6, 3), (3, 10, 3)]


TEXTS = st.text(
    alphabet=st.sampled_from('ab,;"\\{}[]:é日🎉 \t\n\r') | st.characters(exclude_categories=["Cs", "Cc"]),
    max_size=12,
)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.lists(st.integers(0, 400), max_size=5))
def test_any_texts_come_out_of_every_container_as_they_went_in(pairs, cuts):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    files = [
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        json.dumps(rows, ensure_ascii=False, indent=1).encode(),
        as_csv(rows),
        as_csv(rows, ";", quoting=csv.QUOTE_ALL),
    ]
    for content in [*files, gzip.compress(files[1])]:
        found, _ = rows_of(content, cuts)
        assert [json.loads(row.content) for row in found] == rows


PIECES = st.sampled_from(
    [
        b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"\n", b" ", b"prompt,completion\n", b'{"text": "a"}',
        b"x", b"\xff", b"text\n", b"\xef\xbb\xbf", gzip.compress(b"[{}]"),
    ]
)  # fmt: skip


@given(st.lists(PIECES, max_size=25).map(b"".join), st.lists(st.integers(0, 80), max_size=6))
def test_any_bytes_give_the_same_rows_and_faults_wherever_they_are_cut(content, cuts):
    def outcome(cuts):
        try:
            return rows_of(content, cuts)[0]
        except InvalidFileFormatError as error:
            return error.message

    assert outcome(cuts) == outcome([])


def reported(content, *, path=None, **limits):
    with pytest.raises(InvalidFileFormatError) as caught:
        check_rows([content], Limits(**limits), path)
    assert caught.value.param == "file"
    return caught.value.message


CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'prompt,completion\np,c\np,"c\n', "Line 3: A quote that begins here is not closed"),
        (b"prompt,completion\np,c,d\n", "Line 2: The row has 3 cells and the header 2"),
        (b"prompt,completion\n\np,c\n", "Line 2: The line is blank"),
        (b"prompt,completion\np,\xff\n", "Line 2, column 3: Byte 3 of the row is not UTF-8"),
        (b"prompt,completion\np,\n", 'Line 2, completion: "completion" is empty'),
        (b"prompt,completion,prompt\np,c,d\n", "Line 1, column 3, prompt: Two columns have this name"),
        (
            b"prompt,completion,id\np,c,1\n",
            "Line 1, column 3, id: Unknown column; rows of the format completion",
        ),
        (b"prompt,answer\np,c\n", "Line 1, column 2, answer: Unknown column"),
        (b"prompt\np\n", 'Line 1, completion: The column "completion" is missing'),
        (b'messages\n"[1"\n', 'Line 2, column 1, messages: The cell of the column "messages" must hold JSON'),
        (f"[{CHAT}, 1]".encode(), "Row 2 (line 1): Each line must be a JSON object"),
        (f"[\n{CHAT},\n{CHAT},\n]".encode(), "Row 3 (line 4), column 1: A row is missing here"),
        (f"[{CHAT}\n".encode(), "Line 2, column 1: The JSON array is not closed"),
        (f"[{CHAT}]\n[]".encode(), "Line 2, column 1: Something follows the end"),
        (f'[{CHAT},\n {{"messages":\n  [}}]'.encode(), "Line 3"),
        (f'[{CHAT},\n {{"messages":\n  x}}]'.encode(), "Row 2 (line 3), column 3: This is not valid JSON"),
        (f'[{CHAT}, {{"messages": []}}]'.encode(), "Row 2 (line 1), messages:"),
        (b"[]", "The file is empty"),
        (
            f'[{CHAT}, {{"prompt": "p", "completion": "c"}}]'.encode(),
            "Row 2 (line 1): The row is of the format",
        ),
    ],
)
def test_what_is_broken_is_reported_with_its_place(content, expected):
    assert expected in reported(content)


def test_a_chat_in_a_table_is_read_from_its_json_cells():
    messages = json.loads(CHAT)["messages"]
    content = as_csv([{"messages": json.dumps(messages), "tools": ""}] * 3)
    facts = check_rows([content], Limits())
    assert (facts.num_rows, facts.format, facts.container) == (3, "chat", "csv")


def test_a_cell_can_not_add_keys_to_its_row():
    cell = '[{"role": "assistant", "content": "a"}], "parallel_tool_calls": false'
    assert "must hold JSON" in reported(as_csv([{"messages": cell}]))


def test_a_row_over_the_limit_is_a_fault_and_not_kept():
    long = json.dumps({"prompt": "x" * 100_000, "completion": "c"})
    for content in (f"[{CHAT}, {long}, {CHAT}]", f"prompt,completion\np,{'x' * 100_000}\n"):
        assert "longer than 2000 bytes" in reported(content.encode(), max_row_bytes=2000)


@pytest.mark.parametrize("opening", [b'[{"text": "', b'text\n"'], ids=["array", "csv"])
def test_memory_stays_constant_over_an_endless_row(opening):
    chunk = b"z" * (256 * 1024)
    tracemalloc.start()
    with pytest.raises(InvalidFileFormatError):
        check_rows(itertools.chain([opening], itertools.repeat(chunk, 100)), Limits(64 * 1024))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * 1024 * 1024


def test_a_bomb_is_refused_before_it_expands():
    line = json.dumps({"text": "a" * 4000}).encode() + b"\n"
    bomb = gzip.compress(line * 10_000)
    assert len(bomb) < 400 * 1024
    tracemalloc.start()
    message = reported(bomb)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 100 times its size" in message
    assert peak_bytes < 8 * 1024 * 1024
    assert "more than 1000000 bytes" in reported(bomb, max_expanded_bytes=1_000_000, max_expansion_ratio=1e9)


def test_a_file_of_equal_short_rows_is_no_bomb():
    assert check_rows([gzip.compress(f"{CHAT}\n".encode() * 10_000)], Limits()).num_rows == 10_000


def test_files_on_disk_are_read_as_streams_are(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(FILES["array, gzip"])
    found = list(FileRows(path).raw())
    assert all(isinstance(row, RawRow) for row in found)
    assert [json.loads(row.content) for row in found] == ROWS
