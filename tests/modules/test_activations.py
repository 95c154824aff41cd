"""The slope activation against its definition, its gradients against numbers, and what surgery leaves in models."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from shallower.modules.activations import KERNELS, PartialActivation, SlopeActivation, Twice, recognise


class WrittenOutGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


FUSED = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "gelu": nn.GELU(),
    "gelu-tanh": WrittenOutGELU(),
    "quick-gelu": QuickGELU(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}
ANY = {**FUSED, "": nn.Softplus(), "in place": nn.ELU(inplace=True)}
LAYOUTS = {"features": ((3, 4), False), "tokens": ((2, 3, 4), False), "images": ((2, 4, 3, 2), True)}


def slope_activation(f: nn.Module, slope: float | Tensor = 0.3, **options: object) -> SlopeActivation:
    module = SlopeActivation(f, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        module.slope.copy_(torch.as_tensor(slope))
    return module


@pytest.mark.parametrize("name", FUSED)
def test_known_functions_are_recognised_by_what_they_compute(name: str) -> None:
    assert recognise(FUSED[name]) == name
    assert set(FUSED) == set(KERNELS)


@pytest.mark.parametrize("f", [nn.Softplus(), nn.ELU(), nn.PReLU(), nn.Hardswish(), nn.LeakyReLU(), nn.Softmax(-1)])
def test_other_functions_are_not_taken_for_known_ones(f: nn.Module) -> None:
    assert recognise(f) == ""


@pytest.mark.parametrize(("name", "target"), [*product(ANY, ("identity", "one"))])
def test_output_is_the_blend_of_f_and_its_target(name: str, target: str) -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    y = ANY[name](x.clone())
    expected = 0.3 * (x if target == "identity" else 1) + 0.7 * y
    torch.testing.assert_close(slope_activation(ANY[name], target=target)(x), expected)


@pytest.mark.parametrize("name", ANY)
def test_input_is_not_overwritten(name: str) -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    before = x.clone()
    slope_activation(ANY[name])(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ANY)
def test_fresh_blend_computes_f(name: str) -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(SlopeActivation(ANY[name]).double()(x), ANY[name](x.clone()))


@pytest.mark.parametrize("name", ANY)
def test_slope_one_is_exactly_the_identity(name: str) -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(slope_activation(ANY[name], 1.0)(x), x)


def test_prelu_family_is_prelu_whatever_f_was() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    module = SlopeActivation(nn.GELU(), family="prelu").double()
    torch.testing.assert_close(module.slope.detach(), torch.tensor([0.01], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(module(x), F.leaky_relu(x, 0.01), rtol=1e-6, atol=1e-9)


def test_prelu_family_with_a_gate_is_refused() -> None:
    with pytest.raises(MethodError, match="no PReLU form"):
        SlopeActivation(nn.SiLU(), family="prelu", target="one")


@pytest.mark.parametrize(("name", "target", "layout"), [*product(ANY, ("identity", "one"), LAYOUTS)])
def test_gradients_are_those_of_the_formula(name: str, target: str, layout: str) -> None:
    shape, channels_first = LAYOUTS[layout]
    x = (torch.randn(shape, dtype=torch.float64) + 0.01).requires_grad_()
    for width in (None, 4):
        module = slope_activation(ANY[name], width=width, target=target, channels_first=channels_first)

        def run(x: Tensor, slope: Tensor, module: nn.Module = module) -> Tensor:
            return functional_call(module, {"slope": slope}, (x,))

        slope = torch.rand(width or 1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, slope))


@pytest.mark.parametrize("name", FUSED)
def test_gradients_of_gradients_are_those_of_the_formula(name: str) -> None:
    module = slope_activation(FUSED[name], width=4)
    x = (torch.randn(3, 4, dtype=torch.float64) + 0.01).requires_grad_()
    slope = torch.rand(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, slope: functional_call(module, {"slope": slope}, (x,)), (x, slope))


def test_frozen_slope_gets_no_gradient_and_the_input_the_same_one() -> None:
    module = slope_activation(nn.GELU())
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    (learnt,) = torch.autograd.grad(module(x).square().sum(), x)
    module.slope.requires_grad_(False)
    (frozen,) = torch.autograd.grad(module(x).square().sum(), x)
    assert torch.equal(learnt, frozen)


def test_slope_learns_where_the_input_needs_no_gradient() -> None:
    module = slope_activation(nn.GELU())
    x = torch.randn(5, 7, dtype=torch.float64)
    module(x).sum().backward()
    torch.testing.assert_close(module.slope.grad, (x - F.gelu(x)).sum().view(1))


def test_only_the_input_is_saved_for_backward() -> None:
    saved: list[Tensor] = []
    module = slope_activation(nn.GELU())
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    assert [t.shape for t in saved if t.numel() > 1] == [x.shape]


def test_gradients_hold_for_strided_layouts() -> None:
    module = slope_activation(nn.SiLU(), torch.rand(4), width=4, channels_first=True)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        moved = x.clone(memory_format=layout).requires_grad_()
        y = module(moved)
        assert y.is_contiguous(memory_format=layout)
        results.append((y, *torch.autograd.grad((y * y.sum(0)).sum(), (moved, module.slope))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_of_an_expanded_result_is_right() -> None:
    module = slope_activation(nn.GELU())
    x = torch.randn(6, 3, dtype=torch.float64).t().requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(module.slope.grad, (x - F.gelu(x)).sum().detach().view(1))


def test_module_used_twice_sums_its_gradients() -> None:
    module = slope_activation(nn.Tanh())
    x = torch.randn(5, 7, dtype=torch.float64)
    module(module(x)).sum().backward()
    a = module.slope.detach().clone().requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return a * x + (1 - a) * torch.tanh(x)

    plain(plain(x)).sum().backward()
    torch.testing.assert_close(module.slope.grad, a.grad)


def test_under_autocast_the_result_is_narrow_and_the_slope_stays_wide() -> None:
    layer, module = nn.Linear(16, 64), SlopeActivation(nn.GELU())
    with torch.no_grad():
        module.slope.fill_(0.3)
    x = torch.randn(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(layer(x))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert module.slope.dtype == module.slope.grad.dtype == torch.float32
    narrow = module.slope.grad.clone()
    module.slope.grad = None
    module(layer(x)).square().sum().backward()
    torch.testing.assert_close(narrow, module.slope.grad, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ANY)
def test_without_gradients_the_values_are_the_same(name: str) -> None:
    module = slope_activation(ANY[name], torch.rand(7), width=7)
    x = torch.randn(5, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module(x.requires_grad_()).detach(), rtol=1e-12, atol=1e-14)


def test_model_with_a_slope_activation_still_shows_its_site() -> None:
    model = nn.Sequential(nn.Linear(4, 8), SlopeActivation(nn.GELU()), nn.Linear(8, 2))
    (site,) = find_sites(model, torch.randn(3, 4))
    assert site.width == 8


def test_slope_activation_can_be_exported() -> None:
    module = SlopeActivation(nn.GELU(), width=7)
    x = torch.randn(5, 7)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_slope_is_in_the_state_dict() -> None:
    source, target = slope_activation(nn.GELU(), 0.7), slope_activation(nn.GELU(), 0.0)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.slope, source.slope)
    assert list(source.state_dict()) == ["slope"]


def test_deep_copy_is_independent() -> None:
    module = slope_activation(nn.GELU(), 0.7)
    duplicate = copy.deepcopy(module)
    with torch.no_grad():
        duplicate.slope.fill_(0)
    assert module.slope.item() == pytest.approx(0.7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # from inductor
@pytest.mark.parametrize(("name", "width"), [("gelu", None), ("", 8)])
def test_compiled_as_one_graph_it_gives_the_same_values_and_gradients(name: str, width: int | None) -> None:
    module = slope_activation(ANY[name], width=width)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    for run in (module, compiled):
        run(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), module(x))
    once = torch.autograd.grad(module(x).square().sum(), (x, module.slope))
    torch.testing.assert_close([x.grad, module.slope.grad], [2 * t for t in once])


def test_partial_activation_acts_on_the_first_channels_only() -> None:
    x = torch.randn(2, 3, 5)
    y = PartialActivation(nn.GELU(), 3, 2)(x)
    torch.testing.assert_close(y, torch.cat([F.gelu(x[..., :3]), x[..., 3:]], -1))


def test_partial_activation_counts_channels_first() -> None:
    x = torch.randn(2, 5, 3, 3)
    y = PartialActivation(nn.GELU(), 3, 2, channels_first=True)(x)
    torch.testing.assert_close(y, torch.cat([F.gelu(x[:, :3]), x[:, 3:]], 1))


def test_partial_activation_of_a_packed_gate_ends_in_ones() -> None:
    x = torch.randn(2, 3, 5)
    y = PartialActivation(nn.SiLU(), 3, 2, gate="packed")(x)
    torch.testing.assert_close(y, torch.cat([F.silu(x[..., :3]), torch.ones(2, 3, 2)], -1))


def test_partial_activation_of_a_separate_gate_appends_ones() -> None:
    x = torch.randn(2, 3, 3)
    y = PartialActivation(nn.SiLU(), 3, 2, gate="separate")(x)
    torch.testing.assert_close(y, torch.cat([F.silu(x), torch.ones(2, 3, 2)], -1))


def test_partial_activation_of_a_separate_gate_without_kept_channels_is_ones_that_broadcast() -> None:
    assert torch.equal(PartialActivation(nn.SiLU(), 0, 2, gate="separate")(torch.randn(2, 3, 7)), torch.ones(2, 3, 1))


def test_partial_activation_without_kept_channels_is_the_identity() -> None:
    x = torch.randn(2, 3, 5)
    assert torch.equal(PartialActivation(nn.GELU(), 0, 5)(x), x)


def test_partial_activation_in_place_trains() -> None:
    x = torch.randn(1, 5, 3, 3, requires_grad=True)
    expected = torch.cat([F.relu(2 * x[:, :3]), 2 * x[:, 3:]], 1)
    y = PartialActivation(nn.ReLU(inplace=True), 3, 2, channels_first=True)(2 * x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_twice_repeats_the_channels() -> None:
    x = torch.randn(2, 3, 5)
    assert torch.equal(Twice()(x), torch.cat([x, x], -1))
    assert torch.equal(Twice(channels_first=True)(x), torch.cat([x, x], 1))
