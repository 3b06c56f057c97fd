"""Events reach their queues in order, and a loop is woken once for what was posted together."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from luthier.inference.mail import mail_of, posted_together


def run_in_thread(work: Callable[[], None]) -> "asyncio.Future[None]":
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        work()
        loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=run).start()
    return done


def test_what_is_posted_together_wakes_the_loop_once_and_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> list[int]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()
        mail, wakes = mail_of(loop), []
        assert mail is mail_of(loop)
        wake = mail.wake
        monkeypatch.setattr(mail, "wake", lambda loop: (wakes.append(len(mail._posted)), wake(loop)))

        def post() -> None:
            with posted_together():
                for number in range(3):
                    mail.post(loop, queue, number)
            mail.post(loop, queue, 3)

        await run_in_thread(post)
        assert wakes[0] == 3
        assert len(wakes) == 2
        return [await asyncio.wait_for(queue.get(), 5) for _ in range(4)]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_what_was_posted_before_a_fault_arrives_all_the_same() -> None:
    async def main() -> int:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()

        def post() -> None:
            with pytest.raises(ValueError, match="fault"), posted_together():
                mail_of(loop).post(loop, queue, 1)
                raise ValueError("fault")

        await run_in_thread(post)
        return await asyncio.wait_for(queue.get(), 5)

    assert asyncio.run(main()) == 1


def test_a_closed_loop_takes_nothing() -> None:
    loop = asyncio.new_event_loop()
    mail = mail_of(loop)
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        mail.post(loop, asyncio.Queue(), 1)
