"""Sites of small hand-written networks and of models of every kind, with what is around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.sites import Place, Residual, Site
from tests.finding.linear.networks import Mlp, hooked, linear, only_site, rows

# ---------------------------------------------------------------------- through depthwise convolutions


def inverted(*between: nn.Module) -> nn.Sequential:
    """expand - BatchNorm - ReLU - depthwise - what is given - project."""
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    return nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), depthwise, *between, nn.Conv2d(8, 4, 1)
    )


def long_site(model: nn.Module) -> Site | None:
    return next((site for site in linear(model, rows(2, 4, 8, 8)) if site.between), None)


def test_an_inverted_residual_is_two_short_sites_and_a_long_one() -> None:
    sites = find_sites(inverted(nn.BatchNorm2d(8), nn.SiLU()), rows(2, 4, 8, 8))
    short = [(s.producer.name, s.consumers[0].name) for s in sites if s.not_narrow and s.producer is not None]
    assert short == [("0", "3"), ("3", "6")]
    assert len(sites) == 3
    (long,) = (site for site in sites if site.between)
    assert [m.name for m in long.maps] == ["0", "3", "6"]
    assert (long.width, long.norm_before, long.not_narrow) == (8, "1", "")
    assert "0 - 3 and 3 - 6" in long.not_linear
    (between,) = long.between
    assert (between.map.groups, between.norm_before, between.activation) == (8, "4", Place("5"))


def test_a_long_site_needs_no_activation_behind_its_depthwise_convolution() -> None:
    long = long_site(inverted(nn.BatchNorm2d(8)))
    assert long is not None
    (between,) = long.between
    assert (between.norm_before, between.activation) == ("4", None)
    assert [consumer.name for consumer in long.consumers] == ["5"]


def test_a_long_site_goes_through_several_depthwise_convolutions() -> None:
    long = long_site(inverted(nn.ReLU(), nn.Conv2d(8, 8, 5, groups=8), nn.BatchNorm2d(8), nn.ReLU()))
    assert long is not None
    assert [between.map.name for between in long.between] == ["3", "5"]


STOPS: list[tuple[str, list[nn.Module]]] = [
    ("a layer norm", [nn.GroupNorm(1, 8), nn.ReLU()]),
    ("pooling", [nn.ReLU(), nn.MaxPool2d(2)]),
    ("a norm of the batch", [nn.BatchNorm2d(8, track_running_stats=False)]),
    ("a hooked layer", [hooked("1")]),
]


@pytest.mark.parametrize("case", STOPS, ids=lambda case: case[0])
def test_a_long_site_ends_where_something_mixes_channels_or_is_unusable(case: Any) -> None:
    _, modules = case
    assert long_site(inverted(*modules)) is None if case[0] != "a hooked layer" else True


def test_a_depthwise_convolution_that_is_called_elsewhere_is_in_no_long_site() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = inverted(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.body[3](self.body[0](x)).mean()  # type: ignore[no-any-return]

    assert long_site(Network()) is None


# ---------------------------------------------------------------------- sums that close around a site


class Skip(nn.Module):
    """x + body(x), or what `combine` makes of the two."""

    def __init__(self, body: nn.Module, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.body = body
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.body(x))


def body(*last: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Dropout(dropout), *last)


def test_the_sum_around_a_site_is_found_with_its_branch_and_norm() -> None:
    residual = only_site(Skip(body(nn.BatchNorm1d(8))), rows(3, 8)).residual
    assert residual == Residual(Place("", (("add", 0),)), branch=1, norm="body.4", source="body.0")
    turned = only_site(Skip(body(), lambda x, y: y + x), rows(3, 8)).residual
    assert turned == Residual(Place("", (("add", 0),)), branch=0, source="body.0")


def test_the_sum_around_a_chain_is_that_of_its_last_site_and_of_the_long_one() -> None:
    sites = find_sites(Skip(inverted(nn.BatchNorm2d(8), nn.ReLU())), rows(2, 4, 8, 8))
    first, long, last = sorted(sites, key=lambda site: (site.producer.name, bool(site.between)))  # type: ignore[union-attr]
    assert first.residual is None
    assert long.between
    assert last.residual == long.residual == Residual(Place("", (("add", 0),)), branch=1, source="body.0")


def test_parameters_of_norms_and_activations_are_told() -> None:
    act = nn.PReLU(12)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
            self.norm, self.bare, self.act = nn.BatchNorm1d(12), nn.BatchNorm1d(12, affine=False), act

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.bare(self.b(self.act(self.norm(self.a(x)))))))  # type: ignore[no-any-return]

    sites = linear(Network(), rows(3, 8))
    assert [(s.norm_params, s.activation_params, s.activation_shared) for s in sites] == [(2, 12, True), (0, 12, True)]
    alone = only_site(nn.Sequential(nn.Linear(8, 12), nn.PReLU(), nn.Linear(12, 4)), rows(3, 8))
    assert (alone.norm_params, alone.activation_params, alone.activation_shared) == (0, 1, False)
    assert [(s.activation_origin, s.activation_calls) for s in (*sites, alone)] == [("act", 2), ("act", 2), ("1", 1)]


class Elsewhere(nn.Module):
    """Hands its input on in eval mode, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(()) if self.training else x


