"""Logit lens of a steered run: from which layer on would the model's last layers say the steered words?

    python -m recipes.logit_lens                        # half a minute
    python -m recipes.logit_lens --step 1 --texts 600   # every layer, maps of more texts

A layer's state at the last position is read through the model's own final norm and unembedding; and, since early layers do not
write in the last layer's coordinates, once more through an affine map to the last layer's states, fitted by ridge on general
texts (as in the tuned lens, arXiv 2303.08112, but by least squares on states).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

import expertsteer_nnsight as es
from expertsteer_nnsight.measure.effects import word_ids
from expertsteer_nnsight.models.positions import prefix_of
from expertsteer_nnsight.texts.texts import tokenizer_of
from expertsteer_nnsight.texts.word_ends import shared_ends
from recipes import pair


def output_parts(model: Any) -> tuple[Any, Any]:
    """The final norm and the unembedding of a causal model of transformers, as modules of the wrapped model.

    Raises:
        ValueError: no norm stands beside the decoder layers.
    """
    inside = es.Residual(model).path.rpartition(".")[0]
    found = [n for n, m in model._module.get_submodule(inside).named_children() if "norm" in type(m).__name__.lower()]
    if not found:
        raise ValueError(f"No norm stands beside the layers of {type(model._module).__name__}, so there is no lens.")
    head = next(n for n, m in model._module.named_modules() if m is model._module.get_output_embeddings())
    paths = f"{inside}.{found[-1]}".strip("."), head  # a norm of the embeddings, if there is one, comes before
    norm, unembed = (reduce(getattr, path.split("."), model) for path in paths)
    return norm, unembed


def log_odds(model: Any, words: es.Words) -> Callable[[Tensor], Tensor]:
    """The score of `words` as a function of logits `[..., vocabulary]`, for use inside a trace."""
    up, down = (word_ids(tokenizer_of(model), side) for side in (words.positive, words.negative))

    def odds(logits: Tensor) -> Tensor:
        return logits[..., up].float().logsumexp(-1) - logits[..., down].float().logsumexp(-1)

    return odds


def tuned_maps(model: Any, texts: Sequence[str], layers: Iterable[int], ends: int = 3) -> dict[int, es.RidgeAligner]:
    """For each layer the affine map to the last layer's states, fitted on `texts` at their last tokens and `ends` further ones."""
    places = shared_ends(texts, [(tokenizer_of(model), len(prefix_of(model)))], ends)
    last = es.Residual(model).index(-1)
    states = es.collect(model, texts, {*layers, last}, ends=places, progress=False)
    return {layer: es.RidgeAligner().fit(states[layer], states[last]) for layer in layers if layer != last}


def lens(
    model: Any, prompts: Sequence[str], layers: Sequence[int], maps: Mapping[int, es.RidgeAligner] | None = None
) -> tuple[Float[Tensor, "layer prompt vocabulary"], Float[Tensor, "prompt vocabulary"]]:
    """What the last position of each layer says as logits, and the model's own logits.

    Args:
        model: a wrapped model; for a steered run `plan.attach(model)`.
        prompts: read in one batch, which nnsight pads on the left.
        layers: ascending.
        maps: `tuned_maps`, applied before the norm; a layer without one (the last) is read as it is.
    """
    norm, unembed = output_parts(model)
    residual, to_last = (
        es.Residual(model),
        {i: (m.coef_.float(), m.intercept_.float()) for i, m in (maps or {}).items()},
    )
    with torch.no_grad(), model.trace(list(prompts)):
        found = nnsight.save([])
        for layer in layers:
            h = residual.read(layer)[:, -1:]
            if layer in to_last:
                coef, intercept = to_last[layer]
                h = (h.float() @ coef.to(h.device) + intercept.to(h.device)).to(h.dtype)
            found.append(unembed(norm(h))[:, 0])
        logits = nnsight.save(model.output.logits[:, -1])
    return torch.stack(found), logits


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the lens of an unsteered and of a steered run, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="prompts (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=300, help="general texts for the maps (default: %(default)s)")
    parser.add_argument("--step", type=int, default=3, help="show every so many layers (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan, words = pair.target(), pair.plan(), pair.words(args.prompts)
    odds, last = log_odds(model, words), es.Residual(model).index(-1)
    layers = sorted({*range(0, last, args.step), last})
    maps = tuned_maps(model, es.example("general")[-args.texts :], layers)
    prompts: Any = words.prompts
    shown = [(m, lens(m, prompts, layers, fit)) for fit in (None, maps) for m in (model, plan.attach(model))]
    print(
        f"Steered at layers {list(plan.layers)}; log-odds are means over {len(prompts)} prompts, in nats; the top tokens"
    )
    print(f"are those of {prompts[0]!r}; KL is that of the unsteered model's output from the lens.\n")
    print("       logit lens                              tuned lens")
    print("layer  unsteered steered    KL  steered top    unsteered steered    KL  steered top")
    for i, layer in enumerate(layers):
        line = f"{layer:>5}"
        for (_, (plain, final)), (_, (steered, _)) in (shown[:2], shown[2:]):
            p = final.log_softmax(-1)
            kl = (p.exp() * (p - plain[i].log_softmax(-1))).sum(-1).mean()
            top = model.tokenizer.decode(steered[i, 0].argmax())
            line += f"  {odds(plain[i]).mean():9.2f} {odds(steered[i]).mean():7.2f} {kl:5.2f}  {top!r:<13.13}"
        print(line)
    gap = max(float((found[-1] - final).abs().max()) for _, (found, final) in shown)
    print(f"\nAt the last layer the lens is the model's output: largest difference of a logit {gap:.1e}.")
    print(
        "Read: the layer from which on the steered log-odds leave the unsteered ones is where the direction can be read out;"
    )
    print("where the KL is large, the lens does not yet speak the output's language, and its log-odds mean little.")


if __name__ == "__main__":
    main()
