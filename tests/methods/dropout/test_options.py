"""The options of Structural Dropout."""

from __future__ import annotations

from typing import Any

import pytest

from shallower.errors import MethodError
from shallower.methods.dropout.options import DropoutOptions


def test_the_published_rule_has_one_width_a_step_and_the_whole_scale() -> None:
    options = DropoutOptions.published(p=0.3, seed=2)
    assert (options.p, options.seed, options.lower_bound, options.rescale) == (0.3, 2, 1, 1.0)
    assert not options.sandwich
    assert not options.distillation


@pytest.mark.parametrize(
    "options",
    [{"p": 2.0}, {"shared": -1.0}, {"rescale": float("nan")}, {"passes": -1}, {"sandwich": False}],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(options)) if "sandwich" not in options else "sandwich"):
        DropoutOptions(**options)
