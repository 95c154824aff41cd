"""The command line as a person uses it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from shallower import load
from shallower.app import cli
from shallower.app.jobs import task_of
from tests.app.small import Net
from tests.processes import listen_to_ctrl_c

pytest.importorskip("datasets")

NET = f"{__name__}:make_net"
ROOT = Path(__file__).parents[2]
TIMM = "timm:test_vit?pretrained=false&num_classes=10&img_size=32&patch_size=8"


def make_net() -> nn.Module:
    """A convolution and a wide head for 6x6 grey pictures of three classes."""
    torch.manual_seed(0)
    head = [nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3)]
    return Net(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), *head)


def make_flat() -> tuple[nn.Module, torch.Tensor]:
    """A network without sites."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), torch.zeros(2, 1, 6, 6)


def make_normed() -> nn.Module:
    """A norm stands between an activation and the next layer."""
    head = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), *head)


class Finished(NamedTuple):
    status: int
    out: str
    err: str


Shallower = Callable[..., Finished]


@pytest.fixture
def shallower(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shallower:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["shallower", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return Finished(int(exit_.value.code or 0), out, err)

    return run


def compress(shallower: Shallower, data: Path, output: Path, *options: object, model: str = NET) -> Finished:
    """By training, until layers collapse."""
    fixed = ("--method", "layer-collapse", "--task", "image-classification", "--device", "cpu")
    trained = ("--lr", "0.01", "--dense-epochs", "4", "--epochs", "4")
    return shallower("compress", model, "--data", data, "--output", output, *fixed, *trained, *options)


def squeeze(shallower: Shallower, data: Path, output: Path, *options: object, model: str = NET) -> Finished:
    """Without training."""
    fixed = ("--method", "squeeze", "--task", "image-classification", "--device", "cpu", "--samples", 64)
    return shallower("compress", model, "--data", data, "--output", output, *fixed, *options)


def error_line(finished: Finished, status: int = 1) -> str:
    """The one line that tells what is wrong."""
    assert finished.status == status, finished.err
    assert "Traceback" not in finished.err
    line = finished.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_help_fits_into_80_columns_and_has_examples(shallower: Shallower) -> None:
    commands = ("inspect", "compress", "pick", "compare", "bench", "export", "report", "demo")
    for command in ([], *([name] for name in commands)):
        finished = shallower(*command, "--help")
        assert finished.status == 0
        assert max(map(len, finished.out.splitlines())) <= 80
        if command:
            assert "Example" in finished.out
            assert "\b" not in finished.out


def test_version_is_printed(shallower: Shallower) -> None:
    assert shallower("--version").out.startswith("shallower 0.")


def test_bad_usage_exits_with_2(shallower: Shallower) -> None:
    assert shallower("inspect").status == 2
    assert shallower("inspect", NET, "--nonsense").status == 2
    assert shallower("compress", NET, "--target", "params:50%", "--output", "y").status == 2
    assert shallower("squash").status == 2


def test_inspect_prints_the_table_of_sites(shallower: Shallower) -> None:
    finished = shallower("inspect", NET, "--shape", "1,6,6", "--batch", 2)
    assert finished.status == 0
    assert "3 sites; the model has 11.3K params" in finished.out


def test_inspect_tells_what_is_skipped_and_why(shallower: Shallower) -> None:
    out = shallower("inspect", f"{__name__}:make_normed", "--shape", "8").out
    assert "skipped:" in out
    assert "(LayerNorm)" in out


def test_inspect_prints_json(shallower: Shallower) -> None:
    told = json.loads(shallower("inspect", NET, "--shape", "1,6,6", "--json").out)
    assert [site["width"] for site in told["sites"]] == [4, 96, 96]
    assert told["params"] == sum(p.numel() for p in make_net().parameters())
    assert told["sites"][1]["params_collapsed"] < told["sites"][1]["params"]


def test_inspect_reads_no_weights_with_meta(shallower: Shallower, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "vocab_size": 100}
    config |= {"intermediate_size": 5504, "num_hidden_layers": 2, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    finished = shallower("inspect", tmp_path, "--meta")
    assert finished.status == 0
    assert "2 sites" in finished.out


def test_inspect_knows_a_timm_model(shallower: Shallower) -> None:
    pytest.importorskip("timm")
    assert "6 sites" in shallower("inspect", TIMM).out


def test_inspect_lists_the_real_language_model(shallower: Shallower, data: Path) -> None:
    pytest.importorskip("transformers")
    finished = shallower("inspect", data / "stories260k")
    assert finished.status == 0
    assert "5 sites; the model has 260K params" in finished.out


def test_a_model_without_sites_is_an_error(shallower: Shallower) -> None:
    finished = shallower("inspect", f"{__name__}:make_flat")
    assert "no site that can be squeezed" in error_line(finished)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "./nowhere"),
        ("no.such.module:thing", "No module named"),
        (f"{__name__}:nothing", "has no attribute"),
        (NET, "nothing says what this model takes"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_line(shallower: Shallower, model: str, message: str) -> None:
    assert message in error_line(shallower("inspect", model))


def test_a_shape_that_does_not_fit_is_one_line(shallower: Shallower) -> None:
    assert "does not run on the example inputs" in error_line(shallower("inspect", NET, "--shape", "3,6,6"))
    assert "--shape" in error_line(shallower("inspect", NET, "--shape", "1,x"))


def test_compress_collapses_saves_and_tells(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished = compress(shallower, pictures, output, "--target", "params:5%")
    assert finished.status == 0, finished.err
    assert "2 collapsed" in finished.out
    assert f"saved in {output}" in finished.out
    told = json.loads((output / "result.json").read_text())
    small = load(output, model=make_net())
    params = sum(p.numel() for p in small.parameters())
    assert told["small"]["params"] == params < 0.05 * told["dense"]["params"]
    assert told["small"]["score"] >= 0.9
    assert (output / "plan.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pictures.npz"]


def test_squeezing_needs_neither_labels_nor_training(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    with np.load(pictures) as arrays:
        np.savez(tmp_path / "unlabelled.npz", image=arrays["image"])
    finished = squeeze(shallower, tmp_path / "unlabelled.npz", tmp_path / "out", "--target", "params:50%")
    assert finished.status == 0, finished.err
    assert "agreement" in finished.out
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["dense"]["score"] == 1
    assert told["small"]["params"] <= 0.5 * told["dense"]["params"]
    assert [site["name"] for site in told["sites"]] == ["3", "5"]


def test_training_without_labels_is_one_line(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    with np.load(pictures) as arrays:
        np.savez(tmp_path / "unlabelled.npz", image=arrays["image"])
    finished = compress(shallower, tmp_path / "unlabelled.npz", tmp_path / "out", "--target", "params:50%")
    assert "which column holds the class" in error_line(finished)


def test_classes_that_do_not_fit_do_not_keep_from_squeezing(shallower: Shallower, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (600, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", image=pixels, label=np.arange(600) % 5)
    finished = squeeze(shallower, tmp_path / "many.npz", tmp_path / "out", "--target", "params:70%")
    assert finished.status == 0, finished.err
    assert "the labels were not used: the data has 5 classes" in finished.out


def test_without_a_method_the_minutes_decide(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    given = ("compress", NET, "--data", pictures, "--task", "image-classification", "--device", "cpu")
    finished = shallower(*given, "--target", "params:40%", "--minutes", "0.5", "--output", tmp_path / "out")
    assert finished.status == 0, finished.err
    assert "squeezing on 135 rows (about" in finished.err
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert finished.out.rstrip().endswith(told["summary"])
    assert told["options"]["method"] == "auto"
    assert told["seconds"] < 36


def test_a_result_far_below_the_original_is_a_warning_and_strictly_a_failure(
    shallower: Shallower, pictures: Path, tmp_path: Path
) -> None:
    (status, err), (strictly, _) = [
        (finished.status, finished.err)
        for finished in (
            compress(shallower, pictures, tmp_path / name, "--target", "params:5%", "--lr", "1.0", *more)
            for name, more in (("out", ()), ("strict", ("--strict",)))
        )
    ]
    assert (status, strictly) == (0, 4)
    assert "warning: the accuracy fell from" in err
    told = json.loads((tmp_path / "strict" / "result.json").read_text())
    assert "fell from" in told["alarms"][0]
    for name in ("report.html", "README.md"):
        assert told["alarms"][0] in (tmp_path / "strict" / name).read_text()


def test_a_squeezed_model_heals_by_distillation(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    finished = squeeze(shallower, pictures, tmp_path / "out", "--target", "params:20%", "--heal", 2, "--lr", "0.003")
    assert finished.status == 0, finished.err
    losses = json.loads((tmp_path / "out" / "result.json").read_text())["details"]["healing"]["losses"]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_a_dry_run_tells_the_plan_and_writes_nothing(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    finished = squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%", "--dry-run")
    assert finished.status == 0, finished.err
    assert "dry run: nothing was written" in finished.out
    told = json.loads(
        squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%", "--dry-run", "--json").out
    )
    assert told["after"]["params"] <= 0.5 * told["before"]["params"]
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.npz"]


def test_a_dry_run_of_a_training_tells_the_sites(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    finished = compress(shallower, pictures, tmp_path / "out", "--target", "params:5%", "--dry-run")
    assert finished.status == 0, finished.err
    assert "plan by layer-collapse for 2 sites" in finished.out
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.npz"]


def test_json_is_one_object_and_quiet_is_silent(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    told = json.loads(squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%", "--json").out)
    assert told["output"] == str(tmp_path / "out")
    assert told["small"]["params"] < told["dense"]["params"]
    quiet = squeeze(shallower, pictures, tmp_path / "out", "--target", "params:60%", "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")


def test_every_result_has_a_report_and_a_card(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    assert squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%").status == 0
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert "shallower" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "report.html").unlink()
    assert shallower("report", tmp_path / "out").status == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_activations_go_one_after_another(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    options = ("--method", "tlc", "--target", "params:30%")
    finished = compress(shallower, pictures, tmp_path / "out", *options)
    assert finished.status == 0, finished.err
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["small"]["params"] <= 0.3 * told["dense"]["params"]
    assert told["details"]["removed"]
    points = json.loads((tmp_path / "out" / "curve.json").read_text())["points"]
    assert [point["removed"] for point in points] == list(range(1, len(told["details"]["removed"]) + 1))


def test_all_widths_are_trained_and_one_is_picked(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    trained = compress(shallower, pictures, tmp_path / "all", "--method", "structural-dropout", "--points", 4)
    assert trained.status == 0, trained.err
    original = ("--original", NET)
    picked = shallower("pick", tmp_path / "all", "--target", "params:40%", "--output", tmp_path / "small", *original)
    assert picked.status == 0, picked.err
    points = json.loads((tmp_path / "all" / "curve.json").read_text())["points"]
    told = json.loads((tmp_path / "small" / "result.json").read_text())
    chosen = [point for point in points if point["params"] == told["small"]["params"]]
    assert chosen
    assert told["small"]["score"] == chosen[0]["test_score"]
    small = load(tmp_path / "small", model=make_net())
    assert sum(p.numel() for p in small.parameters()) == told["small"]["params"] <= 0.4 * told["dense"]["params"]
    unmet = shallower("pick", tmp_path / "all", "--target", "params:1%", "--output", tmp_path / "no", *original)
    assert "smallest point of the curve" in error_line(unmet, status=3)
    assert "only imported when you say so" in error_line(
        shallower("pick", tmp_path / "all", "--target", "params:40%", "--output", tmp_path / "no")
    )


def test_only_a_curve_of_widths_is_picked_from(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    assert squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%").status == 0
    finished = shallower("pick", tmp_path / "out", "--target", "params:40%", "--output", tmp_path / "small")
    assert "there is no curve.json" in error_line(finished)


def test_results_are_compared_in_one_table(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    for share in (50, 30):
        assert squeeze(shallower, pictures, tmp_path / f"s{share}", "--target", f"params:{share}%").status == 0
    finished = shallower("compare", tmp_path / "s50", tmp_path / "s30")
    lines = finished.out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [NET, str(tmp_path / "s50"), str(tmp_path / "s30")]
    assert set(json.loads(shallower("compare", tmp_path / "s50", "--json").out)) == {str(tmp_path / "s50")}
    assert "there is no result.json" in error_line(shallower("compare", tmp_path))


def test_a_result_is_timed_against_its_original(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    assert squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%").status == 0
    options = ("--batch", "1,4", "--threads", "1", "--rounds", 2)
    assert "only imported when you say so" in error_line(shallower("bench", tmp_path / "out", *options))
    finished = shallower("bench", tmp_path / "out", *options, "--original", NET)
    assert finished.status == 0, finished.err
    assert [line.split()[0] for line in finished.out.splitlines()] == ["batch", "1", "4"]
    told = json.loads(shallower("bench", tmp_path / "out", *options, "--original", NET, "--json").out)
    assert all(timing["speedup"] > 0 for timing in told["timings"])
    assert shallower("bench", tmp_path / "out", "--batch", "0").status == 2


def test_a_result_is_exported(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    assert squeeze(shallower, pictures, tmp_path / "out", "--target", "params:50%").status == 0
    finished = shallower("export", tmp_path / "out", tmp_path / "small.pt2", "--original", NET)
    assert finished.status == 0, finished.err
    assert (tmp_path / "small.pt2").is_file()


def test_the_same_command_twice_gives_the_same_weights(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    outputs = []
    for _ in range(2):
        assert compress(shallower, pictures, tmp_path / "out", "--target", "macs:60%").status == 0
        outputs.append((tmp_path / "out" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_an_interrupted_run_goes_on_to_the_same_result(
    shallower: Shallower, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compress(shallower, pictures, tmp_path / "whole", "--target", "params:5%").status == 0
    monkeypatch.setattr(Net, "interrupt_in", 33)
    stopped = compress(shallower, pictures, tmp_path / "out", "--target", "params:5%")
    assert stopped.status == 130
    assert f"the same command continues from {tmp_path / '.out.progress'}" in stopped.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Net, "interrupt_in", 12)
    assert compress(shallower, pictures, tmp_path / "out", "--target", "params:5%").status == 0
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_the_state_of_another_run_is_not_gone_on_from(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    note = tmp_path / ".out.progress" / "job.json"
    note.parent.mkdir()
    note.write_text('{"fingerprint": "other"}')
    options = ("--target", "macs:60%")
    assert "interrupted run with other options" in error_line(compress(shallower, pictures, tmp_path / "out", *options))
    assert compress(shallower, pictures, tmp_path / "out", *options, "--fresh").status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "params:20%", "--sites", "encoder.*"), "of the sites that --sites 'encoder.*' selects"),
        (("--target", "params:20%", "--quality-floor", "90"), "between 0 and 1"),
        (("--target", "params:20%", "--task", "causal-lm"), "which column holds the text"),
        (("--target", "params:20%", "--task", "causal-lm", "--augment"), "--augment means nothing for causal-lm"),
        (("--target", "params:20%", "--label-column", "colour"), "no column 'colour'"),
        (("--target", "params:20%", "--lr", "0"), "lr=0.0"),
        (("--target", "params:20%", "--length", "8"), "--length means nothing for image-classification"),
        (("--target", "params:20%", "--text-column", "x"), "--text-column means nothing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    shallower: Shallower, pictures: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    fast = ("--dense-epochs", "0", "--epochs", "1", "--lr", "0.0001")
    assert message in error_line(compress(shallower, pictures, tmp_path / "out", *fast, *options))
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "params:0.1%"), "all 2 sites together reach"),
        (("--target", "params:20%", "--quality-floor", "1"), "allow less, or train the model first"),
    ],
)
def test_a_target_that_is_not_met_exits_with_3(
    shallower: Shallower, pictures: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    finished = compress(shallower, pictures, tmp_path / "out", "--dense-epochs", "0", "--epochs", "1", *options)
    assert message in error_line(finished, status=3)
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "weight:1%"), "not of the form UNIT:AMOUNT"),
        (("--target", "params:100%"), "less than 100 %"),
        (("--target", "params:50%", "--strength", "1"), "it belongs to --method layer-collapse"),
        (("--target", "params:50%", "--epochs", "2"), "--minutes say how long"),
        (("--target", "params:50%", "--method", "squeeze", "--epochs", "2"), "--heal 2 distils"),
        (("--target", "params:50%", "--method", "squeeze", "--lr", "0.1"), "does not train, unless with --heal"),
        (("--target", "params:50%", "--method", "layer-collapse", "--uniform"), "it belongs to --method auto"),
        (("--target", "params:50%", "--method", "squeeze", "--minutes", "2"), "is not bounded by minutes"),
        (("--target", "params:50%", "--minutes", "0"), "minutes=0.0: above 0"),
        (("--target", "params:50%", "--eval-data", "x.csv", "--held-out", "0.2"), "leave one of the two out"),
        (("--target", "params:50%", "--method", "magic"), "magic"),
        (("--target", "params:50%", "--samples", "3"), "--samples"),
        ((), "say how small"),
        (("--target", "params:50%", "--method", "structural-dropout"), "choose one afterwards, with shallower pick"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(
    shallower: Shallower, pictures: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    finished = shallower("compress", NET, "--data", pictures, "--output", tmp_path / "out", *options)
    assert finished.status == 2
    assert message in " ".join(finished.err.split())
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.npz"]


def test_a_directory_with_other_things_is_not_touched(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    assert "not empty" in error_line(compress(shallower, pictures, tmp_path, "--target", "macs:60%"))
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.npz"]


def test_missing_data_is_one_line(shallower: Shallower, tmp_path: Path) -> None:
    finished = compress(shallower, tmp_path / "none.npz", tmp_path / "out", "--target", "macs:60%")
    assert "there is no such file or folder" in error_line(finished)


def test_more_classes_than_outputs_are_refused(shallower: Shallower, tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", image=np.zeros((20, 6, 6), np.uint8), label=np.arange(20) % 5)
    finished = compress(shallower, tmp_path / "many.npz", tmp_path / "out", "--target", "macs:60%")
    assert "the data has 5 classes and the model has 3 outputs" in error_line(finished)


def test_a_drop_target_takes_what_the_score_allows(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    finished = compress(shallower, pictures, tmp_path / "out", "--target", "drop:5%")
    assert finished.status == 0, finished.err
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["small"]["score"] >= 0.95 * told["dense"]["score"]
    assert told["details"]["collapsed"]


def test_a_language_model_is_collapsed_and_then_squeezed(shallower: Shallower, data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = ("--limit", 24, "--length", 32, "--batch-size", 4, "--device", "cpu", "--target", "params:95%")
    texts = ("--data", data / "tinystories" / "text-train.parquet")
    collapsing = ("--method", "layer-collapse", "--epochs", 1, "--order", "last-first")
    first = shallower(
        "compress", data / "stories260k", *texts, *options, *collapsing, "--output", tmp_path / "collapsed"
    )
    assert first.status == 0, first.err
    assert "perplexity" in first.out
    assert task_of(str(tmp_path / "collapsed")) == "causal-lm"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "collapsed")
    squeezing = ("--method", "squeeze", "--output", tmp_path / "squeezed")
    second = shallower("compress", tmp_path / "collapsed", *texts, *options, *squeezing)
    assert second.status == 0, second.err
    assert "4 sites" in shallower("inspect", tmp_path / "collapsed").out
    params = [
        json.loads((tmp_path / name / "result.json").read_text())["small"]["params"]
        for name in ("collapsed", "squeezed")
    ]
    assert params[1] <= 0.95 * params[0]


def test_a_new_head_has_the_classes_of_the_data(shallower: Shallower, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_small_bert(tmp_path / "bert")
    rows = "".join(f"{'good' if i % 3 else 'bad'} film,{('no', 'yes', 'maybe')[i % 3]}\n" for i in range(30))
    (tmp_path / "films.csv").write_text("text,label\n" + rows)
    finished = shallower(
        *("compress", tmp_path / "bert", "--data", tmp_path / "films.csv", "--task", "text-classification"),
        *("--target", "macs:80%", "--device", "cpu", "--output", tmp_path / "out", "--minutes", "1"),
    )
    assert finished.status == 0, finished.err
    assert "the head was new" in finished.out
    small = load(tmp_path / "out")
    assert isinstance(small, transformers.PreTrainedModel)
    assert small.config.id2label == {0: "maybe", 1: "no", 2: "yes"}


def test_text_is_varied_and_linear_paths_are_allowed(shallower: Shallower, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_small_bert(tmp_path / "bert")
    (tmp_path / "films.csv").write_text("text\n" + "good film\nbad film film\ngood bad good\n" * 10)
    finished = shallower(
        *("compress", tmp_path / "bert", "--data", tmp_path / "films.csv", "--task", "feature-extraction"),
        *("--method", "squeeze", "--target", "params:80%", "--vary", "--linear-path", "--device", "cpu"),
        *("--output", tmp_path / "out"),
    )
    assert finished.status == 0, finished.err
    assert load(tmp_path / "out").num_parameters() <= 0.8 * load_dense(tmp_path / "bert")


def load_dense(folder: Path) -> int:
    """Parameters of a saved model."""
    import transformers

    return int(transformers.AutoModel.from_pretrained(folder).num_parameters())


def test_pictures_cannot_be_varied(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    told = error_line(squeeze(shallower, pictures, tmp_path / "out", "--target", "params:80%", "--vary"))
    assert "only batches of tokens can be augmented" in told


def save_small_bert(folder: Path) -> None:
    """A BERT of two layers without a head, and a tokenizer of a few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder)


def test_real_pictures_go_through_a_timm_model(shallower: Shallower, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    finished = shallower(
        *("compress", TIMM, "--data", data / "cifar10" / "test.parquet", "--limit", 24, "--batch-size", 8),
        *("--target", "macs:80%", "--uniform", "--heal", 1, "--device", "cpu", "--output", tmp_path / "out"),
    )
    assert finished.status == 0, finished.err
    sites = json.loads(shallower("inspect", tmp_path / "out", "--json").out)["sites"]
    assert len({site["width"] for site in sites}) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_that_resumes(shallower: Shallower, pictures: Path, tmp_path: Path) -> None:
    options = ("--method", "layer-collapse", "--task", "image-classification", "--device", "cpu", "--lr", "0.01")
    paths = ("--data", str(pictures), "--output", str(tmp_path / "out"))
    command = ["compress", NET, *paths, *options, "--epochs", "300", "--target", "params:5%", "--dense-epochs", "4"]
    program = [sys.executable, "-m", "shallower"]
    with subprocess.Popen(
        [*program, *command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=listen_to_ctrl_c,
    ) as running:
        stage = tmp_path / ".out.progress" / "stage-1.safetensors"
        until = time.monotonic() + 120
        while not stage.exists() and running.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "the same command continues from" in err
    assert "Traceback" not in err
    assert stage.exists()
    assert not (tmp_path / "out").exists()
    resumed = shallower(*command)
    assert resumed.status == 0, resumed.err
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["details"]["stages"][0]["history"]["resumed"] > 0
    assert not stage.exists()


@pytest.mark.slow
def test_help_answers_in_a_process_of_its_own() -> None:
    finished = subprocess.run([sys.executable, "-m", "shallower", "--help"], capture_output=True, text=True)
    assert finished.returncode == 0
    assert "inspect" in finished.stdout
