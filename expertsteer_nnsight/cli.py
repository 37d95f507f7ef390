"""The command line: fit, generate, receipt, info, export, on files and model ids, here or on NDIF."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import expertsteer_nnsight as es
from expertsteer_nnsight._cli_inputs import (
    effect_of,
    model_of,
    neutral_of,
    plan_for,
    plan_of,
    remote_of,
    remotes_of,
    target_of,
    texts_of,
)
from expertsteer_nnsight.texts import texts_hash

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Steer one language model with vectors made from another. A model is a hub id, a folder, or the name of a packaged "
    "model (gemma-3-270m, SmolLM2-135M-Instruct). --remote takes the address of an NDIF host, or `ndif` for the one that "
    "nnsight is configured with.",
)


class Preset(StrEnum):
    """Settings of `fit`."""

    recommended = "recommended"
    in_domain = "in_domain"
    paper = "paper"


class Format(StrEnum):
    """Formats of `export`."""

    gguf = "gguf"
    lm_eval = "lm-eval"
    safetensors = "safetensors"
    hub = "hub"


def _file(told: str) -> Any:
    """An option that takes a file to read."""
    return typer.Option(exists=True, dir_okay=False, help=told, show_default=False)


Pairs = Annotated[
    Path | None, _file("JSON lines with `positive` and `negative` [default: the package's sentiment pairs]")
]
Anchors = Annotated[
    Path | None,
    _file("texts that both models read, one a line, or JSON lines with `text` [default: the package's general texts]"),
]
Neutral = Annotated[Path | None, _file("texts that the strength is calibrated on [default: eight of the package's]")]
Cache = Annotated[
    Path | None, typer.Option(help="folder for the models' states, so that nothing is read twice", show_default=False)
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", dir_okay=False, help="a plan's file")]
Of = Annotated[str | None, typer.Option("--model", help="in place of the plan's target", show_default=False)]
RemoteExpert = Annotated[str | None, typer.Option(help="read the expert on NDIF", show_default=False)]
RemoteTarget = Annotated[str | None, typer.Option(help="run the target on NDIF", show_default=False)]
Budget = Annotated[
    float, typer.Option(help="KL budget of dose 1, in nats: 95th percentile over neutral tokens; 0: do not calibrate")
]


@app.command()
def fit(
    expert: Annotated[str, typer.Argument(help="the model that the direction comes from")],
    target: Annotated[str, typer.Argument(help="the model to steer")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="where to write the plan")] = Path("plan.safetensors"),
    pairs: Pairs = None,
    anchors: Anchors = None,
    neutral: Neutral = None,
    preset: Annotated[Preset, typer.Option(help="settings")] = Preset.recommended,
    kl: Budget = 1.0,
    cache: Cache = None,
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    remote_expert: RemoteExpert = None,
    remote_target: RemoteTarget = None,
) -> None:
    """Make a plan from contrast pairs, and calibrate its strength."""
    if kl < 0:
        raise ValueError(f"--kl is {kl:g}: a budget is above 0, and 0 leaves the plan as it was fitted.")
    texts, calm = texts_of(pairs, anchors), neutral_of(neutral)
    models = model_of(expert, remote_expert), model_of(target, remote_target)
    steer = getattr(es.ExpertSteer, preset)(random_state=seed)
    plan = steer.fit(*models, *texts, cache=cache, **remotes_of(remote_expert, remote_target))
    if kl:
        plan.save(out)  # should the calibration fail
        plan = es.calibrate(plan, models[1], calm, kl, remote=remote_of(remote_target), progress=True)
    plan.save(out)
    typer.echo(f"{plan}\nWrote {out}.")


@app.command()
def generate(
    plan: PlanFile,
    prompts: Annotated[list[str], typer.Argument(help="prompts to continue")],
    model: Of = None,
    dose: Annotated[
        float | None,
        typer.Option(help="in units of the calibrated strength; negative: away [default: as the plan is]"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens instead of taking the most likely")] = False,
    seed: Annotated[int, typer.Option(help="of --sample")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="each prompt is a user's message, in the chat template")] = False,
    unsteered: Annotated[bool, typer.Option("--unsteered", help="print what the model says unsteered, too")] = False,
    remote: RemoteTarget = None,
) -> None:
    """Continue prompts with the steered model."""
    import torch

    from .rollouts import completions, rollouts

    steering = plan_of(plan, dose)
    if steering.dose is not None and abs(steering.dose) > 1.5:
        times = f"{steering.dose**2:.1f} times the calibrated one"
        typer.echo(
            f"Dose {steering.dose:g}: KL grows about as its square, here {times}; text may break down.", err=True
        )
    wrapped = model_of(target_of(steering, model), remote)
    steering = plan_for(steering, wrapped, model)
    texts: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if chat else prompts
    for name, arm in {**({"unsteered": None} if unsteered else {}), "steered": steering}.items():
        torch.manual_seed(seed)
        made = rollouts(wrapped, texts, arm, tokens, do_sample=sample, remote=remote_of(remote))
        for prompt, said in zip(prompts, completions(wrapped, made), strict=True):
            told = f"{name}:\n" if unsteered else ""
            if not said:
                said = "\n(The model ended the text at once" + ("." if chat else ": --chat asks it as a user.") + ")"
            typer.echo(f"{told}{prompt}{chr(10) if chat else ''}{said}\n")


@app.command()
def receipt(
    plan: PlanFile,
    effect: Annotated[
        Path | None,
        _file(
            "JSON: `prompts`, `positive_words`, `negative_words`; or `items`, each a prompt, a text and the other text "
            "[default: the package's sentiment words]"
        ),
    ] = None,
    pairs: Pairs = None,
    anchors: Anchors = None,
    neutral: Neutral = None,
    expert: Annotated[str | None, typer.Option(help="in place of the plan's expert", show_default=False)] = None,
    model: Of = None,
    preset: Annotated[Preset, typer.Option(help="as the plan was fitted")] = Preset.recommended,
    seed: Annotated[int, typer.Option(help="as the plan was fitted")] = 0,
    untrained: Annotated[int, typer.Option(help="untrained experts")] = 3,
    draws: Annotated[int, typer.Option(help="draws of shuffled anchors and of random directions")] = 20,
    cache: Cache = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="where the plan with its receipt goes [default: PLAN]")
    ] = None,
    remote_expert: RemoteExpert = None,
    remote_target: RemoteTarget = None,
) -> None:
    """Measure a plan's effect, cost and controls at equal KL; the plan is fitted again for its controls."""
    tested = plan_of(plan)
    source = tested.info.get("expert")
    named = expert or (source.get("id") if isinstance(source, dict) else source)
    if not named:
        raise ValueError(f"{plan} does not say which expert it came from: name it with --expert.")
    measured, labelled, texts = effect_of(effect), *texts_of(pairs, anchors)
    models = model_of(named, remote_expert), model_of(target_of(tested, model), remote_target)
    hashes = {"labelled_hash": texts_hash(labelled.texts), "anchors_hash": texts_hash(texts)}
    known = tested.info.get("data", {})
    if any(known.get(k, v) != v for k, v in hashes.items()):
        raise ValueError(
            f"{plan} was fitted on other texts than these: give the --pairs and --anchors that it was made of."
        )
    steer, where = getattr(es.ExpertSteer, preset)(random_state=seed), remotes_of(remote_expert, remote_target)
    if steer.settings != tested.info.get("settings"):
        raise ValueError(f"{plan} was fitted with other settings: give the --preset and --seed that it was made with.")
    steer.fit(*models, labelled, texts, cache=cache, **where)
    controls = steer.controls(*models, labelled, texts, untrained=untrained, draws=draws, cache=cache, **where)
    found = es.receipt(
        plan_for(tested, models[1], model),
        models[1],
        measured,
        neutral_of(neutral),
        controls,
        draws=draws,
        remote=remote_of(remote_target),
    )
    found.plan.save(out or plan)
    typer.echo(f"{found}\nWrote {out or plan}.")


