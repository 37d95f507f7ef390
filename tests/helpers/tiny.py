"""Tiny random models of several architectures, and the plain PyTorch hook that steering is compared with."""

from __future__ import annotations

import functools
import os
import warnings
from contextlib import contextmanager

import torch
import transformers as tr
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def watching(hook):
    """A hook that looks as if a library had put it there: it changes nothing, so that a cache need not be refused."""
    hook.__module__ = "torch"
    return hook


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ABSOLUTE = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
CONFIGS = {
    "llama": lambda v: tr.LlamaConfig(vocab_size=v, **SMALL),
    "qwen2": lambda v: tr.Qwen2Config(vocab_size=v, **SMALL),
    "qwen3": lambda v: tr.Qwen3Config(vocab_size=v, head_dim=8, **SMALL),
    "gemma3": lambda v: tr.Gemma3TextConfig(vocab_size=v, head_dim=8, sliding_window=8, **SMALL),
    "gpt2": lambda v: tr.GPT2Config(vocab_size=v, n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "neox": lambda v: tr.GPTNeoXConfig(vocab_size=v, **ABSOLUTE),
    "opt": lambda v: tr.OPTConfig(
        vocab_size=v, hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32,
    ),
    "mistral": lambda v: tr.MistralConfig(vocab_size=v, sliding_window=8, **SMALL),
    "phi3": lambda v: tr.Phi3Config(vocab_size=v, **SMALL),
    "mixtral": lambda v: tr.MixtralConfig(vocab_size=v, num_local_experts=4, **SMALL),
}  # fmt: skip
ARCHITECTURES = list(CONFIGS)
DEVICE = os.environ.get("EXPERTSTEER_TEST_DEVICE", "cpu")
CORPUS = ["the quick brown fox jumps over the lazy dog. hello world, this is a test of one small model."] * 4
PROMPTS = [
    "the quick brown fox",
    "hello world, this is a test of one small model",
    "a dog",
    "this lazy test jumps over",
]
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)


def tokenizer(bos: bool = False) -> tr.PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens; with `bos` it prepends `<s>`, as Gemma's does."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = tr.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


def build(arch: str = "llama", bos: bool = False, seed: int = 0, **overrides) -> TransformersModel:
    """A random model of `arch` in float32, wrapped by nnsight."""
    tok = tokenizer(bos)
    config = CONFIGS[arch](len(tok))
    for key, value in {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **overrides}.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    module = tr.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the default initialisation is so small that a model of this size hardly mixes its tokens
        for p in module.parameters():
            if p.ndim > 1:
                p.mul_(4)
    module.generation_config.eos_token_id = None  # random models should not stop early
    return TransformersModel(module.to(DEVICE), tokenizer=tok, task="text-generation")


@functools.cache
def tiny(arch: str = "llama", bos: bool = False, seed: int = 0) -> TransformersModel:
    return build(arch, bos, seed)


def boot(folder):
    """A TransformerBridge of the model in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformer_lens' own
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


def bridge(model, folder):
    """A TransformerBridge of the same weights and tokenizer; `folder` is where they are handed over."""
    model._module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return boot(folder)


@contextmanager
def hooks(blocks, edits):
    """Plain PyTorch forward hooks: `edits[layer](h, call)` replaces the output of `blocks[layer]` in forward number `call`."""
    calls = dict.fromkeys(edits, 0)

    def hook(layer):
        def run(_module, _args, output):
            h = output[0] if isinstance(output, tuple) else output
            new = edits[layer](h, calls[layer])
            calls[layer] += 1
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return run

    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
