"""`shallower compress --method structural-dropout`: all widths are trained at once, and `pick` chooses one afterwards.

The directory holds the network at its full width, the curve, and for each point of it what BatchNorm measured there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from shallower.app.compression import Outcome, Work
from shallower.app.options import StructuralDropping
from shallower.app.results import CurvePoint
from shallower.calibrating.recalibration import recalibrate
from shallower.core.inputs import Inputs
from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from shallower.methods.dropout.options import DropoutOptions
from shallower.methods.dropout.structural_dropout import StructuralDropout
from shallower.modules.attachment import detached_copy
from shallower.planning.curve import Point
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.training import train

NORM_ROWS = 512
"""Rows of the training data on which BatchNorm is measured at each width."""


@dataclass(frozen=True)
class StructuralDropoutRun(StructuralDropping):
    """Structural Dropout.

    run_method(work, StructuralDropoutRun(points=4))
    """

    def find(self, model: nn.Module, example: Inputs) -> Sites:
        """All sites, with attention heads if asked for."""
        if self.heads:
            return find_sites(model, example, kinds=("hidden", "heads"))
        return find_sites(model, example)

    def usable(self, sites: Sites, target: Target | None) -> Sites:  # noqa: ARG002 - any width is a step to any target
        """All of them; the method itself leaves out what cannot be narrowed."""
        return sites

    def preview(self, work: Work, sites: Sites) -> Plan:
        """The smallest width that would be trained."""
        method = self._method(detached_copy(work.model), work, sites, sort=None)
        return method.plan(self.lower_bound)

    def make(self, work: Work, sites: Sites) -> Outcome:
        """Train, and measure the curve: choose on the rows to choose by, and report on the others."""
        model = work.model
        method = self._method(model, work, sites, sort="magnitude")
        try:
            history = train(
                model,
                work.batches.train,
                work.task.loss,
                work.recipe,
                method=method,
                checkpoint=work.training("widths.safetensors"),
                label="training all widths",
                cpu=work.cpu,
            )
            model.eval()
            rows = None
            if any(isinstance(module, _BatchNorm) for module in model.modules()):
                rows = work.sample(NORM_ROWS)
            curve = method.curve(
                work.score, points=self.points, recalibrate=rows, example_inputs=work.example, name=work.task.quality
            )
            full = detached_copy(model).eval()
            points, files = [], {}
            chosen = [p for p in curve if p is curve.full or p in curve.front().points]
            for number, point in enumerate(tqdm(chosen, desc="measuring the curve", disable=None)):
                small = detached_copy(full)
                if point is not curve.full:
                    small = apply(full, method.plan(point), work.example).eval()
                norms = ""
                if rows is not None:
                    recalibrate(small, rows)
                    norms = f"norms-{number}.safetensors"
                    files[norms] = statistics(small)
                test = work.task.score(small, work.batches.test)
                points.append(CurvePoint.of(point, test_score=test, norms=norms))
        finally:
            method.detach()
        details = {"widths": {site.name: site.width for site in method.sites}, "history": asdict(history)}
        return Outcome(full, Plan((), method=self.name), "all widths", details=details, points=points, files=files)

    def _method(
        self, model: nn.Module, work: Work, sites: Sites, sort: Literal["magnitude"] | None
    ) -> StructuralDropout:
        options = DropoutOptions(lower_bound=self.lower_bound, seed=work.recipe.seed, logits=work.logits)
        return StructuralDropout(model, sites, options, sort=sort)


def at_point(model: nn.Module, sites: Sites, point: Point, example: Inputs) -> tuple[nn.Module, Plan]:
    """The plain smaller model at a point of the curve, and its plan.

    Args:
        model: trained at all widths; it stays as it is.
        sites: of the model, as they were trained.
        point: of the curve.
        example: inputs to prove the surgery on.

    Raises:
        MethodError: the point is of other sites.
    """
    copied = detached_copy(model).eval()
    method = StructuralDropout(copied, sites, sort=None)
    try:
        unknown = set(point.widths) ^ set(method.sites.names)
        if unknown:
            raise MethodError(f"the curve and the model do not fit: they differ at {', '.join(sorted(unknown))}")
        plan = method.plan(point)
    finally:
        method.detach()
    return apply(copied, plan, example).eval(), plan


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running mean and variance of every BatchNorm, by the names of the buffers."""
    return {
        f"{name}.{buffer}": getattr(module, buffer).detach().cpu().clone()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        for buffer in ("running_mean", "running_var")
    }


def set_statistics(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a model what `statistics` took.

    Raises:
        MethodError: they are of another model.
    """
    own = statistics(model)
    if own.keys() != values.keys() or any(own[name].shape != values[name].shape for name in own):
        raise MethodError("the BatchNorm statistics are of another model than this one")
    for name, value in values.items():
        model.get_buffer(name).copy_(value)
