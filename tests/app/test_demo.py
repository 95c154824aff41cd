"""The demo: its networks, its data, and that a saved network is checked to the last bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shallower import find_sites, load
from shallower.app.demo import CONTESTANTS, VGG, WAYS, ViT, check, digits, run
from shallower.app.results import read_record
from shallower.errors import CheckpointError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the table of a quick run."""
    output = tmp_path_factory.mktemp("demo")
    return output, run(output, quick=True)


def test_the_parts_of_the_digits_are_all_rows_once() -> None:
    def sums(seed: int) -> list[torch.Tensor]:
        batches = digits(seed)
        return [
            torch.cat([x for x, _ in part]).sum((1, 2, 3)) for part in (batches.train, batches.validation, batches.test)
        ]

    parts = sums(seed=3)
    assert [len(part) for part in parts] == [1197, 300, 300]
    assert torch.equal(torch.cat(parts).sort().values, torch.cat(sums(seed=0)).sort().values)


def test_both_networks_have_the_sites_that_the_demo_speaks_of() -> None:
    x = torch.zeros(2, 1, 8, 8)
    assert [site.width for site in find_sites(VGG(), x).select("classifier.*")] == [1024, 1024]
    assert [site.width for site in find_sites(ViT(), x)] == [256] * 6


def test_the_demo_collapses_the_head_and_half_of_the_blocks(finished: tuple[Path, str]) -> None:
    _, text = finished
    assert "2 collapsed" in text
    assert "4 collapsed" in text
    assert text.count("squeezed") >= 2
    assert "to the last bit" in text
    assert max(map(len, text.splitlines()[:7])) <= 80


def test_saved_networks_are_smaller_and_load(finished: tuple[Path, str]) -> None:
    output, _ = finished
    for name, contestant in CONTESTANTS.items():
        for way in WAYS:
            fresh = contestant.build()
            small = load(output / f"{name}-{way}", model=fresh)
            assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in fresh.parameters())


def test_every_saved_network_has_its_numbers_and_a_report(finished: tuple[Path, str]) -> None:
    output, _ = finished
    for folder in (output / f"{name}-{way}" for name in CONTESTANTS for way in WAYS):
        assert (folder / "report.html").is_file()
        verdict = read_record(folder).verdict
        assert verdict.small.params < verdict.dense.params


def test_an_answer_that_differs_in_one_bit_fails_the_check(finished: tuple[Path, str]) -> None:
    output, _ = finished
    answers = output / "vgg-squeezed-answers.safetensors"
    kept, original = load_file(answers), answers.read_bytes()
    logits = kept["logits"].clone()
    logits[0, 0] = torch.nextafter(logits[0, 0], torch.tensor(torch.inf))
    save_file({**kept, "logits": logits}, answers)
    try:
        with pytest.raises(CheckpointError, match="vgg-squeezed: the loaded network answers differently"):
            check(output)
    finally:
        answers.write_bytes(original)


def test_the_check_runs_as_a_command(finished: tuple[Path, str]) -> None:
    output, _ = finished
    checked = subprocess.run([sys.executable, "-m", "shallower.app.demo", str(output)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_the_whole_demo_loses_no_accuracy_to_speak_of(tmp_path: Path) -> None:
    run(tmp_path)
    for name in CONTESTANTS:
        squeezed, collapsed = (read_record(tmp_path / f"{name}-{way}").verdict for way in WAYS)
        assert squeezed.dense.score > 0.95
        assert squeezed.small.score > squeezed.dense.score - 0.03
        assert collapsed.small.score > squeezed.dense.score - 0.015
