"""Structural Dropout: train once at many widths, choose the width afterwards.

    method = sh.StructuralDropout(model, sites)
    train(model, loader, task_loss, recipe, method=method)      # or any training loop, see methods/base.py
    method.set_width("50%")                                     # the model itself is narrower now, and back in no time
    curve = method.curve(score)
    small = sh.apply(model, method.plan("memory:50%"), example_inputs)

The channels of a site are nested: a width of k computes the first k of them, and nothing of the others.

References: Structural Dropout, arXiv 2205.06906. Yu and Huang, Universally slimmable networks and improved training
techniques, 2019 (arXiv 1903.05134), for the sandwich rule and the full width as teacher.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.calibrating.recalibration import recalibrate
from shallower.core.inputs import Inputs, InputsOf, default_inputs_of
from shallower.core.modes import evaluating
from shallower.errors import MethodError, TargetError
from shallower.measuring.measurement import compare
from shallower.methods.base import Method
from shallower.methods.dropout.ordering import by_elimination, by_magnitude, permute
from shallower.methods.dropout.prefix import PrefixMap, Width, attach_prefix, columns_each
from shallower.methods.dropout.widths import at_most, grid, interpolated, listed, share_of, summary
from shallower.modules import attachment
from shallower.modules.attachment import detached_copy
from shallower.modules.layers import bias_of
from shallower.planning.allocation import Choice, allocate
from shallower.planning.curve import Curve, Point
from shallower.planning.entries import Entry, Fit
from shallower.planning.fingerprints import fingerprint
from shallower.planning.plan import Plan
from shallower.planning.targets import Cost, Target
from shallower.sites import Place, Site, Sites
from shallower.surgery.applying import apply

Score = Callable[[nn.Module], float]
Widths = int | str | Mapping[str, int]
"""A number of channels, a share ("50%") of every site's, or channels by the name of the site."""


