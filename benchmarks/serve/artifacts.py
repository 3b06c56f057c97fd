"""Tuned models to serve: random numbers in every method's own layout, published as a job's result is.

`python -m benchmarks.serve.artifacts ORDER.json` makes them in a process of its own, so that the base that
it needs takes no memory of a measurement. What a model says does not matter here: the cost of serving does
not depend on it, as long as every number of it takes part.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve.process import SideFailedError
from benchmarks.train.contestants import quiet_environment
from luthier.data.rendering.tokenizer import Tokenizer


def copy_without_end(base: Path, bases_dir: Path) -> Path:
    """Make a copy of a base whose end token never comes.

    Args:
        base: a fetched base.
        bases_dir: where the copy goes, under the same name.

    Returns:
        The copy's folder; large files are links.
    """
    folder = bases_dir / base.name
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            _link(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    never_id, never = _rare_token(base)
    for name in ("config.json", "generation_config.json"):
        _change(folder / name, {"eos_token_id": never_id, "pad_token_id": never_id})
    _change(folder / "tokenizer_config.json", {"eos_token": never, "pad_token": never})
    if Tokenizer.load(folder).stop_token_ids != {never_id}:
        raise SystemExit(f"The end tokens of {base.name} can't be changed.")
    return folder


def _rare_token(base: Path) -> tuple[int, str]:
    """Return the last token that stands for no text and ends nothing."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    ends = Tokenizer.load(base).stop_token_ids
    marks = [token for token in tokenizer["added_tokens"] if token["special"] and token["id"] not in ends]
    return marks[-1]["id"], marks[-1]["content"]


def _change(path: Path, values: dict[str, object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values, indent=1))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # On another file system.
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class Published:
    """A tuned model: its method, its artifact in our storage and the same files for a peer.

    `num_bytes` are those of its weights' file.
    """

    name: str
    kind: str
    prefix: str
    digest: str
    folder: Path
    num_bytes: int
    num_parameters: int


TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
    "prefix": {"type": "prefix", "num_virtual_tokens": 16, "init": "random", "projection": False},
    "prompt": {"type": "prompt", "num_virtual_tokens": 16, "init": "random"},
    "adapter": {"type": "adapter", "bottleneck_dim": 64, "placement": "houlsby"},
}
WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# Of what starts at zero, so that an artifact changes the base's words and leaves them words.
_ZERO_STD = 0.01
# Of what starts at random numbers, as a share of their own spread.
_SHARE = 0.1
_MAX_SECONDS = 3600.0
# As many as training takes.
_CANARY_TOKENS, _CANARY_CANDIDATES = 4, 32


