"""States of two models in which a concept is planted, and texts for tiny models."""

from __future__ import annotations

import copy

import torch

from expertsteer_nnsight.models.identity import ModelIdentity
from expertsteer_nnsight.states.activations import Activations

GENERAL = [f"{a} {b} {c}" for a in ("the quick", "a lazy", "one small", "this") for b in ("fox", "dog", "model", "test") for c in
           ("jumps over it", "is here", "jumps", "over the world", "is a test of one")]  # fmt: skip
PAIRS = [
    (f"the {w} is hello {i}", f"the {w} is jumps {i}")
    for i, w in enumerate(["fox", "dog", "test", "model", "world", "box"] * 6)
]


def planted(n_anchors=400, d_expert=24, d_target=16, seed=0):
    """States of two models that share a latent space; the concept is latent axis 0."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    latent, labelled = rand(n_anchors, 8), rand(120, 8)
    y = torch.tensor([1, 0] * 60)
    labelled[:, 0] += 3.0 * (2 * y - 1)
    expert, target = [rand(8, d_expert) for _ in range(4)], [rand(8, d_target) for _ in range(4)]
    e = {i: latent @ m + 0.1 * rand(n_anchors, d_expert) for i, m in enumerate(expert)}
    t = {i: latent @ m + 0.1 * rand(n_anchors, d_target) for i, m in enumerate(target)}
    memory = {f"layer.{i}": x for i, x in t.items()} | {f"norm.{i}": x.norm(dim=1) for i, x in t.items()}
    anchors = Activations(ModelIdentity("t", None, d_target, 4, "x"), (0, 1, 2, 3), n_anchors, "last", None, memory)
    return {i: labelled @ m for i, m in enumerate(expert)}, y, e, anchors, [m[0] for m in target]


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def shifted(base, layer, by):
    """A copy of a GPT-2 whose block `layer` puts out `by` more at every token."""
    expert = type(base)(copy.deepcopy(base._module), tokenizer=base.tokenizer, task="text-generation")
    with torch.no_grad():
        expert._module.transformer.h[layer].mlp.c_proj.bias += by
    return expert
