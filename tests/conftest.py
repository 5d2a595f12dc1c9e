"""For every layer: skips have typed reasons and fail on CI; signals and killed runs leave nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from types import FrameType

import pytest

from agent.errors import UnsupportedKernel
from tests.lab import leftovers
from tests.requirements import KERNEL, fails_on_ci


def pytest_sessionstart() -> None:
    """End in order on SIGTERM, fixtures torn down; remove what a killed run left."""

    def end(number: int, _: FrameType | None) -> None:
        pytest.exit(signal.Signals(number).name, returncode=128 + number)

    signal.signal(signal.SIGTERM, end)
    if os.geteuid() == 0:
        leftovers.sweep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a named missing kernel feature into a skip, and on CI a skip into a failure."""
    report = yield
    if call.excinfo and call.excinfo.errisinstance(UnsupportedKernel):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {KERNEL} {call.excinfo.value}")
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if fails_on_ci(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, which on CI is a failure: {reason}"
    return report
