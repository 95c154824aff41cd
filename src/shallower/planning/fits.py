"""Maps fitted on data, for a site's consumers, its producers and the linear path beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shallower.errors import PlanError
from shallower.planning.geometry import fitted_map, kernel_of
from shallower.sites import LinearMap, Site


@dataclass(frozen=True, eq=False)
class Fit:
    """Maps fitted on data, which replace the consumers' own weights and the LINEAR channels' slopes.

        y = consumers[i] z_kept + ups[i] (down x + down_bias) + biases[i]

    z_kept are the kept channels as the consumer reads them (behind a BatchNorm after f, where there is one), x is what
    the producer reads in the model after the earlier entries of the plan. All weights are in the logical orientation
    (Conv1D's transposition is the surgery's business).

    Attributes:
        consumers: for each consumer (d_out, kept) - for a convolution (d_out, kept, kh, kw), for attention heads
            (d_out, kept * block). May be empty where nothing is kept.
        biases: for each consumer (d_out,).
        down: (rank, d_in), first half of the linear path that all consumers share; None where there is no path,
            or where the path is one full map. For a convolution (rank, d_in, kh, kw), with the producer's geometry.
        ups: for each consumer (d_out, rank), or (d_out, d_in) where `down` is None; empty where there is no path. For a
            convolution (d_out, rank, kh, kw), with the consumer's geometry; where `down` is None, with any kernel, and
            the geometry that `forms.fitted_map` gives it.
        down_bias: (rank,), constants behind `down`, in front of a consumer's padding; None for none.
        producer: (kept, d_in), for a convolution (kept, d_in, kh, kw): new rows of the producer for the kept channels
            (in a packed gated site, of the up projection); None where they stay as they are.
        producer_bias: (kept,), with it: the new shift of the BatchNorm before f, or, where there is none, the
            producer's new bias; None where that stays as it is.
        gate: (kept, d_in), new rows of a gated site's gate; None where they stay as they are.
        gate_bias: (kept,), the new bias with it; None where it stays as it is.
    """

    consumers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    down: Tensor | None = None
    ups: tuple[Tensor, ...] = ()
    down_bias: Tensor | None = None
    producer: Tensor | None = None
    producer_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def singles(self) -> dict[str, Tensor]:
        """The tensors of which there is at most one, by name."""
        names = ("down", "down_bias", "producer", "producer_bias", "gate", "gate_bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: consumers.0, biases.0, down, ups.0."""
        maps = _numbered("consumers", self.consumers) | _numbered("biases", self.biases)
        return maps | self.singles | _numbered("ups", self.ups)


def _numbered(name: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}


def checked(site: Site, fit: Fit, kept: int) -> Fit:
    """The fit with 1x1 kernels written out, if everything in it has the shape that the site needs.

    Args:
        site: that it was made for.
        fit: as it was given.
        kept: channels that stay.

    Raises:
        PlanError: a shape, a type or a number is wrong, or the site has nothing to fit there.
    """
    if site.kind == "activation":
        raise PlanError(f"{site.name}: an activation place has no maps to fit")
    if not site.consumers:
        raise PlanError(f"{site.name}: no plain linear layer reads its channels alone, so that nothing can be fitted")
    consumers = tuple(fit.consumers)
    if not consumers and kept == 0:
        consumers = tuple(torch.zeros(c.d_out, 0, *_window(c)) for c in site.consumers)
    for name, given in (("consumers", consumers), ("biases", fit.biases), ("ups", fit.ups or site.consumers)):
        if len(given) != len(site.consumers):
            raise PlanError(f"{site.name}: the fit has {len(given)} {name} for {len(site.consumers)} consumers")
    fitted = replace(fit, consumers=consumers, biases=tuple(fit.biases), ups=tuple(fit.ups))
    for name, tensor in fitted.tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise PlanError(f"{site.name}: {name} of the fit is not a tensor of finite floating-point numbers")
    fitted = _with_producers(site, fitted, kept)
    for i, c in enumerate(site.consumers):
        if kept and c.groups > 1:
            raise PlanError(f"{site.name}: `{c.name}` is a grouped convolution, whose kept columns cannot be fitted")
        _check_shape(site, f"consumers.{i}", consumers[i], (c.d_out, kept * site.bridge.block, *_window(c)))
        _check_shape(site, f"biases.{i}", fit.biases[i], (c.d_out,))
    return _with_checked_path(site, fitted)


