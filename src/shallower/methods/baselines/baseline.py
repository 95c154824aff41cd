"""A published way to narrow a network, on the sites, data and surgery that `squeeze` has.

plan = baseline("flap", model, sites, batches, target="macs:60%")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from shallower.core.batches import Batches
from shallower.core.inputs import InputsOf, MaskOf
from shallower.core.modes import without_inference_mode
from shallower.core.processes import raised_anywhere
from shallower.core.text import listing
from shallower.errors import FitError, MethodError
from shallower.methods.base import bound_plan, check_sites
from shallower.methods.baselines.depth import DEPTH, Given
from shallower.methods.baselines.reading import Reader
from shallower.methods.baselines.rivals import RIVALS, Rival
from shallower.methods.baselines.sharing import shared_widths
from shallower.methods.baselines.view import View
from shallower.methods.depth.saving import goal_of, savings_for
from shallower.methods.squeezing.calibration import reader_of
from shallower.methods.squeezing.costing import WidthCosts
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import calibration_of, narrowable, without_attached
from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import lent
from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Sites
from shallower.surgery.operating import operate


def baseline(
    name: str,
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    target: str | Target | int,
    *,
    inputs_of: InputsOf | None = None,
    mask_of: MaskOf | None = None,
    seed: int = 0,
) -> Plan:
    """A plan by a published way, for comparison with `squeeze` and `squeeze_depth` on your own model and data.

        plan = sh.baseline("flap", model, sites, batches, target="macs:60%")
        small = sh.apply(model, plan, example_inputs)

    | name | channels stay by | shares | consumers |
    |---|---|---|---|
    | random | lot | equal | unchanged |
    | magnitude | the norms of their rows and columns | equal | unchanged |
    | energy | E[z^2] | equal | unchanged |
    | wanda-sp | E[z^2]^(1/2) times the columns' 1-norm, in the network narrowed so far | equal | unchanged |
    | flap | variance times the columns' squares, standardised | one threshold | mean into the bias |
    | vbp | variance | one threshold | mean into the bias |
    | nystrom | ridge leverage scores (MoDeGPT) | equal | refitted |
    | osscar | backward elimination (OSSCAR, ZipLM), in the network narrowed so far | equal | refitted |
    | folding | k-means of their rows, merged, with repaired variance | equal | columns summed |

    | name | layers go by | what stays |
    |---|---|---|
    | shortgpt | 1 - cos of what they read and give, ranked once | unchanged |
    | sleb | the output's divergence, one after the other | unchanged |
    | blockpruner | the same, of attention and feed-forward branches | unchanged |
    | replaceme | 1 - cos, in a row | a linear map at the cut |

    Sites that `squeeze` would not narrow, and those that the way has no rule for, stay as they are; `plan.left_out`
    says why. Random, magnitude and folding read no batches: give [].

    Args:
        name: one of these.
        model: in the state it is to be used in; it is not changed.
        sites: of this model, or a selection of them.
        batches: a few hundred samples, labels are not needed. They are read once.
        target: `params:`, `macs:`, `size:` or `kv:`, see `Target`; or how many layers go, where layers do.
        inputs_of, mask_of: return the model's inputs and the mask of padding in a batch, as for `squeeze`.
        seed: of what is drawn: random channels, the start of k-means.

    Raises:
        MethodError: there is no way of that name, or the sites are of another model.
        SiteError: no site can be made narrower in this way, or the batches cannot be read.
        TargetError: the target cannot be met, or the model meets it as it is.
        FitError: the batches are too few or not finite; the error names the site.

    References: in the docstrings of `shallower.methods.baselines.rivals` and `.depth`, where the formulas are.
    """
    rival = RIVALS.get(name)
    if rival is None and name not in DEPTH:
        raise MethodError(f"there is no baseline {name!r}; there are {listing([*RIVALS, *DEPTH])}")
    goal = goal_of(target)
    check_sites(model, sites)
    with raised_anywhere(), without_inference_mode():
        dense = without_attached(model)
        if rival is None:
            given = calibration_of(dense, sites, batches, SqueezeOptions(mask_of=mask_of), inputs_of, None).batches
            savings = savings_for(dense, sites, goal, given[0].inputs)
            plan = bound_plan(dense, DEPTH[name](Given(dense, sites, given, savings)), name)
            return replace(plan, seen=given.seen())
        if isinstance(goal, int):
            raise MethodError(f"target={goal}: {name} narrows layers, and takes none away")
        usable = narrowable(sites).usable(rival.refusal, f"{name} has a rule for none of the sites")
        read = Batches.read(batches, inputs_of or reader_of(dense, usable, None), mask_of)
        if rival.reads != "nothing" and not len(read):
            raise FitError(f"{name} needs data: `batches` is empty. Give a few hundred samples")
        entries = _entries(rival, dense, usable, read, goal, seed)
        plan = bound_plan(dense, entries, name)
        return replace(plan, left_out=dict(usable.skipped), seen=read.seen())


def _entries(
    rival: Rival, dense: nn.Module, sites: Sites, batches: Batches, target: Target, seed: int
) -> list[Entry]:  # fmt: skip
    """What becomes of each site, in order."""
    # what surgery writes into gets memory of its own
    small = detached_copy(dense, lent(dense.parameters()))
    reader = Reader(dense, small, sites, batches)
    at_once = rival.reads == "squares" and not rival.sequential
    views = {site.name: View(dense, site, seed=seed) for site in sites}
    if at_once:
        grams = reader.all()
        views = {site.name: View(dense, site, grams[site.name], seed) for site in sites}
    scores = None
    if rival.score is not None:
        scores = {name: rival.score(view) for name, view in views.items()}
    widths = shared_widths(WidthCosts(dense, sites), target, scores, biased=rival.biased)
    entries: list[Entry] = []
    changing = [site for site in sites if widths[site.name] < site.width]
    for site in tqdm(changing, desc="narrowing", delay=2, leave=False):
        view = views[site.name]
        if not at_once:
            gram = None
            if rival.reads != "nothing":
                gram = reader.one(site, full=rival.reads == "products", sequential=rival.sequential)
            view = View(small, site, gram, seed)
        entry = rival.entry(view, widths[site.name])
        entries.append(entry)
        if rival.sequential:
            operate(small, next(step for step in steps(entries) if step.entry is entry))
    return entries
