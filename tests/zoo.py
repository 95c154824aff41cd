"""Architectures of every kind in small random configurations, with the sites that each one has.

What a model's sites are was written down from reading its code. Nothing is downloaded, and every weight is drawn at
random, norms and layer scales too, so that no layer is near the identity and no branch near zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision.models as tv
import transformers as hf
from timm.layers import GatedMlp, GluMlp
from timm.models import convnext, mlp_mixer, resnet, swin_transformer, swin_transformer_v2
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as tv_swin
from torchvision.models import vgg as tv_vgg

from shallower.core.inputs import Inputs


@dataclass(frozen=True)
class Expected:
    """A site that a model has.

    Attributes:
        kind, width, calls: as in `shallower.sites.Site`.
        producer, consumers, gate, norm_before, norm_after: dotted names.
        f: part of the activation's name.
        packed: "gate-first" or "up-first" where one map gives gate and up.
        linear, narrow: whether its channels may become linear, and may be kept and dropped one by one.
        between: depthwise convolutions on the way.
        residual: the sum that closes around it.
    """

    kind: str
    width: int
    producer: str
    consumers: tuple[str, ...]
    f: str
    gate: str = ""
    packed: str = ""
    calls: int = 1
    linear: bool = True
    norm_before: str = ""
    norm_after: str = ""
    narrow: bool = True
    between: tuple[str, ...] = ()
    residual: str = ""

    def __str__(self) -> str:
        fields = (f"{key}={value!r}" for key, value in vars(self).items() if value not in ("", 1))
        return ", ".join(fields)


@dataclass(frozen=True)
class Skip:
    """Something that looks like a site and is not: part of its name, and a pattern that the reason contains."""

    where: str
    why: str


@dataclass(frozen=True)
class Specimen:
    """An architecture of the zoo.

    Attributes:
        name: unique.
        make: the model and the inputs it is called with.
        sites: every site it has, and no other.
        skips: what must be among the skipped, and why.
        writes: whether it is a language model with `generate`.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Inputs]]
    sites: tuple[Expected, ...]
    skips: tuple[Skip, ...] = ()
    writes: bool = False

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model in eval mode with its weights drawn anew, and its inputs; the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.make()
            randomise(model)
        return model.eval(), inputs


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw every weight, bias, scale and running statistic, so that all of them matter at the output."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() >= 2 and parameter.numel():
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif parameter.dim() == 1:
            parameter.copy_(0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


# ---------------------------------------------------------------------------------------------------------------------
# How expectations are written


def mlp(producer: str, consumer: str, width: int = 37, f: str = "gelu", **more: Any) -> Expected:
    """A feed-forward site."""
    return Expected("feed-forward", width, producer, (consumer,), f, **more)


def head(producer: str, consumer: str, width: int, f: str, **more: Any) -> Expected:
    """A site in a classifier or pooler."""
    return Expected("head", width, producer, (consumer,), f, **more)


def gated(gate: str, up: str, down: str, width: int = 37, f: str = "silu", **more: Any) -> Expected:
    """A gated site whose gate and up projection are two maps."""
    return Expected("gated", width, up, (down,), f, gate=gate, **more)


def packed(both: str, down: str, order: str, width: int = 37, f: str = "silu", **more: Any) -> Expected:
    """A gated site whose gate and up projection are the halves of one map."""
    return Expected("gated", width, both, (down,), f, packed=order, **more)


def conv(producer: str, consumers: str | tuple[str, ...], width: int, f: str = "relu", **more: Any) -> Expected:
    """A site between convolutions."""
    return Expected(
        "convolution", width, producer, (consumers,) if isinstance(consumers, str) else consumers, f, **more
    )


def pooled(producer: str, consumers: str | tuple[str, ...], width: int, **more: Any) -> Expected:
    """A site between convolutions with a pooling in it: for keep and drop."""
    return conv(producer, consumers, width, linear=False, **more)


def basic_blocks(widths: dict[int, int]) -> tuple[Expected, ...]:
    """The sites of a ResNet with two basic blocks a stage; all stages but the first begin without a plain skip."""
    return tuple(
        site
        for stage, width in widths.items()
        for i in (0, 1)
        for site in under(
            f"layer{stage}.{i}",
            conv("conv1", "conv2", width, norm_before="bn1", residual="" if i == 0 < stage - 1 else ":add#0"),
        )
    )


def inverted(
    prefix: str, names: str, width: int, f: str, residual: str = "", second_f: str = ""
) -> tuple[Expected, ...]:
    """An inverted residual: two short sites for linear fates, and the long one around them.

    The names are those of expand, its norm, depthwise, its norm, and project.
    """
    expand, first, depthwise, second, project = names.split()
    return under(
        prefix,
        conv(expand, depthwise, width, f, norm_before=first, narrow=False),
        conv(expand, project, width, f, norm_before=first, linear=False, between=(depthwise,), residual=residual),
        conv(depthwise, project, width, second_f or f, norm_before=second, narrow=False, residual=residual),
    )


def under(prefix: str, *sites: Expected) -> tuple[Expected, ...]:
    """The sites with `prefix` before every dotted name."""

    def join(name: str) -> str:
        return f"{prefix}{'' if name.startswith(':') else '.'}{name}" if name else ""

    return tuple(
        dataclasses.replace(
            site,
            producer=join(site.producer),
            gate=join(site.gate),
            norm_before=join(site.norm_before),
            norm_after=join(site.norm_after),
            residual=join(site.residual),
            between=tuple(join(name) for name in site.between),
            consumers=tuple(join(name) for name in site.consumers),
        )
        for site in sites
    )


def each(pattern: str, *sites: Expected, count: int = 2) -> tuple[Expected, ...]:
    """The sites in each of `count` layers whose names `pattern` gives, "layers.{}"."""
    return tuple(site for i in range(count) for site in under(pattern.format(i), *sites))


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and configurations


def tokens(length: int = 7) -> Tensor:
    return torch.randint(5, 90, (2, length))


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


ENCODER: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
MARKS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {**ENCODER, **MARKS, "num_key_value_heads": 2}
BOTH: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 41,
}
T5: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
SPEECH: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
WINDOWED: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
TIMM_WINDOWED: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 10,
}
TIMM_VISION: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}
TIMM_MIXER: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_blocks": 2, "num_classes": 10}


