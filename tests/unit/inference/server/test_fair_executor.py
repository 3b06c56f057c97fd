import asyncio
import os

from luthier.inference.server.app import FairExecutor


def test_what_a_request_makes_long_yields_its_processor_to_the_steps():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    found = asyncio.run(FairExecutor(1, "compile").run("p", lambda: os.getpriority(os.PRIO_PROCESS, 0)))
    assert found > own == os.getpriority(os.PRIO_PROCESS, 0)
