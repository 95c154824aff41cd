"""From a squeezed model to ONNX Runtime and .pt2, which need neither this library nor the model's code.

python examples/export_onnx.py --output out/export
"""

import argparse
from pathlib import Path

import torch

import shallower as sh
from shallower.app.demo import ViT, digits


def main():
    """Collapse, export, and run what was exported on another batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("out/export"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data, model = digits(), ViT(depth=2).eval()
    example = data.example[:4]
    plan = sh.Plan.collapse(sh.find_sites(model, example).select("blocks.1*"))
    small = sh.apply(model, plan, example)

    print(sh.export(small, example, folder / "model.pt2"))
    program = torch.export.load(folder / "model.pt2").module()
    print("pt2 on 50 rows:", float((program(data.example[:50]) - small(data.example[:50])).abs().max()))

    print(sh.export(small, example, folder / "model.onnx"))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: data.example[:50].numpy()})
    print("ONNX on 50 rows:", float((torch.from_numpy(logits) - small(data.example[:50])).abs().max()))


if __name__ == "__main__":
    main()
