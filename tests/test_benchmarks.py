"""Each benchmark's small real run gives plain results and a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import shallower as sh
from benchmarks import arena, depth, floors, results, zoo, zoo_branches
from benchmarks.__main__ import execute, main
from benchmarks.arena_networks import edits
from benchmarks.families import Family, axes, of_timm, of_transformers
from benchmarks.families.tiny import fields, tiny_config

CACHE = Path(__file__).parents[1] / ".cache" / "benchmarks"


def quick(name: str, data: Path, tmp_path: Path) -> tuple[dict[str, object], str]:
    # Decoded images are shared between runs, stages are not: they are what is tested.
    for decoded in CACHE.glob("cifar10-*.safetensors"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / decoded.name).symlink_to(decoded)
    table = execute(name, data, True, tmp_path / "cache", tmp_path)
    found: dict[str, object] = json.loads((tmp_path / f"{name}.json").read_text())
    return found, table


def rows(found: dict[str, object]) -> list[dict[str, object]]:
    listed = found["rows"]
    assert isinstance(listed, list)
    return listed


@pytest.mark.slow
def test_vgg_loses_both_sites_of_its_head(data: Path, tmp_path: Path) -> None:
    found, table = quick("vgg", data, tmp_path)
    dense, small = rows(found)
    assert len(found["collapsed"]) == 2  # type: ignore[arg-type]
    assert dense["params"] - small["params"] == (512 * 256 + 256) + (256 * 256 + 256) + (256 * 10 + 10) - (
        512 * 10 + 10
    )  # type: ignore[operator]
    assert found["wide_head"] == {"before": 134_309_962, "after": 14_974_026}
    assert "14,974,026" in table


@pytest.mark.slow
def test_sst2_rows_shrink_with_each_collapsed_block(data: Path, tmp_path: Path) -> None:
    found, table = quick("sst2", data, tmp_path)
    listed = rows(found)
    assert [row["collapsed"] for row in listed] == [0, 1, 2, 3, 6]
    # Per block 2 * 384 * 1536 + 384 + 1536 parameters become 384 * 384 + 384.
    assert [listed[0]["params"] - row["params"] for row in listed] == [0, 1_033_728, 2_067_456, 3_101_184, 6_202_368]  # type: ignore[operator]
    assert "6 of 6" in table


def test_vit_compares_two_collapses_of_the_same_network(data: Path, tmp_path: Path) -> None:
    found, table = quick("vit", data, tmp_path)
    listed = rows(found)
    assert [row["collapsed"] for row in listed] == [0, 1, 2]
    assert all(set(row["test"]) == {"unit", "calibration"} for row in listed)  # type: ignore[call-overload]
    assert "best affine" in table


@pytest.mark.slow
def test_an_offloaded_model_is_squeezed_beside_one_in_memory(tmp_path: Path) -> None:
    found, table = quick("offloaded", tmp_path, tmp_path)
    assert [row["way"] for row in rows(found)] == ["offloaded", "in memory"]
    assert "memory growth" in table


@pytest.mark.slow
def test_slope_overhead_times_both_models(tmp_path: Path) -> None:
    found, table = quick("slope_overhead", tmp_path, tmp_path)
    assert [row["sites"] for row in rows(found)] == [5, 4]
    assert all(0.5 < row["ratio"] < 2 for row in rows(found))  # type: ignore[operator]
    assert "BERT" in table


@pytest.mark.slow
def test_structural_dropout_narrows_four_networks_in_every_way_and_draws_them(data: Path, tmp_path: Path) -> None:
    found, table = quick("structural_dropout", data, tmp_path)
    networks: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = found["networks"]  # type: ignore[assignment]
    assert set(networks) == {"mlp", "vgg", "vit", "minilm"}
    ways = {"separate", "magnitude", "squeeze", "published", "defaults", "short", "from dense"}
    assert all(set(network["rows"]) >= ways for network in networks.values())
    assert networks["mlp"]["rows"]["published"]["shares"] == [1.0, 0.75, 0.5, 1 / 256]
    assert "squeeze, all heads" in networks["vit"]["rows"]
    assert all(label in table for label in ("our defaults", "What was asked for", "MiniLM"))
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"structural_dropout-{name}" for name in networks}


def test_a_finished_stage_is_not_trained_again(data: Path, tmp_path: Path) -> None:
    from benchmarks.vit import Work

    for decoded in CACHE.glob("cifar10-*.safetensors"):
        (tmp_path / decoded.name).symlink_to(decoded)
    first = Work(data, True, tmp_path / "vit").from_scratch()[1]
    again = Work(data, True, tmp_path / "vit").from_scratch()[1]
    assert first.resumed == 0
    assert again.resumed == 4
    assert again.losses == first.losses


def test_the_page_of_results_is_made_from_the_files(tmp_path: Path) -> None:
    committed = Path(__file__).parents[1] / "docs"
    (tmp_path / "results").mkdir()
    for path in (committed / "results").glob("*.json"):
        (tmp_path / "results" / path.name).write_text(path.read_text())
    assert results.write(tmp_path).read_text() == (committed / "results.md").read_text()


def test_missing_data_is_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["vit", "--quick", "--data", str(tmp_path / "absent"), "--cache", str(tmp_path), "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "no data" in capsys.readouterr().err


def test_tlc_merges_every_point_of_its_curve_exactly(data: Path, tmp_path: Path) -> None:
    found, table = quick("tlc", data, tmp_path)
    (points,) = found["curves"].values()  # type: ignore[attr-defined]
    assert [len(point["removed"]) for point in points] == [0, 1, 8]
    assert all(point["surgery"] <= 1e-5 for point in points[1:])
    assert points[2]["params"] < points[0]["params"]
    assert "ResNet-20, one-shot" in table


def test_the_zoo_cuts_every_kind_of_family_and_counts_what_is_reached(tmp_path: Path) -> None:
    found, table = quick("zoo", tmp_path, tmp_path)
    listed = {str(row["name"]): row for row in rows(found)}
    assert set(listed) == set(zoo.QUICK)
    assert [row["error"] or row["refused"] for row in listed.values() if row["error"] or row["refused"]] == []
    for name, row in listed.items():
        assert row["reached"] > 0, name  # type: ignore[operator]
        assert row["shapes"] > 0, name  # type: ignore[operator]
    assert listed["hand_unet"]["stock"] == ""
    assert listed["llama"]["stock"] == zoo.LOADS
    assert listed["hand_unet"]["reached"] == listed["hand_unet"]["widths"] == 7
    assert "tests' zoo" in table


def test_the_zoo_loses_layers_branches_and_parts_of_streams(tmp_path: Path) -> None:
    found, table = quick("zoo_branches", tmp_path, tmp_path)
    listed = {str(row["name"]): row for row in rows(found)}
    assert set(listed) == set(zoo_branches.QUICK)
    for name in ("llama", "cifar_resnet"):
        assert set(listed[name]["lost"]) == set(zoo_branches.PARTS)  # type: ignore[call-overload]
        assert not listed[name]["refused"]
    assert listed["llama"]["stock"] == zoo.LOADS
    assert "1 of 1" in table


def test_the_arena_narrows_a_network_in_every_way_to_the_same_cost(data: Path, tmp_path: Path) -> None:
    table = execute("arena", data, True, tmp_path / "cache", tmp_path, "llama")
    found: dict[str, object] = json.loads((tmp_path / "arena.json").read_text())
    dense, *others = sorted(rows(found), key=lambda row: float(row["cut"]))  # type: ignore[arg-type]
    assert {str(row["method"]) for row in others} == set(arena.QUICK)
    macs = [int(row["macs"]) for row in others]  # type: ignore[call-overload]
    assert max(macs) < 0.82 * int(dense["macs"])  # type: ignore[call-overload]
    assert max(macs) - min(macs) < 0.01 * max(macs)
    assert "minus squeeze" in table
    assert "perplexity: squeeze, equal" in table


def test_fewer_layers_are_compared_with_published_ways_on_the_same_data(data: Path, tmp_path: Path) -> None:
    table = execute("depth", data, True, tmp_path / "cache", tmp_path)
    found: dict[str, object] = json.loads((tmp_path / "depth.json").read_text())
    dense, *others = rows(found)
    assert {str(row["method"]) for row in others} == set(depth.METHODS[:3])
    assert all(len(row["gone"]) == 1 for row in others)  # type: ignore[arg-type]
    assert max(int(row["params"]) for row in others) < int(dense["params"])  # type: ignore[call-overload]
    assert "one layer fewer" in table


def test_intervals_are_of_the_differences_on_the_same_calibration_data() -> None:
    mean, half = arena.difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0})  # type: ignore[misc]
    # differences 1, 2 and 3: deviation 1, Student's t 4.303
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert arena.difference({0: 1.0}, {1: 1.0}) is None


def test_an_arena_without_its_network_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(sh.DataError, match="no network 'vgg' in the arena; there are llama, minilm"):
        arena.run(tmp_path, True, tmp_path, "vgg")


def test_words_are_edited_as_often_as_they_differ() -> None:
    assert edits(["the", "cat", "sat"], ["the", "cat", "sat", "down"]) == 1
    assert edits(["a", "b", "c", "d"], ["b", "x", "d"]) == 2
    assert edits([], ["one"]) == 1


def test_widths_are_those_of_the_network_itself_not_of_its_outputs() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(11, 4), nn.Parameter(torch.randn(1, 6, 4))
            self.conv, self.up = nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(6, 8, 3)
            self.mixed, self.single = nn.Parameter(torch.randn(8, 10)), nn.Linear(10, 1)
            self.low, self.high = nn.Parameter(torch.randn(2, 10)), nn.Parameter(torch.randn(12, 2))
            self.classes, self.unused = nn.Linear(12, 3), nn.Linear(12, 5)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.places
            x = self.up(self.conv(x.mT)).mT @ self.mixed
            x = nn.functional.linear(x * self.single(x).sigmoid(), self.high @ self.low)
            return self.classes(x.relu())

    found = axes.widths(Network().eval(), torch.randint(0, 11, (2, 6)))
    assert {width.tensor: (width.axis, width.size) for width in found} == {
        "words.weight": (1, 4),
        "places": (2, 4),
        "conv.weight": (0, 6),
        "up.weight": (1, 8),
        "mixed": (1, 10),
        "low": (0, 2),
        "high": (0, 12),
    }


def test_a_family_that_fails_is_a_row_with_its_error() -> None:
    def broken() -> tuple[nn.Module, Tensor]:
        raise KeyError("no such model")

    row = zoo.examined(Family("broken", "none", broken))
    assert (row.error, row.stage, row.counts) == ("KeyError: 'no such model'", "build", False)


def test_two_thirds_of_a_width_are_not_half_of_it() -> None:
    small = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(5, 2))
    counted = [axes.Width("0.weight", 0, 12), axes.Width("1.weight", 0, 10), axes.Width("2.weight", 0, 3)]
    assert zoo.reached(counted, small) == set(counted[1:])


@pytest.mark.parametrize("name", ["LlamaConfig", "ViTConfig", "LlavaConfig", "DeepseekV3Config"])
def test_configurations_are_made_tiny_with_all_their_parts(name: str) -> None:
    config = tiny_config(getattr(transformers, name))
    sizes = [value for key, value in fields(config).items() if key.endswith(("hidden_size", "intermediate_size"))]
    assert sizes
    assert max(sizes) <= 64


@pytest.mark.parametrize(
    ("name", "read"), [("llava", "pixel_values"), ("qwen2_vl", "image_grid_thw"), ("qwen2_audio", "input_features")]
)
def test_models_of_text_with_pictures_or_sounds_are_given_both(name: str, read: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = of_transformers.made(name)
    assert {"input_ids", read} <= set(inputs)
    towers = [width for width in axes.widths(model, inputs) if "language_model" not in width.tensor]
    assert len(towers) > 5


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("led", {"global_attention_mask"}),
        ("xlnet", {"token_type_ids"}),
        ("trocr", {"encoder_hidden_states"}),
        ("sam", {"input_points", "input_boxes", "input_masks"}),
        ("llava_next", {"input_ids", "pixel_values", "image_sizes"}),
        ("video_llava", {"pixel_values", "pixel_values_videos"}),
        ("qwen3_omni_moe_thinker", {"pixel_values", "input_features"}),
    ],
)
def test_models_are_given_whatever_makes_them_read_every_weight(name: str, given: set[str]) -> None:
    pytest.importorskip("transformers")
    model, inputs = of_transformers.made(name)
    assert given <= set(inputs)
    read = axes.used(model, inputs)
    # vectors that are added, as the mask token of XLNet, read nothing
    assert not [key for key, p in model.named_parameters() if p.squeeze().dim() > 1 and key not in read]


@pytest.mark.parametrize(
    "name",
    ["swin", "detr", "rt_detr", "mask2former", "dpt", "efficientnet", "esm", "gpt_neo", "glm4v", "informer", "vitpose"],
)
def test_models_whose_sizes_depend_on_each_other_are_made_tiny(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = of_transformers.made(name)
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert axes.floats(axes.called(model, inputs))


def test_parameters_without_elements_are_left_as_they_are() -> None:
    class Registers(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.registers = nn.Parameter(torch.empty(1, 0, 4))

    model, _ = Family("registers", "none", lambda: (Registers(), torch.randn(2, 4))).build()
    assert model.get_parameter("registers").numel() == 0


@pytest.mark.parametrize("file", of_timm.CLASSES)
def test_files_of_timm_without_a_small_model_give_their_class(file: str) -> None:
    families = {family.name: family for family in of_timm.listed()}
    model, images = families[f"timm_{file}"].make()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model(images).shape == (2, 7)


def test_what_a_model_keeps_of_its_weights_is_made_anew_from_those_drawn_for_the_zoo() -> None:
    class Caching(nn.Linear):
        kept: Tensor | None = None

        def train(self, mode: bool = True) -> Caching:
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.weight.detach().clone()
            return x @ self.kept.T

    model, inputs = Family("caching", "none", lambda: (Caching(4, 3), torch.randn(2, 4))).build()
    assert torch.equal(model(inputs), inputs @ model.weight.T)


def test_weights_that_no_operation_uses_are_not_counted_where_there_are_no_gradients() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 6), nn.Linear(4, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.used(x).sigmoid()
            hidden.data.mul_(2)
            hidden += 1
            return self.last(hidden).exp().mul_(1).detach()

    counted = {width.tensor for width in axes.widths(InPlace(), torch.randn(5, 4))}
    assert counted == {"used.weight"}


def test_a_parameter_that_is_added_is_one_width_of_all_its_channels() -> None:
    class Biased(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.first, self.bias = nn.Linear(5, 4 * heads), nn.Parameter(torch.randn(heads, 4))
            self.last = nn.Linear(4 * heads, 3)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.first(x).unflatten(-1, (-1, 4)) + self.bias
            return self.last(heads.relu().flatten(-2))

    counted = axes.widths(Biased(6), torch.randn(2, 5))
    assert counted == [axes.Width("bias", 1, 4, 24), axes.Width("first.weight", 0, 24)]
    assert zoo.reached(counted, Biased(3)) == set(counted)
    assert zoo.reached(counted, Biased(4)) == set()


def test_of_a_table_whose_positions_are_picked_the_other_axis_gives_channels() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Parameter(torch.randn(4, 9)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.table[:, x].movedim(0, -1))

    assert axes.Width("table", 0, 4) in axes.widths(Table(), torch.randint(0, 9, (2, 5)))


def test_a_floor_says_whether_it_was_reached() -> None:
    row = {"network": "A", "what": "half", "seconds": 30, "cpu": 29.0, "dense": {"perplexity": 4.7}}
    rows = [
        {**row, "scores": {"perplexity": 8.0}, "aims": [("perplexity", 8.3, False)]},
        {**row, "scores": {"accuracy": 91.0}, "aims": [("accuracy", 92.0, True)], "seconds": None},
    ]
    text = floors.table({"rows": rows, "costs": [], "missing": {"B": "no data"}})
    assert "perplexity 8.3 reached" in text
    assert "29 of 30 s" in text
    assert "accuracy 92 **missed**" in text
    assert "B is not here: no data." in text


def test_the_names_of_floors_are_apart() -> None:
    names = [floor.name for floor in floors.FLOORS]
    assert len(set(names)) == len(names)