@app.command()
def info(plan: PlanFile, as_json: Annotated[bool, typer.Option("--json", help="the whole header")] = False) -> None:
    """Print what a plan is, where it came from and what was measured."""
    import torch

    shown = plan_of(plan)
    if as_json:
        kept = ("layer", "op", "where", "from_step", "skip_special", "residual_norm")
        vectors = [
            {
                **{name: getattr(v, name) for name in kept},
                "strength": torch.as_tensor(v.strength, dtype=torch.float64).tolist(),
            }
            for v in shown.vectors
        ]
        target = shown.target.to_dict() if shown.target else None
        typer.echo(json.dumps({"target": target, "vectors": vectors, "info": shown.info}, indent=1, default=str))
        return
    typer.echo(str(shown))
    if "receipt" in shown.info:
        typer.echo(f"\n{es.Receipt.from_dict(shown.info['receipt'])}")


@app.command()
def export(
    plan: PlanFile,
    to: Annotated[Format, typer.Option(help="format")],
    out: Annotated[str, typer.Option(help="a file, or the repository (owner/name) with --to hub")],
    dose: Annotated[float | None, typer.Option(help="in units of the calibrated strength", show_default=False)] = None,
    model: Of = None,
) -> None:
    """Write a plan for another tool: llama.cpp and repeng (gguf), lm-eval's steered model, plain vectors, or the hub."""
    from .interop.formats import EXPORTS

    taken = plan_of(plan, dose)
    if to == Format.hub:
        typer.echo(f"Wrote {taken.push_to_hub(out)}")
        return
    wrapped = model_of(target_of(taken, model), "names") if to == Format.lm_eval or model else None
    written = EXPORTS[to](plan_for(taken, wrapped, model), out, wrapped)
    typer.echo(f"Wrote {written}. Its reader steers every token, also a <bos>, and knows of no dose.")


def main() -> None:
    """Runs the command line; what goes wrong is one sentence."""
    try:
        app()
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        typer.echo(f"expertsteer: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
