"""Whatever plans say, a registered network works from end to end or refuses them by a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given

from nnunet_ext import registry
from tests.fuzz.plans import Drawn, network_plans
from tests.fuzz.trial import refusal_of

Tally = Callable[[str, Counter[str]], None]


@pytest.mark.parametrize("name", registry.names("architectures"))
def test_a_network_works_or_says_what_does_not_fit(name: str, tally: Tally) -> None:
    network_class = registry.resolve("architectures", name)
    counted: Counter[str] = Counter()

    @given(network_plans(network_class))
    def trial(drawn: Drawn) -> None:
        refusal = refusal_of(network_class, drawn)
        assert drawn.kind != "planned" or refusal is None, refusal
        counted[f"{drawn.kind}, {'worked' if refusal is None else 'refused'}"] += 1

    trial()
    tally(f"plans of {name}", counted)
