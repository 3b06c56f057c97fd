"""A pinned model is asked for as one, whatever name it is called by; its own project alone may pin it."""

from sqlalchemy import update

from db.tables import Job
from luthier.client import LuthierClient
from luthier.core.inference import ModelTarget
from tests.aliases import V1, V2, Aliases
from tests.conftest import TINY_BASE, Api


def test_a_pin_is_in_the_target_until_it_is_removed(ours: Aliases, theirs: Aliases, api: Api) -> None:
    def asked(name: str) -> ModelTarget:
        messages = [{"role": "user", "content": "hi"}]
        ours.ok("POST", "/chat/completions", {"model": name, "messages": messages})
        return api.backend.asked[-1][2]

    ours.put("letters", V1)
    assert ours.ok("GET", f"/models/{V1}")["pinned"] is False
    for _ in range(2):
        assert ours.ok("PUT", f"/models/{V1}/pin")["pinned"] is True
    assert [asked(name).is_pinned for name in (V1, "letters", TINY_BASE)] == [True, True, False]
    client = LuthierClient(f"{api.base_url}/v1", api.key)
    assert client.pin_model(V1)["pinned"] is True
    assert theirs.refused("DELETE", f"/models/{V1}/pin")[0] == 404
    assert client.pin_model(V1, is_pinned=False)["pinned"] is False
    assert not asked(V1).is_pinned
    assert ours.refused("PUT", "/models/letters/pin")[:3] == (400, "invalid_value", "model")
    assert ours.refused("PUT", "/models/nobody/pin")[:2] == (404, "model_not_found")
    # A base, by its own name and by one that is mapped to it.
    for name in (TINY_BASE, "gpt-4o-mini-2024-07-18"):
        for method, path in (("PUT", f"/models/{name}/pin"), ("GET", f"/models/{name}/files")):
            refused = ours.refused(method, path)
            assert refused[:3] == (400, "invalid_value", "model") and "is a base model" in refused[3]


def test_a_project_pins_models_up_to_its_share_and_is_given_the_limit(ours: Aliases, api: Api) -> None:
    with api.state.database.transaction() as session:
        session.execute(update(Job).values(report={"run": {"artifact_bytes": 3_000_000_000}}))
    api.backend.room_bytes = {"packed": 16_000_000_000, "whole": 1}
    assert ours.ok("PUT", f"/models/{V1}/pin")["pinned"] is True
    status, code, param, message = ours.refused("PUT", f"/models/{V2}/pin")
    assert (status, code, param) == (400, "pin_limit_exceeded", "model")
    for part in ("3000000000 bytes", "4000000000 bytes", "Unpin another", "LUTHIER_MAX_PINNED_SHARE"):
        assert part in message
    assert ours.ok("GET", f"/models/{V2}")["pinned"] is False
    ours.ok("DELETE", f"/models/{V1}/pin")
    assert ours.ok("PUT", f"/models/{V2}/pin")["pinned"] is True
