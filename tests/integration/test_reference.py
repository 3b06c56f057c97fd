"""What a new user finds by a browser or a generator: the page at `/`, the reference, the OpenAPI document."""

import re
from typing import Any

import httpx2
import pytest

from tests.conftest import Api


def test_the_page_at_the_root_says_where_things_are_to_people_and_to_programs(api: Api) -> None:
    page = httpx2.get(api.base_url, headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    linked = set(re.findall(r'href="([^"]+)"', page.text))
    places = httpx2.get(api.base_url, headers={"accept": "application/json"}).json()
    assert places["name"] == "luthier"
    assert linked == {value for value in places.values() if value.startswith("/")}
    for path in linked - {"/v1"}:
        assert httpx2.get(api.base_url + path, headers=api.headers).status_code == 200


def test_the_reference_loads_nothing_from_elsewhere(api: Api) -> None:
    page = httpx2.get(f"{api.base_url}/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 3
    for url in loaded:
        if url != "data:,":
            assert url.startswith("/docs/")
            answer = httpx2.get(api.base_url + url)
            assert answer.status_code == 200
            assert len(answer.text) > 100_000
    assert httpx2.get(f"{api.base_url}/docs/other.js").status_code == 400


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    return dict(httpx2.get(f"{api.base_url}/openapi.json").json())


def test_the_document_says_how_to_authenticate_and_where(document: dict[str, Any]) -> None:
    scheme = document["components"]["securitySchemes"]["ApiKey"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert [server["url"] for server in document["servers"]] == ["/"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert (operation.get("security") == [{"ApiKey": []}]) == path.startswith(("/v1/", "/metrics")), (
                path
            )


def test_every_answer_has_a_named_model(document: dict[str, Any]) -> None:
    operations = [(path, one) for path, methods in document["paths"].items() for one in methods.values()]
    assert len(operations) > 50
    for path, operation in operations:
        answers = {status: one for status, one in operation["responses"].items() if status.startswith("2")}
        contents = [one.get("content", {}) for status, one in answers.items() if status == "200"]
        assert contents != [{}], path
        for content in contents:
            if "application/json" in content:
                assert set(content["application/json"]["schema"]) == {"$ref"}, path
        refused = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert refused == {"$ref": "#/components/schemas/ErrorBody"}
