"""LayerCollapse in a training loop of your own: a small vision transformer on scanned digits.

python examples/plain_loop.py --output small
"""

import argparse

import torch
import torch.nn.functional as F

import shallower as sh
from shallower.app.demo import ViT, digits


def accuracy(model, loader):
    """The part of the rows whose largest logit is that of the label."""
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(-1) == y).float().mean() for x, y in loader]
    return float(sum(right)) / len(right)


def main():
    """Train, train until activations are linear, merge, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", default="out/plain_loop")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data, model = digits(), ViT(depth=4)

    def run(optimizer, method=None):
        if method is not None:
            method.follow(optimizer)
        for epoch in range(arguments.epochs):
            model.train()
            for x, y in data.train:
                if method is not None:
                    method.before_step()
                loss = F.cross_entropy(model(x), y)
                (loss + method.penalty() if method is not None else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
                if method is not None:
                    method.after_step()
            print(f"epoch {epoch + 1}: validation accuracy {accuracy(model, data.validation):.3f}")

    run(torch.optim.AdamW(model.parameters(), lr=2e-3))
    dense = accuracy(model, data.test)
    sites = sh.find_sites(model, data.example).select("blocks.[12]*")
    method = sh.LayerCollapse(model, sites, strength=0.5, arrive_in=arguments.epochs * len(data.train) // 2)
    run(torch.optim.AdamW(method.param_groups(weight_decay=0.05), lr=1e-3), method)
    small = sh.apply(model, method.plan(), data.example)
    sh.save(small, arguments.output)
    print(f"test accuracy {dense:.3f} -> {accuracy(small, data.test):.3f}; saved in {arguments.output}")
    print(sh.measure(small, data.example))


if __name__ == "__main__":
    main()
