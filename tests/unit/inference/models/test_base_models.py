"""Bases as they are loaded."""

import pytest

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.specs import BaseFacts
from luthier.inference.models.base_models import load
from luthier.inference.runners.paged import PagedRunner
from tests.inference_server import make_settings
from tests.tiny import BASE_ID, CONTEXT_LENGTH, build_tiny_base
from tests.tiny_shapes import NUM_POSITIONS, build_shape


@pytest.mark.parametrize(("shape", "positions"), [(None, CONTEXT_LENGTH), ("gpt2", NUM_POSITIONS)])
@pytest.mark.parametrize("change", [-16, 16])
def test_a_context_is_never_longer_than_the_models_positions(tmp_path, shape, positions, change):
    folder = build_tiny_base(tmp_path / "bases" / BASE_ID)
    if shape is not None:
        # A base whose positions are learned, under the tiny base's tokenizer.
        for path in build_shape(tmp_path / "shape", shape).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    facts = BaseFacts.model_validate_json((folder / FACTS_NAME).read_bytes())
    facts = facts.model_copy(update={"context_length": positions + change})
    (folder / FACTS_NAME).write_text(facts.model_dump_json())
    base = load(make_settings(tmp_path), BASE_ID)
    assert base.facts.context_length == min(positions, positions + change)
    assert isinstance(base.executor.runner, PagedRunner) == (shape is not None)
