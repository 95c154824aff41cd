"""LayerCollapse inside Lightning's Trainer: a network with a wide head on scanned digits.

python examples/lightning_digits.py --output small
"""

import argparse

import torch
import torch.nn.functional as F

import shallower as sh
from shallower.app.demo import VGG, digits
from shallower.integrations.lightning import ShallowerCallback

from lightning.pytorch import LightningModule, Trainer  # isort: skip - after shallower, which mends torchvision


class Classifier(LightningModule):
    """Any LightningModule; the method is attached to the network in it."""

    def __init__(self, net, method):
        super().__init__()
        self.net, self.method = net, method

    def training_step(self, batch, _):
        """Cross-entropy; the callback adds the penalty."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):  # noqa: ARG002 - Lightning's signature
        """Accuracy."""
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        """No weight decay on slopes."""
        return torch.optim.AdamW(self.method.param_groups(weight_decay=0.05), lr=1e-3)


def main():
    """Train with the callback; the smaller model is there when training ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", default="out/lightning_digits")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data, net = digits(), VGG()
    method = sh.LayerCollapse(net, sh.find_sites(net, data.example).select("classifier*"))
    callback = ShallowerCallback(method, directory=arguments.output)
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(max_epochs=arguments.epochs, callbacks=[callback], **quiet)
    trainer.fit(Classifier(net, method), data.train)
    small = sh.load(arguments.output, model=VGG())
    Trainer(**quiet).test(Classifier(small, method), data.test)
    counts = [sum(p.numel() for p in m.parameters()) for m in (VGG(), small)]
    print(f"{counts[0]:,} -> {counts[1]:,} parameters, saved in {arguments.output}")


if __name__ == "__main__":
    main()
