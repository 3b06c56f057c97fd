"""Deleted models leave memory and disk, and no other client notices."""

import asyncio
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from luthier.core.errors import UnavailableError
from luthier.core.inference import ModelTarget
from luthier.core.settings import Settings
from luthier.inference.models.loading import Kind
from luthier.inference.server import app as app_module
from luthier.inference.server.app import build_app
from luthier.methods import discover
from luthier.storage.store import Storage
from tests.conftest import wait_until
from tests.inference_server import CHAT, Served, publish, user
from tests.unit.inference.artifacts import build_method_artifact

WHOLE = next(name for name, method in discover().items() if method.is_whole_model)


def publish_tuned(folder: Path, base_folder: Path, name: str, method: str, seed: int) -> ModelTarget:
    build_method_artifact(folder / name, base_folder, {"type": method}, seed=seed)
    return publish(folder, folder / name, name)


def drop_deleted(served: Served) -> None:
    asyncio.run_coroutine_threadsafe(served.service.models.drop_deleted(), served.loop).result(30)


def copy_of(folder: Path, target: ModelTarget) -> Path:
    return folder / "cache" / "artifacts" / str(target.digest).removeprefix("sha256:")


@pytest.mark.parametrize("method", ["lora", WHOLE])
def test_a_deleted_model_leaves_memory_and_disk_and_another_stays(
    served: Served, folder: Path, base_folder: Path, method: str
) -> None:
    storage, kind = Storage.open(f"file://{folder}/objects"), Kind.WHOLE if method == WHOLE else Kind.PACKED
    deleted = publish_tuned(folder, base_folder, f"deleted-{method}", method, 71)
    deleted = deleted.model_copy(update={"is_pinned": True})
    kept = publish_tuned(folder, base_folder, f"kept-{method}", method, 72)
    texts = {target.model: served.chat("the sky", target, max_tokens=4) for target in (deleted, kept)}
    loaded = served.service.models.loaded
    wait_until(lambda: {deleted.digest, kept.digest} <= set(loaded.digests), "both are loaded")
    drop_deleted(served)
    assert {deleted.digest, kept.digest} <= set(loaded.digests)
    held = loaded.stats(kind).num_bytes
    storage.delete_prefix(str(deleted.artifact))
    drop_deleted(served)
    assert deleted.digest not in loaded.digests and loaded.stats(kind).num_bytes < held
    assert not copy_of(folder, deleted).exists()
    assert kept.digest in loaded.digests and copy_of(folder, kept).is_dir()
    again = served.chat("the sky", kept, max_tokens=4)
    assert again["choices"] == texts[kept.model]["choices"]


def test_an_answer_that_is_being_made_is_made_to_its_end(served: Served) -> None:
    target = publish_tuned(served.folder, served.base_folder, "answering", "lora", 73)
    expected = served.chat("the sea", target, max_tokens=6)["choices"]
    found: list[object] = []
    served.steps.gate.clear()
    number = served.steps.num_steps
    asking = threading.Thread(
        target=lambda: found.append(served.chat("the sea", target, max_tokens=6)["choices"])
    )
    asking.start()
    wait_until(lambda: served.steps.num_steps > number, "a step has begun")
    Storage.open(f"file://{served.folder}/objects").delete_prefix(str(target.artifact))
    drop_deleted(served)
    assert target.digest in served.service.models.loaded.digests
    served.steps.gate.set()
    asking.join(30)
    assert found == [expected]
    wait_until(lambda: gone(served, target), "it leaves once it has answered")
    response = served.post(CHAT, target, messages=user("the sea"))
    assert response.json()["error"]["code"] == "artifact_corrupt"


def gone(served: Served, target: ModelTarget) -> bool:
    drop_deleted(served)
    return target.digest not in served.service.models.loaded.digests


def test_models_stay_while_storage_is_away(served: Served, folder: Path, base_folder: Path) -> None:
    target = publish_tuned(folder, base_folder, "staying", "lora", 74)
    expected = served.chat("the sea", target, max_tokens=4)["choices"]
    objects = folder / "objects"
    objects.rename(folder / "elsewhere")
    try:
        drop_deleted(served)
        # As a disk that is not mounted.
        objects.mkdir()
        drop_deleted(served)
        assert copy_of(folder, target).is_dir()
        assert served.chat("the sea", target, max_tokens=4)["choices"] == expected
    finally:
        objects.rmdir()
        (folder / "elsewhere").rename(objects)


def test_a_server_looks_for_deleted_models_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Semaphore(0)

    async def look() -> None:
        looked.release()
        raise UnavailableError("Storage is away.")

    async def run() -> None:
        service, sent = MagicMock(), asyncio.Queue[dict[str, str]]()
        service.models.drop_deleted = look
        settings = Settings(_env_file=None, preload_base="")
        received = asyncio.Queue[dict[str, str]]()
        app = build_app(service, settings, token=None)
        received.put_nowait({"type": "lifespan.startup"})
        serving = asyncio.create_task(app({"type": "lifespan"}, received.get, sent.put))
        for _ in range(2):
            assert await asyncio.to_thread(looked.acquire, timeout=30)
        received.put_nowait({"type": "lifespan.shutdown"})
        await asyncio.wait_for(serving, 30)

    monkeypatch.setattr(app_module, "DELETED_CHECK_SECONDS", 0.01)
    asyncio.run(run())