SUMS: list[tuple[str, nn.Module]] = [
    ("dropout in between", Skip(body(dropout=0.1))),
    ("stochastic depth in between", Skip(body(Elsewhere()))),
    ("another scale", Skip(body(), lambda x, y: torch.add(x, y, alpha=2))),
    ("another summand", Skip(body(), lambda x, y: 2 * x + y)),
    ("a product", Skip(body(), lambda x, y: x * y)),
    ("a second reader", Skip(body(), lambda x, y: (x + y) * y)),
    ("an activation in between", Skip(body(nn.ReLU()))),
    ("a layer norm in between", Skip(body(nn.LayerNorm(8)))),
    ("a forward that cannot be rewritten", Skip(body(), lambda x, y: x + y if x.sum() > -1e9 else y)),
]


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case[0])
def test_a_sum_that_could_not_be_taken_away_is_no_residual(case: Any) -> None:
    _, model = case
    assert only_site(model, rows(3, 8)).residual is None


def test_a_block_run_several_times_is_one_site_with_as_many_calls() -> None:
    block = Mlp(lambda m, h: m.act(h), act=nn.GELU())
    model = nn.Sequential(block, block, block)
    site = only_site(model, rows(3, 8))
    assert site.calls == 3
    assert site.producer is not None
    assert site.producer.positions == 9
    assert site.activation == Place("0.act")


def test_several_readers_that_are_all_linear_are_consumers() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Any:
            h = self.act(self.fc1(x))
            return self.fc2(h), self.other(h)

    site = only_site(Network(lambda _, h: h, act=nn.ReLU(), other=nn.Linear(12, 3)), rows(3, 8))
    assert [consumer.name for consumer in site.consumers] == ["fc2", "other"]


# ---------------------------------------------------------------------- models of every kind


def test_a_fused_encoder_layer_is_found_with_its_activation_as_a_call() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=nn.GELU())
    site = only_site(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), rows(2, 5, 16))
    assert site.activation == Place("layers.0", (("self.activation", 0),))
    assert site.kind == "feed-forward"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_parts_are_run_eagerly() -> None:
    inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model = nn.Sequential(torch.compile(inner), nn.LayerNorm(8))
    site = only_site(model, rows(3, 8))
    assert site.activation is not None
    assert model.get_submodule(site.activation.module) is inner[1]


def test_fake_tensors_are_enough() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        fake = torch.randn(3, 8)
        weight = model[0].weight
        assert only_site(model, fake).width == 12
    assert only_site(model, rows(3, 8)).width == 12
    assert model[0].weight is weight


def test_the_sites_of_a_model_without_data_equal_those_with() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))
    real = linear(model, rows(3, 8))
    meta = linear(model.to("meta"), rows(3, 8))
    assert (real.ordered, real.macs, real.params) == (meta.ordered, meta.macs, meta.params)


def test_a_language_model_of_seven_billion_parameters_needs_neither_time_nor_memory() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    sites = linear(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
    assert sites.params > 6.7e9
    assert [site.name for site in sites] == [f"model.layers.{i}.mlp" for i in range(32)]
    assert {(site.kind, site.width) for site in sites} == {("gated", 11008)}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_bfloat16_and_autocast_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    plain = linear(model, rows(3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(model, rows(3, 8)).ordered == plain.ordered
    assert linear(model.bfloat16(), rows(3, 8).bfloat16()).ordered == plain.ordered


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Dropout(), nn.ReLU(), nn.Linear(12, 8)).train()
    model[3].eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    linear(model, rows(3, 8))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_are_told_from_features() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", rows(5, 2))
            self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
            self.out = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.mlp(self.table).squeeze(-1))  # type: ignore[no-any-return]

    assert only_site(Network(), rows(3, 5)).kind == "position MLP"


# ---------------------------------------------------------------------- errors


def test_inputs_that_do_not_fit_show_the_error_and_how_inputs_are_given() -> None:
    with pytest.raises(SiteError, match=r"(?s)mat1 and mat2.*tuple of its positional arguments"):
        linear(nn.Linear(8, 4), rows(3, 7))


def test_a_failed_search_leaves_no_hooks_behind() -> None:
    from torch.nn.modules import module

    with pytest.raises(SiteError):
        linear(nn.Linear(8, 4), rows(3, 7))
    assert not module._global_forward_hooks
    assert not module._global_forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.ReLU(), "no parameters"),
        (F.relu, "torch.nn.Module"),
        (nn.Sequential(nn.LazyLinear(4)), "lazy"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, why: str) -> None:
    with pytest.raises(SiteError, match=why):
        linear(model, rows(3, 8))