def text(
    name: str,
    model: type[hf.PreTrainedModel],
    config: type[hf.PreTrainedConfig],
    *sites: Expected,
    skips: tuple[Skip, ...] = (),
    **fields: Any,
) -> Specimen:
    """A Transformers model that reads tokens."""
    return Specimen(
        name,
        lambda: (model(config(**fields)), {"input_ids": tokens()}),
        sites,
        skips,
        writes=model.can_generate(),
    )


def text_to_text(
    name: str, model: type[hf.PreTrainedModel], config: type[hf.PreTrainedConfig], *sites: Expected, **fields: Any
) -> Specimen:
    """A Transformers encoder-decoder."""
    return Specimen(
        name,
        lambda: (model(config(**fields)), {"input_ids": tokens(), "decoder_input_ids": tokens(5)}),
        sites,
        writes=True,
    )


def picture(
    name: str,
    model: type[hf.PreTrainedModel],
    config: type[hf.PreTrainedConfig],
    *sites: Expected,
    size: int = 16,
    skips: tuple[Skip, ...] = (),
    **fields: Any,
) -> Specimen:
    """A Transformers model that reads images."""
    return Specimen(name, lambda: (model(config(**fields)), {"pixel_values": images(size)}), sites, skips)


def plain(
    name: str, make: Callable[[], nn.Module], *sites: Expected, size: int = 16, skips: tuple[Skip, ...] = ()
) -> Specimen:
    """A model that is called with one tensor of images."""
    return Specimen(name, lambda: (make(), images(size)), sites, skips)


def vectors(name: str, make: Callable[[], nn.Module], *sites: Expected, skips: tuple[Skip, ...] = ()) -> Specimen:
    """A model that is called with two sequences of five vectors of 16 features."""
    return Specimen(name, lambda: (make(), torch.randn(2, 5, 16)), sites, skips)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers


SWIGLU = gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BERT_LAYER = mlp("intermediate.dense", "output.dense")
BART_SITES = (
    *each("model.encoder.layers.{}", mlp("fc1", "fc2")),
    *each("model.decoder.layers.{}", mlp("fc1", "fc2", 41)),
)


def llama_like(
    name: str, model: type[hf.PreTrainedModel], config: type[hf.PreTrainedConfig], f: str = "silu", **fields: Any
) -> Specimen:
    """A decoder whose layers have a SwiGLU or GeGLU of three maps."""
    return text(name, model, config, *each("model.layers.{}", dataclasses.replace(SWIGLU, f=f)), **DECODER, **fields)


