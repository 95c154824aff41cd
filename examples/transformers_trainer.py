"""LayerCollapse inside Transformers' Trainer: a small ViT on scanned digits.

python examples/transformers_trainer.py --output small
"""

import argparse

import torch

import shallower as sh
from shallower.app.demo import digits
from shallower.integrations.transformers import ShallowerCallback

from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification  # isort: skip


def rows_of(loader):
    """What Trainer takes: one dict a row."""
    return [{"pixel_values": x, "labels": int(y)} for x, y in loader.dataset]


def accuracy(prediction):
    """For Trainer.evaluate."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    """Train with the callback; the smaller model is there when training ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--output", default="out/transformers_trainer")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
    model, data = ViTForImageClassification(config), digits()

    sites = sh.find_sites(model, {"pixel_values": data.example}).select("*layer*.[23]*")
    method = sh.LayerCollapse(model, sites)
    callback = ShallowerCallback(method, arrive=0.6, directory=arguments.output)
    options = {"per_device_train_batch_size": 64, "learning_rate": 2e-3, "use_cpu": not torch.cuda.is_available()}
    settings = TrainingArguments(
        "out/trainer", num_train_epochs=arguments.epochs, save_strategy="no", report_to=[], disable_tqdm=True, **options
    )
    train, test = rows_of(data.train), rows_of(data.test)
    trainer = Trainer(
        model, settings, train_dataset=train, eval_dataset=test, callbacks=[callback], compute_metrics=accuracy
    )
    callback.log_through(trainer)
    trainer.train()

    small = sh.load(arguments.output)
    score = Trainer(small, settings, eval_dataset=test, compute_metrics=accuracy).evaluate()["eval_accuracy"]
    counts = [sum(p.numel() for p in m.parameters()) for m in (ViTForImageClassification(config), small)]
    print(f"{counts[0]:,} -> {counts[1]:,} parameters, test accuracy {score:.3f}, saved in {arguments.output}")


if __name__ == "__main__":
    main()
