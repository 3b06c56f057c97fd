"""The page of the methods' parameters is the one that their schemas make."""

from luthier.methods import discover
from luthier.methods._document import parameters_page
from tests.architecture.sources import ROOT


def test_the_page_of_parameters_is_what_the_schemas_say() -> None:
    page = (ROOT / "docs/methods-parameters.md").read_text()
    assert page == parameters_page(), "run: python -m luthier.methods._document > docs/methods-parameters.md"


def test_every_parameter_has_a_description() -> None:
    for method in discover().values():
        for name, field in method.Params.model_fields.items():
            assert name == "type" or field.description, f"{method.name}: {name}"
