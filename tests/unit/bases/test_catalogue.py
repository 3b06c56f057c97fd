from pathlib import Path

import pytest

from luthier.bases.catalogue import load_catalogue
from luthier.core.errors import LuthierError, ModelNotAvailableError

SHIPPED = Path(__file__).parents[3] / "models.toml"
ENTRY = 'source = "{source}"\nlicence = "x"\ncontext_length = 64\nmemory_gib = 1\n'


def test_the_shipped_catalogue_is_sound_and_every_entry_is_pinned():
    catalogue = load_catalogue(SHIPPED)
    for entry in catalogue.bases.values():
        if entry.source_kind == "pypi":
            assert entry.sha256 is not None
        else:
            revision = entry.source.rsplit("@", 1)[1]
            assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gpt-4o-mini-2024-07-18", "gpt-3.5-turbo"])
def test_ids_and_mapped_names_lead_to_the_base(name):
    assert load_catalogue(SHIPPED).resolve(name).id == "smollm2-135m-instruct"


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        ModelNotAvailableError,
        match=r"smollm2-135m-instruct, .*gpt-4o-mini-2024-07-18 .smollm2-135m-instruct.",
    ) as caught:
        load_catalogue(SHIPPED).resolve("gpt-9")
    assert caught.value.param == "model"


def test_a_tuned_models_name_is_not_reported_as_a_base():
    with pytest.raises(ModelNotAvailableError, match="No tuned model of this project is called 'ft:a::b'"):
        load_catalogue(SHIPPED).resolve("ft:a::b")


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ("[bases.a]\n" + ENTRY.format(source="ftp://x"), "is none of"),
        ("[bases.A]\n" + ENTRY.format(source="path:/x"), "can't be read"),
        ("[bases.a]\nwhat = 1\n" + ENTRY.format(source="path:/x"), "can't be read"),
        ('[aliases]\n"x" = "y"\n', "is no base here"),
        ("[bases", "can't be read"),
    ],
)
def test_a_broken_catalogue_is_refused_with_the_reason(tmp_path, content, reported):
    path = tmp_path / "models.toml"
    path.write_text(content)
    with pytest.raises(LuthierError, match=reported):
        load_catalogue(path)
