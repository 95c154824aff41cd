"""TLC: activations go a few at a time, and what is linear then is merged where that pays.

ResNet-20 and ResNet-56, trained on CIFAR-10 by others: 19 and 55 activations, inside of blocks and after sums. In each
round those go whose removal alone raises the loss least on 250 and 125 rows held out of the shared subset, one of
ResNet-20 and four of ResNet-56, replaced by the lines that BatchNorm tells. Then the network is trained on the first
14,000 rows for 54 and 36 steps of 128 images, cropped and mirrored, at a learning rate that falls from 0.01 to 0
along a cosine (SGD with momentum); towards the dense network's answers alone, half of the images with another one mixed
in. (It was trained on all training images before, so that no row of the subset is new to it.) `trained on`: the merged
network, as it is, trained in the same way for four epochs (436 steps), ResNet-56 for 36 steps.
`one-shot` is the order of the dense network without training.

Every network of the table is really merged: each site that is linear got the form that was fastest by more than the
noise, among one layer, one kernel fitted on 250 images, and the layers apart without the dropped channels; `surgery` is
the relative error of the merged network against the same plan simulated on the original layers, before it was trained
on. `depth` is the longest chain of layers with weights. Times are of one image or sentence on one thread, of 40 blocks
of 15 passes in which the networks take turns, other copies of them in each block: the least, the median ratio to the
dense network's, and that to the row before with the interval that holds it at 95 %; `of itself` is the ratio to the
network before its merge, with the same weights and all activations in place, of 12 blocks of 5. The forms were chosen
by times on 8. Accuracies are those of all 10,000 test images for ResNet-20, and else of the first 4,000 (all 1,821
sentences).

MobileNet is a small network of inverted residuals, trained here on CIFAR-10; the padding of its depthwise convolutions
was moved in all blocks before the training of the rounds (which costs MACs where a block then keeps its activations),
so that a block without activations merges exactly into one dense convolution with the skip inside. Swin is a small Swin
Transformer, trained here, for four epochs only; MiniLM is fine-tuned on 3,000 sentences of SST-2. Neither has
BatchNorm: their lines are the best ones by measured statistics. MobileNet's and MiniLM's forms were chosen by the least
time, before the noise was asked; they merge exactly, in less than half of the time. The dense networks are not trained
on as the others are. Test sets are only reported on. One seed of each was trained, and one setting but for ResNet-20.
There an earlier recipe, towards labels and answers by halves from a learning rate of 0.02, had given 90.3 % with four
activations gone and merged, and 90.8 % after another epoch from 0.003.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks import sst2
from benchmarks.images import Images, cifar10, cropped_and_flipped
from benchmarks.record import markdown, required, stage, write_json
from benchmarks.squeeze import RESNET_MEAN, RESNET_STD, ResNet, remembered
from shallower.core.files import read_state, write_state
from shallower.core.inputs import call
from shallower.core.text import amount
from shallower.core.trees import tensors
from shallower.errors import TrainingError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import count_macs, count_params
from shallower.measuring.timing import Ratio, times_in_turn
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.collapsing.stages import Stages
from shallower.methods.tlc.choosing import choose_forms
from shallower.methods.tlc.pace import Pace, Round
from shallower.methods.tlc.till_layers_collapse import TillLayersCollapse
from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.surgery.padding import move_padding
from shallower.surgery.simulation import simulate
from shallower.training import Checkpoint, Recipe, train

TRAINED = 14_000
GAPS = 500
BATCH = 128
COMPARING = Recipe(epochs=1, lr=0.02, optimizer="sgd", weight_decay=1e-4, schedule="cosine", clip=5.0, precision="bf16")
RETRAINING = dataclasses.replace(COMPARING, lr=0.01)
FINISHING = dataclasses.replace(RETRAINING, epochs=4, seed=100)
FINISHING56 = dataclasses.replace(RETRAINING, epochs=1, seed=100)
MOBILE_TRAINING = Recipe(
    epochs=4, lr=0.1, optimizer="sgd", weight_decay=5e-4, warmup=0.05, schedule="cosine", clip=5.0, precision="bf16"
)
MOBILE_RETRAINING = dataclasses.replace(MOBILE_TRAINING, epochs=1, lr=0.02)
SWIN_TRAINING = Recipe(epochs=4, lr=1e-3, weight_decay=0.05, warmup=0.05, precision="bf16")
SWIN_RETRAINING = dataclasses.replace(SWIN_TRAINING, epochs=1, lr=3e-4)
MINILM_TRAINING = Recipe(epochs=1, lr=6e-5, warmup=0.1, precision="bf16")
MINILM_RETRAINING = Recipe(epochs=1, lr=5e-5, warmup=0.05, precision="bf16", seed=1)
SENTENCES = 3_000
REPORTED = 4_000
"""Test images that every point of a curve is scored on, the first of the test set."""
TEMPERATURE = 2.0
BLOCKS, PASSES = 40, 15
"""Of timing, with other copies of the networks in each block."""
EXAMPLES = 8
"""Images or sentences on which forms are timed and MACs are counted."""
CRITERIA = ("loss", "batchnorm", "entropy", "random", "slopes")

ONE_SHOT = (1, 2, 4, 6)
RETRAINED = (1, 2, 4, 6)
FINISHED = (4,)
"""Rounds after which the merged network is trained as it is."""

Loss = Callable[[nn.Module, Any], Tensor]
Made = Callable[[], tuple[nn.Module, Plan]]
Finish = Callable[[nn.Module, Path], object]
"""Trains a merged network, with a checkpoint."""


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as the shared ResNets want them."""
    return (pixels.float() / 255 - RESNET_MEAN) / RESNET_STD


class Batches:
    """Batches (images, labels) in a new order each epoch, cropped and flipped at random, `steps` an epoch."""

    def __init__(self, images: Images, size: int, steps: int | None = None) -> None:
        self.images, self.size = images, size
        self.steps = len(images) // size if steps is None else steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for number in range(self.steps):
            rows = order[number * self.size : (number + 1) * self.size]
            yield normalised(cropped_and_flipped(self.images.pixels[rows])), self.images.labels[rows]


