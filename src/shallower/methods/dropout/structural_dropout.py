"""Structural Dropout: train once at many widths, choose the width afterwards.

The channels of a site are nested: a width of k computes the first k of them, and nothing of the others.

References: Structural Dropout, arXiv 2205.06906. Yu and Huang, Universally slimmable networks and improved training
techniques, 2019 (arXiv 1903.05134), for the sandwich rule and the full width as teacher.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.calibrating.recalibration import recalibrate
from shallower.core.inputs import Inputs, InputsOf, default_inputs_of
from shallower.core.modes import evaluating
from shallower.core.outputs import are_logits
from shallower.core.processes import agreed_result
from shallower.core.watching import watching
from shallower.errors import MethodError, Refusal
from shallower.measuring.cost import cost_as_found
from shallower.measuring.measurement import compare
from shallower.methods.base import Method, bound_plan
from shallower.methods.dropout.norms import frozen_statistics, restored_statistics, with_statistics
from shallower.methods.dropout.options import DropoutOptions
from shallower.methods.dropout.ordering import by_elimination, by_magnitude, permute
from shallower.methods.dropout.prefix import Width, attach_prefix, check_free, entry_at, not_computed
from shallower.methods.dropout.searching import WidthSearch, equal_shares, largest_shares
from shallower.methods.dropout.teaching import divergence
from shallower.methods.dropout.widths import (
    checked,
    drawn,
    full,
    nearest,
    share_of,
    smallest,
    summary,
    table_of,
)
from shallower.modules import attachment
from shallower.modules.attachment import detached_copy
from shallower.planning.costs import Cost, cost_after
from shallower.planning.curve import Curve, Point
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Place, Site, Sites
from shallower.surgery.applying import apply
from shallower.training.loop import Score

Widths = int | str | Mapping[str, int]
"""A number of channels, a share ("50%") of every site's, or channels by the name of the site."""


