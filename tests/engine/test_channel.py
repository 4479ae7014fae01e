"""Frames over the socket pair: any cutting of the byte stream gives the same messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.channel import BlockingChannel, FrameReader, frame, socket_pair


@given(
    messages=st.lists(st.binary(max_size=40), max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_frames_survive_any_cutting(messages, cuts):
    data = b"".join(frame(message) for message in messages)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    reader = FrameReader()
    received = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        received += reader.feed(data[start:end])
    assert received == messages


def test_a_channel_tells_silence_from_the_end():
    client, engine = socket_pair()
    channel = BlockingChannel(engine)
    assert channel.receive(0.0) == []
    client.sendall(frame(b"one") + frame(b"two"))
    assert channel.receive(1.0) == [b"one", b"two"]
    channel.send(b"three")
    assert list(FrameReader().feed(client.recv(100))) == [b"three"]
    client.close()
    assert channel.receive(1.0) is None
    channel.close()