def turned(images: Images, seed: int, amount: float = 0.3) -> tuple[Tensor, Tensor]:
    """Images turned by up to `amount` radians, and shifted, scaled and mirrored at random; and their labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        n = len(images)
        angle, scale = amount * (2 * torch.rand(n) - 1), 1 + amount / 2 * (2 * torch.rand(n) - 1)
        cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
        right, down = (amount / 4 * (2 * torch.rand(n, 2) - 1)).T
        rows = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
        grid = F.affine_grid(rows, [n, 3, 32, 32], align_corners=False)
        x = F.grid_sample(images.pixels.float(), grid, padding_mode="reflection", align_corners=False)
        return normalised(torch.where(torch.rand(n, 1, 1, 1) < 0.5, x, x.flip(3))), images.labels


class Part:
    """The first batches of each epoch of others."""

    def __init__(self, batches: sst2.Batches, steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(self.batches):
            if number == self.steps:
                return
            yield batch


def batched(images: Images, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    """Batches (images, labels) as they are."""
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return [(normalised(part.pixels), part.labels) for part in parts]


def accuracy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of the images that the model classifies rightly, in eval mode and the model's own precision."""
    plain = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        right = sum(
            int((plain(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()) for x, y in batches
        )
    return right / sum(len(y) for _, y in batches)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch (images, labels)."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


@dataclass(frozen=True)
class Lesson:
    """What a network learns from the dense one, whose answers count at temperature 2.

    Attributes:
        labels: share of the labels' cross entropy in the loss; the rest is the divergence from the dense network.
        mixed: part of the images that have up to half of another one mixed in.
        noisy: contrast, colours and pixels change at random by about as much.
    """

    labels: float = 0.0
    mixed: float = 0.0
    noisy: float = 0.0

    def images(self, x: Tensor) -> Tensor:
        """Images (n, 3, height, width) as they are shown."""
        n, unit = len(x), 1 / (255 * RESNET_STD)
        if self.noisy:
            contrast, colour = 2 * torch.rand(n, 1, 1, 1) - 1, 2 * torch.rand(n, 3, 1, 1) - 1
            x = x * (1 + self.noisy * contrast) + 100 * self.noisy * colour * unit
            x = x + 60 * self.noisy * unit * torch.randn_like(x) * torch.rand(n, 1, 1, 1)
        if self.mixed:
            share = torch.rand(n, 1, 1, 1) / 2 * (torch.rand(n, 1, 1, 1) < self.mixed)
            x = x * (1 - share) + x.flip(0) * share
        return x

    def __call__(self, teacher: nn.Module) -> Loss:
        """The loss of a model and a batch (images, labels); in eval mode the labels' cross entropy."""

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            if not model.training:
                return cross_entropy(model, batch)
            x = self.images(batch[0])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                answers = teacher(x).float()
            logits = model(x).float()
            soft = divergence(answers / TEMPERATURE, logits / TEMPERATURE) * TEMPERATURE**2
            hard = F.cross_entropy(logits, batch[1]) if self.labels else 0.0
            return self.labels * hard + (1 - self.labels) * soft

        return loss


LESSON = Lesson(mixed=0.5)
TRIED = (
    (Lesson(), 0.01),
    (Lesson(noisy=0.08), 0.01),
    (Lesson(mixed=0.5), 0.01),
    (Lesson(mixed=0.5), 0.03),
)
"""For ResNet-20, a lesson and a learning rate each; `RETRAINING` and `LESSON` are what came nearest."""


def divergence(answers: Tensor, logits: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of one model's logits (n, classes) from another's."""
    log_p, log_q = F.log_softmax(answers, 1), F.log_softmax(logits, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def resnet(data: Path, blocks: int) -> nn.Module:
    """A shared CIFAR ResNet of 6 n + 2 layers, trained."""
    from safetensors.torch import load_file

    model = ResNet(blocks)
    name = f"resnet{6 * blocks + 2}.safetensors"
    model.load_state_dict(load_file(required(data / "cifar10-resnets" / name)), strict=False)
    return model.eval()


class Inverted(nn.Module):
    """An inverted residual of MobileNetV2: expand, depthwise 3x3, project, with a skip where the shape stays."""

    def __init__(self, d_in: int, d_out: int, stride: int, expansion: int = 6) -> None:
        super().__init__()
        hidden = expansion * d_in
        self.expand, self.bn1 = nn.Conv2d(d_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project, self.bn3 = nn.Conv2d(hidden, d_out, 1, bias=False), nn.BatchNorm2d(d_out)
        self.residual = d_in == d_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(batch, d_out, height / stride, width / stride)."""
        y = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        y = self.bn3(self.project(y))
        result: Tensor = x + y if self.residual else y
        return result


class MobileNet(nn.Module):
    """A small MobileNetV2 for images of 32x32: eight inverted residuals at 16x16, 8x8 and 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        shapes = [
            (16, 16, 1),
            (16, 16, 1),
            (16, 24, 2),
            (24, 24, 1),
            (24, 24, 1),
            (24, 40, 2),
            (40, 40, 1),
            (40, 40, 1),
        ]
        self.blocks = nn.Sequential(*[Inverted(*shape) for shape in shapes])
        self.last, self.last_norm = nn.Conv2d(40, 160, 1, bias=False), nn.BatchNorm2d(160)
        self.classifier = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        x = self.blocks(F.relu6(self.norm(self.stem(x))))
        logits: Tensor = self.classifier(F.relu6(self.last_norm(self.last(x))).mean((2, 3)))
        return logits


def swin() -> nn.Module:
    """A small Swin Transformer for images of 32x32: 8x8 tokens of 48, then 4x4 of 96, two blocks each."""
    from shallower.saving.vision import repair_torchvision

    repair_torchvision()
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    model: nn.Module = SwinTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        num_classes=10,
        drop_path_rate=0.0,
    )
    return model


@dataclass(frozen=True)
class Work:
    """Images: what is trained on, sites and recipes are chosen on, is reported on, and statistics are from."""

    train: Images
    gaps: list[tuple[Tensor, Tensor]]
    recipes: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    whole_test: list[tuple[Tensor, Tensor]]
    calibration: list[Tensor]
    cache: Path

    def gaps_for(self, budget: Budget) -> list[tuple[Tensor, Tensor]]:
        """What a loop chooses on, in every round."""
        return [(x[: budget.ranked], y[: budget.ranked]) for x, y in self.gaps[: -(-budget.ranked // 250)]]

    @classmethod
    def of(cls, data: Path, cache: Path) -> Work:
        rows, test = cifar10(data, "train", cache.parent), cifar10(data, "test", cache.parent)
        return cls(
            rows[:TRAINED],
            batched(rows[TRAINED : TRAINED + GAPS]),
            [turned(rows[TRAINED + GAPS :], seed) for seed in range(100, 103)],
            batched(test[:REPORTED]),
            batched(test),
            [normalised(rows[:250].pixels), normalised(rows[250:400].pixels)],
            cache,
        )


@dataclass(frozen=True)
class Budget:
    """How a shared ResNet is trained while its activations go; `inner`: only those inside of blocks.

    Before each round activations are ranked on `ranked` rows.
    """

    blocks: int
    criterion: str
    steps: int
    rounds: int
    per_round: int
    ranked: int = 250
    inner: bool = False
    recipe: Recipe = RETRAINING
    lesson: Lesson = LESSON
    seed: int = 0

    def folder(self, cache: Path) -> Path:
        """Where the states after each round are kept."""
        return stage(cache, f"resnet{6 * self.blocks + 2}-{self.criterion}", self).with_suffix("")


RESNET20 = Budget(3, "loss", 54, 6, 1)
INNER = Budget(3, "loss", 54, 4, 1, inner=True)
COMPARED = tuple(Budget(3, name, 27, 4, 2, ranked=GAPS, recipe=COMPARING, lesson=Lesson(0.5)) for name in CRITERIA)
RESNET56 = Budget(9, "loss", 36, 2, 4, ranked=125)


def with_retraining(work: Work, data: Path, budget: Budget) -> Path:
    """The loop on a shared ResNet; the folder of the states after each round."""
    folder = budget.folder(work.cache)
    if (folder / f"{budget.rounds}.safetensors").exists():
        return folder
    teacher, model = resnet(data, budget.blocks), resnet(data, budget.blocks)
    sites = places_of(model, budget.inner)
    if budget.criterion == "slopes":
        by_slopes(work, model, teacher, sites, budget, folder)
        return folder
    method = TillLayersCollapse(
        model,
        sites,
        criterion=budget.criterion,  # type: ignore[arg-type]
        batches=work.calibration,
        seed=budget.seed,
    )
    method.fit(
        Batches(work.train, BATCH, budget.steps),
        budget.lesson(teacher),
        budget.recipe,
        Pace(budget.per_round, budget.rounds),
        validation=work.gaps_for(budget) if budget.criterion == "loss" else None,
        on_round=keeper(method, folder, budget.per_round),
        checkpoint=Checkpoint(folder / "run", every=30),
    )
    return folder


def keeper(method: TillLayersCollapse, folder: Path, per_round: int) -> Callable[[Round], None]:
    """What keeps the state after each round in `folder`/NUMBER.safetensors."""

    def keep(done: Round) -> None:
        lines = {name: [method.activations[name].slope, method.activations[name].offset] for name in done.removed}
        state = {
            "model": detached_state(method.model),
            "lines": lines,
            "linearised": list(done.linearised),
            "costs": dict(done.costs),
            "losses": done.history.losses,
            "seconds": done.history.seconds,
        }
        write_state(folder / f"{len(done.removed) // per_round}.safetensors", state, error=TrainingError)

    return keep


def by_slopes(work: Work, model: nn.Module, teacher: nn.Module, sites: Sites, budget: Budget, folder: Path) -> None:
    """LayerCollapse with the same budget: slopes driven to 1 in stages, those first whose collapse costs least."""
    method = LayerCollapse(model, sites, strength=0.05, slope_lr=1e-3, include="*")
    costs = remembered(folder / "sensitivity.json", lambda: method.sensitivity(work.gaps, loss=cross_entropy))
    order = sorted(costs, key=costs.__getitem__)[: budget.rounds * budget.per_round]
    method.fit(
        Batches(work.train, BATCH, budget.steps),
        budget.lesson(teacher),
        budget.recipe,
        Stages(
            [order[start : start + budget.per_round] for start in range(0, len(order), budget.per_round)],
            order=sorted(costs, key=costs.__getitem__),
        ),
        checkpoint=folder / "run",
    )
    one = [torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    gone = [name for name, a in method.slopes().items() if float(a) == 1]
    write_state(
        folder / f"{budget.rounds}.safetensors",
        {"model": detached_state(model), "lines": dict.fromkeys(gone, one)},
        error=TrainingError,
    )


def places_of(model: nn.Module, inner: bool = False) -> Sites:
    """All activations of a CIFAR network, or those inside of blocks."""
    sites = find_sites(model, torch.zeros(2, 3, 32, 32), kinds=("hidden", "activation"))
    return sites.select(lambda site: site.kind == "convolution") if inner else sites


def detached_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights, without what is attached."""
    from shallower.modules.attachment import detached_copy

    return dict(detached_copy(model).state_dict())


def trained(model: nn.Module, batches: Iterable[Any], loss: Loss, recipe: Recipe, path: Path) -> nn.Module:
    """The model after its training, in eval mode."""
    train(model, batches, loss, recipe, checkpoint=Checkpoint(path, every=30), label=path.stem)
    return model.eval()


def mobile_dense(work: Work) -> nn.Module:
    """MobileNet after its dense training."""
    torch.manual_seed(0)
    model = MobileNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = stage(work.cache, "mobile-dense", MOBILE_TRAINING)
    return trained(model, Batches(work.train, BATCH), cross_entropy, MOBILE_TRAINING, path)


def swin_dense(work: Work) -> nn.Module:
    """Swin after its dense training."""
    path = stage(work.cache, "swin-dense", SWIN_TRAINING)
    return trained(swin(), Batches(work.train, BATCH), cross_entropy, SWIN_TRAINING, path)


def swin_rounds(work: Work) -> Path:
    """Swin's feed-forward activations, one a round; the folder of the states after each."""
    folder = stage(work.cache, "swin-rounds", SWIN_TRAINING, SWIN_RETRAINING).with_suffix("")
    if not (folder / "4.safetensors").exists():
        model = swin_dense(work)
        sites = swin_sites(model)
        method = TillLayersCollapse(model, sites, criterion="loss", line="best", batches=work.calibration)
        method.fit(
            Batches(work.train, BATCH, 54),
            cross_entropy,
            SWIN_RETRAINING,
            Pace(per_round=1, rounds=4),
            validation=work.gaps,
            on_round=keeper(method, folder, 1),
            checkpoint=folder / "run",
        )
    return folder


def swin_sites(model: nn.Module) -> Sites:
    """The feed-forward sites of Swin."""
    return find_sites(model, torch.zeros(2, 3, 32, 32)).select(lambda site: site.kind == "feed-forward")


@dataclass(frozen=True)
class Texts:
    """SST-2: what is trained on, what is chosen on, what is reported on."""

    train: sst2.Batches
    gaps: list[dict[str, Tensor]]
    calibration: list[dict[str, Tensor]]
    test: sst2.Sentences
    cache: Path

    @classmethod
    def of(cls, data: Path, cache: Path) -> Texts:
        rows = sst2.sentences(data, "train", SENTENCES + 200, cache=cache.parent)
        held_out = sst2.Sentences(rows.ids[SENTENCES:], rows.labels[SENTENCES:])
        first = sst2.Sentences(rows.ids[:SENTENCES], rows.labels[:SENTENCES])
        calibration = sst2.Sentences(rows.ids[:400], rows.labels[:400]).in_batches(50)
        test = sst2.sentences(data, "test", cache=cache.parent)
        return cls(sst2.Batches(first, sst2.BATCH), held_out.in_batches(100), calibration, test, cache)


def minilm_dense(texts: Texts) -> nn.Module:
    """MiniLM after its fine-tuning."""
    path = stage(texts.cache, "minilm-dense", MINILM_TRAINING, SENTENCES)
    return trained(sst2.network(), texts.train, sst2.cross_entropy, MINILM_TRAINING, path)


def minilm_rounds(texts: Texts) -> Path:
    """MiniLM's feed-forward activations, one a round; the folder of the states after each."""
    folder = stage(texts.cache, "minilm-rounds", MINILM_TRAINING, MINILM_RETRAINING, SENTENCES).with_suffix("")
    if not (folder / "4.safetensors").exists():
        model = minilm_dense(texts)
        sites = minilm_sites(model)
        method = TillLayersCollapse(model, sites, criterion="loss", line="best", batches=texts.calibration)
        method.fit(
            Part(texts.train, 40),
            sst2.cross_entropy,
            MINILM_RETRAINING,
            Pace(per_round=1, rounds=4),
            validation=texts.gaps,
            on_round=keeper(method, folder, 1),
            checkpoint=folder / "run",
        )
    return folder


def minilm_sites(model: nn.Module) -> Sites:
    """The feed-forward sites of MiniLM."""
    return find_sites(model, example_text()).select(lambda site: site.kind == "feed-forward")


def example_text(batch: int = EXAMPLES, length: int = 32) -> dict[str, Tensor]:
    """Sentences of one length."""
    ids = torch.randint(1000, 20_000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Subject:
    """A dense network, and all that is needed to tell what is left of it.

    Attributes:
        dense: as it was.
        sites: whose activations go.
        options: of the method.
        calibration: batches for statistics and fits.
        example: what it is timed on.
        score: test accuracy.
        template: what the states after the rounds fit into; the dense network where None.
    """

    dense: nn.Module
    sites: Sites
    options: Mapping[str, Any]
    calibration: Sequence[Any]
    example: Any
    score: Callable[[nn.Module], float]
    template: nn.Module | None = None

    @property
    def fresh(self) -> nn.Module:
        """A network to load a state into."""
        return copy.deepcopy(self.dense if self.template is None else self.template)


def one_shot(subject: Subject, order: Sequence[str], count: int) -> tuple[nn.Module, Plan]:
    """The dense network and the plan in which the first of `order` are linear."""
    model = copy.deepcopy(subject.dense)
    method = TillLayersCollapse(model, subject.sites, batches=subject.calibration, **subject.options)
    method.linearise(order[:count])
    plan = method.plan()
    method.detach()
    return model, plan


def after_round(subject: Subject, state: Path) -> tuple[nn.Module, Plan]:
    """The network after a round of retraining, and the plan that says which of its activations are gone."""
    kept = read_state(state, error=TrainingError)
    model = subject.fresh
    model.load_state_dict(kept["model"])
    model.eval()
    method = TillLayersCollapse(model, subject.sites, batches=subject.calibration, **subject.options)
    for name, (slope, offset) in kept["lines"].items():
        method.activations[name].set(slope, offset)
    plan = method.plan()
    method.detach()
    return model, plan


def point(subject: Subject, model: nn.Module, plan: Plan, path: Path, finish: Finish | None = None) -> dict[str, Any]:
    """One point of a curve: what its network scores with its activations gone, really merged, and trained as it is.

    The merged network is kept beside `path` as a plan and weights, so that it can be timed with the others later.
    """
    if path.exists():
        row: dict[str, Any] = json.loads(path.read_text())
        return row
    chosen = choose_forms(model, plan, subject.example, batches=subject.calibration)
    small = apply(model, chosen, subject.example)
    merged = subject.score(small)
    exact = all(entry.fit is None for entry in chosen.entries)
    row = {
        "removed": [entry.site.name for entry in plan.entries],
        "linear": merged if exact else subject.score(simulate(model, plan)),
        "merged": merged,
        "surgery": surgery_error(model, chosen, small, subject.calibration[0]),
        "forms": {step.entry.site.name: step.form.kind for step in steps(chosen.entries)},
        "notes": {entry.site.name: entry.note for entry in chosen.entries if entry.note},
        "depth": depth(small, subject.example),
        "params": count_params(small),
        "macs": count_macs(small, subject.example),
    }
    chosen.save(path.with_suffix(".plan"))
    write_state(path.with_suffix(".safetensors"), {"model": dict(model.state_dict())}, error=TrainingError)
    if finish is not None:
        finish(small, path.with_suffix(".finished.safetensors"))
        row["finished"] = subject.score(small)
    write_json(path, row)
    return row


def surgery_error(model: nn.Module, plan: Plan, small: nn.Module, batch: Any) -> float:
    """Relative error of a merged network's output against the plan simulated on the original layers."""
    with torch.no_grad():
        expected, found = (next(tensors(call(m.eval(), batch))).double() for m in (simulate(model, plan), small))
    return float((found - expected).norm() / expected.norm())


def dense_row(subject: Subject) -> dict[str, Any]:
    """The row of the dense network."""
    return {
        "removed": [],
        "linear": None,
        "merged": subject.score(subject.dense),
        "surgery": None,
        "forms": {},
        "notes": {},
        "depth": depth(subject.dense, subject.example),
        "params": count_params(subject.dense),
        "macs": count_macs(subject.dense, subject.example),
    }


def timed(subject: Subject, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """How long the dense network and every point's take, in turn, on one image or sentence.

    `seconds` is the least time; `of_dense` and `of_before` are (median, low, high) of the part of the dense network's
    time, and of that of the point before.
    """
    models = {"dense": subject.dense.eval()} | {str(path): kept(subject, path)[1] for path in paths}
    times = list(times_in_turn(models, one_of(subject.example), blocks=BLOCKS, passes=PASSES, copies=True).values())
    return [
        {
            "seconds": min(own),
            "of_dense": dataclasses.astuple(Ratio.of(own, times[0])),
            "of_before": dataclasses.astuple(Ratio.of(own, before)),
        }
        for own, before in zip(times, [times[0], *times], strict=False)
    ]


def against_itself(subject: Subject, path: Path) -> dict[str, Any]:
    """What part of the time a merged network takes of what it is without the merge, all its activations in place."""
    whole, small = kept(subject, path)
    models = {"whole": whole, "merged": small}
    times = times_in_turn(models, one_of(subject.example), copies=True)
    return {"of_itself": dataclasses.astuple(Ratio.of(times["merged"], times["whole"]))}


def kept(subject: Subject, path: Path) -> tuple[nn.Module, nn.Module]:
    """The network that a point was made from, and the merged one, as `point` kept them."""
    model = subject.fresh
    model.load_state_dict(read_state(path.with_suffix(".safetensors"), error=TrainingError)["model"])
    small = apply(model.eval(), Plan.load(path.with_suffix(".plan")), subject.example)
    if path.with_suffix(".finished.safetensors").exists():
        small.load_state_dict(read_state(path.with_suffix(".finished.safetensors"), error=TrainingError)["model"])
    return model, small.eval()


def one_of(example: Any) -> Any:
    """The first image or sentence of several."""
    return {key: value[:1] for key, value in example.items()} if isinstance(example, dict) else example[:1]


class _Depth(TorchFunctionMode):
    """Notes for every tensor how many layers with weights lie between it and the input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = max((getattr(t, "_depth", 0) for t in tensors((args, kwargs or {}))), default=0)
        layer = func in (F.conv2d, torch.conv2d, F.linear, torch.addmm)
        for tensor in tensors(result):
            tensor._depth = max(before + layer, getattr(tensor, "_depth", 0))  # type: ignore[attr-defined]
        return result


@torch.no_grad()
def depth(model: nn.Module, inputs: Any) -> int:
    """The longest chain of layers with weights (convolutions and linear layers)."""
    with _Depth():
        outputs = call(model.eval(), inputs)
    return max(getattr(tensor, "_depth", 0) for tensor in tensors(outputs))


def curve(
    subject: Subject, points: Mapping[int, Made], folder: Path, finishes: Mapping[int, Finish] | None = None
) -> list[dict[str, Any]]:
    """The rows of a curve, the dense network first, with times taken in turn.

    Args:
        points: what makes each, by the number of its round.
        finishes: what trains some of them after the merge.
    """
    rows = [remembered(folder / "dense.json", lambda: dense_row(subject))]
    paths = []
    for number, made in points.items():
        paths.append(folder / f"{number}.json")
        model, plan = made() if not paths[-1].exists() else (subject.dense, Plan(()))
        rows.append(point(subject, model, plan, paths[-1], (finishes or {}).get(number)))
    name = "-".join(map(str, points))
    times = remembered(folder / f"turns-{name}.json", lambda: {"rows": timed(subject, paths)})["rows"]
    itself = [remembered(path.with_suffix(".itself.json"), partial(against_itself, subject, path)) for path in paths]
    return [{**row, **own, **other} for row, own, other in zip(rows, times, [{}, *itself], strict=True)]


def resnet_subject(work: Work, data: Path, blocks: int, inner: bool = False) -> Subject:
    """A shared ResNet."""
    dense = resnet(data, blocks)
    return Subject(
        dense,
        places_of(dense, inner),
        {},
        work.calibration,
        work.calibration[0][:EXAMPLES].clone(),
        lambda model: accuracy(model, work.whole_test if blocks == 3 else work.test),
    )


def order_of(subject: Subject, gaps: Sequence[Any], path: Path) -> list[str]:
    """The activations of the dense network by the loss that each alone adds."""

    def ranked() -> dict[str, Any]:
        model = copy.deepcopy(subject.dense)
        method = TillLayersCollapse(
            model, subject.sites, batches=subject.calibration, **{**subject.options, "criterion": "loss"}
        )
        return {"gaps": method.rank(gaps, cross_entropy)}

    return list(remembered(path, ranked)["gaps"])


MOBILE_ROUNDS = 3


def mobile_moved(work: Work) -> nn.Module:
    """MobileNet after its dense training, the padding of every depthwise convolution moved to the 1x1 before it."""
    model = mobile_dense(work)
    return move_padding(model, mobile_sites(model).select("*expand"))


def mobile_sites(model: nn.Module) -> Sites:
    """Expand to depthwise and depthwise to project, of every block."""
    found = find_sites(model, torch.zeros(8, 3, 32, 32))
    return found.select(lambda site: site.kind == "convolution" and not site.between)


def where_it_pays(work: Work, path: Path) -> dict[str, str]:
    """What every block becomes once both of its activations are gone, and why."""

    def decide() -> dict[str, Any]:
        model = mobile_moved(work)
        plan = Plan(tuple(Entry.collapse(site) for site in mobile_sites(model)))
        chosen = choose_forms(model, plan, work.calibration[0][:EXAMPLES].clone(), rounds=60)
        return {entry.site.name: f"{entry.becomes}: {entry.note}" for entry in chosen.entries}

    found: dict[str, str] = remembered(path, decide)
    return found


def mobile_rounds(work: Work, folder: Path, blocks: Sequence[str]) -> None:
    """One block a round loses both activations, the one whose loss raises the loss least; then training."""
    if (folder / f"{MOBILE_ROUNDS}.safetensors").exists():
        return
    model = mobile_moved(work)
    sites = mobile_sites(model).select(lambda site: block_of(site.name) in blocks)
    method = TillLayersCollapse(model, sites, line="best", batches=work.calibration)
    for number in range(1, MOBILE_ROUNDS + 1):
        gaps = {}
        for block in blocks:
            names = [name for name in method.activations if block_of(name) == block and name not in method.linear]
            if names:
                method.linearise(names)
                with torch.no_grad():
                    gaps[block] = sum(float(cross_entropy(model.eval(), batch)) for batch in work.gaps)
                method.restore(names)
        if not gaps:
            break
        block = min(gaps, key=lambda name: gaps[name])
        method.linearise([name for name in method.activations if block_of(name) == block])
        train(
            model,
            Batches(work.train, BATCH, 54),
            cross_entropy,
            dataclasses.replace(MOBILE_RETRAINING, seed=number),
            method=method,
            checkpoint=folder / f"train-{number}.safetensors",
            label=f"{block}",
        )
        lines = {name: [method.activations[name].slope, method.activations[name].offset] for name in method.linear}
        write_state(
            folder / f"{number}.safetensors", {"model": detached_state(model), "lines": lines}, error=TrainingError
        )


def block_of(name: str) -> str:
    """The block of a site of MobileNet."""
    return ".".join(name.split(".")[:2])


def mobile(work: Work) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """MobileNet's curve, and what each block would become."""
    folder = stage(work.cache, "mobile-rounds", MOBILE_TRAINING, MOBILE_RETRAINING).with_suffix("")
    notes = where_it_pays(work, folder / "where.json")
    paying = sorted({block_of(name) for name, note in notes.items() if note.startswith("merged")})
    mobile_rounds(work, folder, paying)
    moved = mobile_moved(work)
    subject = Subject(
        mobile_dense(work),
        mobile_sites(moved).select(lambda site: block_of(site.name) in paying),
        {"line": "best"},
        work.calibration,
        work.calibration[0][:EXAMPLES].clone(),
        lambda model: accuracy(model, work.test),
        moved,
    )
    return curve(subject, states(subject, folder), folder / "points"), notes


def states(subject: Subject, folder: Path, numbers: Sequence[int] = range(1, 100)) -> dict[int, Made]:
    """The networks after the rounds of a folder, by the number of the round."""
    found = {number: folder / f"{number}.safetensors" for number in numbers}
    return {number: partial(after_round, subject, path) for number, path in found.items() if path.exists()}


def at_once(work: Work, data: Path, budget: Budget, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A ResNet without training."""
    subject = resnet_subject(work, data, budget.blocks)
    folder = work.cache / f"resnet{6 * budget.blocks + 2}-one-shot"
    order = order_of(subject, work.gaps if budget.blocks == 3 else work.gaps_for(budget), folder / "order.json")
    return curve(subject, {count: partial(one_shot, subject, order, count) for count in counts}, folder)


def in_rounds(
    work: Work,
    data: Path,
    budget: Budget,
    numbers: Sequence[int],
    recipe: Recipe,
    finished: Sequence[int],
    steps: int = TRAINED // BATCH,
) -> list[dict[str, Any]]:
    """A ResNet with training in each round and, after the rounds `finished`, of the merged network by `recipe`.

    An epoch of that has `steps` steps.
    """
    subject = resnet_subject(work, data, budget.blocks, budget.inner)
    folder = with_retraining(work, data, budget)

    def finish(small: nn.Module, checkpoint: Path) -> None:
        batches = Batches(work.train, BATCH, steps)
        loss = budget.lesson(subject.dense)
        train(small, batches, loss, recipe, checkpoint=Checkpoint(checkpoint, every=30), label="merged")
        small.eval()

    points = stage(folder, "points", recipe).with_suffix("")
    return curve(subject, states(subject, folder, numbers), points, dict.fromkeys(finished, finish))


def tried(work: Work, data: Path) -> list[dict[str, Any]]:
    """How near ResNet-20 without four activations comes to the dense one in an epoch, on rows held out, turned."""
    subject = resnet_subject(work, data, 3)
    order = order_of(subject, work.gaps, work.cache / "resnet20-one-shot" / "order.json")
    rows = []
    for lesson, lr in TRIED:
        recipe = dataclasses.replace(RETRAINING, lr=lr)

        def made(lesson: Lesson = lesson, recipe: Recipe = recipe) -> dict[str, Any]:
            model = copy.deepcopy(subject.dense)
            method = TillLayersCollapse(model, subject.sites, batches=subject.calibration)
            method.linearise(order[:4])
            train(model, Batches(work.train, BATCH), lesson(subject.dense), recipe, method=method)
            with torch.inference_mode():
                answers = [(subject.dense(x), model.eval()(x), y) for x, y in work.recipes]
            return {
                **dataclasses.asdict(lesson),
                "lr": recipe.lr,
                "divergence": sum(float(divergence(a, b)) for a, b, _ in answers) / len(answers),
                "accuracy": sum(float((b.argmax(1) == y).float().mean()) for _, b, y in answers) / len(answers),
            }

        rows.append(remembered(stage(work.cache, "tried", lesson, recipe).with_suffix(".json"), made))
    return rows


def criteria(work: Work, data: Path, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Test accuracy of ResNet-20 after the same budget under every criterion."""
    subject = resnet_subject(work, data, 3)
    rows = []
    for budget in [budget for budget in COMPARED if budget.criterion not in without]:
        folder = with_retraining(work, data, budget)

        def made(folder: Path = folder, budget: Budget = budget) -> dict[str, Any]:
            model, plan = after_round(subject, folder / f"{budget.rounds}.safetensors")
            test = subject.score(simulate(model, plan))
            return {"criterion": budget.criterion, "removed": [e.site.name for e in plan.entries], "test": test}

        rows.append(remembered(folder / "row.json", made))
    return rows


def swin_curve(work: Work) -> list[dict[str, Any]]:
    """Swin's curve."""
    folder = swin_rounds(work)
    dense = swin_dense(work)
    subject = Subject(
        dense,
        swin_sites(dense),
        {"line": "best"},
        work.calibration,
        work.calibration[0][:EXAMPLES].clone(),
        lambda model: accuracy(model, work.test),
    )
    return curve(subject, states(subject, folder), folder / "points")


def minilm_curve(texts: Texts) -> list[dict[str, Any]]:
    """MiniLM's curve."""
    folder = minilm_rounds(texts)
    dense = minilm_dense(texts)
    subject = Subject(
        dense,
        minilm_sites(dense),
        {"line": "best"},
        [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in texts.calibration],
        example_text(),
        lambda model: sst2.accuracy(model, texts.test),
    )
    return curve(subject, states(subject, folder), folder / "points")


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:
    """All curves; what is in `cache` is not computed again. Quick: ResNet-20 without training, on few images.

    TLC_WITHOUT in the environment names curves that are left out, separated by semicolons.
    """
    work = Work.of(data, cache)
    if quick:
        return quick_run(work, data)
    without = [name for name in os.environ.get("TLC_WITHOUT", "").split(";") if name]
    mobile_rows, where = mobile(work)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "ResNet-20, one-shot": lambda: at_once(work, data, RESNET20, ONE_SHOT),
        "ResNet-20, retrained": lambda: in_rounds(work, data, RESNET20, RETRAINED, FINISHING, FINISHED),
        "ResNet-20, blocks only, retrained": lambda: in_rounds(work, data, INNER, (1, 2, 3, 4), FINISHING, ()),
        "ResNet-56, one-shot": lambda: at_once(work, data, RESNET56, (4, 8)),
        "ResNet-56, retrained": lambda: in_rounds(work, data, RESNET56, (1, 2), FINISHING56, (2,), 36),
        "MobileNet, retrained": lambda: mobile_rows,
        "MiniLM, SST-2, retrained": lambda: minilm_curve(Texts.of(data, cache)),
        "Swin, retrained": lambda: swin_curve(work),
    }
    return {
        "recipes": {
            "ResNet": [dataclasses.asdict(r) for r in (RETRAINING, FINISHING, FINISHING56, COMPARING)],
            "MobileNet": [dataclasses.asdict(MOBILE_TRAINING), dataclasses.asdict(MOBILE_RETRAINING)],
            "Swin": [dataclasses.asdict(SWIN_TRAINING), dataclasses.asdict(SWIN_RETRAINING)],
            "MiniLM": [dataclasses.asdict(MINILM_TRAINING), dataclasses.asdict(MINILM_RETRAINING)],
        },
        "tried": tried(work, data),
        "curves": {name: made() for name, made in parts.items() if name not in without},
        "criteria": criteria(work, data, without),
        "where": where,
        "without": without,
    }


def quick_run(work: Work, data: Path) -> dict[str, Any]:
    """Two activations of ResNet-20, without training."""
    few = dataclasses.replace(work, test=work.test[:1], gaps=[(x[:50], y[:50]) for x, y in work.gaps[:1]])
    subject = dataclasses.replace(
        resnet_subject(few, data, 3), calibration=[x[:20] for x in work.calibration], example=work.calibration[0][:2]
    )
    model = copy.deepcopy(subject.dense)
    method = TillLayersCollapse(model, subject.sites, batches=subject.calibration)
    order = list(method.rank())
    made: dict[int, Made] = {count: partial(one_shot, subject, order, count) for count in (1, 8)}
    return {"curves": {"ResNet-20, one-shot": curve(subject, made, work.cache / "quick")}}


def table(results: dict[str, Any]) -> str:
    """The curves, one line for each network, and what came of criteria and blocks."""
    lines = []
    for name, rows in results["curves"].items():
        for row in rows:
            first = row is rows[0] or "of_dense" not in row
            scores = [f"{row[key]:.2%}" if row.get(key) is not None else "" for key in ("linear", "merged", "finished")]
            lines.append(
                (
                    name,
                    str(len(row["removed"])),
                    *scores,
                    str(row["depth"]),
                    amount(row["params"]),
                    amount(row["macs"] / EXAMPLES),
                    f"{row['seconds'] * 1e3:.2f} ms",
                    "" if first else f"{1 / row['of_dense'][0]:.2f}x",
                    "" if first else str(Ratio(*row["of_before"])),
                    str(Ratio(*row["of_itself"])) if "of_itself" in row else "",
                    "" if row["surgery"] is None else f"{row['surgery']:.1e}",
                )
            )
    header = ("", "removed", "accuracy", "merged", "trained on", "depth", "params", "MACs")
    image = "![accuracy over activations removed and over depth](results/tlc.png)"
    parts = [image, markdown((*header, "time", "speed", "of the row before", "of itself", "surgery"), lines)]
    after = [(name, row) for name, rows in results["curves"].items() for row in rows[1:] if "of_before" in row]
    slower = [f"{name}, {len(row['removed'])} removed" for name, row in after if Ratio(*row["of_before"]).is_slower]
    parts.append(
        f"Of these {len(after)} networks, slower than the row before by more than the noise: "
        f"{'; '.join(slower) or 'none'}."
    )
    if results.get("without"):
        parts.append(f"Left out of this run (TLC_WITHOUT): {'; '.join(results['without'])}.")
    if "tried" in results:
        rows = [
            (
                f"{row['lr']:g}",
                f"{row['labels']:g}",
                f"{row['mixed']:g}",
                f"{row['noisy']:g}",
                f"{row['divergence']:.3f}",
                f"{row['accuracy']:.1%}",
            )
            for row in results["tried"]
        ]
        columns = ("learning rate", "share of the labels", "mixed", "noisy", "divergence", "accuracy")
        parts.append(
            "What ResNet-20 is trained towards was chosen on the 500 rows that neither training nor the choice of "
            "sites sees, turned, shifted and scaled at random so that they are new to the dense network too: four "
            "activations gone at once, one epoch, then the mean divergence from the dense network's answers and the "
            f"accuracy on them. The least divergence was taken.\n\n{markdown(columns, rows)}"
        )
    if "criteria" in results:
        rows = [
            (ORDERS[row["criterion"]], str(len(row["removed"])), f"{row['test']:.2%}") for row in results["criteria"]
        ]
        parts.append(
            "The same network, recipe and budget (four rounds of 27 steps, two activations of ResNet-20 in each), "
            f"under these orders:\n\n{markdown(('order', 'removed', 'accuracy'), rows)}"
        )
    if "where" in results:
        told = {block_of(name): note for name, note in results["where"].items()}
        rows = [(block, note.partition(": ")[2].partition(". ")[0]) for block, note in told.items()]
        parts.append(
            "MobileNet's blocks once both activations are gone, the form that was fastest and its share of the block's "
            f"time before:\n\n{markdown(('block', 'becomes'), rows)}"
        )
    return "\n\n".join(parts)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Plot accuracy over depth, one curve for each network, into `folder`; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("removed", "depth"), strict=True):
        for number, (name, rows) in enumerate(results["curves"].items()):
            lost = [100 * (row.get("finished", row["merged"]) - rows[0]["merged"]) for row in rows]
            xs = [len(row["removed"]) if key == "removed" else row["depth"] - rows[0]["depth"] for row in rows]
            kind = {"ls": "--" if "one-shot" in name else "-", "color": f"C{number}", "marker": "o", "ms": 4}
            axes.plot(xs, lost, label=name, **kind)
        axes.set_ylim(-10, 4)
        axes.set_xlabel("activations removed" if key == "removed" else "layers with weights, against the dense network")
        axes.grid(alpha=0.3)
        if key == "removed":
            axes.set_ylabel("test accuracy against the dense network, points")
            axes.legend(fontsize=7)
        else:
            axes.invert_xaxis()
    figure.savefig(folder / "tlc.png", dpi=110, metadata={"Software": None})


ORDERS = {
    "loss": "loss on held-out rows (TLC)",
    "batchnorm": "expected change by BatchNorm, without labels",
    "entropy": "entropy of signs (EASIER)",
    "random": "random",
    "slopes": "trained slopes (LayerCollapse)",
}


def main(parts: Sequence[str]) -> None:
    """Make some parts ahead: `python -m benchmarks.tlc tried resnet20 criteria swin`."""
    torch.set_num_threads(1)
    root = Path(__file__).parents[1]
    data = Path(os.environ.get("SHALLOWER_DATA", root.parent / "shared" / "data"))
    cache = Path(os.environ.get("TLC_CACHE", root / ".cache" / "benchmarks" / "tlc"))
    work = Work.of(data, cache)
    resnet56 = partial(in_rounds, work, data, RESNET56, (1, 2), FINISHING56, (2,), 36)
    stages: dict[str, Callable[[], object]] = {
        "tried": lambda: tried(work, data),
        "resnet20": lambda: in_rounds(work, data, RESNET20, RETRAINED, FINISHING, FINISHED),
        "resnet20-one-shot": lambda: at_once(work, data, RESNET20, ONE_SHOT),
        "resnet20-blocks": lambda: in_rounds(work, data, INNER, (1, 2, 3, 4), FINISHING, ()),
        "criteria": lambda: criteria(work, data),
        "mobile": lambda: mobile(work),
        "swin": lambda: swin_curve(work),
        "minilm": lambda: minilm_curve(Texts.of(data, cache)),
        "resnet56-one-shot": lambda: at_once(work, data, RESNET56, (4, 8)),
        "resnet56-rounds": lambda: with_retraining(work, data, RESNET56),
        "resnet56": resnet56,
    }
    for part in parts:
        stages[part]()
        print(part, "done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
