"""Which expert, target and tasks stand for a domain: what runs on a laptop, and the scale of the paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """One domain of the experiment.

    Attributes:
        name: of the domain.
        expert: hub id, or the name of a packaged model.
        target: likewise.
        fit: the lm-eval task whose training items give the contrast pairs; it must offer options.
        tasks: what is measured, by task the metric that decides: `acc_norm` is the log-likelihood of an option by character,
            `acc_mutual_info` the one less that of the option without its question, for options that are the same in every item.
        instruction: what the arm `prompted` says before each item.
    """

    name: str
    expert: str
    target: str
    fit: str
    tasks: dict[str, str]
    instruction: str


_MATHS = "You are a careful mathematician. Work out what is asked and give the right result."
_MEDICAL = "You are an experienced physician. Answer with what the medical evidence says."
_FINANCIAL = "You are a financial analyst. Judge the news and the numbers as an investor would."
_GENERAL = "You are a knowledgeable scientist. Give the right answer."

_TASKS = {
    "mathematics": {"local_svamp": "acc", "local_aqua_rat": "acc_norm", "local_mmlu_mathematics": "acc_norm"},
    "medical": {
        "local_medmcqa": "acc_norm", "local_medqa": "acc_norm", "local_pubmedqa": "acc_mutual_info",
        "local_mmlu_medical": "acc_norm",
    },
    "financial": {
        "local_financial_phrasebank": "acc_mutual_info", "local_tatqa": "acc_norm", "local_mmlu_financial": "acc_norm",
    },
    "general": {
        "local_arc_easy": "acc_norm", "local_arc_challenge": "acc_norm", "local_openbookqa": "acc_norm",
        "local_piqa": "acc_norm", "local_social_i_qa": "acc_norm", "local_winogrande": "acc",
    },
}  # fmt: skip


def _domains(target: str, of: dict[str, tuple[str, str, str]]) -> tuple[Domain, ...]:
    return tuple(Domain(name, expert, target, fit, _TASKS[name], asks) for name, (expert, fit, asks) in of.items())


# models that two cores can run; only the first expert is better than the target at what is measured
SMALL = _domains(
    "SmolLM2-135M-Instruct",
    {
        "mathematics": ("Qwen2.5-Coder-0.5B-Instruct", "local_svamp", _MATHS),
        "medical": ("gemma-3-270m", "local_medmcqa", _MEDICAL),
        "financial": ("gemma-3-270m", "local_financial_phrasebank", _FINANCIAL),
        "general": ("gemma-3-270m", "local_arc_easy", _GENERAL),
    },
)
# public models of the paper's size; its own list of experts could not be read
PAPER = _domains(
    "meta-llama/Llama-3.1-8B-Instruct",
    {
        "mathematics": ("Qwen/Qwen2.5-Math-7B-Instruct", "local_aqua_rat", _MATHS),
        "medical": ("aaditya/Llama3-OpenBioLLM-8B", "local_medmcqa", _MEDICAL),
        "financial": ("instruction-pretrain/finance-Llama3-8B", "local_financial_phrasebank", _FINANCIAL),
        "general": ("Qwen/Qwen2.5-7B-Instruct", "local_arc_challenge", _GENERAL),
    },
)
SCALES = {"small": SMALL, "paper": PAPER}
