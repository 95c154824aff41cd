"""How plans are written and read, whatever the files hold."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shallower.errors import PlanError
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from shallower.sites import Place, Site
from tests.planning.samples import N, fitted_plan, linear, same, site


def test_a_saved_plan_is_read_back_exactly(tmp_path):
    plan = fitted_plan()
    plan.save(tmp_path / "a" / "plan")
    assert same(Plan.load(tmp_path / "a" / "plan"), plan)
    assert sorted(p.name for p in (tmp_path / "a" / "plan").iterdir()) == ["plan.json", "plan.safetensors"]


@settings(max_examples=25)
@given(
    fates=st.lists(st.sampled_from(list(Fate)), min_size=N, max_size=N),
    slopes=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=N, max_size=N),
)
def test_any_plan_survives_its_description(fates, slopes):
    numbers = torch.tensor(slopes, dtype=torch.float64)
    plan = Plan((Entry(site(), torch.tensor(fates), numbers, -numbers),))
    tensors = {"0.slopes": numbers, "0.offsets": -numbers}
    assert same(Plan.from_json(json.loads(json.dumps(plan.to_json())), tensors), plan)


def test_every_part_of_a_fit_and_the_reasons_are_read_back(tmp_path):
    torch.manual_seed(2)
    kept, gate = 3, linear("gate", 6, N)
    fit = Fit(
        (torch.randn(5, kept),), (torch.randn(5),), torch.randn(2, 6), (torch.randn(5, 2),), torch.randn(2),
        torch.randn(kept, 6), torch.randn(kept), torch.randn(kept, 6), torch.randn(kept),
    )  # fmt: skip
    gated = Entry.narrow(site(kind="gated", gate=gate), torch.arange(kept), fit=fit, note="measured", error=0.0312)
    square = site("other", producer=linear("3", 6, N), consumers=(linear("4", N, 5),), activation=Place("5"))
    plan = Plan((gated, Entry.collapse(square, becomes="merged", note="timed")))
    plan.save(tmp_path)
    read = Plan.load(tmp_path)
    assert same(read, plan)
    assert [(e.becomes, e.fold_skip, e.note, e.error) for e in read.entries] == [
        ("", False, "measured", 0.0312),
        ("merged", False, "timed", None),
    ]
    first, second = str(read).splitlines()[-2:]
    assert first.endswith("3.12%  measured")
    assert second.endswith("timed")
    assert "error" in str(read)
    assert "error" not in str(Plan((read.entries[1],)))


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_a_plan_of_an_earlier_version_is_read(tmp_path, version):
    plan = fitted_plan()
    plan.save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    data["version"] = version
    if version < 4:
        del data["left_out"]
    for entry in data["entries"]:
        site = entry["site"]
        if version == 6:
            continue
        site["heads"] = None
        if version == 5:
            continue
        del entry["error"], site["activation_origin"], site["activation_calls"]
        if version == 4:
            continue
        for layer in (site["producer"], *site["consumers"]):
            del layer["size"]
        del site["pooled"]
        if version > 1:
            continue
        for key in ("becomes", "fold_skip", "note"):
            del entry[key]
        for key in ("down_bias", "producer", "producer_bias", "gate", "gate_bias"):
            del entry["fit"][key]
        for key in ("not_narrow", "not_merged", "between", "residual", "heads", "norm_params", "activation_shared"):
            del site[key]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert same(Plan.load(tmp_path), plan)


def test_norms_as_they_were_are_refused(tmp_path):
    fitted_plan().save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    data["version"] = 6
    data["entries"][0]["site"]["averages"] = [{"module": "norm", "dim": -1, "size": 8, "spans": []}]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="norms are described otherwise since version 7"):
        Plan.load(tmp_path)


def test_a_description_without_its_tensors_is_refused():
    with pytest.raises(PlanError, match=r"the tensor '0\.slopes' is missing"):
        Plan.from_json(fitted_plan().to_json())


def test_saving_again_replaces_the_plan(tmp_path):
    fitted_plan().save(tmp_path)
    Plan.collapse([site()]).save(tmp_path)
    assert Plan.load(tmp_path).method == "collapse"


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable")
def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PlanError, match="cannot be written"):
        fitted_plan().save(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "plan").write_text("")
    with pytest.raises(PlanError, match="cannot be written"):
        fitted_plan().save(tmp_path / "plan")


@pytest.mark.parametrize("missing", ["plan.json", "plan.safetensors"])
def test_a_missing_file_is_an_error(tmp_path, missing):
    fitted_plan().save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(PlanError, match=r"missing|No such file"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
@pytest.mark.parametrize("damage", ["cut in half", "empty", "noise"])
def test_a_damaged_file_is_an_error(tmp_path, name, damage):
    fitted_plan().save(tmp_path)
    content = (tmp_path / name).read_bytes()
    damaged = {"cut in half": content[: len(content) // 2], "empty": b"", "noise": b"\xff" * 64}
    (tmp_path / name).write_bytes(damaged[damage])
    with pytest.raises(PlanError, match=r"not readable as JSON|not a safetensors file"):
        Plan.load(tmp_path)


def _set(*keys: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


SITE = ("entries", 0, "site")
ATTACKS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another schema": (_set("schema", to="pickle"), "not a plan"),
    "a later version": (_set("version", to=8), "version 8 of the format"),
    "a version that is no number": (_set("version", to=[1]), "version"),
    "an error below 0": (_set("entries", 0, "error", to=-0.1), "finite number of at least 0"),
    "an error that is no number": (_set("entries", 0, "error", to="0.1"), "error"),
    "an error that is true": (_set("entries", 0, "error", to=True), "error"),
    "an unknown key": (_set("code", to="import os"), "'code' is not a key of"),
    "an unknown key in an entry": (_set("entries", 0, "code", to=1), "'code' is not a key of"),
    "an unknown key in a site": (_set(*SITE, "code", to=1), "'code' is not a key of"),
    "an unknown key in a layer": (_set(*SITE, "producer", "code", to=1), "'code' is not a key of"),
    "entries that are no list": (_set("entries", to={}), "not a list"),
    "an entry that is no object": (_set("entries", 0, to=3), "not an object"),
    "a fingerprint that is none": (_set("fingerprint", to="x"), "fingerprint"),
    "a method that is no text": (_set("method", to=3), "method"),
    "a width without end": (_set(*SITE, "width", to=10**30), "width"),
    "a negative width": (_set(*SITE, "width", to=-1), "width"),
    "a width that does not fit": (_set(*SITE, "width", to=13), "do not fit its width"),
    "a layer without end": (_set(*SITE, "producer", "d_in", to=10**12), "producer"),
    "a layer with half a feature": (_set(*SITE, "producer", "d_in", to=0.5), "producer"),
    "a layer of another kind": (_set(*SITE, "producer", "kind", to="eval"), "producer"),
    "a kernel that is none": (_set(*SITE, "producer", "kernel", to=[0, 0]), "producer"),
    "groups of nothing": (_set(*SITE, "producer", "groups", to=0), "producer"),
    "a site without consumers": (_set(*SITE, "consumers", to=[]), "do not fit"),
    "consumers that are no list": (_set(*SITE, "consumers", to=3), "consumers: 3 is not a list"),
    "a kind of site that is none": (_set(*SITE, "kind", to="all"), "kind: 'all' is not one of"),
    "a place that is none": (_set(*SITE, "activation", "module", to=3), "site.activation"),
    "a call that is none": (_set(*SITE, "activation", "calls", to=[["relu"]]), "site.activation"),
    "fates that are none": (_set("entries", 0, "fates", to=[["maybe", 12]]), "fates"),
    "too few fates": (_set("entries", 0, "fates", to=[["keep", 3]]), "do not count 12"),
    "too many fates": (_set("entries", 0, "fates", to=[["keep", 12], ["keep", 1]]), "do not count 12"),
    "fates without end": (_set("entries", 0, "fates", to=[["keep", 10**18]]), "fates"),
    "a family that is none": (_set("entries", 0, "family", to="cubic"), "family"),
    "a tensor that is missing": (_set("entries", 0, "slopes", "tensor", to="0.none"), "missing from plan.safetensors"),
    "a tensor of another shape": (_set("entries", 0, "slopes", "shape", to=[6, 2]), "the plan says"),
    "a tensor of another type": (_set("entries", 0, "slopes", "dtype", to="float32"), "the plan says 'float32'"),
    "a tensor of another hash": (_set("entries", 0, "slopes", "sha256", to="0" * 64), "other numbers"),
    "a tensor for another": (_set("entries", 0, "slopes", "tensor", to="0.offsets"), "other numbers"),
    "a form that is none": (_set("entries", 0, "becomes", to="smaller"), "becomes: 'smaller'"),
    "a form of kept channels": (_set("entries", 0, "becomes", to="merged"), "without kept channels"),
    "a form that is no text": (_set("entries", 0, "becomes", to=[]), "becomes"),
    "a skip that is not there": (_set("entries", 0, "fold_skip", to=True), "without kept channels"),
    "a skip that is no flag": (_set("entries", 0, "fold_skip", to=1), "fold_skip: 1 is not true or false"),
    "a note without end": (_set("entries", 0, "note", to="a" * 2001), "note"),
    "a note that is no text": (_set("entries", 0, "note", to={}), "not a text"),
    "a residual that is none": (_set(*SITE, "residual", to=3), "not an object"),
    "a residual of a third summand": (
        _set(*SITE, "residual", to={"place": {"module": "", "calls": []}, "branch": 2, "norm": "", "source": ""}),
        "branch: 2",
    ),
    "a layer between that is none": (_set(*SITE, "between", to=[{"map": None}]), "map: None"),
    "layers between that are no list": (_set(*SITE, "between", to="all"), "not a list"),
    "heads as they were": (_set(*SITE, "heads", to={"module": "x"}), "'heads' is not a key of Site"),
    "lists without slots": (_set(*SITE, "lists", to=[{"module": "x", "read": [], "params": 0}]), "lists|do not fit"),
    "heads of another kind of site": (_set(*SITE, "kind", to="heads"), "do not fit"),
    "a flag that is a number": (_set(*SITE, "activation_shared", to=1), "activation_shared: 1 is not true or false"),
    "a path without its second half": (_set("entries", 0, "fit", "ups", to=[]), "not the second"),
    "a middle without a path": (_set("entries", 0, "fit", "down", to=None), "does not name|down_bias|inputs"),
    "a fit of another kind": (_set("entries", 0, "fit", to=[]), "not an object"),
    "ups that are no list": (_set("entries", 0, "fit", "ups", to={}), "ups: the object is not a list"),
    "savings that are not true": (_set("saves", "params", to=10**9), "the file was changed"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_description_is_refused(tmp_path, attack):
    change, reason = ATTACKS[attack]
    fitted_plan().save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=reason):
        Plan.load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": NaN}', '{"schema": Infinity}', "3", "null"])
def test_json_that_is_no_plan_is_refused(tmp_path, text):
    fitted_plan().save(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        Plan.load(tmp_path)


def _rehashed(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What somebody writes who changes numbers and hashes together."""
    import hashlib

    save_file(tensors, directory / "plan.safetensors")
    data = json.loads((directory / "plan.json").read_text())
    for reference in (data["entries"][0]["slopes"], data["entries"][0]["fit"]["down"]):
        tensor = tensors[reference["tensor"]]
        reference["sha256"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        reference["shape"], reference["dtype"] = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    (directory / "plan.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("0.slopes", torch.full((N,), float("nan"), dtype=torch.float64), "not finite"),
        ("0.slopes", torch.ones(N + 1, dtype=torch.float64), r"slopes has shape \(13,\), and must have"),
        ("0.slopes", torch.ones(N, dtype=torch.int64), "dtype: 'int64'"),
        ("0.down", torch.ones(3, 7), "fitted for 7 inputs"),
        ("0.down", torch.ones(3, 6, 1), "down of the fit has shape"),
    ],
)
def test_hostile_numbers_are_refused(tmp_path, name, tensor, reason):
    fitted_plan().save(tmp_path)
    tensors = load_file(tmp_path / "plan.safetensors")
    _rehashed(tmp_path, {**tensors, name: tensor})
    with pytest.raises(PlanError, match=reason):
        Plan.load(tmp_path)


def test_a_tensor_that_no_entry_names_is_refused(tmp_path):
    fitted_plan().save(tmp_path)
    tensors = load_file(tmp_path / "plan.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "plan.safetensors")
    with pytest.raises(PlanError, match="does not name the tensor 'extra'"):
        Plan.load(tmp_path)


def test_a_plan_is_not_changed_by_changing_its_description():
    plan = Plan.collapse([site()])
    data = plan.to_json()
    again = copy.deepcopy(data)
    data["entries"][0]["fates"].append(["keep", 1])
    assert plan.to_json() == again


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name, kind):
    fitted_plan().save(tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(PlanError, match=r"link|regular file"):
        Plan.load(tmp_path)


def test_thousands_of_activation_places_are_read(tmp_path):
    places = [Site(f"act{i}", "activation", 0, None, (), Place(f"act{i}"), "relu") for i in range(3000)]
    Plan.collapse(places).save(tmp_path)
    assert len(Plan.load(tmp_path)) == 3000


def test_more_entries_than_any_model_has_sites_are_refused(tmp_path):
    Plan.collapse([Site("act", "activation", 0, None, (), Place("act"), "relu")]).save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    data["entries"] *= 30_000
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="30000 entries are more than any model has sites"):
        Plan.load(tmp_path)
