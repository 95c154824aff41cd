"""Saved directories that were damaged or made to do harm: each is one clear `CheckpointError`, and nothing happens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from shallower.errors import CheckpointError, ShallowerError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import load, save
from shallower.sites import Follower, Written
from shallower.surgery.applying import apply

IDS = torch.arange(3, 23).view(2, 10)


def squeezed() -> nn.Module:
    """A small Llama with one collapsed and one remaining block: edits, ties and buffers of both kinds."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=24,
        vocab_size=30,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    sites = find_sites(model, IDS).select(lambda site: site.kind == "gated")
    return apply(model, Plan.collapse(sites[:1]), IDS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("honest") / "out"
    save(squeezed(), directory)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "out"
    save(squeezed(), directory, max_shard_size=1000)
    return directory


@pytest.fixture
def attacked(honest: Path, tmp_path: Path) -> Path:
    """A copy of an honest directory, to be spoiled."""
    return Path(shutil.copytree(honest, tmp_path / "attacked"))


@pytest.fixture
def split(sharded: Path, tmp_path: Path) -> Path:
    """A copy of an honest directory whose tensors lie in several files."""
    return Path(shutil.copytree(sharded, tmp_path / "attacked"))


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file: in place, or to what `change` returns."""
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


def refuses(directory: Path, message: str = r"\S") -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(directory)
    assert len(str(caught.value)) < 1500


def test_the_honest_directories_load(honest: Path, sharded: Path):
    assert torch.equal(load(honest)(IDS).logits, load(sharded)(IDS).logits)


# ------------------------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize("name", ["model.safetensors", "buffers.safetensors", "shallower.json", "config.json"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(name: str, part: float, attacked: Path):
    content = (attacked / name).read_bytes()
    (attacked / name).write_bytes(content[: int(len(content) * part)])
    refuses(attacked)


@pytest.mark.parametrize("name", ["model.safetensors", "buffers.safetensors", "shallower.json", "config.json"])
def test_a_missing_file(name: str, attacked: Path):
    (attacked / name).unlink()
    refuses(attacked, "No such file")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x00" * 8, (1 << 40).to_bytes(8, "little"), b"\x02" + b"\x00" * 7])
def test_a_header_of_impossible_length(header: bytes, attacked: Path):
    content = (attacked / "model.safetensors").read_bytes()
    (attacked / "model.safetensors").write_bytes(header + content[8:])
    refuses(attacked, "damaged, or not a safetensors file")


def test_a_pickle_in_the_place_of_the_tensors_is_not_opened(attacked: Path, tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "opened"),)

    (attacked / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refuses(attacked, "damaged, or not a safetensors file")
    torch.save({"bomb": Bomb()}, attacked / "model.safetensors")
    refuses(attacked, "damaged, or not a safetensors file")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["shallower.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"null",
        b"[]",
        b'"text"',
        b'{"schema": "shallower", "schema": "shallower"}',
    ],
    ids=["not text", "deep list", "deep object", "long number", "null", "list", "string", "twice the same key"],
)
def test_json_that_is_no_description(name: str, content: bytes, attacked: Path):
    (attacked / name).write_bytes(content)
    refuses(attacked)


def test_a_description_of_gigabytes_is_not_read(attacked: Path):
    with (attacked / "shallower.json").open("r+b") as file:
        file.truncate(8 << 30)
    refuses(attacked, "larger than 64 MiB")


# ---------------------------------------------------------------------------------------------------- shallower.json


@pytest.mark.parametrize("version", [0, 5, -1, True, 1.0, "1", None, [1]])
def test_an_unknown_version(version: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data.update(version=version))
    refuses(attacked, "the files have version .*, and this Shallower reads version 4")


@pytest.mark.parametrize("schema", ["", "Shallower", "shallower.plan", None, 1])
def test_another_schema(schema: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data.update(schema=schema))
    refuses(attacked, "this is not the description of a saved model")


def test_an_unknown_key(attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data.update(run_this="x"))
    refuses(attacked, "'run_this' is not a key of Description")


KEYS = ["source", "edits", "tensors", "buffers", "tied", "frozen", "training", "files"]


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key(key: str, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: {name: data[name] for name in data if name != key})
    refuses(attacked, f"`{key}` is missing")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [None, 3, True, [[]], [3], {"a": 1}, ["x", {}]])
def test_a_key_with_a_value_of_the_wrong_kind(key: str, value: Any, attacked: Path):
    if key in ("training", "files"):
        value = 3
    rewrite(attacked / "shallower.json", lambda data: data.update({key: value}))
    refuses(attacked)


WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", ["object", "torch.float32", "float32 ", "__class__", "", None, 5, ["float32"], {}])
def test_a_dtype_that_does_not_exist(dtype: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["tensors"][WEIGHT].update(dtype=dtype))
    refuses(attacked, f"tensors.{WEIGHT}.*is unknown|tensors.{WEIGHT}.dtype: .* is not a text")


@pytest.mark.parametrize("dtype", ["float16", "int32", "bool"])
def test_a_dtype_that_the_file_does_not_have(dtype: str, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["tensors"][WEIGHT].update(dtype=dtype))
    refuses(attacked, f"tensor {WEIGHT}: ")


@pytest.mark.parametrize(
    "shape", [[8], [24, 8], [8, 24, 1], [], [0], [-8, -24], [8.0, 24.0], "8x24", [[8, 24]], [True]]
)
def test_a_shape_that_the_model_does_not_have(shape: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["tensors"][WEIGHT].update(shape=shape))
    refuses(attacked, f"tensor {WEIGHT}: |tensors.{WEIGHT}.shape")


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [1, 0, 2], "10", [1.0, 0.0], None])
def test_an_order_that_is_no_order(order: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["tensors"][WEIGHT].update(order=order))
    refuses(attacked, f"tensors.{WEIGHT}.*is not (an order|a list|a whole number)")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.missing", "__class__", "", "..", "a\x00b", "x" * 100_000])
def test_a_tensor_that_the_model_does_not_have(name: str, attacked: Path):
    def rename(data: Any) -> None:
        data["tensors"][name] = data["tensors"].pop(WEIGHT)

    rewrite(attacked / "shallower.json", rename)
    refuses(attacked, "tensor ")


def test_a_buffer_that_the_model_does_not_have(attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["buffers"].update(extra=data["tensors"][WEIGHT]))
    refuses(attacked, "tensor extra: the files have it, and the model does not")


@pytest.mark.parametrize(
    "group",
    [
        [],
        ["model.embed_tokens.weight"],
        ["nowhere", "lm_head.weight"],
        ["model.embed_tokens.weight", WEIGHT],
        ["model.embed_tokens.weight", "model.embed_tokens.weight"],
        ["model.embed_tokens.weight", "lm_head.weight", "lm_head.weight"],
        ["model.embed_tokens.weight", "forward"],
        [["model.embed_tokens.weight"], "lm_head.weight"],
        "tied",
    ],
)
def test_ties_that_cannot_be(group: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data.update(tied=[group]))
    refuses(attacked)


def test_a_tensor_that_belongs_to_two_groups(attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["tied"].append(data["tied"][0]))
    refuses(attacked, "it is named twice")


# ------------------------------------------------------------------------------------------------- source and config


@pytest.mark.parametrize(
    "source",
    [
        "os:system?command=true",
        "builtins:eval",
        "transformers:pipeline",
        "transformers:AutoModelForCausalLM",
        "transformers:../../x",
        "transformers:LlamaForCausalLM?attention=someone/kernel",
        "transformers:LlamaForCausalLM?trust_remote_code=true",
        "transformers:BertModel",
        "timm:hf-hub:someone/something",
        "timm:local-dir:/tmp",
        "timm:resnet18?checkpoint_path=/etc/passwd",
        "timm:resnet18?pretrained=true",
        "torchvision:resnet18?weights=DEFAULT",
        "timm:resnet18",
        "\x00",
    ],
)
def test_a_source_that_is_something_else(source: str, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data.update(source=source))
    refuses(attacked)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -1},
        {"hidden_size": "large"},
        {"hidden_size": 10**30},
        {"hidden_size": 0},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1},
        {"vocab_size": 10**12},
        {"num_attention_heads": 0},
        {"hidden_act": "os.system"},
        {"rope_parameters": {"rope_type": "__class__"}},
        {"pad_token_id": 10**9},
        {"model_type": "bert", "hidden_size": 16},
    ],
    ids=str,
)
def test_a_config_that_fits_no_model(change: dict[str, Any], attacked: Path):
    rewrite(attacked / "config.json", lambda data: data.update(change))
    refuses(attacked)


def test_a_config_that_names_code_runs_none(attacked: Path):
    (attacked / "evil.py").write_text("raise SystemExit('code of the directory was run')")
    rewrite(
        attacked / "config.json",
        lambda data: data.update(
            auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            attn_implementation="someone/kernel",
            _attn_implementation="someone/kernel",
        ),
    )
    loaded: Any = load(attacked)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("settings_", [[], 3, None, "text"])
def test_a_generation_config_that_is_none(settings_: Any, attacked: Path):
    (attacked / "generation_config.json").write_text(json.dumps(settings_))
    refuses(attacked, "not a generation config")


# ------------------------------------------------------------------------------------------------------------- edits

MAP = {
    "edit": "map",
    "name": WEIGHT.removesuffix(".weight"),
    "kind": "linear",
    "d_in": 24,
    "d_out": 8,
    "bias": False,
    "kernel": [1, 1],
    "stride": [1, 1],
    "padding": [0, 0],
    "dilation": [1, 1],
    "groups": 1,
}
PARTIAL = {
    "edit": "partial",
    "name": "model.layers.1.mlp.act_fn",
    "kept": 2,
    "linear": 2,
    "gate": "",
    "channels_first": False,
}


@pytest.mark.parametrize(
    "edit",
    [
        {},
        "identity",
        {"edit": "exec", "name": "model"},
        {"edit": "__class__", "name": "model"},
        {"edit": ["identity"], "name": "model"},
        {"edit": "identity", "name": "model", "more": 1},
        *[
            {"edit": "identity", "name": name}
            for name in (
                "",
                ".",
                "..",
                "model.",
                "__class__",
                "forward",
                "model.__dict__",
                "a\x00",
                "x" * 10_000,
                3,
                None,
            )
        ],
        {"edit": "identity", "name": "model.layers"},
        {"edit": "identity", "name": "model.layers.1.mlp.down_proj"},
        {"edit": "externalise", "module": "model", "calls": [["__init__", 0]]},
        {"edit": "externalise", "module": "model.layers.0", "calls": [["relu", 10**6]]},
        {
            "edit": "partial",
            "name": "model.layers.1.mlp.act_fn",
            "kept": -1,
            "linear": 2,
            "gate": "",
            "channels_first": False,
        },
        MAP | {"name": "model.norm"},
        MAP | {"d_out": 10**7, "d_in": 10**7},
        MAP | {"d_out": 2**40},
        MAP | {"d_out": True},
        MAP | {"d_out": 8.0},
        MAP | {"d_out": 9},
        MAP | {"bias": True},
        MAP | {"kind": "conv2d"},
        MAP | {"groups": 5},
    ],
    ids=lambda edit: str(edit)[:60],
)
def test_an_edit_that_cannot_be(edit: Any, attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data["edits"].append(edit))
    refuses(attacked)


def test_edits_left_out(attacked: Path):
    rewrite(attacked / "shallower.json", lambda data: data.update(edits=[]))
    refuses(attacked, r"tensor model\.layers\.0\.mlp")


# ------------------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(WEIGHT),
        lambda tensors: tensors.update(extra=torch.zeros(2)),
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(30, 8)}),
        lambda tensors: tensors.update({WEIGHT: torch.zeros(24, 8)}),
        lambda tensors: tensors.update({WEIGHT: torch.zeros(8, 24, dtype=torch.float64)}),
        lambda tensors: tensors.clear(),
    ],
    ids=["missing", "extra", "an alias", "transposed", "another dtype", "none at all"],
)
def test_tensors_that_are_not_those_described(change: Callable[[dict[str, torch.Tensor]], Any], attacked: Path):
    tensors = load_file(attacked / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, attacked / "model.safetensors")
    refuses(attacked, "tensor ")


# ------------------------------------------------------------------------------------------ paths that leave the place


@pytest.mark.parametrize("name", ["model.safetensors", "buffers.safetensors", "shallower.json", "config.json"])
def test_a_link_that_leaves_the_directory(name: str, attacked: Path, tmp_path: Path):
    (attacked / name).rename(tmp_path / name)
    (attacked / name).symlink_to(tmp_path / name)
    refuses(attacked, "this is a link")


def test_a_pipe_is_not_waited_for(attacked: Path):
    (attacked / "model.safetensors").unlink()
    os.mkfifo(attacked / "model.safetensors")
    refuses(attacked, "not a regular file")


@pytest.mark.parametrize(
    "shard",
    [
        "../model-00001-of-00003.safetensors",
        "/etc/passwd",
        "sub/model-00001-of-00003.safetensors",
        "..",
        "",
        "model-00001-of-00003.safetensors\x00",
        "model-00001-of-00003.bin",
        "model-00099-of-00099.safetensors",
        3,
        None,
    ],
)
def test_a_shard_that_is_elsewhere(shard: Any, split: Path):
    shutil.copy(next(split.glob("model-00001-*")), split.parent / "model-00001-of-00003.safetensors")
    rewrite(split / "model.safetensors.index.json", lambda index: index["weight_map"].update({WEIGHT: shard}))
    refuses(split, r"is not the name of a file beside it|No such file|not the index of a model")


def test_a_shard_that_is_a_link(split: Path, tmp_path: Path):
    shard = next(split.glob("model-00001-*"))
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    refuses(split, "this is a link")


def test_a_tensor_that_lies_in_two_shards(split: Path):
    first, second = sorted(split.glob("model-0*.safetensors"))[:2]
    both = {**load_file(first), **load_file(second)}
    save_file(both, first)
    refuses(split, "it is in .* and not in")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": {}}}])
def test_an_index_that_is_none(index: Any, split: Path):
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(split)


def test_a_tensor_that_only_the_index_knows(split: Path):
    def add(index: Any) -> None:
        index["weight_map"]["extra"] = index["weight_map"][WEIGHT]

    rewrite(split / "model.safetensors.index.json", add)
    refuses(split, "tensor extra: it is in the index and not in")


# -------------------------------------------------------------------------------------------------------- at random


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in nested JSON."""
    yield path
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from places(value, (*path, key))


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3000),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["model", "lm_head.weight", "float32", "identity", "forward", "__class__", [], {}, [[]], [{}], {"": 0}]
    ),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_value_exchanged_anywhere_is_refused_or_harmless(draw: st.DataObject, attacked: Path, honest: Path):
    name = draw.draw(st.sampled_from(["shallower.json", "shallower.json", "config.json"]))
    data = json.loads((honest / name).read_text())
    *path, last = draw.draw(st.sampled_from([place for place in places(data) if place]))
    target = data
    for key in path:
        target = target[key]
    target[last] = draw.draw(ODD_VALUES)
    (attacked / name).write_text(json.dumps(data))
    try:
        with contextlib.suppress(CheckpointError):
            load(attacked)
    finally:
        shutil.copy(honest / name, attacked / name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 3000), byte=st.integers(0, 255), name=st.sampled_from(["model", "buffers"]))
