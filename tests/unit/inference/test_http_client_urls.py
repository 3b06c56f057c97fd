"""The URLs that the client of a model server takes."""

import pytest

from luthier.core.errors import LuthierError
from luthier.inference.backends._http import HttpClient


@pytest.mark.parametrize(
    "url", ["localhost:8001", "ftp://host", "http://", "http://host:port", "http://host/a b", "http://[::1"]
)
def test_a_url_of_another_kind_is_refused_by_name(url: str) -> None:
    with pytest.raises(LuthierError, match="no server's URL"):
        HttpClient(url, {})


def test_a_url_with_what_would_not_be_sent_is_refused_and_no_password_told() -> None:
    for url in ("http://user:secret@host", "http://host/?a=1", "http://host/#a"):
        with pytest.raises(LuthierError, match="none of which is sent") as raised:
            HttpClient(url, {})
        assert "secret" not in str(raised.value)
