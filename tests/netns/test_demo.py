"""`make demo` checks each of its steps itself; here it is only made sure that none fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.requirements import require_root


def test_the_demo_shows_everything():
    require_root()
    root = Path(__file__).parents[2]

    ran = subprocess.run(
        [sys.executable, "-m", "tests.demo"], cwd=root, capture_output=True, text=True, timeout=110, check=False
    )

    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "FAILED" not in ran.stdout
