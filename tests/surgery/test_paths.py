"""Products of linear maps, and what stands between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry, Fate
from shallower.planning.forms import form_of
from shallower.surgery.paths import affine, as_read, columns_read, linear_path_of, product_of


def normed() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)
    ).double()
    for norm in (model[1], model[3]):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    nn.init.normal_(model[1].bias)
    return model.eval(), torch.randn(5, 3, dtype=torch.float64)


def test_a_norm_is_a_scale_and_a_shift() -> None:
    model, _ = normed()
    h = torch.randn(4, 6, dtype=torch.float64)
    scale, shift = affine(model, "1")
    assert torch.allclose(model[1](h), h * scale + shift)
    assert affine(model, "") is None
    with pytest.raises(PlanError, match="not a BatchNorm"):
        affine(model, "0")


def test_linear_and_dropped_channels_as_the_consumer_reads_them() -> None:
    model, x = normed()
    site = find_sites(model, x)[0]
    slopes, offsets = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    fates = torch.tensor([int(Fate.LINEAR)] * 4 + [int(Fate.DROP)] * 2)
    entry = Entry(site, fates, slopes, offsets)
    rows, shift, constants = as_read(model, entry, model[0], entry.linear, entry.dropped)
    line = model[3](model[1](model[0](x)) * slopes + offsets)
    assert torch.allclose(x @ rows.T + shift, line[:, :4])
    assert torch.allclose(constants, model[3](offsets.expand(1, 6))[0, 4:])


def test_the_path_of_a_collapse_has_all_constants_in_the_consumers_bias() -> None:
    model, x = normed()
    entry = Entry.collapse(find_sites(model, x)[0])
    path = linear_path_of(model, entry, form_of(entry), model[0], [model[4]])
    weight = product_of(path.ups[0], path.down, model[0], model[4])
    expected = model[4](model[3](model[1](model[0](x))))
    assert path.shift is None
    assert torch.allclose(x @ weight.T + path.biases[0], expected)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_product_of_two_convolutions(stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 2, stride=stride, bias=False).double()
    second = nn.Conv2d(4, 3, 2, dilation=dilation, bias=False).double()
    x = torch.randn(1, 2, 13, 13, dtype=torch.float64)
    weight = product_of(second.weight, first.weight, first, second)
    assert torch.allclose(F.conv2d(x, weight, stride=stride), second(first(x)))


def test_columns_of_a_flattened_image_are_blocks_of_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    site = find_sites(model, torch.randn(1, 1, 4, 4))[0]
    columns = columns_read(site, model[3], torch.tensor([2]))
    assert torch.equal(columns, model[3].weight[:, 8:])


def test_a_constant_in_front_of_zero_padding_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1))
    nn.init.normal_(model.eval()[2].bias)
    site = find_sites(model, torch.randn(1, 1, 4, 4))[0]
    entry = Entry.narrow(site, torch.tensor([0]))
    with pytest.raises(PlanError, match="along the border"):
        linear_path_of(model, entry, form_of(entry), model[0], [model[3]])
