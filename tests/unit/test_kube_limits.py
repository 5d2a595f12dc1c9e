"""How often the API server is asked at most."""

from __future__ import annotations

import threading

import pytest

from agent.sources.kube_limits import RequestLimit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("qps", "burst", "delays"),
    [
        pytest.param(5, 1, [0, 0.2, 0.4, 0.6], id="no burst"),
        pytest.param(5, 3, [0, 0, 0, 0.2, 0.4], id="burst"),
        pytest.param(0.5, 2, [0, 0, 2, 4], id="seldom"),
        pytest.param(5, 0, [0, 0.2], id="zero is one"),
    ],
)
def test_turns_at_once(qps, burst, delays):
    limit = RequestLimit(qps, burst, Clock())

    assert [limit.reserve() for _ in delays] == pytest.approx(delays)


def test_the_bucket_fills_again_and_not_beyond_its_size():
    clock = Clock()
    limit = RequestLimit(5, 3, clock)
    assert [limit.reserve() for _ in range(3)] == [0, 0, 0]

    clock.now += 0.2
    assert [limit.reserve() for _ in range(2)] == pytest.approx([0, 0.2])

    clock.now += 1_000
    assert [limit.reserve() for _ in range(4)] == pytest.approx([0, 0, 0, 0.2])


def test_a_client_that_closes_does_not_wait():
    limit = RequestLimit(0.001, 1)
    closing = threading.Event()
    limit.wait(closing)
    closing.set()

    limit.wait(closing)  # for a thousand seconds, else
