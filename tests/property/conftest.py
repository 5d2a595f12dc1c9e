"""Hypothesis: on CI the same examples every time, elsewhere others; HYPOTHESIS_PROFILE=long looks longer."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=150, suppress_health_check=_SLOW)
settings.register_profile("dev", deadline=None, max_examples=100, print_blob=True, suppress_health_check=_SLOW)
settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("EBPROXY_CI") else "dev"))
