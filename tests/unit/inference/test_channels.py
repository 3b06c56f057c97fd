"""Channels as the inference server has them: frames, places for streams, and their ends."""

import asyncio

import pytest

from luthier.core.errors import InvalidRequestError, UnavailableError
from luthier.core.inference import HEADER_CHANNEL, HEADER_STREAM
from luthier.inference import channels as channels_module
from luthier.inference.channels import Channels
from luthier.inference.frames import MAX_NUMBER, SIGN_OF_LIFE, FrameReader, to_frame

ID = "0123456789abcdef" * 2


def test_frames_are_read_wherever_they_are_cut() -> None:
    frames = [(1, b"one"), (MAX_NUMBER, b""), (7, b"x" * 300)]
    content = b"".join(to_frame(*frame) for frame in frames)
    for cut in range(len(content) + 1):
        reader = FrameReader()
        assert [*reader.read(content[:cut]), *reader.read(content[cut:])] == frames
    reader = FrameReader()
    assert [frame for place in range(len(content)) for frame in reader.read(content[place:][:1])] == frames


def test_a_channel_tells_all_that_was_written_at_once_and_then_ends() -> None:
    async def main() -> list[bytes]:
        channels = Channels()
        channel_id, channel = channels.open({HEADER_CHANNEL: ID})
        assert channel_id == ID
        place = channels.find({HEADER_CHANNEL: ID, HEADER_STREAM: "7"})
        assert place is not None
        assert (place.channel, place.channel_id, place.number) == (channel, ID, 7)
        told = channel.pieces()
        channel.write(7, b"a")
        # Would be the end.
        channel.write(7, b"")
        channel.write(8, b"b")
        pieces = [await anext(told)]
        channel.end(7)
        channels.close()
        return [*pieces, *[piece async for piece in told]]

    assert asyncio.run(main()) == [to_frame(7, b"a") + to_frame(8, b"b"), to_frame(7, b"")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {HEADER_STREAM: "7"},
        {HEADER_CHANNEL: ID},
        {HEADER_CHANNEL: "f" * 32, HEADER_STREAM: "7"},
        {HEADER_CHANNEL: ID, HEADER_STREAM: "-1"},
        {HEADER_CHANNEL: ID, HEADER_STREAM: "0"},
        {HEADER_CHANNEL: ID, HEADER_STREAM: str(MAX_NUMBER + 1)},
    ],
)
def test_a_stream_that_names_no_open_channel_has_no_place_there(headers: dict[str, str]) -> None:
    channels = Channels()
    channels.open({HEADER_CHANNEL: ID})
    assert channels.find(headers) is None


def test_a_channel_that_is_gone_has_no_place_for_streams() -> None:
    channels = Channels()
    channels.open({HEADER_CHANNEL: ID})
    channels.forget(ID)
    assert channels.find({HEADER_CHANNEL: ID, HEADER_STREAM: "7"}) is None


def test_a_channel_that_nobody_reads_any_more_ends_its_streams() -> None:
    async def main() -> None:
        channels = Channels()
        _, channel = channels.open({HEADER_CHANNEL: ID})
        with channel.ending() as before, channel.ending() as ended:
            pass
        with channel.ending() as before:
            assert not before.is_set()
            channels.forget(ID)
            assert before.is_set()
        assert not ended.is_set()
        # One that was about to begin.
        with channel.ending() as after:
            assert after.is_set()

    asyncio.run(main())


def test_a_channel_gives_signs_of_life_while_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_module, "QUIET_SECONDS", 0.02)

    async def main() -> None:
        _, channel = Channels().open({HEADER_CHANNEL: ID})
        told = channel.pieces()
        assert [await anext(told) for _ in range(2)] == [SIGN_OF_LIFE] * 2
        channel.write(1, b"a")
        assert await anext(told) == to_frame(1, b"a")

    asyncio.run(main())
    assert list(FrameReader().read(SIGN_OF_LIFE)) == [(0, b"")]


def test_no_channel_is_opened_or_found_once_all_were_ended() -> None:
    channels = Channels()
    channels.open({HEADER_CHANNEL: ID})
    channels.close()
    assert channels.find({HEADER_CHANNEL: ID, HEADER_STREAM: "7"}) is None
    with pytest.raises(UnavailableError):
        channels.open({HEADER_CHANNEL: "f" * 32})


@pytest.mark.parametrize("channel_id", ["", "x" * 32, "a" * 31, ID])
def test_a_channel_needs_an_id_of_its_own(channel_id: str) -> None:
    channels = Channels()
    channels.open({HEADER_CHANNEL: ID})
    with pytest.raises(InvalidRequestError, match="32 hexadecimal digits"):
        channels.open({HEADER_CHANNEL: channel_id})
