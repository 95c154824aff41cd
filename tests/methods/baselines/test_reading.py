"""What the consumers read is what hooks see, in the dense network and in the one narrowed so far."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.batches import Batches
from shallower.methods.baselines.reading import Reader
from tests.methods.baselines.test_baseline import images, perceptron


def reads(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a layer reads on all batches."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen)


def test_squares_of_all_sites_take_one_pass() -> None:
    model, sites, batches = perceptron()
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    grams = Reader(model, model, sites, Batches.read(batches)).all()
    handle.remove()
    assert len(calls) == len(batches)
    for site in sites:
        z = reads(model, site.consumers[0].name, batches).double()
        moments = grams[site.name].centred()
        torch.testing.assert_close(moments.mean_y, z.mean(0))
        torch.testing.assert_close(moments.yy, z.var(0, unbiased=False))


def test_products_of_a_padded_convolution_are_those_of_its_patches() -> None:
    model, sites, batches = images()
    site = sites[0]
    gram = Reader(model, model, sites, Batches.read(batches)).one(site, full=True, sequential=False)
    z = reads(model, site.consumers[0].name, batches)
    columns = F.unfold(z, 3, padding=1).mT.flatten(0, 1).double()
    assert gram.count == len(columns)
    torch.testing.assert_close(gram.centred(intercept=False).zz, columns.T @ columns / len(columns))


def test_a_sequential_reading_sees_the_narrowed_network_and_goes_on_from_its_blocks() -> None:
    model, sites, batches = images()
    small = copy.deepcopy(model)
    reader = Reader(model, small, sites, Batches.read(batches))
    first, second = sites
    reader.one(first, full=False, sequential=True)
    with torch.no_grad():
        small.blocks[0][3].weight.mul_(0.5)
    runs: list[int] = []
    handle = small.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    found = reader.one(second, full=False, sequential=True).centred()
    handle.remove()
    z = reads(small, second.consumers[0].name, batches)
    columns = F.unfold(z, 3, padding=1).mT.flatten(0, 1).double()
    torch.testing.assert_close(found.mean_y, columns.mean(0))
    assert len(runs) <= len(batches)
