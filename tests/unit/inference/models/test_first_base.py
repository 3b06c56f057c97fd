"""Bases that are asked for at once, and what is done when the first alone is in memory."""

import asyncio
import gc
import threading

import pytest
import torch

from luthier.core.runtime import freeze_garbage
from luthier.core.settings import Settings
from luthier.inference.models import base_models
from luthier.inference.models.base_models import LoadedBase
from luthier.inference.models.registry import Models
from tests.inference_server import make_settings
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.models.test_adapter_cache import InlineEngine

pytestmark = pytest.mark.anyio


async def test_the_first_base_alone_is_reported_and_before_a_request_gets_it(tmp_path):
    for base_id in (BASE_ID, "tiny-twin"):
        build_tiny_base(tmp_path / "bases" / base_id)
    reported: list[list[str]] = []

    models = Models(make_settings(tmp_path), InlineEngine(), lambda: reported.append(models.base_ids))
    await asyncio.gather(models.get_base(BASE_ID), models.get_base("tiny-twin"))
    await models.get_base(BASE_ID)
    assert sorted(models.base_ids) == sorted([BASE_ID, "tiny-twin"])
    assert reported == [[]]


async def test_who_leaves_while_a_base_is_loaded_leaves_it_to_the_next(tmp_path, monkeypatch):
    build_tiny_base(tmp_path / "bases" / BASE_ID)
    begun, may_end, num_loads = threading.Event(), threading.Event(), []
    load = base_models.load

    def load_slowly(settings: Settings, base_id: str) -> LoadedBase:
        num_loads.append(base_id)
        begun.set()
        assert may_end.wait(30)
        return load(settings, base_id)

    monkeypatch.setattr(base_models, "load", load_slowly)

    models = Models(make_settings(tmp_path), InlineEngine())
    leaving = asyncio.ensure_future(models.get_base(BASE_ID))
    assert await asyncio.to_thread(begun.wait, 30)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    next_one = asyncio.ensure_future(models.get_base(BASE_ID))
    await asyncio.sleep(0.05)
    may_end.set()
    assert (await next_one).facts.id == BASE_ID
    assert num_loads == [BASE_ID]


async def test_bases_that_are_loaded_at_once_leave_each_other_whole(tmp_path):
    # transformers' own loading does not: with two threads some weights come out as missing, from then on.
    base_ids = [f"tiny-{number}" for number in range(4)]
    for base_id in base_ids:
        build_tiny_base(tmp_path / "bases" / base_id)

    for _ in range(3):
        models = Models(make_settings(tmp_path), InlineEngine())
        loaded = await asyncio.gather(*map(models.get_base, base_ids))
        logits = [base.probe_logits for base in loaded]
        assert all(torch.equal(one, logits[0]) for one in logits)


def test_what_is_there_is_not_looked_at_again():
    before = gc.get_freeze_count()
    try:
        freeze_garbage()
        assert gc.get_freeze_count() > before
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
    finally:
        gc.unfreeze()
