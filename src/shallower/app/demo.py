"""`shallower demo`: two small networks on scikit-learn's digits, each squeezed in two ways, saved and checked.

Once without training, from some hundred pictures, and once by training until layers merge.

python -m shallower.demo demo-out       # loads what was saved and compares its answers, bit for bit
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shallower.app.batching import TaskBatches
from shallower.app.compression import MethodRun, Result, Work, run_method
from shallower.app.jobs import record_of, write
from shallower.app.models import LoadedModel
from shallower.app.results import verdict_table
from shallower.app.runs.layer_collapse import LayerCollapseRun
from shallower.app.runs.squeeze import SqueezeRun
from shallower.app.tasks import Classification
from shallower.errors import CheckpointError, DataError
from shallower.planning.targets import Target
from shallower.saving.checkpoint import load
from shallower.training import Recipe, train

CLASSES = 10
SAMPLES = 768
WAYS = ("squeezed", "collapsed")
"""What is done with each network: without training, and with."""

ANSWERS = "answers.safetensors"


class VGG(nn.Module):
    """Convolutions with BatchNorm and a wide fully connected head, as in VGG; 8x8 grey pictures.

    Args:
        channels: of the convolutions, each followed by a pooling that halves the picture.
        hidden: width of the head's two hidden layers.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), hidden: int = 1024) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *channels), channels, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(channels[-1], hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 1, 8, 8) pictures -> (rows, 10) logits."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class Block(nn.Module):
    """Self-attention and an MLP that is four times as wide, each on top of a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, dim) -> the same."""
        rows, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, dim)
        x = x + self.projection(mixed)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A vision transformer on 8x8 grey pictures: 16 overlapping patches.

    Args:
        dim: features of a token.
        depth: blocks.
        heads: of the attention.
    """

    def __init__(self, dim: int = 64, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, stride=2, padding=1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 1, 8, 8) pictures -> (rows, 10) logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@dataclass(frozen=True)
class Contestant:
    """A network of the demo, what is asked of it, and how it is trained: as it is, and until layers merge."""

    build: Callable[[], nn.Module]
    target: str
    dense: Recipe
    collapsed: Recipe


CONTESTANTS: Mapping[str, Contestant] = {
    "vgg": Contestant(
        VGG,
        "params:10%",
        Recipe(10, 1e-3, weight_decay=0.05, warmup=0.1),
        Recipe(10, 1e-3, weight_decay=0.05, warmup=0.1),
    ),
    "vit": Contestant(
        ViT,
        "macs:65%",
        Recipe(12, 2e-3, weight_decay=0.05, warmup=0.1),
        Recipe(10, 1e-3, weight_decay=0.05, warmup=0.1),
    ),
}


def digits(seed: int = 0, batch_size: int = 64) -> TaskBatches:
    """1,797 scans of handwritten digits: 1,197 to train on, 300 to choose on, 300 to report on.

    Raises:
        DataError: scikit-learn, which brings them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the demo's digits come with scikit-learn: pip install shallower[demo]") from error
    bunch = load_digits()
    pictures = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train_part, validation, test = (
        TensorDataset(pictures[part], labels[part]) for part in (order[600:], order[:300], order[300:600])
    )
    shuffled = DataLoader(train_part, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    example = validation.tensors[0][:128]
    return TaskBatches(shuffled, DataLoader(validation, 300), DataLoader(test, 300), example, seed)


def run(output: Path, *, seed: int = 0, quick: bool = False) -> str:
    """Train both networks, make each smaller in both ways, save and check; the table of what came of it.

    Args:
        output: folder for the results: one for each, and their answers on the test pictures.
        seed: of the initial weights, the order of the pictures and their division.
        quick: one epoch of everything.

    Raises:
        CheckpointError: a saved network answers differently in a fresh process.
    """
    task = Classification()
    rows: list[tuple[str, ...]] = []
    for name, contestant in CONTESTANTS.items():
        batches = digits(seed)
        torch.manual_seed(seed)
        model = contestant.build()
        dense, trained = (
            replace(recipe, seed=seed, epochs=1 if quick else recipe.epochs)
            for recipe in (contestant.dense, contestant.collapsed)
        )
        train(model, batches.train, task.loss, dense, label=f"{name}: training", cpu=True)
        target = Target.parse(contestant.target)
        runs: tuple[MethodRun, ...] = (SqueezeRun(samples=SAMPLES), LayerCollapseRun())
        for method, way in zip(runs, WAYS, strict=True):
            print(f"{name}: {way} to {target}", file=sys.stderr)
            started = time.perf_counter()
            result = run_method(Work(model, batches, task, target, trained, cpu=True), method)
            options = {"model": name, "data": "digits", "method": method.name, "target": str(target), "seed": seed}
            record = record_of(result, options, seconds=time.perf_counter() - started)
            write(result.model, output / f"{name}-{way}", LoadedModel(model, ""), result.outcome.plan, record)
            _keep_answers(result, batches, output / f"{name}-{way}-{ANSWERS}")
            found = result.verdict.rows(task.quality, name, result.outcome.note)
            rows += found if way == WAYS[0] else found[1:]
    command = [sys.executable, "-m", "shallower.app.demo", str(output)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    checked = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if checked.returncode:
        raise CheckpointError(f"{output}: the saved networks failed their check: {checked.stderr.strip()}")
    return "\n".join([verdict_table(task.quality, rows), checked.stdout.strip()])


def check(output: Path) -> str:
    """Load the saved networks and compare their answers with those that were kept.

    Raises:
        CheckpointError: an answer differs in any bit.
    """
    names = [(name, f"{name}-{way}") for name in CONTESTANTS for way in WAYS]
    for name, saved in names:
        kept = load_file(output / f"{saved}-{ANSWERS}")
        model = load(output / saved, CONTESTANTS[name].build())
        with torch.no_grad():
            answers = model(kept["pictures"])
        if not torch.equal(answers, kept["logits"]):
            worst = float((answers - kept["logits"]).abs().max())
            raise CheckpointError(f"{output / saved}: the loaded network answers differently, by up to {worst:.1e}")
    folders = ", ".join(saved for _, saved in names)
    return (
        f"saved in {output}: {folders}; loaded again in a fresh process, all answer the same to the last bit.\n"
        f"Open {output / names[0][1] / 'report.html'} in a browser"
    )


@torch.no_grad()
def _keep_answers(result: Result, batches: TaskBatches, path: Path) -> None:
    pictures = torch.cat([inputs for inputs, _ in batches.test])
    save_file({"pictures": pictures, "logits": result.model(pictures)}, path)


if __name__ == "__main__":
    print(check(Path(sys.argv[1])))
