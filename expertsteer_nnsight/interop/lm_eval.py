r"""A model of lm-evaluation-harness on nnsight traces: every task of the harness, steered or not, here or on NDIF.

    python -m expertsteer_nnsight.interop.lm_eval --model expertsteer \
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,plan=plan.safetensors --tasks arc_easy --device cpu

That is lm-eval's own command line with the model `expertsteer` registered (lm-eval 0.4.13 looks for models in its own
package alone). In Python, importing this module registers it for `lm_eval.simple_evaluate(model="expertsteer", ...)`, or
pass a `SteeredLM` made of any nnsight model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        'Evaluating with lm-evaluation-harness needs the extra: pip install "expertsteer_nnsight[lm-eval]".'
    ) from error

from ..measure.continuations import Scorer, Text, has_border
from ..models.identity import ModelIdentity
from ..models.positions import prefix_of
from ..ndif.argument import host_of
from ..states.fingerprint import fingerprint, tokenizer_fingerprint, untold
from ..steering.plan import SteeringPlan, stack_plans
from ..texts.texts import encode_continued, tokenizer_of

if TYPE_CHECKING:
    from ..fit.live_expert import LiveExpert
    from ..ndif.host import Remote

_HFLM: Any = HFLM  # its decorator hides its type
_log = logging.getLogger("expertsteer_nnsight")
_ALL = 1_000_000
_NOT_HERE = ("peft", "delta", "parallelize", "tp_plan", "gguf_file", "autogptq", "gptqmodel")


class SteeredLM(_HFLM):
    """lm-eval's `hf` model, with every forward an nnsight trace that a plan may steer.

    Tokenization, chat templates, batching arguments, stop sequences and the request cache are those of `hf`. A log-likelihood
    request is teacher-forced: the border of prompt and completion, which a plan may depend on, is that of the request. In
    `loglikelihood_rolling` what a window scores is completion, so all but the first token of a text that fits into one.

    Args:
        pretrained: a hub id or a folder, or a model of nnsight.
        plan: a `SteeringPlan` or its file; None does not steer.
        dose: of a calibrated plan, in units of what met its budget; None takes a plan as it is.
        live: a `LiveExpert` or its file, in place of a plan: the expert reads each context, and each continuation if it follows.
        expert: the model of a live expert's file: a hub id, a folder or a model of nnsight; what the file names if None.
        remote_expert: where that expert is read: True, "http://..." or a `Remote`.
        remote: True, "http://..." or a `Remote`: run on NDIF, without the model's weights here.
        share_contexts: read a context once for all its continuations, where that saves time. Local models alone.
        device: where a model that is loaded here goes.
        dtype: of a model that is loaded here; "auto" is that of its files.
        revision: of a model that is loaded.
        trust_remote_code: run code that comes with a model.
        kwargs: further arguments of lm-eval's `HFLM`: batch_size, max_length, add_bos_token, prefix_token_id, ...

    Raises:
        ValueError: the plan does not fit the model or has strengths a row, a dose for a plan that is not calibrated, a plan and a
            live expert together, or an argument of `hf` that would load a model another way. With a live expert also a
            request without a context, or one that lm-eval cuts or writes in other tokens than the model's tokenizer.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: SteeringPlan | str | Path | None = None,
        dose: float | int | None = None,
        live: LiveExpert | str | Path | None = None,
        expert: Any = None,
        remote_expert: bool | str | Remote = False,
        remote: bool | str | Remote = False,
        share_contexts: bool = True,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        refused = [name for name in _NOT_HERE if kwargs.get(name)]
        if refused:
            raise ValueError(
                f"The expertsteer model takes no {', '.join(refused)}: load the model yourself and pass it as pretrained."
            )
        self.remote = host_of(remote)
        self.nn_model = (
            _loaded(pretrained, self.remote, device, dtype, revision, trust_remote_code)
            if isinstance(pretrained, (str, Path))
            else pretrained
        )
        self.plan = SteeringPlan.load(plan) if isinstance(plan, (str, Path)) else plan
        if self.plan is not None:
            self.plan.check(self.nn_model)
            self.plan = self.plan if dose is None else self.plan.at_dose(dose)
            if any(v.rows is not None for v in self.plan.vectors):
                raise ValueError(
                    "The plan has a strength or a vector for each row, and lm-eval makes its own batches: give one."
                )
            added = kwargs.get("add_bos_token") and not prefix_of(self.nn_model)
            if added and any(v.skip_special for v in self.plan.vectors):
                raise ValueError(
                    "add_bos_token=True puts a token before each text that the model's tokenizer does not, and the plan leaves "
                    "special tokens unsteered: leave add_bos_token out, or give plan.with_(skip_special=False)."
                )
        if live is not None and plan is not None:
            raise ValueError("A plan and a live expert were given, and only one of them can steer: leave one out.")
        how = (device, dtype, None, trust_remote_code)
        self.live = self._live(live, expert, remote_expert, how) if isinstance(live, (str, Path)) else live
        if self.live is not None:
            ModelIdentity(**self.live.info_["target"]).check(
                ModelIdentity.of(self.nn_model), "This live expert cannot steer the model"
            )
        kwargs.setdefault("tokenizer", tokenizer_of(self.nn_model))
        about = logging.getLogger("lm_eval.models.huggingface")
        level = about.level
        about.setLevel(logging.ERROR)  # warns of every model that is not loaded by name
        try:
            super().__init__(self.nn_model._module, **kwargs)
        finally:
            about.setLevel(level)
        self._size = self.batch_size
        self.pretrained = str(ModelIdentity.of(self.nn_model))
        if self.remote is not None:
            self._device = torch.device("cpu")  # of what is sent
            if self._size == "auto":
                raise ValueError(
                    "batch_size is 'auto', which tries sizes on this machine: name a number for a remote model."
                )
        self._chats: dict[str, list[dict[str, str]]] = {}
        self._score = Scorer(self.nn_model, self.plan, self.remote, share_contexts and self.logits_cache)
        self._steered = self.nn_model if self.plan is None else self.plan.attach(self.nn_model)

    def _live(self, path: str | Path, expert: Any, remote: bool | str | Remote, how: tuple[Any, ...]) -> LiveExpert:
        """A live expert's file with its models."""
        from ..fit.live_expert import LiveExpert

        named = LiveExpert.load(path).info_["expert"]["id"] if expert is None else expert
        if named is None:
            raise ValueError(f"{path} does not name its expert: give expert=.")
        reader = _loaded(named, host_of(remote), *how) if isinstance(named, (str, Path)) else named
        where: dict[str, Any] = {"remote_expert": remote, "remote_target": self.remote or False}
        return LiveExpert.load(path, reader, self.nn_model, **where, any_id=expert is not None)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Unsteered logits; `hf` finds the largest batch with it."""
        with torch.no_grad(), self.nn_model.trace(input_ids=inps, attention_mask=torch.ones_like(inps)):
            logits = nnsight.save(self.nn_model.output.logits)
        return logits

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats, and whether it is the greedy continuation, of (texts, context ids, continuation ids)."""
        if not requests:
            return []
        # continuations that differ in their last token alone share a row, unless the plan tells their contexts apart
        border, live = has_border(self.plan), self.live
        rows: dict[Any, list[int]] = {}
        for i, (names, context, continuation) in enumerate(requests):
            ids = tuple(context + continuation)
            # a live expert reads a context's own text, and each continuation if it follows
            told = 0 if live is None else (names, i) if live.follow else names and names[0]
            rows.setdefault((ids[:-1], len(context) if border or live is not None else 0, told), []).append(i)
        texts = [self._text(ids, [requests[i] for i in mine]) for (ids, *_), mine in rows.items()]
        members = list(rows.values())
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:

            def done(number: int, values: Tensor) -> None:
                text, (logs, best) = texts[number], values
                shared = text.scored - 1
                for place, i in enumerate(members[number]):
                    names, _, continuation = requests[i]
                    own = [*range(shared - len(continuation) + 1, shared), shared + place]
                    answers[i] = (float(logs[own].sum()), bool(best[own].all()))
                    if names is not None:
                        self.cache_hook.add_partial("loglikelihood", names, answers[i])
                    bar.update()

            own = None if live is None else self._read([requests[mine[0]] for mine in members], live)
            self._score(texts, self._rows(texts), done, own)
        return answers

    def _read(self, requests: list[Any], live: LiveExpert) -> list[SteeringPlan]:
        """A live expert's plan for each request."""
        prompts, continuations = [], []
        for names, context, continuation in requests:
            if names is None or not names[0].strip():
                raise ValueError(
                    "A live expert reads a prompt, but a request has no context: leave out live= for this task."
                )
            prompt = names[0].rstrip()  # lm-eval counts the spaces at its end to the continuation
            more = names[0][len(prompt) :] + names[1]
            if live.follow or live.where != "last_prompt":  # whose places are numbers of tokens
                ids, _, border = encode_continued(self.tokenizer, prompt, more)
                if (ids, border) != ([*context, *continuation], len(context)) or len(ids) > self.max_length + 1:
                    raise ValueError(
                        f"lm-eval reads {prompt[-40:]!r} in other tokens than the model's tokenizer, or cuts it at "
                        f"{self.max_length}, so its places cannot be found: leave out add_bos_token, or raise max_length."
                    )
            prompts.append(prompt)
            continuations.append(more)
        reads = self._reads([names[0] for names, *_ in requests], live)
        # a gate reads the target too: a chat's messages, since its written template would begin with `<bos>` twice
        return live.for_texts(reads if self._chats else prompts, continuations, reads)

    def _reads(self, contexts: Sequence[str], live: LiveExpert) -> list[Any]:
        """What the expert reads: a chat in its own template where lm-eval wrote it in the target's."""
        if not self._chats:
            return [context.rstrip() for context in contexts]
        if live.follow or live.where != "last_prompt":
            raise ValueError(
                "With a chat template a live expert reads the prompt alone, because templates differ: leave out the template, or "
                "fit one without follow and shared_ends."
            )
        return [self._chats.get(context) or context.rstrip() for context in contexts]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in `hf`; a live expert reads the same messages.

        Raises:
            ValueError: with a live expert, a chat whose answer is begun already (`gen_prefix` of a task).
        """
        if self.live is not None and chat_history[-1]["role"] == "assistant":
            raise ValueError(
                "The task begins the answer itself (gen_prefix), and a live expert reads a chat up to the answer: leave out the "
                "chat template."
            )
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        if self.live is not None:
            self._chats[text] = [dict(message) for message in chat_history]
        return text

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """As in `hf`; a live expert reads the same strings in `_model_generate`."""
        self._strings = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _text(self, ids: tuple[int, ...], requests: list[Any]) -> Text:
        """The row of requests that differ in their last token alone; what does not fit is cut on the left, as in `hf`."""
        scored = max(len(continuation) for _, _, continuation in requests)
        if scored > self.max_length:
            raise ValueError(
                f"A continuation has {scored} tokens, more than the model's {self.max_length}: set max_length= or shorten it."
            )
        cut = max(0, len(ids) - self.max_length)
        if cut:
            _log.warning(
                "A request has %s tokens, and its first %s are cut: max_length is %s.", len(ids), cut, self.max_length
            )
        prompt = max(1, len(requests[0][1]) - cut)
        return Text(ids[cut:], prompt, scored, tuple(continuation[-1] for _, _, continuation in requests))

    def _rows(self, texts: list[Text]) -> int:
        if self._size != "auto":
            return int(self._size)
        longest = max(texts, key=lambda text: len(text.ids))
        return self._detect_batch_size([(None, list(longest.ids), [0])])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, window by window."""
        self.batch_size_per_gpu = _ALL  # of windows: batches are made of them later
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = self._size

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Continuations of a left-padded batch, with the plan on every step."""
        from lm_eval.models.utils_hf import stop_sequences_criteria

        options = dict(generation_kwargs)
        mask = options.pop("attention_mask")
        temperature = options.pop("temperature", 0.0)
        if options.get("do_sample") is None:
            options["do_sample"] = temperature > 0
        if options["do_sample"]:
            options["temperature"] = temperature
        width = context.shape[1]
        options |= {
            "max_new_tokens": max_length - width,
            "pad_token_id": self.tokenizer.pad_token_id,
            "use_cache": True,
        }
        if self.remote is None:
            options["stopping_criteria"] = stop_sequences_criteria(self.tokenizer, stop, width, len(context))
        else:  # a server has no lm-eval: there only the end token stops, and the text is cut here
            options["backend"] = self.remote.backend(self.nn_model)
        steered = self._steered
        if self.live is not None:
            reads = self._reads(self._strings, self.live)
            if self.live.follow:
                return self._followed(self.live, context, options, reads)
            prompts = [text.rstrip() or text for text in self._strings]
            plans = self.live.for_texts(reads if self._chats else prompts, None, reads)
            steered = stack_plans(plans).attach(self.nn_model)
        with (
            torch.no_grad(),
            steered.generate({"input_ids": context, "attention_mask": mask}, **options) as tracer,
        ):
            ids = nnsight.save(tracer.result)
        return ids.cpu()

    def _followed(self, live: LiveExpert, context: Tensor, options: dict[str, Any], reads: list[Any]) -> Tensor:
        """Continuations that the expert reads as they are written."""
        if options["do_sample"]:
            raise ValueError("A live expert that follows takes the likeliest token at each step: leave do_sample out.")
        made = live.follow_ids(self._strings, options["max_new_tokens"], reads)
        width = max(len(row) for row in made)
        end = self.eot_token_id
        rows = torch.tensor([row + [end] * (width + 1 - len(row)) for row in made], dtype=context.dtype)
        return torch.cat([context.cpu(), rows], 1)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval's cache of requests knows nothing of plans, so one file of it serves one model with one plan.

        Raises:
            ValueError: the file was made with another one.
        """
        store = getattr(cache_hook, "dbdict", None)
        if store is not None:
            tokens: list[Any] = [self.add_bos_token, self.prefix_token_id, self.max_length]
            tokens.append(tokenizer_fingerprint(self.tokenizer))
            mine: dict[str, Any] = {"model": _told(self.nn_model, self.remote is not None), "plan": self._plan_hash()}
            mine["tokens"] = tokens
            if self.live is not None:
                mine["expert"] = _told(self.live.expert_, bool(self.live.remote_))
                mine["expert's tokens"] = tokenizer_fingerprint(tokenizer_of(self.live.expert_))
            kept = store.get("expertsteer", mine if len(store) == 0 else None)
            if kept != mine:
                raise ValueError(
                    f"This request cache was made with {kept or 'another model class'}, and this is {mine}: name another file."
                )
            store["expertsteer"] = mine
        super().set_cache_hook(cache_hook)

    def _plan_hash(self) -> str | None:
        digest = hashlib.sha256()
        if self.live is not None:
            used = [self.live.maps_[pair] for pair in self.live.layers_]
            acts = [getattr(self.live, name) for name in ("op", "where", "follow", "follow_op", "follow_amount")]
            digest.update(repr((list(self.live.layers_), float(self.live.amount_), self.live.gate_, acts)).encode())
            for tensor in (t for m in used for t in (m.weight, m.bias, m.mean, m.predictor)):
                digest.update(tensor.numpy().tobytes())
            return digest.hexdigest()[:16]
        if self.plan is None:
            return None
        for v in self.plan.vectors:
            digest.update(repr((v.layer, v.op, v.where, v.from_step, v.skip_special, v.length)).encode())
            digest.update(v.direction.float().numpy().tobytes())
            digest.update(repr(v.at).encode() + (b"" if v.predictor is None else v.predictor.numpy().tobytes()))
        return digest.hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores beside the results."""
        receipt = {} if self.plan is None else self.plan.info.get("receipt", {})
        return {
            "model_name": self.pretrained, "model_dtype": str(self._model.dtype), "plan": self._plan_hash(),
            "plan_layers": None if self.plan is None else list(self.plan.layers),
            "plan_dose": None if self.plan is None else self.plan.dose, "plan_receipt": receipt.get("verdict"),
            "live_expert": None if self.live is None else self.live.info_["expert"]["id"],
            "live_layers": None if self.live is None else [list(pair) for pair in self.live.layers_],
            "remote": None if self.remote is None else self.remote.address,
        }  # fmt: skip


if __name__ != "__main__":  # there `main` imports the module once more, under its own name
    register_model("expertsteer")(SteeredLM)  # as a decorator it would hide the class's type


def _loaded(
    name: str | Path,
    remote: Remote | None,
    device: str | None,
    dtype: str | torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
) -> Any:
    """A model by its hub id or folder; without its weights if it runs elsewhere."""
    from nnsight.modeling.transformers import TransformersModel

    options: dict[str, Any] = {"task": "text-generation"}
    if revision is not None:
        options["revision"] = revision
    if trust_remote_code:
        options["trust_remote_code"] = True
    if remote is not None:
        return TransformersModel(str(name), **options)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TransformersModel(str(name), dispatch=True, dtype=dtype, device_map=device, **options)


def _told(model: Any, remote: bool) -> str:
    """A model's fingerprint.

    Raises:
        ValueError: there is none.
    """
    hidden = None if remote else untold(model)
    if hidden is not None:
        raise ValueError(f"No request cache can tell this model from others, because {hidden}: leave out --use_cache.")
    return fingerprint(model, remote)


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    from expertsteer_nnsight.interop import lm_eval as registered

    registered.main()
