"""Numbers remember of which sizes they are made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.finding.channels.trials.leading import Expected
from shallower.finding.channels.trials.origins import made_of
from shallower.recording.tracing import trace_forward


class Scaled(nn.Module):
    """A map of features scaled by a number that is made of sizes; `by` says how."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        batch, length, width = h.shape
        if self.by == "width":
            h = h * 2 * (-width // 3 + 1.5 * h.size(-1)) ** -0.5
        elif self.by == "length":
            h = h * (width / length)
        else:
            h = h * (batch / 7)
        y: Tensor = self.b(torch.relu(h))
        return y


def test_what_is_computed_of_sizes_remembers_their_axes() -> None:
    for by, count in (("width", 1), ("length", 2), ("batch", 1)):
        model, x = Scaled(by), torch.randn(2, 5, 4)
        f = Following(trace_forward(model, x))
        (found,) = made_of(Expected(f), model, x).values()
        batch, length, width = f.axes(f.trace.calls[0].outputs[0])
        assert len(found) == count
        assert found == {"width": {width}, "length": {width, length}, "batch": {batch}}[by]


def test_a_number_of_channels_alone_is_written_and_one_of_the_inputs_too_is_not() -> None:
    x = torch.randn(2, 5, 4)
    model = Scaled("width")
    (site,) = sh.find_sites(model, x, kinds="all").select(lambda site: site.width == 12)
    small = sh.apply(model, sh.Plan((sh.Entry.narrow(site, range(5)),)), x)
    assert small.a.out_features == 5
    sites = sh.find_sites(Scaled("length"), x, kinds="all")
    assert not sites.select(lambda site: site.width == 12)
    assert "does not follow fewer channels at `mul`" in sites.skipped["a"]
