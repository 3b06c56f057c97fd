"""The documents say what the code does: codes, quickstart, links, names of files and functions."""

import ast
import re
from pathlib import Path

import pytest

from luthier.core import errors
from luthier.core.errors import JobError, LuthierError
from tests.architecture.sources import ROOMS, ROOT, python_files, tracked_files, tree_of

_DOCUMENTS = [name for name in tracked_files() if name.endswith(".md") and "/support/" not in name]


def _codes_of(name: str) -> set[str]:
    """Return the codes that a file defines: class attributes named `code`, and pairs `message, code = …`."""
    found: set[str] = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                target = statement.targets[0] if isinstance(statement, ast.Assign) else None
                target = statement.target if isinstance(statement, ast.AnnAssign) else target
                value = getattr(statement, "value", None)
                if isinstance(target, ast.Name) and target.id == "code" and isinstance(value, ast.Constant):
                    found.add(value.value)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = [getattr(element, "id", "") for element in node.targets[0].elts]
            if "code" in names and isinstance(node.value, ast.Tuple):
                value = node.value.elts[names.index("code")]
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found.add(value.value)
    return found


def _documented() -> dict[str, str]:
    """Return the codes of docs/errors.md with the cell that follows each."""
    text = (ROOT / "docs/errors.md").read_text()
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, flags=re.MULTILINE))


def test_every_error_code_is_documented_and_no_other() -> None:
    defined = set().union(*(_codes_of(name) for name in python_files(*ROOMS)))
    assert set(_documented()) == defined


def test_the_documented_http_status_is_the_codes_own() -> None:
    classes = [
        cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, LuthierError)
    ]
    documented = _documented()
    for cls in classes:
        if cls.code is not None and not issubclass(cls, JobError):
            assert documented[cls.code].strip() == str(cls.http_status), cls


def _python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def test_the_tutorials_program_is_the_example_and_the_readmes_snippet_is_cut_from_it() -> None:
    example = (ROOT / "examples/quickstart.py").read_text()
    assert _python_blocks("docs/tutorial.md") == [example]
    [snippet] = _python_blocks("README.md")
    assert set(snippet.splitlines()) <= set(example.splitlines())


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def _anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", _DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" not in target:
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in _anchors(linked), f"{target}#{anchor}"


def _defines(path: Path, name: str) -> bool:
    last = name.rpartition(".")[2]
    return any(
        getattr(node, "name", None) == last
        for node in ast.walk(tree_of(str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    )


@pytest.mark.parametrize("name", _DOCUMENTS)
def test_files_and_functions_that_documents_name_exist(name: str) -> None:
    for file, function in re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", (ROOT / name).read_text()):
        paths = [known for known in tracked_files() if f"/{known}".endswith(f"/{file}")]
        assert paths, file
        assert not function or any(_defines(Path(path), function) for path in paths), f"{file}: {function}"


def test_the_walkthrough_names_twelve_files_in_order() -> None:
    rows = re.findall(
        r"^\| (\d+) \| `([\w/]+\.py): ", (ROOT / "docs/walkthrough.md").read_text(), re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == list(range(1, 13))
    assert len({file for _, file in rows}) == 12


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_that_documents_name_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_each_decision_has_a_number_of_its_own() -> None:
    """Numbers of decisions whose subject was deleted are not used again."""
    numbers = [int(path.name[:4]) for path in (ROOT / "docs/decisions").glob("0*.md")]
    assert len(set(numbers)) == len(numbers)
