"""What is saved is loaded again, to the last bit, and nothing is half-written."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shallower.app.models import load_model
from shallower.core.inputs import call
from shallower.core.trees import tensors
from shallower.errors import CheckpointError
from shallower.finding.kinds import find_sites
from shallower.modules.activations import PartialActivation
from shallower.modules.attachment import attach, detach
from shallower.modules.edits import edits
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import check_source, load, read_source, read_training, save
from shallower.sites import Place, Site
from shallower.surgery.applying import apply

TEXT = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
IDS = {"input_ids": torch.arange(3, 23).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).eval()


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **options)).eval()


class Functional(nn.Module):
    """An activation that is a call inside a forward, a tied weight, and buffers of both kinds."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(8, width)
        self.down = nn.Linear(width, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = nn.Parameter(torch.randn(8, 8))
        self.twin = nn.Linear(8, 8, bias=False)
        self.twin.weight = self.head.weight
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.relu(self.up(x)))
        return self.twin(self.head(self.norm(x + self.shift)))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def answers(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(call(model.eval(), inputs)))


def assert_same(first: nn.Module, second: nn.Module, inputs: Any) -> None:
    """Equal outputs, to the last bit."""
    pairs = list(zip(answers(first, inputs), answers(second, inputs), strict=True))
    assert pairs
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def narrowing(site: Site, kept: int) -> Entry:
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(2))
    return Entry.narrow(site, order[:kept].sort().values)


def narrowed(model: Any, inputs: Any, kept: int) -> Any:
    """Every feed-forward site with the same number of channels."""
    sites = find_sites(model, inputs).select(lambda site: site.kind in ("feed-forward", "gated"))
    assert len(sites) == 3
    return apply(model, Plan(tuple(narrowing(site, kept) for site in sites)), inputs)


def collapsed(model: Any, inputs: Any, count: int = 1) -> Any:
    sites = find_sites(model, inputs).select(lambda site: site.kind in ("feed-forward", "gated"))
    return apply(model, Plan.collapse(sites[:count]), inputs)


def mixed(model: Any, inputs: Any) -> Any:
    """A few channels kept, a few linear, a few dropped: a partial activation."""
    site = find_sites(model, inputs)[0]
    fates = torch.arange(site.width) % 12
    fates = torch.where(fates == 0, 1, torch.where(fates < 3, 0, 2))
    zeros = torch.zeros(site.width, dtype=torch.float64)
    return apply(model, Plan((Entry(site, fates, zeros + 0.5, zeros),)), inputs)


# ------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("squeeze", [None, collapsed, mixed])
@pytest.mark.parametrize("make", [bert, llama])
def test_a_transformers_model_loads_by_itself_with_equal_outputs(make: Any, squeeze: Any, tmp_path: Path):
    model = make()
    if squeeze:
        model = squeeze(model, IDS)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(model, loaded, IDS)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("timm:vit_tiny_patch16_224?img_size=32&depth=2&num_classes=5", 1),
        ("timm:swin_tiny_patch4_window7_224?img_size=56&embed_dim=24", 0),
        ("torchvision:mobilenet_v3_small?num_classes=5", 0),
    ],
)
def test_a_vision_model_loads_from_its_source(name: str, count: int, tmp_path: Path):
    loaded = load_model(name, pretrained=False)
    inputs = loaded.make_example_inputs(batch=2)
    small = collapsed(loaded.model, inputs, count) if count else loaded.model
    save(small, tmp_path / "out", source=loaded.source)
    assert_same(small, load(tmp_path / "out"), inputs)
    assert read_source(tmp_path / "out") == loaded.source


def test_a_model_of_ones_own_loads_into_a_fresh_instance(tmp_path: Path):
    model = Functional().eval()
    small = apply(model, Plan.collapse(find_sites(model, X).select(lambda s: s.width == 64)), X)
    save(small, tmp_path / "out")
    fresh = Functional()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = load(tmp_path / "out", model=fresh)
    assert_same(small, loaded, X)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert isinstance(fresh.up, nn.Linear)
    assert isinstance(loaded.up, nn.Identity)


