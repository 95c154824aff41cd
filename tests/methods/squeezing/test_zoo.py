"""Every architecture of the zoo squeezed: calibrated, planned, and applied."""

from __future__ import annotations

import pytest
import torch

from shallower.core.inputs import call
from shallower.core.trees import tensors
from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.coupled.coupling import not_described
from shallower.methods.squeezing.coupled.readers import is_coupled
from shallower.methods.squeezing.squeeze import narrowable
from shallower.methods.squeezing.sweeping import Sweep
from shallower.surgery.applying import apply
from tests.zoo import ZOO, Specimen

DISTINCT = {
    "albert",
    "gpt2",
    "phi3",
    "llama",
    "mobilenet_v2",
    "prelu_of_channels",
    "convolutions_with_norm_after",
    "resnet_of_transformers",
    "regnet_y",
}
"""Tied calls, transposed weights, packed and separate gates, depthwise convolutions, slopes, norms behind, stages.

And a layer that is fitted as a reader and loses rows to a site that is fitted itself.
"""


@pytest.mark.parametrize(
    "specimen", [pytest.param(s, id=s.name, marks=() if s.name in DISTINCT else pytest.mark.slow) for s in ZOO]
)
def test_the_plan_is_exact(specimen: Specimen) -> None:
    model, inputs = specimen.build()
    try:
        sites = narrowable(find_sites(model, inputs))
    except SiteError:
        pytest.skip("nothing to squeeze")
    calibration = Calibration([inputs] * 4)
    unknown = not_described(model, list(filter(is_coupled, sites)), calibration)
    sites = sites.select(lambda site: site.name not in unknown)
    widths = {site.name: max(1, site.width // 2) for site in sites}
    plan, small = Sweep(model, sites, calibration).plan(widths)
    with torch.no_grad():
        found = [next(tensors(call(m, inputs))) for m in (apply(model, plan, inputs), small)]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)
    assert {*sites.names} == {entry.site.name for entry in plan.entries if len(entry.kept) < entry.site.width}
