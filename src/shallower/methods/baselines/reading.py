"""What the consumers of some sites read on the batches: means and second moments, from as few passes as possible.

reader = Reader(dense, small, sites, batches)
grams = reader.all()                        # variances of every site, in one pass of the dense network
gram = reader.one(site, full=True)          # products of one site's columns, in the network narrowed so far
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.grams import Gram
from shallower.calibrating.patches import check_mask, flat, flat_mask, patches, thinned
from shallower.calibrating.recording import Recorder
from shallower.calibrating.walking import Walk, walked
from shallower.core.batches import Batches
from shallower.core.inputs import model_device
from shallower.core.modes import evaluating
from shallower.errors import FitError
from shallower.sites import Site


class Reader:
    """Passes over the batches.

    Attributes:
        dense: the model as it is.
        small: the same with the earlier sites narrowed; it changes between passes.
        sites: in order of execution.
        batches: that were read once.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, sites: Sequence[Site], batches: Batches) -> None:
        self.dense = dense
        self.small = small
        self.sites = sites
        self.batches = batches
        self._walk: Walk | None = None

    def all(self) -> dict[str, Gram]:
        """Sums of what each site's consumers read in the dense network, and of its squares, by the site's name."""
        return self._pass(self.dense, self.sites, full=False)

    def one(self, site: Site, *, full: bool, sequential: bool) -> Gram:
        """The moments of one site; passes for the sites in order go on from the blocks that are finished.

        Args:
            site: later than those asked for before.
            full: products of all columns, not squares alone.
            sequential: in the network narrowed so far; else in the dense one.
        """
        if self._walk is None:
            self._walk = Walk.along(self.dense, self.small, self.sites, self.batches)
        model = self.dense
        if sequential:
            model = self.small
            # the walk compares the dense network with a pass from the inputs, on the first batch
            with evaluating(self.dense), Recorder(self.dense, [site]) as recorder:
                walked(recorder, self._walk, 0, [site], self.batches[0].on(model_device(self.dense)).inputs)
        return self._pass(model, [site], full=full)[site.name]

    def _pass(self, model: nn.Module, sites: Sequence[Site], *, full: bool) -> dict[str, Gram]:
        device = model_device(model)
        grams: dict[str, Gram] = {}
        for site in sites:
            columns = site.width * site.columns_each
            grams[site.name] = Gram(columns * full, columns * (not full), device=device)
        with evaluating(model), Recorder(model, sites) as recorder:
            for index, batch in enumerate(tqdm(self.batches, desc="calibrating", delay=5, leave=False)):
                here = batch.on(device)
                walked(recorder, self._walk, index, sites, here.inputs)
                check_mask(here, recorder.rows)
                for site in sites:
                    for z in self._read(recorder, site, flat_mask(here.mask)):
                        grams[site.name] = _added_up(grams[site.name], z)
                recorder.forget()
        found: dict[str, Gram] = {}
        for name, gram in grams.items():
            found[name] = gram.over_processes()
            if found[name].count < 2:
                raise FitError(f"{name}: its consumers ran on {found[name].count} positions of the batches; give more")
            if not found[name].is_finite():
                raise FitError(f"{name}: its channels are not finite on the batches; does the model overflow?")
        return found

    def _read(self, recorder: Recorder, site: Site, mask: Tensor | None) -> list[Tensor]:
        """What the consumers read in each call, (positions, columns)."""
        m, found = site.consumers[0], []
        for z, y in zip(recorder.inputs.get(m.name, ()), recorder.outputs.get(m.name, ()), strict=True):
            positions = len(flat(y, m.kind == "conv2d"))
            if not positions:
                continue
            step = thinned(positions * len(self.batches), site.width, site.columns_each)
            rows = patches(z, recorder.read_as[m.name], step)
            if mask is not None and len(mask) == positions:
                rows = rows[mask[::step]]
            found.append(rows)
        return found


def _added_up(gram: Gram, z: Tensor) -> Gram:
    nothing = torch.empty(len(z), 0, dtype=z.dtype, device=z.device)
    if gram.columns:
        return gram.seen(z, nothing)
    return gram.seen(nothing, z)