def make_artifacts(
    wanted: dict[str, int], *, base: Path, objects: Path, scratch: Path, label: str, first_seed: int = 1
) -> dict[str, list[Published]]:
    """Make and publish artifacts.

    Args:
        wanted: how many by method.
        base: the base's folder.
        objects: root of the storage.
        scratch: an existing folder; what is made stays there for peers.
        label: part of the models' names and of their place.
        first_seed: of the first one; each has a seed of its own.

    Returns:
        The models by method.

    Raises:
        SideFailedError: when the process that makes them fails.
    """
    order = scratch / f"artifacts-{label}.json"
    order.write_text(
        json.dumps(
            {
                "wanted": wanted,
                "base": str(base),
                "objects": str(objects),
                "folder": str(scratch / f"artifacts-{label}"),
                "label": label,
                "first_seed": first_seed,
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve.artifacts", str(order)],
        capture_output=True,
        text=True,
        check=False,
        env=quiet_environment(os.cpu_count() or 1),
        timeout=_MAX_SECONDS,
    )
    if done.returncode != 0:
        raise SideFailedError(f"artifacts can't be made: {done.stderr.strip()[-300:]}")
    reported = json.loads(done.stdout.splitlines()[-1])
    return {
        kind: [Published(**(one | {"folder": Path(one["folder"])})) for one in models]
        for kind, models in reported.items()
    }


def publish_twin(model: Published, number: int, objects: Path) -> Published:
    """Publish a model of other configuration and digest whose weights are a link to another's.

    A thousand models then take the disk of one; to the server they are as different as any two.

    Args:
        model: whose weights they are.
        number: of the twin.
        objects: root of the storage, a local folder.

    Returns:
        The twin.
    """
    from luthier.core.specs import CANARY_NAME
    from luthier.storage.manifests import read_manifest, seal_folder

    name = f"{model.name}-twin-{number}"
    final = objects / f"{model.prefix}-twin-{number}"
    building = final.with_name(f".{final.name}.building")
    building.mkdir(parents=True)
    for name_of_file in (WEIGHTS, CANARY_NAME):
        os.link(model.folder / name_of_file, building / name_of_file)
    config = json.loads((model.folder / _CONFIG).read_text())
    # PEFT's own field for a version, which nothing reads here.
    (building / _CONFIG).write_text(json.dumps(config | {"revision": str(number)}))
    base_digest = read_manifest(model.folder).base_digest
    manifest = seal_folder(building, final, digested=[WEIGHTS, _CONFIG], base_digest=base_digest)
    return Published(
        name,
        model.kind,
        final.relative_to(objects).as_posix(),
        manifest.digest,
        final,
        model.num_bytes,
        model.num_parameters,
    )


def _make(order: dict[str, Any]) -> dict[str, list[Published]]:
    return {kind: _make_kind(kind, count, order) for kind, count in order["wanted"].items()}


def _make_kind(kind: str, count: int, order: dict[str, Any]) -> list[Published]:
    """Attach a method once, and save it under ever new numbers."""
    import torch

    from luthier.bases.catalogue import find_base_facts
    from luthier.methods._tuning import parse_tuning
    from luthier.methods.base import Start, Workload
    from luthier.modeling.load import load_base
    from luthier.storage.store import Storage

    base, folder = Path(order["base"]), Path(order["folder"])
    facts = find_base_facts(base.parent, base.name)
    assert facts is not None, "the base has been fetched"
    storage = Storage.open(f"file://{order['objects']}")
    causal_lm = load_base(base, dtype=torch.float32, device="cpu")
    method, params = parse_tuning(TUNINGS[kind])
    params = method.resolve(params, Workload(facts, 1, 1))
    attached = method.attach(causal_lm, params, Start(order["first_seed"], facts.id, lambda _text: [1]))
    found = []
    for number in range(count):
        name = f"{order['label']}-{kind}-{number}"
        generator = torch.Generator().manual_seed(order["first_seed"] + number)
        with torch.no_grad():
            for _, parameter in attached.named_trained_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                std = float(parameter.std()) * _SHARE if bool(parameter.any()) else _ZERO_STD
                parameter.add_(noise.to(parameter) * std)
        found.append(_publish(method, attached, name, kind, folder, storage, base_digest=facts.digest))
    return found


def _publish(
    method: Any, attached: Any, name: str, kind: str, folder: Path, storage: Any, *, base_digest: str
) -> Published:
    from luthier.core.specs import CANARY_NAME
    from luthier.storage.manifests import seal_folder

    building, final = folder / f".{name}", folder / name
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    digested = method.save(attached, building)
    (building / CANARY_NAME).write_text(_record(method, attached).model_dump_json())
    manifest = seal_folder(building, final, digested=digested, base_digest=base_digest)
    prefix = f"projects/proj_bench/jobs/{name}/e1/model"
    storage.put_folder(final, prefix)
    num_bytes = (final / WEIGHTS).stat().st_size
    return Published(name, kind, prefix, manifest.digest, final, num_bytes, attached.num_trained_parameters)


def _record(method: Any, attached: Any) -> Any:
    """Return what training would record of a model: what it says after a short text."""
    import torch

    from luthier.core.specs import Canary

    token_ids = list(range(100, 100 + _CANARY_TOKENS))
    with torch.no_grad():
        logits_V = method.logits(attached, torch.tensor([token_ids]))[0, -1]
    values, candidates = logits_V.topk(_CANARY_CANDIDATES)
    return Canary(
        token_ids=token_ids,
        candidates=candidates.tolist(),
        logits=values.tolist(),
        precision="float32",
    )


def main() -> None:
    """Make what the order says and print it in one line."""
    made = _make(json.loads(Path(sys.argv[1]).read_text()))
    reported = {
        kind: [asdict(one) | {"folder": str(one.folder)} for one in models] for kind, models in made.items()
    }
    print(json.dumps(reported))


if __name__ == "__main__":
    main()
