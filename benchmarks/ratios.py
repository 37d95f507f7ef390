"""Ratios against what one would write by hand, all from one run: collecting, steered generation, RFM.

    python -m benchmarks.ratios                       # the packaged target on the CPU (or a GPU, if there is one)
    python -m benchmarks.ratios --shape 7b            # a randomly initialised 7B-shaped Llama in bfloat16, for a GPU

Each figure is the median over repeats, taken in turns so that a slow moment of the machine hits both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import nnsight
import torch
from nnsight.modeling.transformers import TransformersModel

import expertsteer_nnsight as es

LAYERS = (8, 12, 16, 20)


def median_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median seconds of either, and the median of the ratios of neighbouring runs."""
    ours()
    theirs()
    times = []
    for _ in range(repeats):
        pair = []
        for run in (ours, theirs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    return (
        statistics.median(t[0] for t in times), statistics.median(t[1] for t in times),
        statistics.median(t[0] / t[1] for t in times),
    )  # fmt: skip


def hooked(
    blocks: Any, layers: Any, run: Callable[[], Any], edit: Callable[[torch.Tensor], torch.Tensor | None]
) -> Any:
    """`run()` with plain forward hooks on some blocks."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        new = edit(output[0] if isinstance(output, tuple) else output)
        return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [blocks[i].register_forward_hook(hook) for i in layers]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def collecting(model: Any, texts: list[str], layers: tuple[int, ...], repeats: int) -> tuple[float, float, float]:
    """collect() against the model's own body (no head) with hooks, same batches and padding; collect stops after its last layer."""
    module, tokenizer = model._module, model.tokenizer
    blocks = es.Residual(model).layers._module
    body = module.model
    device = next(module.parameters()).device

    def by_hand() -> None:
        order = sorted(range(len(texts)), key=lambda i: len(tokenizer(texts[i])["input_ids"]))
        for start in range(0, len(texts), 32):
            encoded = [tokenizer(texts[i])["input_ids"] for i in order[start : start + 32]]
            width = max(map(len, encoded))
            ids = torch.tensor([e + [0] * (width - len(e)) for e in encoded], device=device)
            mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in encoded], device=device)
            last = torch.tensor([len(e) - 1 for e in encoded], device=device)
            kept = []

            def keep(h: torch.Tensor, last: torch.Tensor = last, kept: list = kept) -> None:
                kept.append(h[torch.arange(len(h), device=h.device), last].cpu())

            with torch.no_grad():
                hooked(
                    blocks,
                    layers,
                    lambda ids=ids, mask=mask: body(input_ids=ids, attention_mask=mask, use_cache=False),
                    keep,
                )

    return median_ratio(lambda: es.collect(model, texts, layers, progress=False), by_hand, repeats)


def generating(model: Any, prompts: list[str], tokens: int, repeats: int) -> tuple[float, float, float]:
    """An attached plan's generation against a plain hook that adds the same vectors."""
    width = es.Residual(model).hidden_size
    plan = es.SteeringPlan([es.SteeringVector(i, torch.randn(width), 0.1) for i in LAYERS])
    steered = plan.attach(model)
    module = model._module
    encoded = model.tokenizer(prompts, return_tensors="pt", padding=True).to(next(module.parameters()).device)
    adds = {v.layer: 0.1 * v.direction.to(next(module.parameters())) for v in plan.vectors}
    blocks = es.Residual(model).layers._module
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def ours() -> None:
        with torch.no_grad(), steered.generate(prompts, **settings) as tracer:
            nnsight.save(tracer.result)

    def by_hand() -> None:
        handles = [blocks[i].register_forward_hook(lambda m, a, h, v=v: h + v) for i, v in adds.items()]
        with torch.no_grad():
            module.generate(**encoded, **settings)
        for handle in handles:
            handle.remove()

    return median_ratio(ours, by_hand, repeats)


def machines(repeats: int) -> tuple[float, float, float]:
    """Our RFM against xrfm: n = 400, d = 4096, five iterations, one bandwidth, float64, top eigenvector included."""
    from xrfm import RFM

    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4096, generator=g, dtype=torch.float64)
    y = (x[:, 0] + 0.3 * torch.randn(400, generator=g, dtype=torch.float64) > 0).double()
    settings = {"bandwidth": 60.0, "adaptive": False, "center": False, "scale": None, "center_y": False,
                "validation_fraction": 0.0, "n_iter": 5}  # fmt: skip

    def theirs() -> None:
        model = RFM(kernel="l2_high_dim", bandwidth=60.0, device="cpu", tuning_metric="mse", verbose=False)
        model.fit((x, y[:, None]), (x[:40], y[:40, None]), reg=1e-3, iters=5, get_agop_best_model=True, verbose=False)
        agop: Any = model.agop_best_model
        torch.lobpcg(agop.double(), k=1)

    return median_ratio(lambda: es.RecursiveFeatureMachine(**settings).fit(x, y), theirs, repeats)


def random_llama(tokenizer: Any, device: str) -> TransformersModel:
    """A 7B-shaped Llama with random weights in bfloat16, and the packaged target's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        module = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def main() -> None:
    """Prints one line a comparison: our seconds, the other's, and the ratio."""
    from expertsteer_nnsight.models.packaged import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["packaged", "7b"], default="packaged")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--texts", type=int, default=256)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load("SmolLM2-135M-Instruct")
    if args.shape == "7b":
        model = random_llama(model.tokenizer, device)
    texts = es.example("general")[: args.texts]
    last = (*LAYERS[:3], es.Residual(model).n_layers - 1)
    rows = {
        f"collecting, {len(texts)} texts, 4 layers up to 20": lambda: collecting(model, texts, LAYERS, args.repeats),
        f"collecting, {len(texts)} texts, 4 layers up to the last": lambda: collecting(
            model, texts, last, args.repeats
        ),
        "steered generation, 4 prompts, 40 tokens": lambda: generating(model, texts[:4], 40, args.repeats),
        "RFM, n = 400, d = 4096, 5 iterations (xrfm, CPU)": lambda: machines(max(2, args.repeats // 2)),
    }
    print(
        f"{'':<52}{'ours, s':>10}{'other, s':>10}{'ratio':>8}   ({args.shape}, {device}, {torch.get_num_threads()} threads)"
    )
    for name, run in rows.items():
        ours, other, ratio = run()
        print(f"{name:<52}{ours:>10.3f}{other:>10.3f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
