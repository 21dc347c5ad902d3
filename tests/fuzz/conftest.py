"""How many cases are drawn, and what was counted of them.

`make test` draws a few, the same ones each time; `make test-fuzz` many, by its seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# The folders of nnU-Net that the contract tests set before it is imported.
from tests.contract.conftest import pytest_unconfigure, unused_number, workspace  # noqa: F401

_KEY = "fuzz"
_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("few", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("fuzz", max_examples=500, **_COMMON)
if settings.get_current_profile_name() != "fuzz":
    settings.load_profile("few")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, Counter[str]], None]:
    """Keep what was counted for the end of the run: ``tally("plans of X", counter)``."""

    def keep(subject: str, counted: Counter[str]) -> None:
        request.node.user_properties.append((_KEY, (subject, dict(sorted(counted.items())))))

    return keep


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was tried."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    found = [value for report in calls for key, value in report.user_properties if key == _KEY]
    if found and settings.get_current_profile_name() == "fuzz":
        terminalreporter.section("what was tried")
        for subject, counted in found:
            terminalreporter.line(f"{subject}: {', '.join(f'{what} {n}' for what, n in counted.items())}")
