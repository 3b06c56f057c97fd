"""`.env.example` lists every setting with its default, and nothing else."""

import re
from pathlib import Path

from pydantic import SecretStr

from luthier.core.settings import Settings

_EXAMPLE = Path(__file__).parents[2] / ".env.example"
# Their defaults depend on the machine, so the example shows a usual one.
_MACHINE_DEPENDENT = {"bases_dir", "models_file"}


def _listed() -> dict[str, str]:
    return dict(re.findall(r"^# (LUTHIER_[A-Z_]+)=(.*)$", _EXAMPLE.read_text(), flags=re.MULTILINE))


def test_every_setting_is_listed_and_no_other() -> None:
    assert set(_listed()) == {f"LUTHIER_{name.upper()}" for name in Settings.model_fields}


def test_every_listed_value_is_the_default() -> None:
    listed = _listed()
    for name, field in Settings.model_fields.items():
        if name in _MACHINE_DEPENDENT:
            continue
        default = field.default
        text = default.get_secret_value() if isinstance(default, SecretStr) else str(default)
        assert listed[f"LUTHIER_{name.upper()}"] == text, name


def test_every_setting_has_a_sentence_above_it() -> None:
    lines = _EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"# LUTHIER_[A-Z_]+=", line):
            assert re.match(r"# [A-Z]?\w", lines[number - 1]), line
            assert "=" not in lines[number - 1].split(" ")[1], line


def test_copying_the_example_changes_nothing() -> None:
    assert all(line.startswith("#") or not line for line in _EXAMPLE.read_text().splitlines())
