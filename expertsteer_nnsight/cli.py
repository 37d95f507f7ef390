"""The command line: fit, generate, receipt, info, export, and a live expert's own, on files and model ids, here or on NDIF."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import expertsteer_nnsight as es

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Steer one language model with vectors made from another. A model is a hub id, a folder, or the name of a packaged "
    "model (gemma-3-270m, SmolLM2-135M-Instruct). --remote takes the address of an NDIF host, or `ndif` for the one that "
    "nnsight is configured with.",
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"expertsteer_nnsight {es.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


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
    texts, calm = _texts_of(pairs, anchors), _neutral_of(neutral)
    models = _model_of(expert, remote_expert), _model_of(target, remote_target)
    steer = getattr(es.ExpertSteer, preset)(random_state=seed)
    plan = steer.fit(*models, *texts, cache=cache, **_remotes_of(remote_expert, remote_target))
    if kl:
        plan.save(out)  # should the calibration fail
        plan = es.calibrate(plan, models[1], calm, kl, remote=_remote_of(remote_target), progress=True)
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

    from .measure.rollouts import completions, rollouts

    steering = _plan_of(plan, dose)
    if steering.dose is not None and abs(steering.dose) > 1.5:
        times = f"{steering.dose**2:.1f} times the calibrated one"
        typer.echo(
            f"Dose {steering.dose:g}: KL grows about as its square, here {times}; text may break down.", err=True
        )
    wrapped = _model_of(_target_of(steering, model), remote)
    steering = _plan_for(steering, wrapped, model)
    texts: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if chat else prompts
    for name, arm in {**({"unsteered": None} if unsteered else {}), "steered": steering}.items():
        torch.manual_seed(seed)
        made = rollouts(wrapped, texts, arm, tokens, do_sample=sample, remote=_remote_of(remote))
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
    from .texts.texts import texts_hash

    tested = _plan_of(plan)
    source = tested.info.get("expert")
    named = expert or (source.get("id") if isinstance(source, dict) else source)
    if not named:
        raise ValueError(f"{plan} does not say which expert it came from: name it with --expert.")
    measured, labelled, texts = _effect_of(effect), *_texts_of(pairs, anchors)
    models = _model_of(named, remote_expert), _model_of(_target_of(tested, model), remote_target)
    hashes = {"labelled_hash": texts_hash(labelled.texts), "anchors_hash": texts_hash(texts)}
    known = tested.info.get("data", {})
    if any(known.get(k, v) != v for k, v in hashes.items()):
        raise ValueError(
            f"{plan} was fitted on other texts than these: give the --pairs and --anchors that it was made of."
        )
    steer, where = getattr(es.ExpertSteer, preset)(random_state=seed), _remotes_of(remote_expert, remote_target)
    if steer.settings != tested.info.get("settings"):
        raise ValueError(f"{plan} was fitted with other settings: give the --preset and --seed that it was made with.")
    steer.fit(*models, labelled, texts, cache=cache, **where)
    controls = steer.controls(*models, labelled, texts, untrained=untrained, draws=draws, cache=cache, **where)
    found = es.receipt(
        _plan_for(tested, models[1], model),
        models[1],
        measured,
        _neutral_of(neutral),
        controls,
        draws=draws,
        remote=_remote_of(remote_target),
    )
    found.plan.save(out or plan)
    typer.echo(f"{found}\nWrote {out or plan}.")


@app.command()
def info(plan: PlanFile, as_json: Annotated[bool, typer.Option("--json", help="the whole header")] = False) -> None:
    """Print what a plan is, where it came from and what was measured."""
    from .steering.plan_file import read_header  # which needs no torch

    shown = read_header(plan)
    if as_json:
        kept = ("layer", "op", "where", "from_step", "skip_special", "residual_norm", "strength", "rows", "at")
        vectors = [{name: getattr(v, name) for name in kept} for v in shown.vectors]
        whole = {"target": shown.target, "vectors": vectors, "prompts": shown.prompts, "info": shown.info}
        typer.echo(json.dumps(whole, indent=1, default=str))
        return
    typer.echo(str(shown))
    if "receipt" in shown.info:
        from .measure.receipts import Receipt

        typer.echo(f"\n{Receipt.from_dict(shown.info['receipt'])}")


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

    taken = _plan_of(plan, dose)
    if to == Format.hub:
        typer.echo(f"Wrote {taken.push_to_hub(out)}")
        return
    wrapped = _model_of(_target_of(taken, model), "names") if to == Format.lm_eval or model else None
    written = EXPORTS[to](_plan_for(taken, wrapped, model), out, wrapped)
    typer.echo(f"Wrote {written}. Its reader steers every token, also a <bos>, and knows of no dose.")


# -- a live expert -----------------------------------------------------------------------------------------------------

live = typer.Typer(no_args_is_help=True, help="An expert that reads each prompt along, in place of a fixed vector.")
app.add_typer(live, name="live")
LiveFile = Annotated[Path, typer.Argument(metavar="LIVE", dir_okay=False, help="a live expert's file")]
Expert = Annotated[str | None, typer.Option("--expert", help="in place of the file's expert", show_default=False)]
Target = Annotated[str | None, typer.Option("--model", help="in place of the file's target", show_default=False)]
_ROWS = "JSON lines with `prompt`, `options` and `answer`, the number of the right option from 0"


@live.command("fit")
def live_fit(
    expert: Annotated[str, typer.Argument(help="the model that reads along")],
    target: Annotated[str, typer.Argument(help="the model to steer")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="where to write it")] = Path("live.safetensors"),
    anchors: Anchors = None,
    validation: Annotated[Path | None, _file(f"{_ROWS}: layers, amount and gate are chosen on them")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="read options, and what the target writes, too")] = False,
    gate: Annotated[
        bool, typer.Option("--gate", help="steer only prompts of which the expert is sure enough; needs --validation")
    ] = False,
    cache: Cache = None,
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    remote_expert: RemoteExpert = None,
    remote_target: RemoteTarget = None,
) -> None:
    """Fit the maps from the expert to the target on unlabelled texts."""
    if gate and validation is None:
        raise typer.BadParameter(
            "needs --validation, whose items choose how sure the expert must be", param_hint="--gate"
        )
    held_out = None if validation is None else _questions_of(validation)
    models = _model_of(expert, remote_expert), _model_of(target, remote_target)
    made = es.LiveExpert(follow=follow, gate="validation" if gate else None, random_state=seed)
    made.fit(*models, _anchors_of(anchors), held_out, cache=cache, **_remotes_of(remote_expert, remote_target))
    r2 = {pair: "" if made.maps_[pair].r2 is None else f" (R² {made.maps_[pair].r2:.2f})" for pair in made.layers_}
    layers = ", ".join(f"{e}>{t}{r2[e, t]}" for e, t in made.layers_)
    through = f", gate {made.gate_:.2f} nats" if made.gate_ is not None else ", no gate pays" if gate else ""
    typer.echo(f"Layers {layers}, amount {made.amount_:g}{through}.\nWrote {made.save(out)}.")


@live.command("generate")
def live_generate(
    file: LiveFile,
    prompts: Annotated[list[str], typer.Argument(help="prompts to continue")],
    expert: Expert = None,
    model: Target = None,
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 40,
    chat: Annotated[
        bool, typer.Option("--chat", help="each prompt is a user's message, in the chat templates")
    ] = False,
    unsteered: Annotated[bool, typer.Option("--unsteered", help="print what the model says unsteered, too")] = False,
    remote_expert: RemoteExpert = None,
    remote_target: RemoteTarget = None,
) -> None:
    """Continue prompts with the expert reading along."""
    from .measure.rollouts import completions, rollouts

    made = _live_of(file, expert, model, remote_expert, remote_target)
    texts: list[Any] = [[{"role": "user", "content": p}] for p in prompts] if chat else prompts
    said = {"with the live expert": made.generate(texts, tokens)}
    if unsteered:
        plain = rollouts(made.target_, texts, None, tokens, remote=made.remote_target_)
        said = {"unsteered": completions(made.target_, plain), **said}
    for name, answers in said.items():
        for prompt, answer in zip(prompts, answers, strict=True):
            typer.echo(f"{name + ':' + chr(10) if unsteered else ''}{prompt}{chr(10) if chat else ''}{answer}\n")


@live.command("receipt")
def live_receipt(
    file: LiveFile,
    questions: Annotated[Path, _file(f"{_ROWS}: other ones than those that layers were chosen on")],
    anchors: Anchors = None,
    expert: Expert = None,
    model: Target = None,
    untrained: Annotated[int, typer.Option(help="untrained experts")] = 3,
    cache: Cache = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="where the receipt goes, as JSON", show_default=False)
    ] = None,
    remote_expert: RemoteExpert = None,
    remote_target: RemoteTarget = None,
) -> None:
    """Compare a live expert with its controls on questions."""
    asked, texts = _questions_of(questions), _anchors_of(anchors)
    made = _live_of(file, expert, model, remote_expert, remote_target)
    found = made.receipt(asked, texts, untrained=untrained, cache=cache)
    typer.echo(str(found))
    if out is not None:
        typer.echo(f"Wrote {found.save(out)}.")


# -- what the arguments mean -------------------------------------------------------------------------------------------


def _plan_of(path: Path, dose: float | None = None) -> es.SteeringPlan:
    """A plan's file, at a dose if one is named."""
    plan = es.SteeringPlan.load(path)
    return plan if dose is None else plan.at_dose(dose)


