"""No docstring, comment or identifier uses a word of `dialect_words.txt`."""

import re
import warnings
from collections import Counter
from pathlib import Path

from tests.architecture.sources import ROOMS, ROOT, python_files

_WORDS = [
    line
    for line in (Path(__file__).with_name("dialect_words.txt")).read_text().splitlines()
    if not line.startswith("#")
]
_DIALECT = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b".replace(" ", r"\s+"), re.IGNORECASE)
_CAPITALS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_+")
# What is not code: a comment, a docstring (a long string that begins its line), any other string.
_PROSE = re.compile(
    r'''(?P<said>\#[^\n]*|^[ \t]*r?"""(?:[^"\\]|\\.|"(?!""))*""")|"""(?:[^"\\]|\\.|"(?!""))*"""'''
    r"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""",
    re.MULTILINE | re.DOTALL,
)
# Names of Python's own, and stored ones: members of specs, headers, columns.
_FOREIGN_NAMES = re.compile(
    r"\b(?:tell|guess_type|guess_extension|(?:HEADER_)?foundation(?:_path|_digest|_model_id)?)\b",
    re.IGNORECASE,
)
_QUOTED_NAME = re.compile(r"`[^`\n]*`")
# Where a lane is a part of a vector register.
_VECTOR_CODE = ("luthier_cpu/", "luthier/modeling/kernels/", "tests/luthier_cpu/")
# How many are left in packages; numbers only shrink. One that is not listed counts against the sum.
_COUNTS = {
    # The user `nobody`, and the words of the test of this list.
    "tests": 4,
}


def _package(name: str) -> str:
    """Return `luthier.data` for a file of the library, and the top folder for any other."""
    parts = name.split("/")
    return ".".join(parts[:2]) if parts[0] == "luthier" and len(parts) > 2 else parts[0]


def dialect_in(source: str) -> Counter[str]:
    """Count the words of the dialect in the docstrings, comments and identifiers of a source."""
    prose = [_QUOTED_NAME.sub(" ", match["said"] or "") for match in _PROSE.finditer(source)]
    names = _CAPITALS.sub(" ", _FOREIGN_NAMES.sub(" ", _PROSE.sub(" ", source)))
    return Counter(
        " ".join(word.lower().split()) for text in (*prose, names) for word in _DIALECT.findall(text)
    )


def test_words_are_found_in_docstrings_comments_and_names_and_nowhere_else() -> None:
    source = (
        '"""In place\n of it."""\nclass BellTower:\n    # Tells.\n    is_told = at.tell() + "a lie, untidy"\n'
    )
    assert dialect_in(source) == {"in place of": 1, "bell": 1, "tells": 1, "told": 1}


def test_the_dialect_shrinks() -> None:
    found: dict[str, Counter[str]] = {}
    for name in python_files(*ROOMS, "luthier_cpu", "tests", "benchmarks", "examples"):
        words = dialect_in((ROOT / name).read_text())
        if name.startswith(_VECTOR_CODE):
            del words["lane"], words["lanes"]
        found.setdefault(_package(name), Counter()).update(words)
    counts = {package: words.total() for package, words in found.items()}
    worse = {
        package: dict(found[package].most_common(8))
        for package, limit in _COUNTS.items()
        if counts.get(package, 0) > limit
    }
    assert not worse, f"more words of dialect_words.txt than before: {worse}"
    new = {package: dict(words.most_common(8)) for package, words in found.items() if package not in _COUNTS}
    assert sum(counts.values()) <= sum(_COUNTS.values()), f"more words than before, in new packages: {new}"
    lower = {
        package: counts.get(package, 0) for package in _COUNTS if counts.get(package, 0) < _COUNTS[package]
    }
    if lower:
        warnings.warn(f"_COUNTS may be lowered: {lower}", stacklevel=1)