def test_the_loaded_model_carries_the_record_of_its_surgery_and_saves_again(tmp_path: Path):
    small = collapsed(bert(), IDS)
    save(small, tmp_path / "first")
    again = collapsed(load(tmp_path / "first"), IDS)
    assert edits(again)[: len(edits(small))] == edits(small)
    assert len(edits(again)) > len(edits(small))
    save(again, tmp_path / "second")
    assert_same(again, load(tmp_path / "second"), IDS)


def test_a_partial_activation_is_built_again(tmp_path: Path):
    small = mixed(bert(), IDS)
    save(small, tmp_path / "out")
    assert any(isinstance(module, PartialActivation) for module in load(tmp_path / "out").modules())


@pytest.mark.slow
def test_outputs_are_equal_in_a_fresh_process(tmp_path: Path):
    small = collapsed(llama().bfloat16(), IDS)
    save(small, tmp_path / "out")
    save_file(IDS, tmp_path / "inputs.safetensors")
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from shallower import load\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad():\n"
        "    logits = load(sys.argv[1] + '/out')(**load_file(sys.argv[1] + '/inputs.safetensors')).logits\n"
        "save_file({'logits': logits}, sys.argv[1] + '/logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=os.environ)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], answers(small, IDS)[0])


def test_dtypes_survive_also_where_they_are_mixed(tmp_path: Path):
    model = llama().bfloat16()
    model.model.norm.float()
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_buffers_that_no_state_dict_holds_are_saved_as_they_are(tmp_path: Path):
    model = llama().bfloat16()
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    save(model, tmp_path / "out")
    loaded: Any = load(tmp_path / "out")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert_same(model, loaded, IDS)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path):
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded: Any = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(model, loaded, IDS)


def test_weights_that_were_untied_stay_untied(tmp_path: Path):
    model = Functional()
    model.twin.weight = nn.Parameter(torch.randn(8, 8))
    save(model, tmp_path / "out")
    loaded: Any = load(tmp_path / "out", model=Functional())
    assert loaded.twin.weight is not loaded.head.weight
    assert_same(model, loaded, X)


def test_frozen_parameters_stay_frozen(tmp_path: Path):
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    save(model, tmp_path / "out")
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in load(tmp_path / "out").named_parameters()} == wanted
    assert set(wanted.values()) == {True, False}


def test_a_model_is_loaded_in_another_type_and_on_a_device(tmp_path: Path):
    save(bert(), tmp_path / "out")
    loaded = load(tmp_path / "out", device="meta", dtype=torch.bfloat16)
    floating = {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()}
    assert floating == {torch.bfloat16}
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}


def test_outputs_of_one_pixel_kernels_in_channels_last_are_equal_to_the_last_bit(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(6, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 1)).to(memory_format=torch.channels_last)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=nn.Sequential(nn.Conv2d(6, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 1)))
    images = torch.randn(2, 6, 7, 9)
    assert_same(model, loaded, images)
    assert loaded(images).stride() == model(images).stride()


def test_the_memory_layout_survives(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    save(model, tmp_path / "out")
    loaded: Any = load(tmp_path / "out", model=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    assert loaded[0].weight.stride() == model[0].weight.stride()
    assert_same(model, loaded, torch.randn(1, 3, 8, 8))


def test_tensors_lie_in_memory_as_torch_would_allocate_them(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)))
    assert [tensor.data_ptr() % 64 for tensor in loaded.state_dict().values()] == [0, 0, 0, 0]


def test_a_recurrent_network_finds_its_flattened_weights_again(tmp_path: Path):
    model = nn.LSTM(4, 5)
    save(model, tmp_path / "out")
    assert_same(model, load(tmp_path / "out", model=nn.LSTM(4, 5)), torch.randn(3, 2, 4))


def test_the_attention_implementation_is_remembered(tmp_path: Path):
    model = transformers.BertModel(transformers.BertConfig(**TEXT, attn_implementation="eager"))
    save(model, tmp_path / "out")
    loaded: Any = load(tmp_path / "out")
    assert loaded.config._attn_implementation == "eager"
    assert_same(model, loaded, IDS)