LANGUAGE = (
    text(
        "bert",
        hf.BertForSequenceClassification,
        hf.BertConfig,
        *each("bert.encoder.layer.{}", BERT_LAYER),
        head("bert.pooler.dense", "classifier", 32, "tanh"),
        **ENCODER,
    ),
    text(
        "bert_pooler_is_output",
        hf.BertModel,
        hf.BertConfig,
        *each("encoder.layer.{}", BERT_LAYER),
        **ENCODER,
    ),
    text(
        "bert_masked_lm",
        hf.BertForMaskedLM,
        hf.BertConfig,
        *each("bert.encoder.layer.{}", BERT_LAYER),
        skips=(Skip("cls.predictions", "norm|tied"),),
        **ENCODER,
    ),
    text(
        "roberta",
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        *each("roberta.encoder.layer.{}", BERT_LAYER),
        head("classifier.dense", "classifier.out_proj", 32, "tanh"),
        pad_token_id=1,
        **ENCODER,
    ),
    text(
        "distilbert",
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        *each("distilbert.transformer.layer.{}", mlp("ffn.lin1", "ffn.lin2")),
        head("pre_classifier", "classifier", 32, "relu"),
        vocab_size=99,
        dim=32,
        hidden_dim=37,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=40,
    ),
    text(
        "albert",
        hf.AlbertForSequenceClassification,
        hf.AlbertConfig,
        *under("albert.encoder.albert_layer_groups.0.albert_layers.0", mlp("ffn", "ffn_output", calls=2)),
        head("albert.pooler", "classifier", 32, "tanh"),
        embedding_size=16,
        **ENCODER,
    ),
    text(
        "electra",
        hf.ElectraForSequenceClassification,
        hf.ElectraConfig,
        *each("electra.encoder.layer.{}", BERT_LAYER),
        head("classifier.dense", "classifier.out_proj", 32, "gelu"),
        embedding_size=16,
        **ENCODER,
    ),
    text(
        "deberta_v2",
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config,
        *each("deberta.encoder.layer.{}", BERT_LAYER),
        head("pooler.dense", "classifier", 32, "gelu"),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        **ENCODER,
    ),
    text(
        "mpnet",
        hf.MPNetForSequenceClassification,
        hf.MPNetConfig,
        *each("mpnet.encoder.layer.{}", BERT_LAYER),
        head("classifier.dense", "classifier.out_proj", 32, "tanh"),
        pad_token_id=1,
        **ENCODER,
    ),
    text(
        "modernbert",
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig,
        *each("model.layers.{}", packed("mlp.Wi", "mlp.Wo", "gate-first", f="gelu")),
        cls_token_id=1,
        sep_token_id=2,
        skips=(Skip("head", "norm"),),
        **ENCODER,
        **MARKS,
    ),
    text(
        "gpt2",
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        *each("transformer.h.{}", mlp("mlp.c_fc", "mlp.c_proj")),
        vocab_size=99,
        n_positions=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=37,
        **MARKS,
    ),
    text(
        "gpt_neo",
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig,
        *each("transformer.h.{}", mlp("mlp.c_fc", "mlp.c_proj")),
        vocab_size=99,
        max_position_embeddings=40,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        intermediate_size=37,
        window_size=4,
        **MARKS,
    ),
    text(
        "gpt_neox",
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        *each("gpt_neox.layers.{}", mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        **ENCODER,
        **MARKS,
    ),
    text(
        "gptj",
        hf.GPTJForCausalLM,
        hf.GPTJConfig,
        *each("transformer.h.{}", mlp("mlp.fc_in", "mlp.fc_out")),
        vocab_size=99,
        n_positions=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=37,
        rotary_dim=4,
        **MARKS,
    ),
    text(
        "opt",
        hf.OPTForCausalLM,
        hf.OPTConfig,
        *each("model.decoder.layers.{}", mlp("fc1", "fc2", f="relu")),
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=37,
        max_position_embeddings=40,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        **MARKS,
    ),
    text(
        "bloom",
        hf.BloomForCausalLM,
        hf.BloomConfig,
        *each("transformer.h.{}", mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", 128)),
        vocab_size=99,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        **MARKS,
    ),
    text(
        "falcon",
        hf.FalconForCausalLM,
        hf.FalconConfig,
        *each("transformer.h.{}", mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=37,
        **MARKS,
    ),
    text(
        "mpt",
        hf.MptForCausalLM,
        hf.MptConfig,
        *each("transformer.blocks.{}", mlp("ffn.up_proj", "ffn.down_proj", 128)),
        vocab_size=99,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=40,
    ),
    text(
        "starcoder2",
        hf.Starcoder2ForCausalLM,
        hf.Starcoder2Config,
        *each("model.layers.{}", mlp("mlp.c_fc", "mlp.c_proj")),
        **DECODER,
    ),
    text(
        "phi",
        hf.PhiForCausalLM,
        hf.PhiConfig,
        *each("model.layers.{}", mlp("mlp.fc1", "mlp.fc2")),
        **ENCODER,
        **MARKS,
    ),
    text(
        "phi3",
        hf.Phi3ForCausalLM,
        hf.Phi3Config,
        *each("model.layers.{}", packed("mlp.gate_up_proj", "mlp.down_proj", "gate-first")),
        **DECODER,
    ),
    text(
        "glm",
        hf.GlmForCausalLM,
        hf.GlmConfig,
        *each("model.layers.{}", packed("mlp.gate_up_proj", "mlp.down_proj", "gate-first")),
        head_dim=8,
        **DECODER,
    ),
    llama_like("llama", hf.LlamaForCausalLM, hf.LlamaConfig),
    llama_like("llama_with_biases", hf.LlamaForCausalLM, hf.LlamaConfig, mlp_bias=True, attention_bias=True),
    llama_like("mistral", hf.MistralForCausalLM, hf.MistralConfig),
    llama_like("qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config),
    llama_like("qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=8),
    llama_like("gemma", hf.GemmaForCausalLM, hf.GemmaConfig, f="gelu", head_dim=8),
    llama_like("gemma2", hf.Gemma2ForCausalLM, hf.Gemma2Config, f="gelu", head_dim=8),
    llama_like("stablelm", hf.StableLmForCausalLM, hf.StableLmConfig),
    llama_like("olmo2", hf.Olmo2ForCausalLM, hf.Olmo2Config),
    llama_like("cohere", hf.CohereForCausalLM, hf.CohereConfig),
    text_to_text(
        "t5",
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        *each("encoder.block.{}.layer.1.DenseReluDense", mlp("wi", "wo", f="relu")),
        *each("decoder.block.{}.layer.2.DenseReluDense", mlp("wi", "wo", f="relu")),
        **T5,
    ),
    text_to_text(
        "t5_v1_1",
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        *each("encoder.block.{}.layer.1.DenseReluDense", gated("wi_0", "wi_1", "wo", f="gelu")),
        *each("decoder.block.{}.layer.2.DenseReluDense", gated("wi_0", "wi_1", "wo", f="gelu")),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **T5,
    ),
    text_to_text(
        "bart",
        hf.BartForConditionalGeneration,
        hf.BartConfig,
        *BART_SITES,
        max_position_embeddings=40,
        **BOTH,
    ),
    text_to_text(
        "mbart",
        hf.MBartForConditionalGeneration,
        hf.MBartConfig,
        *BART_SITES,
        max_position_embeddings=40,
        **BOTH,
    ),
    text_to_text(
        "pegasus",
        hf.PegasusForConditionalGeneration,
        hf.PegasusConfig,
        *BART_SITES,
        max_position_embeddings=40,
        **BOTH,
    ),
    text_to_text(
        "marian",
        hf.MarianMTModel,
        hf.MarianConfig,
        *BART_SITES,
        max_position_embeddings=40,
        pad_token_id=0,
        decoder_start_token_id=0,
        **BOTH,
    ),
)

VIT_LAYER = mlp("mlp.fc1", "mlp.fc2")

SEEING = (
    picture("vit", hf.ViTForImageClassification, hf.ViTConfig, *each("vit.layers.{}", VIT_LAYER), **VISION),
    picture("deit", hf.DeiTForImageClassification, hf.DeiTConfig, *each("deit.layers.{}", VIT_LAYER), **VISION),
    picture(
        "beit",
        hf.BeitForImageClassification,
        hf.BeitConfig,
        *each("beit.layers.{}", VIT_LAYER),
        use_relative_position_bias=True,
        **VISION,
    ),
    picture(
        "dinov2",
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config,
        *each("dinov2.encoder.layer.{}", mlp("mlp.fc1", "mlp.fc2", 64)),
        mlp_ratio=2,
        **{key: value for key, value in VISION.items() if key != "intermediate_size"},
    ),
    picture(
        "dinov2_swiglu",
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config,
        *each("dinov2.encoder.layer.{}", dataclasses.replace(SWIGLU, width=48)),
        mlp_ratio=2,
        use_swiglu_ffn=True,
        **{key: value for key, value in VISION.items() if key != "intermediate_size"},
    ),
    picture(
        "swin",
        hf.SwinForImageClassification,
        hf.SwinConfig,
        *under("swin.encoder.layers.0.blocks.0", mlp("mlp.fc1", "mlp.fc2", 32)),
        *under("swin.encoder.layers.1.blocks.0", mlp("mlp.fc1", "mlp.fc2", 64)),
        size=32,
        **WINDOWED,
    ),
    picture(
        "swin_v2",
        hf.Swinv2ForImageClassification,
        hf.Swinv2Config,
        *under("swinv2.encoder.layers.0.blocks.0", mlp("intermediate.dense", "output.dense", 32)),
        *under("swinv2.encoder.layers.1.blocks.0", mlp("intermediate.dense", "output.dense", 64)),
        *each(
            "swinv2.encoder.layers.{}.blocks.0.attention.self.continuous_position_bias_mlp",
            Expected("position MLP", 512, "0", ("2",), "relu"),
        ),
        size=32,
        **WINDOWED,
    ),
    picture(
        "convnext",
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig,
        *under("convnext.encoder.stages.0.layers.0", mlp("pwconv1", "pwconv2", 32)),
        *under("convnext.encoder.stages.1.layers.0", mlp("pwconv1", "pwconv2", 64)),
        size=32,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
    ),
    picture(
        "convnext_v2",
        hf.ConvNextV2ForImageClassification,
        hf.ConvNextV2Config,
        size=32,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        skips=(Skip("stages.0.layers.0", "norm|read"), Skip("stages.1.layers.0", "norm|read")),
    ),
    picture(
        "resnet_of_transformers",
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        *(
            site
            for stage, width in ((0, 4), (1, 8))
            for site in under(
                f"resnet.encoder.stages.{stage}.layers.0.layer",
                conv("0.convolution", "1.convolution", width, norm_before="0.normalization"),
                conv("1.convolution", "2.convolution", width, norm_before="1.normalization"),
            )
        ),
        pooled(
            "resnet.embedder.embedder.convolution",
            (
                "resnet.encoder.stages.0.layers.0.layer.0.convolution",
                "resnet.encoder.stages.0.layers.0.shortcut.convolution",
            ),
            8,
            norm_before="resnet.embedder.embedder.normalization",
        ),
        size=32,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
    ),
    picture(
        "segformer",
        hf.SegformerForImageClassification,
        hf.SegformerConfig,
        size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        skips=(Skip("stages.0", "depthwise|reshape"), Skip("stages.1", "depthwise|reshape")),
    ),
    Specimen(
        "clip",
        lambda: (
            hf.CLIPModel(hf.CLIPConfig(text_config={**ENCODER, **MARKS}, vision_config={**VISION}, projection_dim=16)),
            {"input_ids": tokens(), "pixel_values": images()},
        ),
        (
            *each("text_model.encoder.layers.{}", VIT_LAYER),
            *each("vision_model.encoder.layers.{}", VIT_LAYER),
        ),
    ),
    Specimen(
        "siglip",
        lambda: (
            hf.SiglipModel(hf.SiglipConfig(text_config={**ENCODER, **MARKS}, vision_config={**VISION})),
            {"input_ids": tokens(), "pixel_values": images()},
        ),
        (
            *each("text_model.encoder.layers.{}", VIT_LAYER),
            *each("vision_model.encoder.layers.{}", VIT_LAYER),
            *under("vision_model.head", VIT_LAYER),
        ),
    ),
)

LISTENING = (
    Specimen(
        "whisper",
        lambda: (
            hf.WhisperForConditionalGeneration(
                hf.WhisperConfig(
                    num_mel_bins=8,
                    max_source_positions=10,
                    max_target_positions=20,
                    decoder_start_token_id=1,
                    suppress_tokens=None,
                    begin_suppress_tokens=None,
                    **MARKS,
                    **BOTH,
                )
            ),
            {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(5)},
        ),
        BART_SITES,
    ),
    Specimen(
        "wav2vec2",
        lambda: (
            hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**SPEECH)),
            {"input_values": torch.randn(2, 80)},
        ),
        each("wav2vec2.encoder.layers.{}.feed_forward", mlp("intermediate_dense", "output_dense")),
    ),
    Specimen(
        "hubert",
        lambda: (hf.HubertModel(hf.HubertConfig(**SPEECH)), {"input_values": torch.randn(2, 80)}),
        each("encoder.layers.{}.feed_forward", mlp("intermediate_dense", "output_dense")),
    ),
    Specimen(
        "audio_spectrogram_transformer",
        lambda: (
            hf.ASTForAudioClassification(
                hf.ASTConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    intermediate_size=37,
                    patch_size=8,
                    frequency_stride=8,
                    time_stride=8,
                    max_length=16,
                    num_mel_bins=16,
                )
            ),
            {"input_values": torch.randn(2, 16, 16)},
        ),
        each("audio_spectrogram_transformer.layers.{}", VIT_LAYER),
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# timm


def timm_convnext(**fields: Any) -> nn.Module:
    return convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), num_classes=10, **fields)


def timm_mobilenet_v3() -> nn.Module:
    stages = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k3_s2_e3_c24_nre"], ["ir_r1_k5_s1_e3_c24_se0.25"]]
    return MobileNetV3(decode_arch_def(stages), num_features=32, stem_size=8, act_layer=nn.Hardswish, num_classes=10)


TIMM_CONVNEXT_SITES = tuple(
    site
    for stage, width in enumerate((32, 64, 64, 64))
    for site in under(f"stages.{stage}.blocks.0.mlp", mlp("fc1", "fc2", width))
)

OF_TIMM = (
    plain(
        "timm_vit",
        lambda: timm.models.VisionTransformer(mlp_ratio=2, **TIMM_VISION),
        *each("blocks.{}.mlp", mlp("fc1", "fc2", 64)),
    ),
    plain(
        "timm_deit3",
        lambda: timm.models.VisionTransformer(init_values=1e-5, no_embed_class=True, **TIMM_VISION),
        *each("blocks.{}.mlp", mlp("fc1", "fc2", 128)),
    ),
    plain(
        "timm_mixer",
        lambda: mlp_mixer.MlpMixer(**TIMM_MIXER),
        *each(
            "blocks.{}", mlp("mlp_tokens.fc1", "mlp_tokens.fc2", 16), mlp("mlp_channels.fc1", "mlp_channels.fc2", 128)
        ),
    ),
    plain(
        "timm_gmixer",
        lambda: mlp_mixer.MlpMixer(mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp, act_layer=nn.SiLU, **TIMM_MIXER),
        *each(
            "blocks.{}",
            packed("mlp_tokens.fc1", "mlp_tokens.fc2", "up-first", 16),
            packed("mlp_channels.fc1", "mlp_channels.fc2", "up-first", 64),
        ),
    ),
    plain(
        "timm_resmlp",
        lambda: mlp_mixer.MlpMixer(
            mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, **TIMM_MIXER
        ),
        *each("blocks.{}.mlp_channels", mlp("fc1", "fc2", 128)),
    ),
    plain(
        "timm_gmlp",
        lambda: mlp_mixer.MlpMixer(
            mlp_ratio=4, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, **TIMM_MIXER
        ),
        skips=(Skip("blocks.0", "chunk|split|read|reshape"),),
    ),
    plain("timm_convnext", timm_convnext, *TIMM_CONVNEXT_SITES, size=32),
    plain("timm_convnext_with_convolutions", lambda: timm_convnext(conv_mlp=True), *TIMM_CONVNEXT_SITES, size=32),
    plain(
        "timm_eva02_tiny",
        lambda: timm.create_model("eva02_tiny_patch14_224", **TIMM_VISION),
        *each("blocks.{}.mlp", packed("fc1", "fc2", "gate-first", 85)),
    ),
    plain(
        "timm_eva02_base",
        lambda: timm.create_model("eva02_base_patch14_224", **TIMM_VISION),
        skips=(Skip("blocks.0", "norm"), Skip("blocks.1", "norm")),
    ),
    plain(
        "timm_swin",
        lambda: swin_transformer.SwinTransformer(**TIMM_WINDOWED),
        *under("layers.0.blocks.0.mlp", mlp("fc1", "fc2", 64)),
        *under("layers.1.blocks.0.mlp", mlp("fc1", "fc2", 128)),
        size=32,
    ),
    plain(
        "timm_swin_v2",
        lambda: swin_transformer_v2.SwinTransformerV2(**TIMM_WINDOWED),
        *under("layers.0.blocks.0.mlp", mlp("fc1", "fc2", 64)),
        *under("layers.1.blocks.0.mlp", mlp("fc1", "fc2", 128)),
        *each("layers.{}.blocks.0.attn.cpb_mlp", Expected("position MLP", 512, "0", ("2",), "relu")),
        size=32,
    ),
    plain(
        "timm_resnet",
        lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8, num_classes=10),
        pooled("conv1", ("layer1.0.conv1", "layer1.0.downsample.0"), 64, norm_before="bn1"),
        *(
            site
            for stage, width in ((1, 8), (2, 8), (3, 16), (4, 16))
            for site in under(f"layer{stage}.0", conv("conv1", "conv2", width, norm_before="bn1"))
        ),
        size=32,
    ),
    plain(
        "timm_mobilenet_v3",
        timm_mobilenet_v3,
        conv("conv_stem", "blocks.0.0.conv_dw", 8, "swish", norm_before="bn1", narrow=False),
        conv("blocks.0.0.se.conv_reduce", "blocks.0.0.se.conv_expand", 2),
        *inverted("blocks.1.0", "conv_pw bn1 conv_dw bn2 conv_pwl", 48, "relu"),
        conv("blocks.2.0.conv_pw", "blocks.2.0.conv_dw", 72, "swish", norm_before="blocks.2.0.bn1", narrow=False),
        conv("blocks.2.0.se.conv_reduce", "blocks.2.0.se.conv_expand", 18, "swish"),
        head("conv_head", "classifier", 32, "hardswish"),  # behind the average: an image of one pixel is flattened
        size=32,
        skips=(
            Skip("blocks.0.0", "average"),
            Skip("blocks.2.0.conv_dw", "average"),
        ),
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision


def tv_vgg11() -> nn.Module:
    with torch.device("meta"):  # its own classifier alone would be 120 million weights
        model = tv.VGG(nn.Sequential(), init_weights=False)
    model.features = tv_vgg.make_layers([8, "M", 8, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M"], batch_norm=True)
    model.classifier = nn.Sequential(
        nn.Linear(16 * 7 * 7, 37),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(37, 41),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(41, 10),
    )
    return model


def tv_mobilenet_v2() -> nn.Module:
    return tv.MobileNetV2(num_classes=10, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])


def tv_efficientnet() -> nn.Module:
    stages = [
        tv.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
        tv.efficientnet.MBConvConfig(4, 3, 2, 8, 16, 1),
    ]
    return tv.EfficientNet(stages, dropout=0.1, num_classes=10, last_channel=32)


def tv_swin_v2() -> nn.Module:
    return tv.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=10,
        block=tv_swin.SwinTransformerBlockV2,
        downsample_layer=tv_swin.PatchMergingV2,
    )


def tv_regnet_y() -> nn.Module:
    parameters = tv.regnet.BlockParams(
        depths=[1, 1],
        widths=[8, 16],
        group_widths=[4, 4],
        bottleneck_multipliers=[1.0, 1.0],
        strides=[2, 2],
        se_ratio=0.25,
    )
    return tv.RegNet(parameters, num_classes=10)


TV_INVERTED = "conv.0.0 conv.0.1 conv.1.0 conv.1.1 conv.2"
RESNET18_WIDTHS = {1: 64, 2: 128, 3: 256, 4: 512}

OF_TORCHVISION = (
    plain(
        "vgg11_bn",
        tv_vgg11,
        pooled("features.0", "features.4", 8, norm_before="features.1"),
        pooled("features.4", "features.8", 8, norm_before="features.5"),
        conv("features.8", "features.11", 16, norm_before="features.9"),
        pooled("features.11", "features.15", 16, norm_before="features.12"),
        conv("features.15", "features.18", 16, norm_before="features.16"),
        pooled("features.18", "features.22", 16, norm_before="features.19"),
        conv("features.22", "features.25", 16, norm_before="features.23"),
        pooled("features.25", "classifier.0", 16, norm_before="features.26"),
        head("classifier.0", "classifier.3", 37, "relu"),
        head("classifier.3", "classifier.6", 41, "relu"),
        size=32,
    ),
    plain(
        "resnet18",
        lambda: tv.resnet18(num_classes=10),
        *basic_blocks(RESNET18_WIDTHS),
        size=32,
        skips=(Skip("conv1", "also read by `add`"),),
    ),
    plain(
        "resnet50",
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10),
        pooled("conv1", ("layer1.0.conv1", "layer1.0.downsample.0"), 64, norm_before="bn1"),
        *(
            site
            for stage, width in RESNET18_WIDTHS.items()
            for site in under(
                f"layer{stage}.0",
                conv("conv1", "conv2", width, norm_before="bn1"),
                conv("conv2", "conv3", width, norm_before="bn2"),
            )
        ),
        size=32,
    ),
    plain(
        "mobilenet_v2",
        tv_mobilenet_v2,
        *under(
            "features.1",
            conv("conv.0.0", "conv.1", 8, "relu6", norm_before="conv.0.1", narrow=False, residual=":add#0"),
        ),
        *inverted("features.2", TV_INVERTED, 48, "relu6"),
        *inverted("features.3", TV_INVERTED, 48, "relu6", ":add#0"),
        head("features.4.0", "classifier.1", 1280, "relu6", norm_before="features.4.1"),
        size=32,
        skips=(Skip("features", "add"),),
    ),
    plain(
        "shufflenet_v2",
        lambda: tv.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=10),
        *(
            site
            for stage, width in ((2, 4), (3, 8), (4, 8))
            for site in under(
                f"stage{stage}.0.branch2",
                conv("0", "3", width, norm_before="1", narrow=False),
                conv("0", "5", width, norm_before="1", linear=False, between=("3",)),
            )
        ),
        head("conv5.0", "fc", 32, "relu", norm_before="conv5.1"),
        size=32,
        skips=(Skip("conv1", "pool"), Skip("stage2.0.branch1", "cat"), Skip("stage3.0.branch2", "cat")),
    ),
    plain(
        "resnext",
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4, num_classes=10),
        pooled("conv1", ("layer1.0.conv1", "layer1.0.downsample.0"), 64, norm_before="bn1"),
        *(
            site
            for stage, width in {1: 16, 2: 32, 3: 64, 4: 128}.items()
            for site in under(
                f"layer{stage}.0",
                conv("conv1", "conv2", width, norm_before="bn1", narrow=False),
                conv("conv2", "conv3", width, norm_before="bn2", narrow=False),
            )
        ),
        size=32,
    ),
    plain(
        "densenet",
        lambda: tv.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=10),
        *(
            site
            for block in (1, 2)
            for layer in (1, 2)
            for site in under(
                f"features.denseblock{block}.denselayer{layer}", conv("conv1", "conv2", 8, norm_before="norm2")
            )
        ),
        size=32,
    ),
    plain(
        "efficientnet",
        tv_efficientnet,
        *under("features.1.0.block.1", conv("fc1", "fc2", 2, "silu")),
        *under("features.2.0.block", conv("0.0", "1.0", 32, "silu", norm_before="0.1", narrow=False)),
        *under("features.2.0.block.2", conv("fc1", "fc2", 2, "silu")),
        head("features.3.0", "classifier.1", 32, "silu", norm_before="features.3.1"),
        size=32,
        skips=(Skip("features", "add"), Skip("features.1.0.block", "average"), Skip("features.2.0.block", "average")),
    ),
    plain(
        "torchvision_swin_v2",
        tv_swin_v2,
        *under("features.1.0", mlp("mlp.0", "mlp.3", 64)),
        *under("features.3.0", mlp("mlp.0", "mlp.3", 128)),
        Expected("position MLP", 512, "features.1.0.attn.cpb_mlp.0", ("features.1.0.attn.cpb_mlp.2",), "relu"),
        Expected("position MLP", 512, "features.3.0.attn.cpb_mlp.0", ("features.3.0.attn.cpb_mlp.2",), "relu"),
        size=32,
    ),
    plain(
        "torchvision_vit",
        lambda: tv.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=37, num_classes=10
        ),
        *each("encoder.layers.encoder_layer_{}.mlp", mlp("0", "3")),
    ),
    plain(
        "torchvision_convnext",
        lambda: tv.ConvNeXt(
            [tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)], num_classes=10
        ),
        *under("features.1.0.block", mlp("3", "5", 32)),
        *under("features.3.0.block", mlp("3", "5", 64)),
        size=32,
    ),
    plain(
        "regnet_y",
        tv_regnet_y,
        conv(
            "stem.0",
            ("trunk_output.block1.block1-0.proj.0", "trunk_output.block1.block1-0.f.a.0"),
            32,
            norm_before="stem.1",
        ),
        *(
            conv(f"{block}.a.0", f"{block}.b.0", width, norm_before=f"{block}.a.1", narrow=False)
            for block, width in (("trunk_output.block1.block1-0.f", 8), ("trunk_output.block2.block2-0.f", 16))
        ),
        *under("trunk_output.block1.block1-0.f.se", conv("fc1", "fc2", 8)),
        *under("trunk_output.block2.block2-0.f.se", conv("fc1", "fc2", 2)),
        size=32,
        skips=(Skip("block1-0.f.b", "average"), Skip("block2-0.f.b", "average")),
    ),
    plain(
        "squeezenet",
        lambda: tv.SqueezeNet("1_1", num_classes=10),
        pooled("features.0", "features.3.squeeze", 64),
        *(
            site
            for fire, width in ((3, 16), (4, 16), (6, 32), (7, 32), (9, 48), (10, 48), (11, 64), (12, 64))
            for site in under(f"features.{fire}", conv("squeeze", ("expand1x1", "expand3x3"), width))
        ),
        size=64,
        skips=(Skip("features.3.expand1x1", "cat"),),
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Written by hand


class FunctionalMLP(nn.Module):
    """Three layers with `F.relu` called twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 37), nn.Linear(37, 41), nn.Linear(41, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        return self.fc3(F.dropout(F.relu(self.fc2(x)), 0.1, self.training))


class MethodMLP(nn.Module):
    """Activations that are tensor methods, one of them in place, and a function of the torch namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 37), nn.Linear(37, 41)
        self.fc3, self.fc4 = nn.Linear(41, 43), nn.Linear(43, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).relu_()
        x = self.fc2(x).sigmoid()
        return self.fc4(torch.tanh(self.fc3(x)))


