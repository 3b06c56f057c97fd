"""What no log may hold."""

import json
import subprocess
import sys

_PROBE = """
import logging
from luthier.core.logs import configure_logs
configure_logs("debug")
logging.getLogger("httpx2").info("POST https://hooks.example/?token=secret")
logging.getLogger("httpcore2.http11").debug("x-token: secret")
logging.getLogger("ours").info("reported")
"""


def test_the_http_library_writes_down_no_url_and_no_header():
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    assert "reported" in done.stderr
    assert "secret" not in done.stderr


def test_an_exception_is_logged_by_types_and_places_without_its_text():
    code = (
        "import logging, structlog\n"
        "from luthier.core.logs import configure_logs\n"
        "configure_logs('info')\n"
        "def fail():\n"
        "    try:\n"
        "        raise KeyError('secret')\n"
        "    except KeyError as error:\n"
        "        raise ValueError('secret') from error\n"
        "try:\n"
        "    fail()\n"
        "except ValueError as error:\n"
        "    structlog.get_logger().error('a', exc_info=error)\n"
        "    structlog.get_logger().exception('b')\n"
        "    logging.getLogger('uvicorn.error').error('c', exc_info=error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "secret" not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["a", "b", "c"]
    for line in lines:
        assert (line["error_type"], line["caused_by"]) == ("ValueError", "KeyError")
        assert line["trace"][-1].endswith(" fail")
