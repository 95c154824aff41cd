"""Squeeze a timm model without training it further: half of the hidden channels go, least squares makes up for them.

python examples/timm_model.py --model vit_tiny_patch16_224     # with weights from the hub
"""

import argparse

import torch

import shallower as sh
from shallower.app.demo import digits
from shallower.app.models import load_model
from shallower.app.tasks import Classification


def main():
    """Without --model: a tiny ViT, first trained on scanned digits, so that this runs anywhere."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--target", default="params:75%")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", default="out/timm_model")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model:
        model = load_model(f"timm:{arguments.model}").model
        source = f"timm:{arguments.model}"
        batches = [torch.randn(8, 3, 224, 224) for _ in range(8)]  # put your own pictures here
        score = None
    else:
        options = "in_chans=1&num_classes=10&img_size=8&patch_size=2"
        source = f"timm:test_vit?{options}"
        model = load_model(source, pretrained=False).model
        data, task = digits(), Classification()
        sh.train(model, data.train, task.loss, sh.Recipe(arguments.epochs, 2e-3, warmup=0.1), label="training")
        batches = list(data.train)[:6]  # a few hundred samples are enough
        score = lambda m: task.score(m, data.validation)  # noqa: E731
    model.eval()
    example = batches[0][0][:8] if isinstance(batches[0], (tuple, list)) else batches[0]

    sites = sh.find_sites(model, example)
    print(sites)
    plan = sh.squeeze(model, sites, batches, arguments.target, score=score)
    print(plan)
    small = sh.apply(model, plan, example)
    sh.save(small, arguments.output, source=source)
    speed = sh.compare({"dense": model, "small": small}, example)["small"]
    if score is not None:
        print(f"test accuracy {task.score(model, data.test):.3f} -> {task.score(small, data.test):.3f}")
    print(f"{speed}\nsaved in {arguments.output}; sh.load({arguments.output!r}) reads it")


if __name__ == "__main__":
    main()
