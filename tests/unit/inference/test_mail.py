"""Events reach their queues in order, and a loop is woken once for what was held back together."""

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable

import pytest

from luthier.inference.mail import Mail, hand_over, holding_back, own_mail


def run_in_thread(work: Callable[[], None]) -> "asyncio.Future[None]":
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - pytest's own are not exceptions of another kind
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=run).start()
    return done


def test_what_is_held_back_wakes_the_loop_once_when_it_is_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> list[int]:
        queue, mail, rings = asyncio.Queue[int](), own_mail(), []
        assert mail is own_mail()
        ring = mail.ring
        monkeypatch.setattr(mail, "ring", lambda: (rings.append(len(mail._posted)), ring()))

        def post() -> None:
            with holding_back():
                for number in range(3):
                    mail.post(queue.put_nowait, number)
                assert rings == []
                hand_over()
                assert rings == [3]
                hand_over()
                mail.post(queue.put_nowait, 3)
                assert len(rings) == 1
            assert len(rings) == 2
            mail.post(queue.put_nowait, 4)

        await run_in_thread(post)
        assert len(rings) == 3
        return [await asyncio.wait_for(queue.get(), 5) for _ in range(5)]

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_a_loop_is_rung_once_until_it_delivers() -> None:
    async def main() -> list[int]:
        queue, mail = asyncio.Queue[int](), own_mail()
        for number in range(3):
            mail.post(queue.put_nowait, number)
        assert os.read(mail._heard, 100) == b"!"
        # As if nothing had been read.
        mail._is_rung = False
        mail.post(queue.put_nowait, 3)
        return [await asyncio.wait_for(queue.get(), 5) for _ in range(4)]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_what_is_held_back_for_a_loop_that_is_gone_rings_nobody_elses_pipe() -> None:
    async def main() -> Mail[int]:
        mail = own_mail()
        mail.post(asyncio.Queue[int]().put_nowait, 1)
        return mail

    loop = asyncio.new_event_loop()
    with holding_back():
        mail = loop.run_until_complete(main())
        loop.close()
        del loop
        gc.collect()
        heard, bell = os.pipe()
        os.set_blocking(heard, False)
        # The number that the bell had is somebody else's now.
        os.dup2(bell, mail._bell)
    with pytest.raises(BlockingIOError):
        os.read(heard, 1)
    for end in {heard, bell, mail._bell}:
        os.close(end)


def test_what_was_posted_before_a_fault_arrives_all_the_same() -> None:
    async def main() -> int:
        queue, mail = asyncio.Queue[int](), own_mail()

        def post() -> None:
            with pytest.raises(ValueError, match="fault"), holding_back():
                mail.post(queue.put_nowait, 1)
                raise ValueError("fault")

        await run_in_thread(post)
        return await asyncio.wait_for(queue.get(), 5)

    assert asyncio.run(main()) == 1


def test_a_ring_keeps_the_interpreter() -> None:
    async def main() -> None:
        mail, deliveries = own_mail(), []
        deliver = mail._deliver
        loop = asyncio.get_running_loop()
        loop.add_reader(mail._heard, lambda: (deliveries.append(time.perf_counter()), deliver()))
        returned: list[float] = []

        def post() -> None:
            # The loop's thread is asleep when it is rung.
            time.sleep(0.1)
            before = sys.getswitchinterval()
            sys.setswitchinterval(5.0)
            try:
                mail.post(asyncio.Queue[int]().put_nowait, 1)
                end = time.perf_counter() + 0.05
                while time.perf_counter() < end:
                    pass
                returned.append(time.perf_counter())
            finally:
                sys.setswitchinterval(before)

        await run_in_thread(post)
        # The loop was woken at once, and had to wait until the other thread gave the interpreter up.
        assert deliveries[0] > returned[0]

    asyncio.run(main())


def test_a_loop_that_is_gone_takes_nothing_and_leaves_no_pipe() -> None:
    async def main() -> Mail[int]:
        return own_mail()

    loop = asyncio.new_event_loop()
    mail = loop.run_until_complete(main())
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        mail.post(asyncio.Queue[int]().put_nowait, 1)
    os.fstat(mail._bell)
    del loop
    gc.collect()
    with pytest.raises(RuntimeError, match="closed"):
        mail.post(asyncio.Queue[int]().put_nowait, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mail._bell)
