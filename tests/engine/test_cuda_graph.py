"""Which graphs there are, which one a step takes, and which is captured next."""

from __future__ import annotations

import pytest

from headrace.engine.cuda_graph import (
    CHEAP_TOKENS,
    MAX_GRAPH_TOKENS,
    MISSES_BEFORE_CAPTURE,
    POOL_SLACK_BYTES,
    GraphBook,
    graph_sizes,
)


class Graph:
    def replay(self) -> None: ...


def book_of(sizes: tuple[int, ...], captured: tuple[int, ...] = ()) -> GraphBook:
    book = GraphBook(sizes)
    for size in captured:
        book.add(size, Graph(), pool_growth=0)
    return book


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("max_tokens", [8, 60, 100, 512, 8192])
def test_sizes_cover_every_step_and_waste_little(max_tokens, multiple):
    sizes = graph_sizes(max_tokens, multiple)
    assert list(sizes) == sorted(set(sizes)) and len(sizes) <= 31
    assert all(size % multiple == 0 for size in sizes)
    largest = min(max_tokens, MAX_GRAPH_TOKENS)
    assert largest <= sizes[-1] < largest + multiple
    for tokens in range(CHEAP_TOKENS + 1, largest + 1):
        size = next(size for size in sizes if size >= tokens)
        assert (size - tokens) / size < 0.25
    if multiple == 1 and max_tokens >= 8:
        assert sizes[:4] == (1, 2, 4, 8)


def test_a_step_takes_its_own_size():
    book = book_of((1, 2, 4, 8, 16), captured=(16, 8, 4, 2, 1))
    taken = [book.take(tokens) for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17)]
    assert taken == [1, 2, 4, 4, 8, 8, 16, 16, None]
    assert book.next() is None and book.due() is None


def test_a_larger_graph_stands_in_unless_it_wastes_much():
    book = book_of((8, 64, 128, 256, 512), captured=(512, 64))
    assert book.take(3) == 64  # no slower than 8: both read all weights
    assert book.take(65) is None  # 512 for 128
    assert book.take(200) == 512
    assert book.take(600) is None


def test_the_largest_is_captured_first_then_what_was_missed_then_from_large_to_small():
    book = GraphBook((1, 8, 64, 256))
    order = []
    book.take(8)
    while (size := book.next()) is not None:
        order.append(size)
        book.add(size, Graph(), pool_growth=0)
    assert order == [256, 8, 64, 1]


def test_between_steps_only_what_is_missed_again_and_again():
    book = book_of((1, 8, 512), captured=(512,))
    for _ in range(MISSES_BEFORE_CAPTURE - 1):
        book.take(1)
    assert book.due() is None
    book.take(1)
    assert book.due() == 1
    book.add(1, Graph(), pool_growth=0)
    assert book.due() is None
    for _ in range(MISSES_BEFORE_CAPTURE):
        book.take(700)  # larger than any graph: no miss
    assert book.due() is None


def test_the_first_graph_makes_the_pool_and_others_may_hardly_grow_it():
    book = GraphBook((1, 8, 64, 512))
    book.add(512, Graph(), pool_growth=1 << 30)
    assert book.pool_growth == 0
    book.add(64, Graph(), pool_growth=POOL_SLACK_BYTES)
    assert not book.is_closed and book.next() == 8
    book.add(8, Graph(), pool_growth=1)
    assert book.is_closed and book.next() is None and book.take(8) == 8
    for _ in range(MISSES_BEFORE_CAPTURE):
        book.take(1)
    assert book.due() is None


def test_a_size_is_captured_once():
    book = book_of((1, 8), captured=(8,))
    with pytest.raises(AssertionError):
        book.add(8, Graph(), pool_growth=0)
    with pytest.raises(AssertionError):
        book.add(4, Graph(), pool_growth=0)