def _check_shape(site: Site, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise PlanError(f"{site.name}: {name} of the fit has shape {tuple(tensor.shape)}, and must have shape {wanted}")


def _with_producers(site: Site, fit: Fit, kept: int) -> Fit:
    """The fit with its producer's and gate's rows checked."""
    packed, gate = site.bridge.packed, site.gate
    if packed:  # one layer makes both halves
        gate = site.producer
    changed: dict[str, Tensor] = {}
    for name, m in (("producer", site.producer), ("gate", gate)):
        rows, bias = getattr(fit, name), getattr(fit, f"{name}_bias")
        if rows is None:
            if bias is not None:
                raise PlanError(f"{site.name}: {name}_bias of the fit needs {name} with it")
            continue
        if m is None or kept == 0 or m.groups > 1:
            raise PlanError(f"{site.name}: the site has no {name} whose kept rows could be fitted")
        if bias is not None:
            _check_shape(site, f"{name}_bias", bias, (kept,))
            if packed and not m.bias:
                raise PlanError(f"{site.name}: `{m.name}` makes gate and up projection and has no bias to be fitted")
        rows = _with_window(rows, m)
        if rows.dim() < 2:
            raise PlanError(f"{site.name}: {name} of the fit is not a matrix of rows")
        _check_shape(site, name, rows, (kept, rows.shape[1], *_window(m)))
        changed[name] = rows
    return replace(fit, **changed)  # type: ignore[arg-type]


def _with_checked_path(site: Site, fit: Fit) -> Fit:
    """The fit with its linear path checked."""
    down, producer = fit.down, site.producer
    if down is None and fit.down_bias is not None:
        raise PlanError(f"{site.name}: down_bias of the fit needs down with it")
    if down is not None and not fit.ups:
        raise PlanError(f"{site.name}: the fit has the first half of a linear path but not the second (ups)")
    if not fit.ups:
        return fit
    if producer is None or not site.bridge.pixelwise:
        what = "an average, a pooling or a reshape in it"
        if producer is None:
            what = "no producer"
        raise PlanError(f"{site.name}: the site has {what}, so that no fitted linear path can run beside it")
    if down is not None:
        down = _with_window(down, producer)
        if down.dim() < 2 or down.shape[0] < 1:
            raise PlanError(f"{site.name}: down of the fit has shape {tuple(down.shape)}, not (rank, d_in)")
        _check_shape(site, "down", down, (*down.shape[:2], *_window(producer)))
        if fit.down_bias is not None:
            _check_shape(site, "down_bias", fit.down_bias, (down.shape[0],))
    ups = []
    for i, c in enumerate(site.consumers):
        up = _with_window(fit.ups[i], c)
        if up.dim() != 2 + len(_window(c)):
            raise PlanError(f"{site.name}: ups.{i} of the fit has {up.dim()} dimensions, not {2 + len(_window(c))}")
        if down is None:  # one full map: with any kernel that leaves the output its size
            _check_shape(site, f"ups.{i}", up, (c.d_out, *up.shape[1:]))
            fitted_map(producer, c, kernel_of(up))
        else:
            _check_shape(site, f"ups.{i}", up, (c.d_out, down.shape[0], *_window(c)))
        ups.append(up)
    return replace(fit, down=down, ups=tuple(ups))


def _window(m: LinearMap) -> tuple[int, ...]:
    """What the shape of a map's weight has behind (d_out, d_in)."""
    if m.kind != "conv2d":
        return ()
    return m.kernel


def _with_window(weight: Tensor, m: LinearMap) -> Tensor:
    """A (d_out, d_in) matrix for a 1x1 convolution as its weight."""
    if m.kind == "conv2d" and weight.dim() == 2:
        return weight[:, :, None, None]
    return weight
