"""LayerCollapse: train activations until they are linear, so that the layers around them merge.

    method = sh.LayerCollapse(model, sites)
    method.fit(loader, task_loss, recipe, stages=3)             # or any training loop, see methods/base.py
    small = sh.apply(model, method.plan(), example_inputs)

Reference: LayerCollapse, arXiv 2311.17943.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from shallower.calibrating.moments import Moments, collect, gaussian_prelu
from shallower.core.inputs import InputsOf, MaskOf, call, default_inputs_of, model_device, reiterable, to_device
from shallower.core.modes import evaluating
from shallower.errors import MethodError
from shallower.methods.base import Method, linearisable
from shallower.methods.collapsing.sensitivity import output_change
from shallower.modules import attachment
from shallower.modules.activations import SlopeActivation
from shallower.planning.entries import Entry, Family, Fate
from shallower.planning.fingerprints import fingerprint
from shallower.planning.paying import paying
from shallower.planning.plan import Plan
from shallower.sites import Place, Site, Sites

if TYPE_CHECKING:
    from shallower.training.loop import History, Recipe

Granularity = Literal["site", "channel"]
Affine = Literal["best", "calibration", "gaussian", "unit"]
Order = Literal["sensitivity", "last-first"]
Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module], float]

SCHEMA = 1
"""Version of the file that `fit` keeps its stages in."""


@dataclass(frozen=True)
class Stage:
    """One stage of `LayerCollapse.fit`.

    Attributes:
        sites: names of the sites that the stage set out to collapse.
        collapsed: names of all sites whose slopes are exactly 1 after it.
        slopes: mean slope of every site at its end, before those within the tolerance were set to 1.
        score: of the model at its end; None without `score`.
        taken_back: the score was under the floor, so that the model is as it was before the stage.
        history: of the training.
    """

    sites: tuple[str, ...]
    collapsed: tuple[str, ...]
    slopes: Mapping[str, float]
    score: float | None
    taken_back: bool
    history: History


class LayerCollapse(Method):
    """Replaces f by a x + (1 - a) f(x) and pulls the slope a to 1 by the penalty strength * sum (1 - a)^2.

    Attaches to the model at once; at a = 0 the model computes what it computed. Sites at which no channel may become
    linear are left alone, and so are those whose collapse makes no layer cheaper (two 3x3 convolutions, for instance)
    unless they are named in `include`; `method.left_out` tells which and why.

    A slope that has become exactly 1 (by `settle`, or because of `arrive_in`) stays there as long as `before_step` and
    `after_step` are called.

    Args:
        model: to attach to.
        sites: where; a gated site's gate goes towards the constant 1.
        include: names or patterns of sites that become linear even where that saves nothing; "*" for all.
        strength: of the penalty. Per channel the penalty is the mean over the channels, so that strength keeps its
            meaning.
        family: "blend" keeps the trained f at first; "prelu" is the paper's max(x, 0) + a min(x, 0), from a = 0.01.
        granularity: one slope for each site, or for each channel.
        decoupled: as AdamW decouples weight decay: a <- a - 2 lr strength (a - 1) in `after_step`, and no penalty in
            the loss; the paper's choice for language models.
        slope_lr: learning rate of the slopes, if it is not the model's. With AdamW a slope moves by at most about its
            learning rate in a step, so that 5e-5 would need 20,000 steps from 0 to 1.
            SGD knows no such bound: with a network's 0.05 the task's gradient throws the slopes about, and `arrive_in`
            keeps every throw towards 1; 1e-3 was right there.
        arrive_in: steps after which every slope is at 1 for certain: in each step a slope goes at least 1 / arrive_in
            towards 1. None leaves it to the penalty. `fit` sets it for each stage.

    Raises:
        MethodError: a value is out of its range, no site can become linear or none pays, nothing fits a name in
            `include`, or a method is attached already.
        SiteError: an activation cannot be exchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        strength: float = 0.5,
        *,
        family: Family = "blend",
        granularity: Granularity = "site",
        decoupled: bool = False,
        slope_lr: float | None = None,
        arrive_in: int | None = None,
        include: str | Iterable[str] = (),
    ) -> None:
        if strength < 0 or (slope_lr is not None and slope_lr <= 0) or (arrive_in is not None and arrive_in < 1):
            raise MethodError("strength must not be negative, slope_lr must be positive and arrive_in at least 1 step")
        if family not in ("blend", "prelu") or granularity not in ("site", "channel"):
            raise MethodError(
                f"family={family!r}, granularity={granularity!r}: the families are 'blend' and 'prelu', the "
                "granularities 'site' and 'channel'"
            )
        super().__init__(model, _worthwhile(sites, [include] if isinstance(include, str) else list(include)))
        self.left_out = {site.name: self.sites.skipped[site.name] for site in sites if site not in self.sites}
        self.strength = strength
        self.family = family
        self.granularity = granularity
        self.decoupled = decoupled
        self.slope_lr = slope_lr
        self.arrive_in = arrive_in
        self.activations: dict[str, SlopeActivation] = {}
        self.active: tuple[str, ...] = tuple(site.name for site in self.sites)
        self._before: dict[str, Tensor] = {}
        try:
            for site in self.sites:
                self.activations[site.name] = self._attach(site)
        except Exception:
            self.detach()
            raise

    def _attach(self, site: Site) -> SlopeActivation:
        place = _place(site)
        if site.gated and self.family == "prelu":
            raise MethodError(f"{site.name}: a gate has no PReLU form; use family='blend' or leave gated sites out")
        weight = _weight_near(self.model, site)

        def slope_of(f: nn.Module) -> SlopeActivation:
            module = SlopeActivation(
                f,
                width=site.width if self.granularity == "channel" and site.width else None,
                family=self.family,
                target="one" if site.gated else "identity",
                channels_first=site.channels_first,
            )
            return module.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

        module = attachment.attach(self.model, place, slope_of)
        assert isinstance(module, SlopeActivation)
        return module

    def detach(self) -> None:
        """Takes the slope activations out again; the trained weights stay as they are."""
        attachment.detach(self.model, [_place(site) for site in self.sites if site.name in self.activations])
        self.activations = {}
        self.active = ()

    def slopes(self) -> dict[str, Tensor]:
        """The slopes now, by site: (1,) or (n,), detached copies."""
        return {name: _whole(module.slope).detach().clone() for name, module in self.activations.items()}

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """As `Method.param_groups`, and a last group for the slopes: no weight decay, `slope_lr` if given."""
        slopes = [m.slope for m in self.activations.values() if m.slope.requires_grad]
        own = {id(slope) for slope in slopes}
        groups = super().param_groups(weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        rate = {} if self.slope_lr is None else {"lr": self.slope_lr}
        groups.append({"params": slopes, "weight_decay": 0.0, **rate})
        return [group for group in groups if group["params"]]

    def penalty(self) -> Tensor:
        """strength * sum over active sites of (1 - a)^2, per channel the mean; 0 where the penalty is decoupled."""
        if self.decoupled or not self.active:
            return super().penalty()
        parts = [(1 - _whole(self.activations[name].slope)).square().mean() for name in self.active]
        return self.strength * torch.stack(parts).sum()

    def add_penalty_grad(self) -> None:
        """After `backward()`, adds 2 strength (a - 1) / n to the gradient of each active slope.

        For loops whose loss should stay the task's own. With a gradient scaler, call it after `unscale_`.
        """
        if self.decoupled:
            return
        for name in self.active:
            slope = self.activations[name].slope
            if slope.requires_grad:
                gradient = (slope.detach() - 1) * (2 * self.strength / slope.numel())
                slope.grad = gradient if slope.grad is None else slope.grad.add_(gradient)

    def before_step(self) -> None:
        """Notes the slopes, so that `after_step` can tell how far they went."""
        self._before = {name: module.slope.detach().clone() for name, module in self.activations.items()}

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """The decoupled penalty, `arrive_in`, and slopes that are exactly 1 stay so."""
        for name in self.active:
            slope = self.activations[name].slope
            if self.decoupled and slope.requires_grad:
                slope.sub_(slope - 1, alpha=2 * lr * self.strength)
            if self.arrive_in is not None and name in self._before:
                slope.copy_(torch.maximum(slope, self._before[name] + 1 / self.arrive_in).clamp_(max=1))
        for name, before in self._before.items():
            slope = self.activations[name].slope
            slope.copy_(torch.where(before == 1, before, slope))
        self._before = {}

    @torch.no_grad()
    def settle(self, tolerance: float = 0.05) -> tuple[str, ...]:
        """Sets active slopes with |1 - a| < tolerance to exactly 1, for good; a site whose slopes are all 1 is frozen.

        Returns:
            The names of all sites whose slopes are exactly 1 now.
        """
        done = []
        for name, module in self.activations.items():
            slope = module.slope
            if name in self.active:
                slope.copy_(torch.where((1 - slope).abs() < tolerance, torch.ones_like(slope), slope))
            if bool((_whole(slope) == 1).all()):
                slope.requires_grad_(False)
                done.append(name)
        return tuple(done)

    def plan(
        self,
        tolerance: float = 0.05,
        affine: Affine = "best",
        *,
        batches: Iterable[Any] | None = None,
        inputs_of: InputsOf = default_inputs_of,
        mask_of: MaskOf | None = None,
    ) -> Plan:
        """Channels with |1 - a| < tolerance become linear, the others keep their slope activation.

        Args:
            tolerance: 0.05 in the paper. A site whose slopes are all 0 (blend) is not in the plan: it is f still.
            affine: which line takes the place of the almost linear activation.
                "unit": slope exactly 1, as in the paper.
                "gaussian": the nearest to it under the BatchNorm before f, which says that f's input is normal with
                    mean beta and deviation |gamma|; exactly 1 at sites without one.
                "calibration": the nearest on `batches`.
                "best": "calibration" where batches are given, "gaussian" otherwise.
            batches: for "calibration"; see `shallower.statistics.collect`, also for `inputs_of` and `mask_of`.

        Raises:
            MethodError: the tolerance is not positive, batches are needed and missing, or an activation place has
                neither arrived nor stayed as it was.
        """
        if tolerance <= 0:
            raise MethodError(f"tolerance={tolerance}: a slope is never less than 0 away from 1")
        if affine not in ("best", "calibration", "gaussian", "unit"):
            raise MethodError(f"affine={affine!r}: choose best, calibration, gaussian or unit")
        if affine == "calibration" and batches is None:
            raise MethodError("affine='calibration' needs batches= to calibrate on")
        linear = {name: (1 - a).abs() < tolerance for name, a in self.slopes().items()}
        moments: Mapping[str, Moments] = {}
        if batches is not None and affine in ("best", "calibration"):
            collapsing = [site for site in self.sites if bool(linear[site.name].any())]
            moments = collect(self.model, collapsing, batches, inputs_of=inputs_of, mask_of=mask_of)
        found = (self._entry(site, linear[site.name], affine, moments.get(site.name)) for site in self.sites)
        entries = tuple(entry for entry in found if entry is not None)
        return Plan(entries, fingerprint(self.model, [entry.site for entry in entries]), "layer-collapse")

    def _entry(self, site: Site, linear: Tensor, affine: Affine, moments: Moments | None) -> Entry | None:
        module = self.activations[site.name]
        alphas = _whole(module.slope).detach().cpu().double()
        linear = linear.cpu()
        if self.family == "blend" and bool((alphas == 0).all()):
            return None
        if site.kind == "activation":
            if not bool(linear.all()):
                raise MethodError(
                    f"{site.name}: an activation place is either linear or as it was, and its slope is "
                    f"{float(alphas):.3f}: train it further, or leave the site out when you construct the method"
                )
            return Entry.collapse(site)
        fates = torch.where(linear, int(Fate.LINEAR), int(Fate.KEEP)).to(torch.int8).expand(site.width).clone()
        slopes = torch.ones(site.width, dtype=torch.float64)
        offsets = torch.zeros_like(slopes)
        if bool(linear.any()):
            if moments is not None:
                slopes, offsets = (t.cpu() for t in moments.best_affine())
            elif affine != "unit" and site.norm_before and not site.gated:
                slopes, offsets = (t.cpu() for t in _gaussian(module, self.model.get_submodule(site.norm_before)))
        kept = None if bool(linear.all()) else alphas
        return Entry(site, fates, slopes, offsets, alphas=kept, family="blend" if site.gated else self.family)

    def sensitivity(
        self,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        score: Score | None = None,
        inputs_of: InputsOf = default_inputs_of,
    ) -> dict[str, float]:
        """What each site alone costs if it becomes linear now, the others staying as they are.

        The cost is what the score loses if `score` is given, else what the loss gains if `loss` is given, else the
        change of the model's output: KL divergence of logits, relative squared error otherwise; means over the batches.

        Args:
            batches: a few; not read where `score` is given.
            loss: of the model and a batch.
            score: of the model, higher is better.
            inputs_of: picks the model's inputs out of a batch, where neither is given.

        Raises:
            MethodError: there are no batches.
        """
        names = list(self.activations)
        with evaluating(self.model):
            if score is not None:
                base = score(self.model)
                return {name: base - self._linear_alone(name, partial(score, self.model)) for name in names}
            costs = []
            device = model_device(self.model)
            for batch in tqdm(reiterable(batches), desc="sensitivity", delay=2):
                on_device = to_device(batch, device)
                if loss is not None:
                    before = loss(self.model, on_device)
                    run = partial(loss, self.model, on_device)
                    costs.append([float(self._linear_alone(name, run) - before) for name in names])
                else:
                    inputs = inputs_of(on_device)
                    reference = call(self.model, inputs)
                    run = partial(call, self.model, inputs)
                    costs.append([float(output_change(reference, self._linear_alone(name, run))) for name in names])
        if not costs:
            raise MethodError("there are no batches to measure the sensitivity on")
        return {name: sum(column) / len(costs) for name, column in zip(names, zip(*costs, strict=True), strict=True)}

    def _linear_alone(self, name: str, run: Callable[[], Any]) -> Any:
        slope = self.activations[name].slope
        before = slope.detach().clone()
        try:
            slope.fill_(1)
            return run()
        finally:
            slope.copy_(before)

    def fit(
        self,
        batches: Iterable[Any],
        loss: Loss,
        recipe: Recipe,
        *,
        stages: int | Sequence[Sequence[str]] | None = None,
        order: Order | Sequence[str] = "sensitivity",
        tolerance: float = 0.05,
        arrive: float | None = 0.5,
        score: Score | None = None,
        floor: float | None = None,
        probe: Iterable[Any] | None = None,
        checkpoint: Path | str | None = None,
        checkpoint_every: int = 0,
        cpu: bool = False,
    ) -> list[Stage]:
        """Trains in stages: in each a few more sites are pulled towards 1, and set to exactly 1 where they come near.

        The slopes of later sites rest meanwhile; those of earlier sites that did not come near go on.

        Args:
            batches, loss, recipe: as `shallower.training.train` takes them; the recipe is that of every stage.
            stages: number of stages, among which the sites are divided evenly, or the names of the sites of each
                stage. None: one site after another, the paper's n-stage schedule.
            order: which sites come first: "sensitivity", those whose collapse alone raises the loss least;
                "last-first", from the output backwards as in the paper; or names.
            tolerance: slopes with |1 - a| < tolerance are set to 1 at the end of a stage.
            arrive: part of each stage after which the slopes of its sites are at 1 for certain, driven there evenly, so
                that the rest of the stage trains the network that will remain. None leaves it to the penalty
                whether they arrive: the paper's own, and needed where channels are to be chosen.
            score: of the model, higher is better, taken after each stage.
            floor: lowest score accepted. A stage that ends below it is taken back and is the last.
            probe: a few batches to measure the sensitivity on; by default the first 8 of `batches`.
            checkpoint: a folder. After an interruption the same call goes on where it was.
            checkpoint_every: keep the state also after so many steps, not only after each epoch.
            cpu: stay on the CPU.

        Returns:
            The stages, in order.

        Raises:
            MethodError: the stages or the order do not fit the sites, or floor is given without score.
            TrainingError: see `train`.
        """
        from shallower.core.state_file import read_state, write_state
        from shallower.training.loop import train

        if floor is not None and score is None:
            raise MethodError("floor= needs score=, a function of the model, to compare with")
        record = None if checkpoint is None else Path(checkpoint) / "stages.safetensors"
        if record is not None and record.exists():
            groups, finished = self._resume(read_state(record), record, recipe)
        else:
            probe = list(islice(reiterable(batches), 8)) if probe is None else probe
            groups, finished = self._groups(stages, self._ordered(order, probe, loss)), []

        def keep() -> None:
            if record is not None:
                if _is_main():
                    write_state(record, self._state(groups, finished, recipe))
                _wait()

        if not finished:
            keep()  # the order, which other random numbers would measure otherwise
        own_arrive_in = self.arrive_in
        self.arrive_in = None if arrive is None else max(1, round(arrive * _steps(batches, recipe)))
        try:
            for number in range(len(finished) + 1, len(groups) + 1):
                if finished and finished[-1].taken_back:
                    break
                part = None if record is None else record.with_name(f"stage-{number}.safetensors")
                before = {} if floor is None else {k: v.cpu().clone() for k, v in self.model.state_dict().items()}
                self._begin(groups[:number])
                history = train(
                    self.model,
                    batches,
                    loss,
                    dataclasses.replace(recipe, seed=recipe.seed + number - 1),
                    method=self,
                    checkpoint=part,
                    checkpoint_every=checkpoint_every,
                    label=f"stage {number}/{len(groups)}",
                    cpu=cpu,
                )
                slopes = {name: float(a.mean()) for name, a in self.slopes().items()}
                collapsed = self.settle(tolerance)
                value = None if score is None else _agreed(score, self.model)
                taken_back = floor is not None and value is not None and value < floor
                if taken_back:
                    self.model.load_state_dict(before)
                    collapsed = finished[-1].collapsed if finished else ()
                finished.append(Stage(tuple(groups[number - 1]), collapsed, slopes, value, taken_back, history))
                keep()
                if part is not None and _is_main():
                    part.unlink(missing_ok=True)
        finally:
            self.arrive_in = own_arrive_in
            self._begin(groups)
        return finished

    def _begin(self, groups: Sequence[Sequence[str]]) -> None:
        """Make the sites of `groups` active and let all other slopes rest; those that are settled rest anyway."""
        open_ = {name for name, a in self.slopes().items() if not bool((a == 1).all())}
        self.active = tuple(name for group in groups for name in group if name in open_)
        for name, module in self.activations.items():
            module.slope.requires_grad_(name in self.active)

    def _ordered(self, order: Order | Sequence[str], probe: Iterable[Any], loss: Loss) -> list[str]:
        names = list(self.activations)
        if order == "last-first":
            return names[::-1]
        if order == "sensitivity":
            costs = self.sensitivity(probe, loss=loss) if len(names) > 1 else dict.fromkeys(names, 0.0)
            return sorted(names, key=costs.__getitem__)
        if isinstance(order, str) or sorted(order) != sorted(names):
            raise MethodError(
                f"order={order!r}: give 'sensitivity', 'last-first' or every one of the names {', '.join(names)} once"
            )
        return list(order)

    def _groups(self, stages: int | Sequence[Sequence[str]] | None, ordered: list[str]) -> list[list[str]]:
        if stages is None:
            return [[name] for name in ordered]
        if isinstance(stages, int):
            if not 1 <= stages <= len(ordered):
                raise MethodError(f"stages={stages}: there are {len(ordered)} sites to divide among the stages")
            bounds = [len(ordered) * i // stages for i in range(stages + 1)]
            return [ordered[a:b] for a, b in pairwise(bounds)]
        groups = [list(group) for group in stages]
        named = [name for group in groups for name in group]
        if len(set(named)) < len(named) or not set(named) <= set(ordered) or not all(groups):
            raise MethodError(f"stages={stages!r}: name each site at most once; the sites are {', '.join(ordered)}")
        return groups

    def _state(self, groups: list[list[str]], finished: list[Stage], recipe: Recipe) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "groups": groups,
            "stages": [dataclasses.asdict(stage) for stage in finished],
            "recipe": dataclasses.asdict(recipe),
            "model": dict(self.model.state_dict()),
        }

    def _resume(self, state: Any, record: Path, recipe: Recipe) -> tuple[list[list[str]], list[Stage]]:
        from shallower.training.loop import History

        try:
            if state["schema"] != SCHEMA:
                raise MethodError(f"{record} has schema {state['schema']}, this version reads {SCHEMA}")
            if state["recipe"] != dataclasses.asdict(recipe) or not {n for g in state["groups"] for n in g} <= set(
                self.activations
            ):
                raise MethodError(
                    f"{record} is of another run, with other sites or another recipe; give another folder"
                )
            self.model.load_state_dict(state["model"])
            stages = [Stage(**{**stage, "history": History(**stage["history"])}) for stage in state["stages"]]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise MethodError(f"{record} does not fit this run ({error}); give another folder") from error
        return state["groups"], stages


def _worthwhile(sites: Sites, include: Sequence[str]) -> Sites:
    """Those sites that may become linear and either pay or are asked for; the reasons of the others go to `skipped`.

    Raises:
        MethodError: there is none, or nothing that may become linear has a name that was asked for.
    """
    linear = linearisable(sites)
    asked = {name: linear.select(name) for name in include}
    for name, found in asked.items():
        if not found:
            raise MethodError(f"include={name!r}: there is no site of that name that may become linear")
    kept, reasons = paying(linear)
    names = {site.name for found in (kept, *asked.values()) for site in found}
    left = {name: reason for name, reason in reasons.items() if name not in names}
    if not names:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise MethodError(f"no site pays ({told}). With include='*' the activations go all the same")
    chosen = tuple(site for site in linear if site.name in names)
    return linear.only(chosen, left)


def _place(site: Site) -> Place:
    if site.activation is None:
        raise MethodError(f"{site.name}: it has no activation")
    return site.activation


def _weight_near(model: nn.Module, site: Site) -> Tensor:
    """A weight that tells the device and the dtype of the site."""
    if site.producer is not None:
        return next(model.get_submodule(site.producer.name).parameters())
    return next(model.parameters(), torch.zeros(1))


def _gaussian(module: SlopeActivation, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The best line under a BatchNorm's own word: h ~ N(beta, gamma^2)."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm):
        raise MethodError(f"a {type(norm).__name__} before the activation says nothing about its distribution")
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    mean = torch.zeros(norm.num_features) if bias is None else bias.detach().cpu()
    std = torch.ones(norm.num_features) if weight is None else weight.detach().cpu().abs()
    if module.kernel == "relu":
        return gaussian_prelu(mean, std, _whole(module.slope).cpu())
    exact = copy.deepcopy(module).cpu().double()
    with torch.no_grad():
        return Moments.gaussian(mean, std, exact).best_affine()


def _whole(slope: Tensor) -> Tensor:
    """The slope of all shards, where FSDP has distributed it."""
    return slope.full_tensor() if isinstance(slope, DTensor) else slope


def _steps(batches: Iterable[Any], recipe: Recipe) -> int:
    """Steps of one call of `train` on these batches."""
    length = len(batches) if isinstance(batches, Sized) else 0
    return recipe.epochs * (length // int(os.environ.get("WORLD_SIZE", "1")))


def _agreed(score: Score, model: nn.Module) -> float:
    """The main process's score, so that all take the same decision."""
    with evaluating(model):
        values = [float(score(model))]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0 if not dist.is_initialized() else dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
