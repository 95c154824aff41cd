"""Squeezing and int8 quantisation compose: size and accuracy of a digit classifier after each and after both.

python examples/quantise.py
"""

import argparse
import io

import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

import shallower as sh
from shallower.app.demo import VGG, digits
from shallower.app.tasks import Classification


def size(model):
    """Bytes of everything that the model's state holds."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def int8(model):
    """Weights of linear layers in int8, activations quantised as they come."""
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def main():
    """Train, squeeze without further training, quantise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--target", default="params:30%")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data, task, model = digits(), Classification(), VGG()
    sh.train(model, data.train, task.loss, sh.Recipe(arguments.epochs, 1e-3, warmup=0.1), label="training")
    model.eval()
    sites = sh.find_sites(model, data.example).select("classifier*")
    plan = sh.squeeze(model, sites, list(data.train)[:6], arguments.target)
    small = sh.apply(model, plan, data.example)
    for name, network in {
        "dense": model,
        "dense, int8": int8(model),
        "squeezed": small,
        "squeezed, int8": int8(small),
    }.items():
        print(f"{name:15} {size(network) / 1e6:6.2f} MB   test accuracy {task.score(network, data.test):.3f}")


if __name__ == "__main__":
    main()
