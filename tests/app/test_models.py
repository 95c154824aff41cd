"""Models by name, from four libraries and from one's own code."""

from __future__ import annotations

import json
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from shallower.app.models import LoadedModel, load_model
from shallower.core.inputs import call
from shallower.core.trees import tensors
from shallower.errors import ModelError
from shallower.saving.skeletons import build_skeleton
from shallower.saving.sources import parse_options, source_of
from tests.saving.sizes import ENCODER_DECODER, IMAGE, SMALL, TEXT

TAKEN = {
    "bert": (transformers.BertModel, transformers.BertConfig(**TEXT)),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**TEXT)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=50)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**TEXT)),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50),
    ),
    "bart": (
        transformers.BartForSequenceClassification,
        transformers.BartConfig(
            **ENCODER_DECODER,
            vocab_size=50,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
    ),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGE)),
    "clip": (
        transformers.CLIPModel,
        transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8),
    ),
    "whisper": (
        transformers.WhisperModel,
        transformers.WhisperConfig(
            **ENCODER_DECODER,
            vocab_size=50,
            max_source_positions=10,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
    ),
    "wav2vec2": (
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config(**SMALL, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and the import path as it was before the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return tmp_path


def made(name: str) -> Any:
    architecture, config = TAKEN[name]
    return architecture(config).eval()


@pytest.mark.parametrize("name", TAKEN)
def test_a_transformers_model_answers_its_example_inputs(name: str):
    model = made(name)
    inputs = LoadedModel(model, source_of(model)).make_example_inputs(batch=2, length=12)
    assert all(len(tensor) == 2 for tensor in tensors(inputs))
    with torch.no_grad():
        answers = list(tensors(call(model, inputs)))
    assert all(tensor.isfinite().all() for tensor in answers)


@pytest.mark.parametrize("name", TAKEN)
def test_the_skeleton_of_a_transformers_model_has_its_tensors_on_meta_and_its_buffers_for_real(name: str):
    model = made(name)
    skeleton = build_skeleton(source_of(model), model.config.to_dict())
    assert type(skeleton) is type(model)
    assert {key: value.shape for key, value in skeleton.named_parameters()} == {
        key: value.shape for key, value in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for key, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, model.get_buffer(key))


def test_example_ids_are_ordinary_tokens_within_the_positions():
    model = made("roberta")
    inputs = LoadedModel(model, source_of(model)).make_example_inputs(batch=50, length=512)
    ids = inputs["input_ids"]
    assert ids.shape == (50, 18)
    assert not {0, 1, 2} & set(ids.unique().tolist())
    assert ids.max() < 50


def test_example_inputs_depend_on_the_seed_alone():
    loaded = LoadedModel(made("vit"), source_of(made("vit")))
    first, again, other = (loaded.make_example_inputs(seed=seed)["pixel_values"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_transformers_directory_loads_with_its_tokenizer(data: Path):
    loaded = load_model(str(data / "stories260k"))
    assert type(loaded.model) is transformers.LlamaForCausalLM
    assert not loaded.model.training
    assert loaded.processor("Once upon a time")["input_ids"]
    assert loaded.source == "transformers:LlamaForCausalLM?attention=sdpa"


def test_a_task_chooses_the_head_and_num_labels_its_width(tmp_path: Path):
    made("bert").save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), task="text-classification", num_labels=5)
    assert type(loaded.model) is transformers.BertForSequenceClassification
    assert loaded.model.classifier.out_features == 5
    assert loaded.processor is None


def test_a_classifier_without_padding_token_gets_one(data: Path):
    loaded = load_model(str(data / "stories260k"), task="text-classification", num_labels=2)
    assert loaded.model.config.pad_token_id == loaded.processor.pad_token_id is not None
    with torch.no_grad():
        assert loaded.model(**loaded.processor(["a", "a longer text"], padding=True, return_tensors="pt"))


def test_pretrained_false_gives_other_weights_of_the_same_architecture(tmp_path: Path):
    model = made("llama")
    model.save_pretrained(tmp_path)
    same, fresh = load_model(str(tmp_path)).model, load_model(str(tmp_path), pretrained=False).model
    assert torch.equal(same.lm_head.weight, model.lm_head.weight)
    assert fresh.lm_head.weight.shape == model.lm_head.weight.shape
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("timm:vit_tiny_patch16_224?img_size=32&num_classes=10&depth=1", (2, 3, 32, 32)),
        ("timm:resnet18?in_chans=1&num_classes=10", (2, 1, 224, 224)),
        ("torchvision:mobilenet_v3_small?num_classes=10", (2, 3, 224, 224)),
        ("torchvision:vit_b_32?image_size=64&num_classes=10", (2, 3, 64, 64)),
    ],
)
def test_timm_and_torchvision_models_load_by_name_with_options(spec: str, shape: tuple[int, ...]):
    loaded = load_model(spec, pretrained=False)
    inputs = loaded.make_example_inputs(batch=2)
    assert inputs.shape == shape
    with torch.no_grad():
        assert loaded.model(inputs).shape == (2, 10)
    skeleton = build_skeleton(loaded.source)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {
        k: v.shape for k, v in loaded.model.state_dict().items()
    }


def test_num_labels_sets_the_classes_of_a_vision_model_and_stays_in_its_source():
    loaded = load_model("timm:resnet18?pretrained=false", num_labels=7)
    assert loaded.source == "timm:resnet18?num_classes=7"
    assert loaded.model.num_classes == 7


def test_a_factory_in_the_current_directory_is_called_with_the_options(here: Path):
    (here / "my_nets.py").write_text(
        textwrap.dedent("""
        import torch
        def make(width=8, bias=True):
            return torch.nn.Linear(3, width, bias=bias), torch.ones(4, 3)
        """)
    )
    loaded = load_model("my_nets:make?width=5&bias=false")
    assert (loaded.model.out_features, loaded.model.bias) == (5, None)
    assert loaded.source == ""
    assert loaded.make_example_inputs(batch=9).shape == (4, 3)


def test_a_factory_may_return_the_model_alone_and_then_needs_inputs_from_elsewhere():
    loaded = load_model("torch.nn:Linear?in_features=3&out_features=2")
    assert isinstance(loaded.model, nn.Linear)
    with pytest.raises(ModelError, match="nothing says what this model takes"):
        loaded.make_example_inputs()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/directory", "no such directory, and not a model name"),
        ("no-such-model-here", "there is no such directory, and the hub cannot be reached"),
        ("timm:vit_tiny_patch16", "did you mean .*vit_tiny_patch16_224"),
        ("timm:hf-hub:some/one", "timm has no model"),
        ("torchvision:vgg16bn", "did you mean .*vgg16_bn"),
        ("torchvision:fcn_resnet50", "torchvision has no model"),
        ("torchvision:resnet18?depth=3", "unexpected keyword argument 'depth'"),
        ("torchvision:resnet18?weights=DEFAULT", "the option weights would read files"),
        ("timm:resnet18?checkpoint_path=x.pth", "the option checkpoint_path would read files"),
        ("timm:resnet18?num_classes", "the options are written as"),
        ("timm:resnet18?num_classes=1&num_classes=2", "given twice"),
        ("no_such_package.module:make", "No module named 'no_such_package'"),
        ("torch.nn:no_such_name", "no attribute 'no_such_name'"),
        ("os:getcwd", "returned a str, not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(spec: str, message: str):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(spec, pretrained=False)
    assert "\n" not in str(caught.value)
    assert spec.partition("?")[0].partition(":")[2] in str(caught.value)


def test_a_directory_without_a_model_says_so(tmp_path: Path):
    with pytest.raises(ModelError, match="neither a Transformers directory"):
        load_model(str(tmp_path))


def test_a_transformers_directory_with_a_broken_config_is_one_clear_line(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_whose_code_lies_in_its_directory_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('code of the directory was run')")
    with pytest.raises(ModelError):
        load_model(str(tmp_path))


def test_options_are_read_as_what_they_look_like():
    text = "name?a=1&b=-2.5&c=true&d=False&e=text&f=1e-3&g="
    assert parse_options(text) == ("name", {"a": 1, "b": -2.5, "c": True, "d": False, "e": "text", "f": 1e-3, "g": ""})


@pytest.mark.parametrize("key", ["__class__", "a.b", "", "1a", "ä"])
def test_the_name_of_an_option_is_an_identifier(key: str):
    with pytest.raises(ModelError):
        parse_options(f"name?{key}=1")


def test_only_models_of_the_transformers_package_have_a_source_of_their_own():
    class Mine(transformers.BertModel):
        pass

    assert source_of(made("bert")) == "transformers:BertModel?attention=sdpa"
    assert source_of(Mine(TAKEN["bert"][1])) == ""
    assert source_of(nn.Linear(1, 1)) == ""


@pytest.mark.parametrize(
    "source",
    [
        "transformers:AutoModel",
        "transformers:PreTrainedModel",
        "transformers:pipeline",
        "transformers:__class__",
        "transformers:modeling_utils.PreTrainedModel",
        "transformers:BertModel?attention=someone/kernel",
        "transformers:BertModel?trust_remote_code=true",
        "timm:create_model",
        "os:system",
        "transformers",
        "",
    ],
)
def test_a_source_names_nothing_but_model_classes_of_the_libraries(source: str):
    with pytest.raises(ModelError):
        build_skeleton(source, {})


def test_a_config_cannot_choose_an_attention_that_is_fetched():
    config = TAKEN["bert"][1].to_dict() | {"_attn_implementation": "some/kernel", "attn_implementation": "some/kernel"}
    skeleton: Any = build_skeleton("transformers:BertModel?attention=eager", config)
    assert skeleton.config._attn_implementation == "eager"


@pytest.mark.parametrize("spec", ["./nowhere", "/no/such/place", "a/b/c"])
def test_missing_directory_is_not_looked_for_on_the_hub(spec: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_model(spec)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A directory with a low-rank adapter, and the model with the adapter beside its layers."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    chosen = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries to each other
        model = peft.get_peft_model(base, chosen).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def test_an_adapter_is_merged_into_the_model_it_was_trained_on(adapted: tuple[Path, nn.Module]) -> None:
    path, model = adapted
    loaded = load_model(str(path))
    assert type(loaded.model) is transformers.LlamaForCausalLM
    ids = torch.randint(5, 30, (2, 7))
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base_model_name_or_path": "os:system?command=x"}, "no directory here"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "no directory here"),
    ],
)
def test_an_adapter_of_something_else_runs_nothing(
    adapted: tuple[Path, nn.Module], tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    described = json.loads((adapted[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | changed))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapted[0] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=said):
        load_model(str(tmp_path))


def test_an_adapter_that_is_pickled_is_not_read(adapted: tuple[Path, nn.Module], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text((adapted[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(tmp_path))
