"""What the demo prints where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from tests.demo.policy import _show
from tests.demo.screen import Screen

SOURCE, DESTINATION = "fd00:10:180:1::12", "fd00:10:180:1::13"


def end(pod: str, address: str, port: int) -> dict[str, Any]:
    return {"namespace": "shop", "pod": pod, "address": address, "port": port, "labels": None}


def test_an_address_and_its_port_are_not_broken_in_two() -> None:
    flow = {
        "time": "2026-01-31T12:00:03.120456Z",
        "verdict": "forwarded",
        "direction": "ingress",
        "protocol": "TCP",
        "source": end("shopper", SOURCE, 56452),
        "destination": end("web-1", DESTINATION, 18080),
        "reason": "policy",
        "why": "no rule allows it; isolated by NetworkPolicy shop/web",
        "device": "",
    }
    screen = Screen(Console(file=io.StringIO()))
    with screen.console.capture() as printed:
        _show(screen, [("node-1", flow)])

    words = printed.get().split()
    assert {f"[{SOURCE}]:56452", f"[{DESTINATION}]:18080", "NetworkPolicy", "shop/web"} <= set(words)