class StructuralDropout(Method):
    """Trains all widths of the sites at once, by computing only the first channels of each.

        method = sh.StructuralDropout(model, sites)
        sh.train(model, loader, task_loss, recipe, method=method)
        method.set_width("50%")                              # the model itself is narrower now
        curve = method.curve(score)
        small = sh.apply(model, method.plan("size:50%"), example_inputs)

    Attaches to the model at once, at the full width: the model computes what it computed. In eval mode the model has
    the widths of `set_width`; in train mode those that `before_step` draws, or, with the sandwich rule, several in turn
    in `loss(closure)`. Slices are real: what is not computed costs nothing. The paper's own rule is
    `StructuralDropout.as_published(model, sites)`.

    Widths are drawn on the CPU from a generator of its own, so that they are equal in all processes. The generator is
    part of `state_dict()`, which `train` keeps in its checkpoint. torch.compile compiles anew for every width, unless
    `torch._dynamo.config.allow_unspec_int_on_nn_module` is True: three graphs then serve all. Activation checkpointing
    does not work with several passes a step: it would compute a pass again at another's width, which PyTorch reports.

    Args:
        model: to attach to.
        sites: feed-forward, gated, convolution and head sites. Sites whose channels cannot be kept one by one are left
            alone, and listed in `method.sites.skipped`.
        options: how widths are drawn and taught.
        sort: order the channels by importance first: "magnitude" of their weights, or batches to measure on (by
            backward elimination; see `ordering`). The model computes what it computed. None: as they are.
        inputs_of: picks the model's inputs out of a batch.
        output_of: picks the output that the full width teaches out of what the model returns.

    Raises:
        MethodError: a value is out of its range, no site can be narrowed, or a method is attached already.

    Reference: Structural Dropout, arXiv 2205.06906.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        options: DropoutOptions | None = None,
        *,
        sort: Literal["magnitude"] | Iterable[Any] | None = "magnitude",
        inputs_of: InputsOf = default_inputs_of,
        output_of: OutputOf = default_output_of,
    ) -> None:
        if isinstance(sort, str) and sort != "magnitude":
            raise MethodError(f"sort={sort!r} must be 'magnitude', batches to measure on, or None")
        super().__init__(model, sites.usable(_refusal, "no site can be narrowed", MethodError).apart())
        check_free(model, self.sites)
        self.options = options or DropoutOptions()
        self.inputs_of, self.output_of = inputs_of, output_of
        self.table = table_of(self.sites, self.options.lower_bound, self.options.step)
        self._widths = {site.name: Width(site.width) for site in self.sites}
        self._generator = torch.Generator().manual_seed(self.options.seed)
        self._drawn: list[dict[str, int]] = []
        self._places: list[Place] = []
        if sort is not None:
            self._sort(sort)
        self._places = attach_prefix(model, self.sites, self._widths, rescale=self.options.rescale)

    @classmethod
    def as_published(cls, model: nn.Module, sites: Sites, *, p: float = 0.5, seed: int = 0) -> StructuralDropout:
        """The paper's rule (see `DropoutOptions.published`), with the channels in the order that they have."""
        return cls(model, sites, DropoutOptions.published(p=p, seed=seed), sort=None)

    def detach(self) -> None:
        """Take the slicing out again; the trained weights stay as they are, in the order that `sort` brought about."""
        attachment.detach(self.model, self._places)
        self._places = []

    def _sort(self, by: str | Iterable[Any]) -> None:
        if isinstance(by, str):
            orders = by_magnitude(self.model, self.sites)
        else:
            orders = by_elimination(self.model, self.sites, by, inputs_of=self.inputs_of)
        for site in self.sites:
            permute(self.model, site, orders[site.name])

    def before_step(self) -> None:
        """Draw the widths of the step."""
        options = self.options
        passes = 1
        if options.sandwich:
            passes = options.passes
        self._drawn = [drawn(self.table, options.p, options.shared, self._generator) for _ in range(passes)]
        self._train_at(full(self.table))
        if not options.sandwich:
            self._train_at(self._drawn[0])

    def loss(self, closure: Callable[[], Tensor | tuple[Tensor, Any]]) -> Tensor:
        """The mean loss over the passes of the step.

        Args:
            closure: runs the model once and returns the task's loss. With distillation the model's output is taken
                from the call of the model inside; of a compiled model it cannot be, and closure returns (loss, output).

        Raises:
            MethodError: the output that the full width is to teach was not seen.
        """
        if not self.options.sandwich:
            value = closure()
            if isinstance(value, tuple):
                value, _ = value
            return value
        self._train_at(full(self.table))
        total, taught = self._seen(closure)
        passes = [smallest(self.table), *self._drawn]
        for widths in passes:
            self._train_at(widths)
            with frozen_statistics(self.model):
                value, output = self._seen(closure)
            total = total + self._taught(value, output, taught)
        return total / (1 + len(passes))

    def after_step(self, lr: float | None = None) -> None:  # noqa: ARG002
        """Go back to the full width in train mode, for what else may run there."""
        self._train_at(full(self.table))

    def state_dict(self) -> dict[str, Any]:
        """The generator of widths, and the table of widths that it belongs to."""
        table = {name: list(widths) for name, widths in self.table.items()}
        return {"generator": self._generator.get_state(), "table": table}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned.

        Raises:
            MethodError: it is the state of a method with other sites or widths.
        """
        try:
            table = {name: tuple(widths) for name, widths in state["table"].items()}
            generator = state["generator"]
        except (KeyError, TypeError, AttributeError) as error:
            raise MethodError(f"this is not the state of Structural Dropout: {error!r}") from error
        if table != self.table:
            other = next(name for name in (*self.table, *table) if table.get(name) != self.table.get(name))
            raise MethodError(
                f"{other}: the checkpoint is of another table of widths ({summary(table.get(other))}, here "
                f"{summary(self.table.get(other))}). Use the sites, lower_bound and step that it was trained with"
            )
        self._generator.set_state(generator)

    def _train_at(self, widths: Mapping[str, int]) -> None:
        for name, width in self._widths.items():
            width.drawn = widths[name]

    def _seen(self, closure: Callable[[], Any]) -> tuple[Tensor, Any]:
        """The loss of one pass, and the output that the model returned in it."""
        outputs: list[Any] = []

        def see(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if not torch.compiler.is_compiling():  # a compiled graph would keep the output of its first call
                outputs.append(output)

        after = {"": see}
        if not self.options.distillation:
            after = {}
        with watching(self.model, after=after):
            value = closure()
        if isinstance(value, tuple):
            value, output = value
            outputs.append(output)
        if not outputs:
            return value, None
        return value, outputs[-1]

    def _taught(self, value: Tensor, output: Any, teacher: Any) -> Tensor:
        """The loss of a narrow pass: its own, mixed with the divergence from what the full width returned."""
        part = self.options.distillation
        if not part:
            return value
        if teacher is None or output is None:
            raise MethodError(
                "the full width is to teach the narrow ones, and the model was not called in closure, or is compiled: "
                "let closure return (loss, output), or use distillation=0"
            )
        categorical = self.options.logits
        if categorical is None:
            categorical = are_logits(teacher)
        from_full = divergence(self.output_of(output), self.output_of(teacher).detach(), categorical)
        return (1 - part) * value + part * from_full

    def widths(self) -> dict[str, int]:
        """The channels that each site computes in eval mode."""
        return {name: width.live for name, width in self._widths.items()}

    def set_width(self, width: Widths, site: str | None = None, *, batches: Iterable[Any] | None = None) -> None:
        """Change the widths of the live model; nothing is copied.

            method.set_width("50%");  method.set_width(128, site="encoder.layer.0")

        Args:
            width: channels, 1 to n; of a mapping, only the sites that it names change. A share takes the width of the
                table that is nearest to it.
            site: only this one.
            batches: measure the statistics of all BatchNorms anew at these widths. They stay: measure again for others.

        Raises:
            MethodError: the width is out of range, or there is no such site.
        """
        if site is None:
            chosen = self._resolved(width)
        elif isinstance(width, Mapping):
            raise MethodError("use widths by the name of the site, or one width and a site, not both")
        else:
            chosen = {site: self._width_of(self._known(site), width)}
        for name, k in chosen.items():
            self._widths[name].live = k
        if batches is not None:
            recalibrate(self.model, batches, inputs_of=self.inputs_of)

    def _resolved(self, width: Widths) -> dict[str, int]:
        """Channels of every site; those that a mapping does not name stay as they are."""
        if isinstance(width, Mapping):
            changed = {name: self._width_of(self._known(name), k) for name, k in width.items()}
            return self.widths() | changed
        return {site.name: self._width_of(site, width) for site in self.sites}

    def _known(self, name: str) -> Site:
        if name not in self._widths:
            raise MethodError(f"there is no site {name!r}; the sites are {', '.join(self._widths)}")
        return self.sites[name]

    def _width_of(self, site: Site, width: int | str) -> int:
        if isinstance(width, str):
            return nearest(self.table[site.name], share_of(width))
        return checked(site, width)

    @contextmanager
    def at(self, width: Widths, batches: Iterable[Any] | None = None) -> Iterator[nn.Module]:
        """The live model in eval mode at other widths; widths, modes and BatchNorm statistics come back afterwards.

            with method.at("25%", batches) as model:
                score(model)

        Args:
            width: see `set_width`.
            batches: see `set_width`.
        """
        before = self.widths()
        statistics = restored_statistics(self.model) if batches is not None else nullcontext()
        with statistics:
            try:
                self.set_width(width, batches=batches)
                with evaluating(self.model):
                    yield self.model
            finally:
                self.set_width(before)

    def plan(self, width: Widths | Target | Point | None = None, *, beside: Plan | None = None) -> Plan:
        """A plan that makes a plain smaller model, which answers as the live model does at these widths.

            sh.apply(model, method.plan("50%"), example_inputs)
            sh.apply(model, method.plan("params:60%"), example_inputs)
            sh.apply(model, method.plan(curve.best("drop:1%")), example_inputs)

        BatchNorm statistics are taken as the model has them: measure them at the width with
        `set_width(width, batches=...)` before, or in the small model with `recalibrate` afterwards.

        Args:
            width: widths as in `set_width`, a point of a curve, or a target of cost ("macs:60%", "kv:50%"), for which
                every site that it counts keeps the same share of its channels. None: what the live model computes now.
            beside: a plan of another method for other sites of the same model; its entries are taken into this one.

        Raises:
            MethodError: a width is out of range.
            TargetError: the target cannot be met with the smallest widths; the error says what they leave.
        """
        widths = self._chosen(width)
        entries = []
        for site in self.sites:
            if widths[site.name] < site.width:
                entries.append(entry_at(self.model, site, widths[site.name], self.options.rescale))
        made_by = "structural dropout"
        if beside is not None:
            made_by = f"structural dropout, {beside.method}"
            entries += beside.entries
            if beside.entries and not beside.fingerprint:
                # a plain collapse depends on no weights, and is not bound to any
                return Plan(tuple(entries), method=made_by)
        if not entries:
            return Plan((), method=made_by)
        return bound_plan(self.model, entries, made_by)

    def _chosen(self, width: Widths | Target | Point | None) -> dict[str, int]:
        if width is None:
            return self.widths()
        if isinstance(width, Point):
            return self._resolved(width.widths)
        if isinstance(width, Target):
            return self._in_proportion(width)
        if isinstance(width, str) and ":" in width:
            return self._in_proportion(Target.parse(width))
        return self._resolved(width)

    def _in_proportion(self, target: Target) -> dict[str, int]:
        """The largest equal shares that meet a target of cost."""
        if target.unit in ("latency", "drop"):
            raise MethodError(
                f"the target {target} needs a curve: method.plan(method.curve(score, ...).best({str(target)!r}))"
            )
        return largest_shares(self.table, target, self.cost)

    def cost(self, widths: Mapping[str, int]) -> Cost:
        """What the model costs at these widths; MACs are counted on the inputs that the sites were found with."""
        narrower = (site for site in self.sites if widths[site.name] < site.width)
        plan = Plan(tuple(Entry.narrow(site, torch.arange(widths[site.name])) for site in narrower))
        return cost_after(plan, cost_as_found(self.model, self.sites), self.model)

    def curve(
        self,
        score: Score,
        *,
        points: int = 8,
        search: int = 3,
        unit: Literal["params", "macs", "size"] = "params",
        recalibrate: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        name: str = "score",
    ) -> Curve:
        """Score many widths of the live model.

            curve = method.curve(lambda model: accuracy(model, validation), recalibrate=batches)

        Equal shares at all sites, and, with more than one site, widths that are chosen for each site: every site is
        narrowed alone to `search` widths, the losses of score that this costs are taken to add up, and the widths that
        lose least for so much cost are scored together.

        Args:
            score: of the model, higher is better.
            points: shares of the channels, evenly from the lower bound to all, and as many searched choices.
            search: widths at which each site is tried alone; 0 does not search.
            unit: of the cost that the search divides among the sites.
            recalibrate: batches to measure BatchNorm statistics on at every width; without them, all widths use those
                of the training, which fit none but the full one.
            example_inputs: measure the latency of the models that the front's points become, in turn.
            name: of the score.

        Raises:
            MethodError: there are fewer than two points.

        Warns:
            UserWarning: the model has BatchNorms, and there is nothing to measure them on.
        """
        if points < 2 or search < 0:
            raise MethodError(f"points={points}, search={search}: a curve has at least 2 points")
        if not with_statistics(self.model):
            recalibrate = None
        elif recalibrate is None:
            warnings.warn(
                "the model has BatchNorms, whose statistics are those of the training and fit no narrower width: use "
                "recalibrate=batches to measure them at every width",
                stacklevel=2,
            )
        searching = WidthSearch(self.table, lambda widths: float(getattr(self.cost(widths), unit)))
        tries = searching.alone(search)
        rounds = points + len(tries)
        if tries:
            rounds += points - 2
        found: dict[tuple[int, ...], Point] = {}
        with tqdm(total=rounds, desc="widths") as bar:

            def scored(widths: Mapping[str, int], label: str = "") -> float:
                key = tuple(widths.values())
                known = found.get(key)
                if known is None:
                    batches = recalibrate if widths != full(self.table) else None
                    with self.at(widths, batches) as live:
                        known = Point(label, dict(widths), float(agreed_result(score, live)), self.cost(widths))
                    bar.update()
                found[key] = known if known.label else dataclasses.replace(known, label=label)
                return known.score

            for label, widths in equal_shares(self.table, points):
                scored(widths, label)
            if tries:
                choices = searching.between(searching.losses(tries, scored), points)
                for i, widths in enumerate(choices, 1):
                    scored(widths, f"searched {i}")
        curve = Curve(tuple(point for point in found.values() if point.label), name)
        if example_inputs is None:
            return curve
        return self._timed(curve, example_inputs)

    def _timed(self, curve: Curve, example_inputs: Inputs) -> Curve:
        """The curve with the latencies of its front, each model timed in turn with the others."""
        plain = detached_copy(self.model)
        timed = [point for point in curve.front() if point is not curve.full]
        models = {"full": plain}
        for i, point in enumerate(timed):
            models[str(i)] = apply(plain, self.plan(point), example_inputs)
        times = compare(models, example_inputs, rounds=10)
        measured = {id(point): times[str(i)] for i, point in enumerate(timed)}
        measured[id(curve.full)] = times["full"]
        points = []
        for point in curve:
            if time := measured.get(id(point)):
                cost = dataclasses.replace(point.cost, latency=time.latency)
                point = dataclasses.replace(point, cost=cost, spread=time.spread)
            points.append(point)
        return Curve(tuple(points), curve.name)


def _refusal(site: Site) -> Refusal | None:
    """Why a site cannot be narrowed."""
    if site.bridge.not_narrow is None and site.width == 1:
        return Refusal("it has one channel")
    return not_computed(site)
