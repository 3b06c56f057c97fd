"""What no log may hold."""

import subprocess
import sys

_PROBE = """
import logging
from luthier.core.logs import configure_logs
configure_logs("debug")
logging.getLogger("httpx2").info("POST https://hooks.example/?token=secret")
logging.getLogger("httpcore2.http11").debug("x-token: secret")
logging.getLogger("ours").info("told")
"""


def test_the_http_library_writes_down_no_url_and_no_header() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    assert "told" in done.stderr
    assert "secret" not in done.stderr