def test_a_model_with_a_method_attached_is_saved_without_it(tmp_path: Path):
    model = Functional()
    attach(model, Place("norm"), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    save(model, tmp_path / "out")
    assert isinstance(model.norm, nn.Sequential)
    detach(model)
    assert_same(model, load(tmp_path / "out", model=Functional()), X)


@pytest.mark.slow
def test_a_compiled_model_is_saved_as_the_module_inside(tmp_path: Path):
    model = bert()
    save(torch.compile(model, backend="eager"), tmp_path / "out")
    assert_same(model, load(tmp_path / "out"), IDS)


def test_a_large_model_is_split_into_several_files(tmp_path: Path):
    model = bert()
    save(model, tmp_path / "out", max_shard_size=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same(model, load(tmp_path / "out"), IDS)


def test_the_training_record_comes_back(tmp_path: Path):
    record = {"method": "layer-collapse", "score": 0.91, "sites": ["a", "b"]}
    save(bert(), tmp_path / "out", training=record)
    assert read_training(tmp_path / "out") == record


def test_no_file_is_a_pickle(tmp_path: Path):
    save(collapsed(llama(), IDS), tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".safetensors"}


# --------------------------------------------------------------------------------------------- beside Transformers


@pytest.mark.parametrize(
    ("make", "auto"),
    [(bert, transformers.AutoModelForSequenceClassification), (llama, transformers.AutoModelForCausalLM)],
)
def test_a_uniformly_narrower_model_loads_in_its_stock_class(make: Any, auto: Any, tmp_path: Path):
    small = narrowed(make(), IDS, kept=24)
    save(small, tmp_path / "out")
    stock, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(stock) is type(small)
    assert stock.config.intermediate_size == 24
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(small, stock, IDS)
    assert_same(small, load(tmp_path / "out"), IDS)


def test_the_tokenizer_lies_beside_the_model(data: Path, tmp_path: Path):
    story = load_model(str(data / "stories260k"))
    save(story.model, tmp_path / "out", processor=story.processor)
    again = load_model(str(tmp_path / "out"))
    assert again.processor("Lily has a ball")["input_ids"] == story.processor("Lily has a ball")["input_ids"]
    assert again.source == story.source


@pytest.mark.parametrize("squeeze", [collapsed, mixed])
def test_a_squeezed_language_model_generates_alike_with_and_without_cache(squeeze: Any, data: Path, tmp_path: Path):
    story = load_model(str(data / "stories260k"))
    prompt = story.processor("Once upon a time", return_tensors="pt")
    small = squeeze(story.model, dict(prompt))
    save(small, tmp_path / "out", processor=story.processor)
    loaded: Any = load(tmp_path / "out")

    def told(model: Any, use_cache: bool) -> list[int]:
        return model.generate(**prompt, max_new_tokens=20, do_sample=False, use_cache=use_cache)[0].tolist()

    assert told(loaded, True) == told(loaded, False) == told(small, True)
    assert loaded.generation_config.to_dict() == story.model.generation_config.to_dict()


# ---------------------------------------------------------------------------------------------------- all or nothing


def test_an_earlier_result_is_replaced(tmp_path: Path):
    save(bert(), tmp_path / "out", max_shard_size=10_000)
    save(llama(), tmp_path / "out")
    assert read_source(tmp_path / "out").startswith("transformers:LlamaForCausalLM")
    assert not list((tmp_path / "out").glob("model-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_is_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    save(bert(), tmp_path / "out")
    assert_same(bert(), load(tmp_path / "out"), IDS)


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not the result of an earlier save"):
        save(bert(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_result_with_a_foreign_file_is_left_alone(tmp_path: Path):
    save(bert(), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which no save wrote"):
        save(bert(), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_directory_is_left_alone(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="this is a file"):
        save(bert(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


class Interrupts:
    """A processor during whose saving the user presses Ctrl-C, or the disk is full."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, directory: Path) -> None:
        (directory / "half.json").write_text("{")
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("disk full"), CheckpointError)]
)
def test_an_interrupted_save_leaves_the_earlier_result_and_nothing_else(
    error: BaseException, raised: type[BaseException], tmp_path: Path
):
    save(bert(), tmp_path / "out")
    with pytest.raises(raised):
        save(llama(), tmp_path / "out", processor=Interrupts(error))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(bert(), load(tmp_path / "out"), IDS)


def test_a_killed_save_leaves_a_hint_where_the_earlier_result_is(tmp_path: Path):
    save(bert(), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.previous-0123abcd")
    with pytest.raises(CheckpointError, match=r"left the earlier one at .*\.out\.previous-0123abcd"):
        load(tmp_path / "out")


def test_a_killed_save_is_cleaned_up_after_by_the_next(tmp_path: Path):
    save(bert(), tmp_path / "out")
    script = f"""
import os, signal, sys, torch
from shallower import save
model = torch.nn.Linear(4, 4)
save(model, {str(tmp_path / "out")!r}, beside=lambda partial: os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(bert(), load(tmp_path / "out"), IDS)
    save(bert(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_all_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path):
    save(bert(), tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_what_is_written_beside_the_model_belongs_to_the_result(tmp_path: Path):
    for text in ("first", "second"):
        save(bert(), tmp_path / "out", beside=lambda partial, text=text: (partial / "notes.txt").write_text(text))
    assert (tmp_path / "out" / "notes.txt").read_text() == "second"


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_source_is_checked_before_any_work_as_it_is_when_saved():
    model = load_model("torchvision:mobilenet_v3_small?num_classes=10", pretrained=False).model
    check_source(model, "torchvision:mobilenet_v3_small?num_classes=10")
    check_source(bert())
    check_source(Functional())
    for source in ("torchvision:mobilenet_v3_small", "torchvision:no_such_model", "nonsense"):
        with pytest.raises(CheckpointError):
            check_source(model, source)


def test_a_model_that_its_source_does_not_rebuild_is_refused_when_saved(tmp_path: Path):
    model = load_model("torchvision:mobilenet_v3_small?num_classes=10", pretrained=False).model
    with pytest.raises(CheckpointError, match=r"tensor classifier\.3\.weight: its shape is \[10, 1024\] in the files"):
        save(model, tmp_path / "out", source="torchvision:mobilenet_v3_small")
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_changed_by_hand_is_refused_when_saved(tmp_path: Path):
    model = bert()
    model.bert.encoder.layer[0].intermediate.dense = nn.Linear(16, 20)
    with pytest.raises(CheckpointError, match="this model is not what 'transformers:BertForSequenceClassification"):
        save(model, tmp_path / "out")
    save(model, tmp_path / "out", source="")


def test_without_a_source_a_fresh_instance_is_asked_for(tmp_path: Path):
    save(Functional(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"do not say how the model is built; give a fresh instance"):
        load(tmp_path / "out")


def test_a_factory_in_a_file_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "trap_for_imports.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    save(Functional(), tmp_path / "out", source="trap_for_imports:make")
    with pytest.raises(CheckpointError, match="'trap_for_imports:make', which is not imported unasked"):
        load(tmp_path / "out")
    assert_same(load(tmp_path / "out", model=Functional()), load(tmp_path / "out", model=Functional()), X)
    assert "trap_for_imports" not in sys.modules


def test_a_fresh_instance_of_another_architecture_is_refused(tmp_path: Path):
    save(Functional(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tensor up\.weight: its shape is \[64, 8\] in the files and \[32, 8\]"):
        load(tmp_path / "out", model=Functional(width=32))


@pytest.mark.parametrize("source", ["nonsense", "https://example.org/x:y", "timm:", "os.system:"])
def test_a_source_that_says_nothing_is_refused_when_saved(source: str, tmp_path: Path):
    with pytest.raises(CheckpointError):
        save(Functional(), tmp_path / "out", source=source)


def test_a_training_record_that_is_not_json_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="the training record is not plain JSON"):
        save(Functional(), tmp_path / "out", training={"score": float("nan")})


def test_a_directory_that_is_not_there_is_one_clear_line(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"there is no such directory$"):
        load(tmp_path / "nowhere")