def test_any_byte_exchanged_in_a_header_is_refused_or_harmless(
    position: int, byte: int, name: str, attacked: Path, honest: Path
):
    path = attacked / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(bytes(content))
    try:
        with contextlib.suppress(CheckpointError):
            load(attacked)
    finally:
        shutil.copy(honest / path.name, path)


# -------------------------------------------------------------------------------- numbers that are written in forwards


class Writing(nn.Module):
    """Its forward makes tensors, lists and loops of numbers that are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(1):
            x = x + torch.zeros(1, 6)
        sizes = list(map(int, [4, 4]))
        parts = self.up(x).split(sizes, 1)
        return self.down(torch.cat(parts, 1).view(len(x), 8)) * math.sqrt(1)


NUMBERS = {
    "a loop": ("range(1)", 0, 32),
    "an iterator": ("map(int, [4, 4])", 1, 3),
    "the mathematics": ("math.sqrt(1)", 0, 2.0),
    "a tensor of gigabytes": ("torch.zeros(1, 6)", 1, 2**24),
    "a shape": ("torch.cat(parts, 1).view(len(x), 8)", 1, -(2**24)),
    "nothing": ("torch.zeros(6, 1)", 1, 1),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_written_in_calls_of_pytorch_only_and_are_no_larger_than_tensors(
    number: tuple[str, int, float], tmp_path: Path
):
    text, place, value = number
    save(Writing(), tmp_path / "out")
    edit = {
        "edit": "number",
        "name": "",
        "written": {"path": [[text, 0]], "place": place, "value": 1},
        "value": value,
    }
    rewrite(tmp_path / "out" / "shallower.json", lambda data: data["edits"].append(edit))
    with pytest.raises(CheckpointError, match=r"no call of PyTorch|than any tensor|has no call"):
        load(tmp_path / "out", model=Writing())


@pytest.mark.parametrize("number", [NUMBERS["a loop"], NUMBERS["a tensor of gigabytes"]], ids=["loop", "gigabytes"])
def test_a_plan_whose_channels_take_such_numbers_with_them_is_refused(number: tuple[str, int, float]):
    torch.manual_seed(0)
    model, x = Writing().eval(), torch.randn(3, 6)
    site = find_sites(model, x)[0]
    text, place, value = number
    follower = Follower("", "", 0, Written(((text, 0),), place, value))
    hostile = replace(site, followers=(*site.followers, follower))
    plan = Plan((Entry.narrow(hostile, torch.arange(hostile.width // 2)),))
    with pytest.raises(ShallowerError, match=r"no call of PyTorch|than any tensor"):
        apply(model, plan, x)