class SharedActivation(nn.Module):
    """One activation object and one dropout object, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 37), nn.Linear(37, 41), nn.Linear(41, 10)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.fc3(self.drop(self.act(self.fc2(x))))


class Residual(nn.Module):
    """x + body(norm(x))."""

    def __init__(self, body: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(width), body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with the functional silu."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(16, 37, bias), nn.Linear(37, 16, bias), nn.Linear(16, 37, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GeGLU(nn.Module):
    """The up projection first, then the gate, in one map that `chunk` divides."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(16, 74), nn.Linear(37, 16)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(up * F.gelu(gate))


class SplitSwiGLU(nn.Module):
    """The gate first, cut at a place that does not follow the map's width."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out, self.act = nn.Linear(16, 74), nn.Linear(37, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.split(self.proj(x), 37, dim=-1)
        return self.out(self.act(gate) * up)


class TanhGELU(nn.Module):
    """A GELU that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 37), nn.Linear(37, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(0.5 * h * (1.0 + torch.tanh(0.7978845608 * (h + 0.044715 * torch.pow(h, 3)))))


class Twice(nn.Module):
    """One block, applied twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Scaled(nn.Module):
    """An activation between constants, and one that `torch.where` writes out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 37), nn.Linear(37, 41), nn.Linear(41, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc2(F.relu(self.fc1(x) * 2 + 1) - 0.5)
        return self.fc3(torch.where(h > 0, h, 0.1 * h))


class AlwaysDropping(nn.Module):
    """A functional dropout that stays on in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 37), nn.Linear(37, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.5))


class TwoHeads(nn.Module):
    """A hidden tensor that two linear maps read."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.act = nn.Linear(16, 37), nn.ReLU()
        self.mean, self.spread = nn.Linear(37, 3), nn.Linear(37, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.trunk(x))
        return self.mean(h), self.spread(h)


class CifarBlock(nn.Module):
    """The basic block of He et al. with F.relu and the parameter-free shortcut (option A)."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out)
        self.conv2, self.bn2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False), nn.BatchNorm2d(d_out)
        self.stride, self.more = stride, d_out - d_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al., section 4.2, with 4-8-16 channels and two blocks a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(CifarBlock(4, 4, 1), CifarBlock(4, 4, 1))
        self.layer2 = nn.Sequential(CifarBlock(4, 8, 2), CifarBlock(8, 8, 1))
        self.layer3 = nn.Sequential(CifarBlock(8, 16, 2), CifarBlock(16, 16, 1))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


def encoder_of_torch(**fields: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 37, batch_first=True, **fields)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def sequential_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 37),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.2),
        nn.Linear(37, 41, bias=False),
        nn.Tanh(),
        nn.Linear(41, 10),
    )


def norms_around_activations() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(0, 1),
        nn.Linear(16, 37),
        nn.BatchNorm1d(37),
        nn.ReLU(),
        nn.Linear(37, 41),
        nn.ReLU(),
        nn.BatchNorm1d(41),
        nn.Dropout(0.1),
        nn.Linear(41, 10),
    )


def convolutions_with_norm_after() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 5, 3, stride=2),
    )


def norm_before_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(8), nn.Dropout2d(0.1), nn.Conv2d(8, 6, 3, padding=1)
    )


def channels_last() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 12, 1),
        nn.Hardswish(),
        nn.Conv2d(12, 6, 3, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )
    return model.to(memory_format=torch.channels_last)


BY_HAND = (
    vectors("torch_encoder", encoder_of_torch, *each("layers.{}", mlp("linear1", "linear2", f="relu"))),
    vectors(
        "torch_encoder_with_module",
        lambda: encoder_of_torch(activation=nn.GELU(), norm_first=True),
        *each("layers.{}", mlp("linear1", "linear2")),
    ),
    vectors("functional_mlp", FunctionalMLP, head("fc1", "fc2", 37, "relu"), head("fc2", "fc3", 41, "relu")),
    vectors(
        "method_mlp",
        MethodMLP,
        head("fc1", "fc2", 37, "relu"),
        head("fc2", "fc3", 41, "sigmoid"),
        head("fc3", "fc4", 43, "tanh"),
    ),
    vectors("shared_activation", SharedActivation, head("fc1", "fc2", 37, "gelu"), head("fc2", "fc3", 41, "gelu")),
    vectors(
        "sequential_mlp",
        sequential_mlp,
        head("0", "3", 37, "relu"),
        head("3", "5", 41, "tanh"),
    ),
    vectors(
        "norms_around_activations",
        norms_around_activations,
        head("1", "4", 37, "relu", norm_before="2"),
        head("4", "8", 41, "relu", norm_after="6"),
    ),
    vectors(
        "swiglu",
        lambda: nn.Sequential(Residual(SwiGLU()), Residual(SwiGLU(bias=True))),
        *each("{}.body", gated("w1", "w3", "w2")),
    ),
    vectors(
        "packed_gates",
        lambda: nn.Sequential(Residual(GeGLU()), Residual(SplitSwiGLU())),
        *under("0.body", packed("proj", "out", "up-first", f="gelu")),
        skips=(Skip("1.body", "split|cut"),),
    ),
    vectors("tanh_gelu", lambda: Residual(TanhGELU()), *under("body", mlp("up", "down"))),
    vectors(
        "block_called_twice",
        lambda: Twice(Residual(TanhGELU())),
        *under("block.body", mlp("up", "down", calls=2)),
    ),
    vectors("scaled", Scaled, head("fc1", "fc2", 37, "relu"), head("fc2", "fc3", 41, "")),
    vectors("always_dropping", AlwaysDropping, skips=(Skip("fc1", "dropout"),)),
    vectors(
        "prelu_of_channels",
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(16, 37), nn.PReLU(37), nn.Linear(37, 10)),
        head("1", "3", 37, "prelu"),
    ),
    vectors("two_heads", TwoHeads, Expected("head", 37, "trunk", ("mean", "spread"), "relu")),
    plain(
        "cifar_resnet",
        CifarResNet,
        *basic_blocks({1: 4, 2: 8, 3: 16}),
        skips=(Skip("conv1", "read|add"),),
    ),
    plain(
        "convolutions_with_norm_after",
        convolutions_with_norm_after,
        conv("0", "3", 8, norm_after="2"),
        conv("3", "6", 12, norm_after="5"),
    ),
    plain("norm_before_padding", norm_before_padding, conv("0", "4", 8, norm_after="2")),
    Specimen(
        "channels_last",
        lambda: (channels_last(), images().to(memory_format=torch.channels_last)),
        (conv("0", "3", 8, "silu", norm_before="1"), conv("3", "5", 12, "swish")),
    ),
)

ZOO: tuple[Specimen, ...] = (*LANGUAGE, *SEEING, *LISTENING, *OF_TIMM, *OF_TORCHVISION, *BY_HAND)