def _plan_for(plan: es.SteeringPlan, wrapped: Any, model: str | None) -> es.SteeringPlan:
    """The plan as it is, or for the model that was named in place of its target."""
    if model is None:
        return plan
    plan.check(wrapped, any_id=True)  # a model of any name, but of the plan's width and depth
    return es.SteeringPlan(plan.vectors, wrapped, plan.info, plan.prompts)


def _model_of(name: str, remote: str | None) -> Any:
    """The model that a name means, with its weights unless it is remote."""
    from difflib import get_close_matches

    from .models.packaged import MODELS, load

    known = [packaged for packaged in MODELS if "MiniLM" not in packaged]  # which writes no text
    near = [] if "/" in name or name in known or Path(name).exists() else get_close_matches(name, known, 1, 0.85)
    if near:
        raise ValueError(f"There is no model {name!r}: is {near[0]} meant?")
    try:
        return load(name, here=remote is None)
    except OSError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder and no packaged model ({', '.join(known)}), and the hub did not give it: {said}"
        ) from None


def _target_of(plan: es.SteeringPlan, model: str | None) -> str:
    """The name of the model to steer: the one that was named, else the plan's."""
    named = model or (plan.target.id if plan.target else None)
    if not named:
        raise ValueError("The plan does not say which model it is for: name it with --model.")
    return named


