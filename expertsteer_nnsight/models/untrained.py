"""The control that matters: the expert's own architecture with random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch


def untrained_like(model: Any, random_state: int = 0) -> Any:
    """A model of the same class, configuration and tokenizer with random weights, wrapped like `model`.

    The control that matters: what a fit gets out of it comes from the labels and the anchors, not from the expert.

    Args:
        model: a `TransformersModel` of a causal LM; of a remote one, the copy is made here.
        random_state: seed of the weights; torch's global generator is left as it was.

    Raises:
        ValueError: transformers has no causal LM for the model's configuration.
    """
    from nnsight.modeling.transformers import TransformersModel
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        parameter = next(model._module.parameters())
        module = AutoModelForCausalLM.from_config(copy.deepcopy(model._module.config), dtype=parameter.dtype)
    if not parameter.is_meta:
        module = module.to(parameter.device)  # and not to its dtype: some buffers are wider
    module.config._name_or_path = f"untrained-{random_state}"
    return TransformersModel(module.eval(), tokenizer=model.tokenizer, task="text-generation")
