"""What the processes of the stack are given."""

from pathlib import Path

import pytest

from luthier.cli.stack.home import Secrets, StackError
from luthier.cli.stack.plan import Plan, reachable_host, service_environment, service_plan
from luthier.core.settings import Settings

_SECRETS = Secrets("id", "lt_first_key", "owner-password", "role-password", "sealing-key")
_HOME = Path("/srv/home")


def _environment(settings: Settings) -> dict[str, str]:
    return service_environment(
        settings,
        home=_HOME,
        run=Path("/tmp/luthier-x"),
        secrets=_SECRETS,
        database_url="postgresql+psycopg://luthier:role-password@/luthier",
        redis_url="redis+socket:///tmp/luthier-x/valkey.sock",
    )


def _plan(settings: Settings | None = None) -> Plan:
    environment = _environment(settings or Settings())
    return service_plan(environment, host="127.0.0.1", port=8000)


@pytest.mark.parametrize(
    ("name", "value", "operators"),
    [
        ("HOME", "/srv/home", None),
        ("STORAGE_URL", "file:///srv/home/objects", "s3://bucket/prefix"),
        ("RUNS_DIR", "/srv/home/runs", "/scratch"),
        ("CACHE_DIR", "/srv/home/cache", None),
        ("INFERENCE_URL", "unix:///tmp/luthier-x/inference.sock", None),
        ("SECRET_KEY", "sealing-key", "theirs"),
    ],
)
def test_state_is_under_the_home_by_absolute_paths_unless_the_operator_has_set_it(
    monkeypatch, name, value, operators
):
    assert _environment(Settings())[f"LUTHIER_{name}"] == value
    if operators is not None:
        monkeypatch.setenv(f"LUTHIER_{name}", operators)
        assert _environment(Settings())[f"LUTHIER_{name}"] == operators


@pytest.mark.parametrize(("set_to", "seconds"), [(None, 5.0), ("600", 600.0)])
def test_a_worker_has_as_long_to_stop_as_its_jobs_have_to_save(monkeypatch, set_to, seconds):
    if set_to is not None:
        monkeypatch.setenv("LUTHIER_STOP_SECONDS", set_to)
    (worker,) = [spec for spec in _plan().late if spec.name == "worker"]
    assert float(worker.environment["LUTHIER_STOP_SECONDS"]) == seconds
    assert worker.stop_seconds == seconds + 1


def test_each_secret_reaches_only_who_needs_it():
    plan = _plan()
    items = (*plan.early, *plan.steps, *plan.late)
    given = {item.name: "\n".join(item.environment.values()) for item in items}
    for secret in ("role-password", "lt_first_key", "sealing-key", "valkey.sock"):
        assert secret not in given["inference"]
    assert [name for name, values in given.items() if "lt_first_key" in values] == ["bootstrap"]
    assert not [name for name, values in given.items() if "owner-password" in values]


def test_each_inference_process_has_a_socket_of_its_own_and_the_api_knows_all():
    plan = _plan(Settings(inference_processes=3))
    assert [spec.name for spec in plan.early] == ["inference", "inference-2", "inference-3"]
    urls = [spec.environment["LUTHIER_INFERENCE_URL"] for spec in plan.early]
    assert urls[1] == "unix:///tmp/luthier-x/inference-2.sock"
    (api, _) = plan.late
    assert api.environment["LUTHIER_INFERENCE_URL"] == ",".join(urls)
    # They share the machine.
    assert {spec.environment["LUTHIER_INFERENCE_PROCESSES"] for spec in plan.early} == {"3"}


def test_the_operators_urls_decide_how_many_inference_processes_there_are():
    plan = _plan(Settings(inference_url="unix:///srv/a.sock, unix:///srv/b.sock"))
    urls = [spec.environment["LUTHIER_INFERENCE_URL"] for spec in plan.early]
    assert urls == ["unix:///srv/a.sock", "unix:///srv/b.sock"]
    with pytest.raises(StackError, match="names 1 servers and LUTHIER_INFERENCE_PROCESSES is 2"):
        _plan(Settings(inference_url="unix:///srv/a.sock", inference_processes=2))


def test_a_server_that_is_not_ours_is_not_started():
    plan = _plan(Settings(inference_backend="vllm", inference_url="http://vllm:8000"))
    assert plan.early == ()
    assert plan.late[0].environment["LUTHIER_INFERENCE_BACKEND"] == "vllm"
    with pytest.raises(StackError, match="set LUTHIER_INFERENCE_URL"):
        _plan(Settings(inference_backend="vllm"))


def test_api_and_worker_are_stopped_before_what_they_use():
    plan = _plan()
    stages = {spec.name: spec.stop_stage for spec in (*plan.early, *plan.late)}
    assert max(stages["api"], stages["worker"]) < stages["inference"]


def test_all_stages_together_fit_into_ten_seconds():
    from luthier.cli.stack.postgres import Postgres
    from luthier.cli.stack.valkey import Valkey

    folder = Path("/nowhere")
    servers = [Postgres(folder, folder, folder, None, _SECRETS).spec(), Valkey(folder, folder).spec()]
    plan = _plan()
    limits: dict[int, float] = {}
    for spec in (*plan.early, *plan.late, *servers):
        limits[spec.stop_stage] = max(limits.get(spec.stop_stage, 0.0), spec.stop_seconds)
    assert sum(limits.values()) < 10.0


@pytest.mark.parametrize(
    ("bound", "reached"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("fd00::1", "[fd00::1]")],
)
def test_a_client_here_reaches_what_was_bound(bound, reached):
    assert reachable_host(bound) == reached