class StructuralDropout(Method):
    """Trains all widths of the sites at once, by computing only the first channels of each.

    Attaches to the model at once, at the full width: it computes what it computed. In eval mode the model has the
    widths of `set_width`; in train mode those that `before_step` draws, or, with the sandwich rule, several in turn in
    `loss(closure)`. Slices are real: what is not computed costs nothing. The paper's own rule is
    `StructuralDropout.as_published(model, sites)`.

    Widths are drawn on the CPU from a generator of its own, so that they are equal in all processes. It is a part of
    `state()`, which `training.train` keeps in its checkpoint. torch.compile compiles anew for every width, unless
    `torch._dynamo.config.allow_unspec_int_on_nn_module` is True: three graphs then serve all. Activation checkpointing
    does not go with several passes a step: it would compute a pass again at another's width, which PyTorch reports.

    Args:
        model: to attach to.
        sites: where: feed-forward, gated, convolution and head sites. Sites whose channels cannot be kept one by one
            are left alone, and told in `method.sites.skipped`.
        p: probability with which a site is narrowed in a random pass; it has its full width otherwise.
        lower_bound: the smallest width, as channels or as a share of the site's.
        step: between widths, as channels or as a share.
        shared: probability that all sites of a random pass have one share of their channels; each has its own
            otherwise.
        sandwich: the full and the smallest width in every step, and `passes` random ones between.
        passes: random passes of a step with the sandwich rule.
        distillation: part of the narrow passes' loss that is the divergence from the full width's output, 0 to 1;
            needs `sandwich`.
        rescale: multiply what k channels give by (n / k) to this power: 1 is the paper's scale, which keeps the mean
            of channels that agree, 0.5 keeps the energy of channels that do not, 0 leaves them as they are.
        sort: order the channels by importance first: "magnitude" of their weights, or batches to measure on (by
            backward elimination; see `ordering`). The model computes what it computed.
        seed: of the widths.
        inputs_of: picks the model's inputs out of a batch.
        output_of: picks the output that the full width teaches out of what the model returns.
        logits: whether that output is logits of classes in its last dimension (then the Kullback-Leibler divergence
            teaches) or not (then the mean squared difference, relative to the output's variance).

    Raises:
        MethodError: a value is out of its range, no site can be narrowed, or a method is attached already.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        *,
        p: float = 1.0,
        lower_bound: int | str = "25%",
        step: int | str = 1,
        shared: float = 0.5,
        sandwich: bool = True,
        passes: int = 1,
        distillation: float = 0.5,
        rescale: float = 0.5,
        sort: Literal["magnitude"] | Iterable[Any] | None = "magnitude",
        seed: int = 0,
        inputs_of: InputsOf = default_inputs_of,
        output_of: OutputOf = default_output_of,
        logits: bool = True,
    ) -> None:
        if not all(0 <= value <= 1 for value in (p, shared, distillation, rescale)) or passes < 0:
            raise MethodError("p, shared, distillation and rescale are numbers from 0 to 1, and passes is not negative")
        if distillation and not sandwich:
            raise MethodError(
                "distillation: the full width can teach only where it is run in every step; give sandwich=True, or "
                "distillation=0"
            )
        if isinstance(sort, str) and sort != "magnitude":
            raise MethodError(f"sort={sort!r}: 'magnitude', batches to measure on, or None")
        super().__init__(model, _narrowable(sites))
        _check_free(model, self.sites)
        self.p, self.passes, self.seed = p, passes, seed
        self.shared, self.sandwich, self.distillation = shared, sandwich, distillation
        self.rescale, self.logits = rescale, logits
        self.inputs_of, self.output_of = inputs_of, output_of
        self.table = {site.name: grid(site, lower_bound, step) for site in self.sites}
        self._widths = {site.name: Width(site.width) for site in self.sites}
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[dict[str, int]] = []
        self._places: list[Place] = []
        if sort is not None:
            orders = (
                by_magnitude(model, self.sites)
                if isinstance(sort, str)
                else by_elimination(model, self.sites, sort, inputs_of=inputs_of)
            )
            for site in self.sites:
                permute(model, site, orders[site.name])
        self._places = attach_prefix(model, self.sites, self._widths, rescale=rescale)

    @classmethod
    def as_published(cls, model: nn.Module, sites: Sites, *, p: float = 0.5, seed: int = 0) -> StructuralDropout:
        """The paper's rule: one width a site and step, uniform over 1 .. n - 1 with probability p, and n / k."""
        return cls(
            model,
            sites,
            p=p,
            lower_bound=1,
            step=1,
            shared=0.0,
            sandwich=False,
            distillation=0.0,
            rescale=1.0,
            sort=None,
            seed=seed,
        )

    def detach(self) -> None:
        """Takes the slicing out again; the trained weights stay as they are, in the order that `sort` gave them."""
        attachment.detach(self.model, self._places)
        self._places = []

    # ------------------------------------------------------------------ training

    def before_step(self) -> None:
        """Draws the widths of the step."""
        self._drawn = [self._draw() for _ in range(self.passes if self.sandwich else 1)]
        self._train_at(self._drawn[0] if self._drawn and not self.sandwich else self._full)

    def loss(self, closure: Callable[[], Tensor | tuple[Tensor, Any]]) -> Tensor:
        """The mean loss over the passes of the step.

        Args:
            closure: runs the model once and gives the task's loss. With distillation the model's output is taken from
                the call of the model inside; of a compiled model it cannot be, and closure gives (loss, output).

        Raises:
            MethodError: the output that the full width is to teach was not seen.
        """
        if not self.sandwich:
            value = closure()
            return value[0] if isinstance(value, tuple) else value
        self._train_at(self._full)
        total, output = self._seen(closure)
        teacher = None if output is None else output.detach()
        passes = [self._smallest, *self._drawn]
        for widths in passes:
            self._train_at(widths)
            with _frozen_statistics(self.model):
                value, output = self._seen(closure)
            if self.distillation:
                if teacher is None or output is None:
                    raise MethodError(
                        "the full width is to teach the narrow ones, and the model was not called in closure, or is "
                        "compiled: let closure give (loss, output), or use distillation=0"
                    )
                value = (1 - self.distillation) * value + self.distillation * self._divergence(output, teacher)
            total = total + value
        return total / (1 + len(passes))

    def after_step(self, lr: float) -> None:  # noqa: ARG002
        """Back to the full width in train mode, for what else may run there."""
        self._train_at(self._full)

    def state(self) -> dict[str, Any]:
        """The generator of widths, and the table of widths that it belongs to."""
        table = {name: list(widths) for name, widths in self.table.items()}
        return {"generator": self._generator.get_state(), "table": table}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` gave.

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
                f"{summary(self.table.get(other))}); give the sites, lower_bound and step that it was trained with"
            )
        self._generator.set_state(generator)

    @property
    def _full(self) -> dict[str, int]:
        return {site.name: site.width for site in self.sites}

    @property
    def _smallest(self) -> dict[str, int]:
        return {name: widths[0] for name, widths in self.table.items()}

    def _train_at(self, widths: Mapping[str, int]) -> None:
        for name, width in self._widths.items():
            width.drawn = widths[name]

    def _draw(self) -> dict[str, int]:
        """Widths of one pass: below the full one with probability p, uniform over the table."""
        together, *rest = torch.rand(1 + 2 * len(self.table), generator=self._generator, dtype=torch.float64).tolist()
        numbers = list(zip(rest[::2], rest[1::2], strict=True))
        if together < self.shared:
            numbers = numbers[:1] * len(numbers)
        drawn = {}
        for (coin, share), (name, widths) in zip(numbers, self.table.items(), strict=True):
            narrow = widths[:-1] or widths
            drawn[name] = narrow[int(share * len(narrow))] if coin < self.p else widths[-1]
        return drawn

    def _seen(self, closure: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
        """The loss of one pass, and the output that the model gave in it."""
        outputs: list[Any] = []

        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not torch.compiler.is_compiling():  # a compiled graph would keep the output of its first call
                outputs.append(output)

        handle = self.model.register_forward_hook(see) if self.distillation else None
        try:
            value = closure()
        finally:
            if handle is not None:
                handle.remove()
        if isinstance(value, tuple):
            value, output = value
            outputs.append(output)
        return value, self.output_of(outputs[-1]) if outputs else None

    def _divergence(self, output: Tensor, teacher: Tensor) -> Tensor:
        output, teacher = output.float(), teacher.float()
        if self.logits:
            log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(output, -1)
            return F.kl_div(log_q.flatten(0, -2), log_p.flatten(0, -2), reduction="batchmean", log_target=True)
        return (output - teacher).square().mean() / teacher.var().clamp_min(1e-12)

    # ------------------------------------------------------------------ the live model

    def widths(self) -> dict[str, int]:
        """The channels that each site computes in eval mode."""
        return {name: width.live for name, width in self._widths.items()}

    def set_width(self, width: Widths, site: str | None = None, *, batches: Iterable[Any] | None = None) -> None:
        """Give the live model other widths; nothing is copied.

            method.set_width("50%");  method.set_width(128, site="encoder.layer.0")

        Args:
            width: channels, 1 to n; of a mapping, only the sites that it names change. A share takes the width of the
                table that is nearest to it.
            site: only this one.
            batches: measure the statistics of all BatchNorms anew at these widths. They stay: measure again for others.

        Raises:
            MethodError: the width is out of range, or there is no such site.
        """
        if site is not None:
            if site not in self._widths:
                raise MethodError(f"there is no site {site!r}; the sites are {', '.join(self._widths)}")
            if isinstance(width, Mapping):
                raise MethodError("give widths by the name of the site, or one width and a site, not both")
            chosen = {site: self._width_of(self.sites[site], width)}
        else:
            chosen = self._resolved(width)
        for name, k in chosen.items():
            self._widths[name].live = k
        if batches is not None:
            recalibrate(self.model, batches, inputs_of=self.inputs_of)

    def _resolved(self, width: Widths) -> dict[str, int]:
        """Channels of every site; those that a mapping does not name stay as they are."""
        if not isinstance(width, Mapping):
            return {site.name: self._width_of(site, width) for site in self.sites}
        unknown = [name for name in width if name not in self._widths]
        if unknown:
            raise MethodError(f"there is no site {unknown[0]!r}; the sites are {', '.join(self._widths)}")
        return self.widths() | {name: self._width_of(self.sites[name], k) for name, k in width.items()}

    def _width_of(self, site: Site, width: int | str) -> int:
        if isinstance(width, str):
            share = share_of(width)
            return min(self.table[site.name], key=lambda k: (abs(k - share * site.width), k))
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= site.width:
            raise MethodError(f"{site.name}: a width of {width!r}; it is a number of channels from 1 to {site.width}")
        return width

    @contextmanager
    def at(self, width: Widths, batches: Iterable[Any] | None = None) -> Iterator[nn.Module]:
        """The live model in eval mode at other widths; widths, modes and BatchNorm statistics come back afterwards.

            with method.at("25%", batches) as model:
                score(model)

        Args:
            width, batches: see `set_width`.
        """
        before = self.widths()
        norms = [m for m in self.model.modules() if _has_statistics(m)] if batches is not None else []
        saved = [{name: b.clone() for name, b in norm.named_buffers()} for norm in norms]
        try:
            self.set_width(width, batches=batches)
            with evaluating(self.model):
                yield self.model
        finally:
            self.set_width(before)
            for norm, buffers in zip(norms, saved, strict=True):
                for name, buffer in norm.named_buffers():
                    buffer.copy_(buffers[name])

    # ------------------------------------------------------------------ choosing

    def plan(self, width: Widths | Target | Point | None = None, *, beside: Plan | None = None) -> Plan:
        """What `apply` makes a plain smaller model of, that answers as the live model does at these widths.

            sh.apply(model, method.plan("50%"), example_inputs)
            sh.apply(model, method.plan("params:60%"), example_inputs)
            sh.apply(model, method.plan(curve.best("drop:1%")), example_inputs)

        BatchNorm statistics are taken as the model has them: measure them at the width with
        `set_width(width, batches=...)` before, or in the small model with `recalibrate` afterwards.

        Args:
            width: widths as in `set_width`, a point of a curve, or a target of cost ("macs:60%", "memory:50%"), for
                which every site keeps the same share of its channels. None: what the live model computes now.
            beside: a plan of another method for other sites of the same model; its entries are taken into this one.

        Raises:
            MethodError: a width is out of range.
            TargetError: the target cannot be met with the smallest widths; the error says what they leave.
        """
        widths = self._chosen(width)
        entries = [self._entry(site, widths[site.name]) for site in self.sites if widths[site.name] < site.width]
        others = () if beside is None else beside.entries
        ours = [entry.site for entry in entries]
        together = (*entries, *others)
        made_by = "structural dropout" if beside is None else f"structural dropout, {beside.method}"
        # a plain collapse depends on no weights, and is not bound to any
        bound = ours + ([] if beside is None or not beside.fingerprint else [entry.site for entry in others])
        if len(bound) < len(together):
            return Plan(together, method=made_by)
        return Plan(together, fingerprint(self.model, bound) if bound else "", made_by)

    def _chosen(self, width: Widths | Target | Point | None) -> dict[str, int]:
        if width is None:
            return self.widths()
        if isinstance(width, Point):
            return self._resolved(width.widths)
        if isinstance(width, Target) or (isinstance(width, str) and ":" in width):
            return self._in_proportion(Target.parse(width) if isinstance(width, str) else width)
        return self._resolved(width)

    def _entry(self, site: Site, k: int) -> Entry:
        kept = torch.arange(k)
        if not self.rescale and not site.norm_after and not site.between:
            return Entry.narrow(site, kept)
        # A constant that a BatchNorm makes of nothing is not added here, as a dropped channel's would be.
        scale = (site.width / k) ** self.rescale
        consumers = [cast("PrefixMap", self.model.get_submodule(m.name)) for m in site.consumers]
        columns = k * columns_each(site)
        scaled = tuple(c.logical_weight.detach()[:, :columns] * scale for c in consumers)
        biases = [bias_of(c) for c in consumers]
        fitted = [w.new_zeros(len(w)) if b is None else b.clone() for w, b in zip(scaled, biases, strict=True)]
        return Entry.narrow(site, kept, fit=Fit(scaled, tuple(fitted)))

    def _in_proportion(self, target: Target) -> dict[str, int]:
        if target.unit in ("latency", "drop"):
            raise MethodError(
                f"the target {target} needs a curve: method.plan(method.curve(score, ...).best({str(target)!r}))"
            )
        before = self.cost(self._full)
        shares = sorted({k / site.width for site in self.sites for k in self.table[site.name]}, reverse=True)
        for share in shares:
            widths = {site.name: at_most(self.table[site.name], share * site.width) for site in self.sites}
            if target.met(before, self.cost(widths)):
                return widths
        least, start = target.amount_of(self.cost(self._smallest)), target.amount_of(before)
        raise TargetError(
            f"the target {target} asks for {target.limit(before) / start:.1%} of the model's {target.unit}; with the "
            f"smallest widths ({listed(self._smallest)}) {least / start:.1%} would remain. Ask for less, or train "
            "with a smaller lower_bound or at more sites"
        )

    def cost(self, widths: Mapping[str, int]) -> Cost:
        """What the model costs at these widths; MACs are counted on the inputs that the sites were found with."""
        plan = Plan(
            tuple(
                Entry.narrow(site, torch.arange(widths[site.name]))
                for site in self.sites
                if widths[site.name] < site.width
            )
        )
        parameters = {id(p): p for p in self.model.parameters()}.values()
        memory = sum(
            t.numel() * t.element_size() for t in {id(t): t for t in (*parameters, *self.model.buffers())}.values()
        )
        params, saved = sum(p.numel() for p in parameters), plan.params_saved
        each = next(iter(parameters)).element_size()
        statistics = sum(2 * 4 * site.norms * (site.width - widths[site.name]) for site in self.sites)
        return Cost(params - saved, self.sites.macs - plan.macs_saved, memory - each * saved - statistics)

    def curve(
        self,
        score: Score,
        *,
        points: int = 8,
        search: int = 3,
        unit: Literal["params", "macs", "memory"] = "params",
        recalibrate: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        name: str = "score",
    ) -> Curve:
        """Score many widths of the live model.

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
        statistics = any(map(_has_statistics, self.model.modules()))
        batches = recalibrate if statistics else None
        if statistics and recalibrate is None:
            warnings.warn(
                "the model has BatchNorms, whose statistics are those of the training and fit no narrower width: give "
                "recalibrate=batches to measure them at every width",
                stacklevel=2,
            )
        cache: dict[tuple[int, ...], float] = {}
        alone = self._alone(search)
        bar = tqdm(total=points + (points - 2 if alone else 0) + len(alone), desc="widths")

        def scored(widths: Mapping[str, int]) -> float:
            key = tuple(widths.values())
            if key not in cache:
                with self.at(widths, batches if widths != self._full else None) as live:
                    cache[key] = float(score(live))
                bar.update()
            return cache[key]

        with bar:
            choices: dict[tuple[int, ...], tuple[str, dict[str, int]]] = {}
            for i in range(points):
                share = 1 - i / (points - 1)
                widths = {n: t[round((len(t) - 1) * share)] for n, t in self.table.items()}
                label = "full" if i == 0 else f"{sum(widths.values()) / sum(self._full.values()):.0%}"
                choices.setdefault(tuple(widths.values()), (label, widths))
            for _, widths in list(choices.values()):
                scored(widths)
            if alone:
                for i, widths in enumerate(self._searched(alone, scored, points, unit), 1):
                    choices.setdefault(tuple(widths.values()), (f"searched {i}", widths))
                    scored(widths)
        found = [Point(label, w, cache[key], self.cost(w)) for key, (label, w) in choices.items()]
        curve = Curve(tuple(found), name)
        return curve if example_inputs is None else self._timed(curve, example_inputs)

    def _alone(self, levels: int) -> list[dict[str, int]]:
        """Every site narrowed alone to some widths of its table."""
        if levels == 0 or len(self.table) < 2:
            return []
        found = []
        for name, table in self.table.items():
            below = table[:-1]
            picked = (
                {below[round(i * (len(below) - 1) / max(1, levels - 1))] for i in range(levels)} if below else set()
            )
            found += [self._full | {name: k} for k in sorted(picked)]
        return found

    def _searched(
        self, alone: Sequence[dict[str, int]], scored: Callable[[Mapping[str, int]], float], points: int, unit: str
    ) -> Iterator[dict[str, int]]:
        full = scored(self._full)
        known: dict[str, dict[int, float]] = {n: {t[-1]: 0.0} for n, t in self.table.items()}
        for widths in alone:
            ((name, k),) = [(n, k) for n, k in widths.items() if k != self._full[n]]
            known[name][k] = full - scored(widths)
        costs = {name: {k: self._amount(self._full | {name: k}, unit) for k in t} for name, t in self.table.items()}
        menus = {
            name: [Choice(k, costs[name][k], error) for k, error in interpolated(table, known[name])]
            for name, table in self.table.items()
        }
        low, high = self._amount(self._smallest, unit), self._amount(self._full, unit)
        for i in range(1, points - 1):
            limit = high + (low - high) * i / (points - 1)

            def met(choices: Mapping[str, Choice], limit: float = limit) -> bool:
                return self._amount({n: choice.width for n, choice in choices.items()}, unit) <= limit

            chosen = allocate(menus, met)
            yield {name: chosen[name].width for name in self.table}

    def _amount(self, widths: Mapping[str, int], unit: str) -> float:
        return float(getattr(self.cost(widths), unit))

    def _timed(self, curve: Curve, example_inputs: Inputs) -> Curve:
        front = list(curve.front())
        plain = detached_copy(self.model)
        models = {"full": plain}
        models |= {p.label: apply(plain, self.plan(p), example_inputs) for p in front if p is not curve.full}
        times = compare(models, example_inputs, rounds=10)
        points = []
        for p in curve:
            key = "full" if p is curve.full else p.label
            if any(p is q for q in front) or p is curve.full:
                cost = dataclasses.replace(p.cost, latency=times[key].latency)
                p = dataclasses.replace(p, cost=cost, spread=times[key].spread)
            points.append(p)
        return Curve(tuple(points), curve.name)


# ---------------------------------------------------------------------- widths


def _narrowable(sites: Sites) -> Sites:
    """Those sites whose channels can be kept one by one; the reasons of the others go to `skipped`."""
    reasons = {site.name: reason for site in sites if (reason := _why_not(site))}
    if len(reasons) == len(sites):
        told = "; ".join(f"{name}: {reason}" for name, reason in {**reasons, **sites.skipped}.items())
        raise MethodError(f"there is no site that can be narrowed{': ' if told else ''}{told}")
    chosen = tuple(site for site in sites if site.name not in reasons)
    return sites.only(chosen, reasons)


def _check_free(model: nn.Module, sites: Sites) -> None:
    """Check that no method is attached at these sites, before anything is changed."""
    taken = set(attachment.attached_places(model))
    for site in sites:
        places = [site.activation, *(Place(m.name) for m in site.maps)]
        if taken.intersection(places):
            raise MethodError(
                f"{site.name}: a method is attached here already; leave the site out, or detach the earlier method "
                "first (method.detach())"
            )


def _why_not(site: Site) -> str:
    if site.not_narrow:
        return site.not_narrow
    if site.kind == "activation" or site.width == 0:
        return (
            "its channels are those of a residual sum or have other readers: every layer that adds to it or reads it "
            "would have to be narrowed with it, to the same width"
        )
    return "" if site.width > 1 else "it has one channel"


# ---------------------------------------------------------------------- BatchNorm


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "momentum")


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorms normalise by their batch, and leave their running statistics as they are."""
    norms: list[Any] = [m for m in model.modules() if _has_statistics(m)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
