"""Zero padding between two convolutions, which one merged convolution cannot have, moved to the first of the two.

moved = sh.move_padding(model, sites["layer1.0"])     # then fine-tune: the border has changed a little
sites = sh.find_sites(moved, inputs)                  # the pair merges exactly now

Moved padding makes the first of the two more expensive as long as they do not merge. So only those sites should have it
moved that are to become linear and then merge into something cheaper:

chosen = worth_moving([sites[name] for name in linear])
moved = sh.move_padding(model, chosen)
model = sh.move_padding(moved, chosen, back=True)     # as it was
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from shallower.core.inputs import Inputs, call, model_device
from shallower.core.modes import evaluating, without_inference_mode
from shallower.core.trees import doubled, to_device
from shallower.core.watching import recorded
from shallower.errors import SiteError
from shallower.modules.attachment import copied, detached_copy
from shallower.modules.edits import Padding, perform
from shallower.planning.entries import Entry
from shallower.planning.geometry import joint_padding
from shallower.sites import Place, Site, by_name
from shallower.surgery.simulation import fated

M = TypeVar("M", bound=nn.Module)


@without_inference_mode()
def move_padding(model: M, sites: Site | Iterable[Site], *, inplace: bool = False, back: bool = False) -> M:
    """Let the first convolution of each site put all the zeros around, and the others none.

        moved = sh.move_padding(model, sites.select("layer1.*"))

    The producer's padding becomes p1 + s1 p2 and the consumers' 0. Sizes stay, but along the border the consumer now
    reads what the producer and the activation make of zeros, where it read zeros: fine-tune afterwards. What is merged
    then is exact. Only numbers of padding change: parameters stay the objects they are, so that an optimizer and an
    attached method go on. The change is recorded for `save`. Find the sites again afterwards.

    Args:
        model: perhaps with a method attached.
        sites: of this model, in the order of execution where they overlap.
        inplace: change the model itself, in the middle of a training for instance.
        back: undo it. The sites are those found before the move, whose padding is put back as they say; without
            training in between the model then computes what it computed before.

    Returns:
        A copy, or the model itself with `inplace`. Sites without padding between are passed over.

    Raises:
        SiteError: a site is not of convolutions, its padding is not of zeros, is longer on one side than on the other,
            or differs between its consumers.
    """
    chosen = list(sites) if isinstance(sites, Iterable) else [sites]
    moved = model if inplace else copied(model)
    for site in chosen:  # nothing is changed if one of them cannot be
        _convolutions(moved, site)
    for site in chosen:
        if back:
            _put_back(moved, site)
            continue
        producer, consumers = _convolutions(moved, site)
        inner, outer = zeros_around(site, producer), zeros_around(site, consumers[0])
        if outer == (0, 0):
            continue
        first, *others = by_name(site.maps)
        stride = cast("tuple[int, int]", producer.stride)
        perform(moved, Padding(first, joint_padding(inner, stride, outer)))
        for name in others:
            perform(moved, Padding(name, (0, 0)))
    return moved


def _put_back(moved: nn.Module, site: Site) -> None:
    """Give the convolutions of a site the padding that it says."""
    for m in site.maps:
        if zeros_around(site, cast("nn.Conv2d", moved.get_submodule(m.name))) != m.padding:
            perform(moved, Padding(m.name, m.padding))


@without_inference_mode()
def border_error(model: nn.Module, site: Site | Entry, example_inputs: Inputs) -> float:
    """How much merging a site as it is would change what its consumers return, along the border.

        error = sh.border_error(model, sites["layer1.0"], example_inputs)

    Args:
        model: that the site belongs to.
        site: whose layers would be merged, or the entry with the fates of its channels; else all are linear.
        example_inputs: what the model is called with.

    Returns:
        The relative error (norm of the difference over the norm) of the consumers' outputs against the same linear
        layers apart; 0 where nothing is padded between them.

    Raises:
        SiteError: the site is not of convolutions that pad with zeros.
    """
    entry = Entry.collapse(site) if isinstance(site, Site) else site
    site = entry.site
    apart = detached_copy(model).eval().double()
    if site.activation is None:
        raise SiteError(f"{site.name}: the site has no activation")
    _convolutions(apart, site)
    x = _input_of(apart, site, example_inputs)
    whole = move_padding(apart, site)
    results = []
    for network in (apart, whole):
        f = fated(entry, nn.Identity()).eval()
        results.append(torch.cat([y.flatten() for y in _linear(network, site, f, x)]))
    difference, size = (results[0] - results[1]).norm(), results[0].norm()
    return float(difference / size if size > 0 else difference)


def zeros_around(site: Site, module: nn.Conv2d) -> tuple[int, int]:
    """The zeros that a convolution puts on each side of height and width.

    Raises:
        SiteError: it pads with something else, or more on one side than on the other.
    """
    if module.padding_mode != "zeros":
        raise SiteError(f"{site.name}: a convolution of it pads with {module.padding_mode}, not zeros")
    if not isinstance(module.padding, str):
        return module.padding[0], module.padding[1]
    extents = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "valid":
        return 0, 0
    if any(extent % 2 for extent in extents):
        raise SiteError(f"{site.name}: a convolution of it pads one side more than the other")
    return extents[0] // 2, extents[1] // 2


def _convolutions(model: nn.Module, site: Site) -> tuple[nn.Conv2d, list[nn.Conv2d]]:
    """The producer and the consumers of a site, if padding can move from these to that."""
    if site.producer is None or not site.bridge.direct:
        raise SiteError(f"{site.name}: padding moves between a convolution and those that read it directly")
    found = []
    for m in site.maps:
        try:
            module = model.get_submodule(m.name)
        except AttributeError:
            raise SiteError(f"{site.name}: the model has no module `{m.name}`; were the sites found in it?") from None
        if not isinstance(module, nn.Conv2d):
            raise SiteError(f"{site.name}: `{m.name}` is a {type(module).__name__}, not a convolution")
        found.append(module)
    producer, consumers = found[0], found[1:]
    zeros_around(site, producer)
    if len({zeros_around(site, consumer) for consumer in consumers}) > 1:
        raise SiteError(f"{site.name}: its consumers pad differently, so that no padding of the producer fits all")
    return producer, consumers


def _input_of(model: nn.Module, site: Site, inputs: Inputs) -> Tensor:
    """What the producer reads."""
    name = site.maps[0].name
    with evaluating(model), recorded(model, [name], outputs=False) as seen:
        call(model, to_device(doubled(inputs), model_device(model)))
    if not seen.inputs[name]:
        raise SiteError(f"{site.name}: `{name}` does not run on these inputs")
    return seen.inputs[name][-1]


@torch.no_grad()
def _linear(model: nn.Module, site: Site, f: nn.Module, x: Tensor) -> list[Tensor]:
    """What the consumers give with `f` in the place of the activation."""
    first, *others = map(model.get_submodule, by_name(site.maps))
    before, after = _norm_alone(model, site, site.bridge.norm_before), _norm_alone(model, site, site.bridge.norm_after)
    z = after(f(before(first(x))))
    return [consumer(z) for consumer in others]


def _norm_alone(model: nn.Module, site: Site, name: str) -> nn.Module:
    """A BatchNorm, without an activation that stands in it."""
    norm = model.get_submodule(name) if name else nn.Identity()
    place = site.activation or Place("")
    inner = place.module.removeprefix(f"{name}.")
    if name and not place.calls and inner != place.module:
        norm = copy.deepcopy(norm)
        norm.set_submodule(inner, nn.Identity())
    return norm