def _remote_of(remote: str | None) -> Any:
    """The `remote=` that an option means."""
    return False if remote is None else True if remote == "ndif" else remote


def _remotes_of(remote_expert: str | None, remote_target: str | None) -> dict[str, Any]:
    """The same of both options, as arguments of `fit`."""
    return {"remote_expert": _remote_of(remote_expert), "remote_target": _remote_of(remote_target)}


def _texts_of(pairs: Path | None, anchors: Path | None) -> tuple[es.ContrastPairs, list[Any]]:
    """Contrast pairs and anchors, from files or the package's."""
    labelled = es.example("sentiment_pairs").split("train") if pairs is None else es.ContrastPairs.from_jsonl(pairs)
    return labelled, _anchors_of(anchors)


def _anchors_of(path: Path | None) -> list[Any]:
    """Anchors, from a file or the package's."""
    from .texts.texts import as_texts

    return list(es.example("general")) if path is None else as_texts(path)


def _live_of(
    path: Path, expert: str | None, model: str | None, remote_expert: str | None, remote_target: str | None
) -> es.LiveExpert:
    """A live expert's file with its models, or those that were named in their place."""
    names = {"expert": expert, "target": model}
    known = es.LiveExpert.load(path).info_
    for side, told in names.items():
        names[side] = told or known[side]["id"]
        if not names[side]:
            option = {"expert": "--expert", "target": "--model"}[side]
            raise ValueError(f"{path} does not say which model its {side} is: name it with {option}.")
    wrapped = _model_of(str(names["expert"]), remote_expert), _model_of(str(names["target"]), remote_target)
    named = expert is not None or model is not None
    return es.LiveExpert.load(path, *wrapped, **_remotes_of(remote_expert, remote_target), any_id=named)


def _questions_of(path: Path) -> es.MultipleChoice:
    """Questions with options, from a file."""
    from pydantic import BaseModel, ValidationError

    from .files import reason

    class Row(BaseModel, extra="ignore"):
        prompt: str
        options: list[str]
        answer: int

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines would cut strings
        if line.strip():
            try:
                rows.append(Row.model_validate_json(line, strict=True))
            except ValidationError as error:
                raise ValueError(f"Line {number} of {path}: {reason(error)}. It needs {_ROWS}.") from None
    return es.MultipleChoice([(row.prompt, row.options, row.answer) for row in rows])


def _neutral_of(path: Path | None) -> list[Any]:
    """Neutral texts, from a file or the package's."""
    from .texts.texts import as_texts

    return list(es.example("sentiment_probe")["neutral_texts"][:8]) if path is None else as_texts(path)


def _effect_of(path: Path | None) -> Any:
    """The effect that a file describes, or the package's."""
    try:
        found = es.example("sentiment_probe") if path is None else json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"An effect's file holds an object, but {path} a {type(found).__name__}.")
    if "items" in found:
        wrong = next((item for item in found["items"] if isinstance(item, str) or len(item) != 3), None)
        if wrong is not None:
            raise ValueError(f"An item of {path} is a prompt, a text and the other text, but one is {wrong!r:.60}.")
        return es.Choices([tuple(item) for item in found["items"]])
    prompts = found.get("prompts", found.get("test_prompts"))
    if prompts is None or not {"positive_words", "negative_words"} <= set(found):
        raise ValueError(
            f"An effect's file needs prompts, positive_words and negative_words, or items, but {path} has {sorted(found)}."
        )
    return es.Words(prompts, found["positive_words"], found["negative_words"])


def main() -> None:
    """Runs the command line; what goes wrong is one sentence."""
    try:
        app()
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        typer.echo(f"expertsteer: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
