"""Prepares the folder of models that the hub stand-in serves.

    SERVER_PY -m ndif_server.models [DIR] [--smollm2 FOLDER]

lab/tiny-llama and lab/tiny-expert are small Llamas with random weights, for tests that need a server and no sense.
lab/SmolLM2-135M-Instruct is a link to the folder of the real model, in transformers' format, that the project makes.
Models that are there already are left as they are.
"""

# ruff: noqa: T201 (a program for the command line prints)

import argparse
import json
import os
import shutil
from pathlib import Path

from .settings import MODELS

TINY = {
    "tiny-llama": {"width": 32, "layers": 4, "seed": 0, "prepends_bos": False},
    "tiny-expert": {"width": 48, "layers": 3, "seed": 1, "prepends_bos": True},
}
TEXT = "the quick brown fox jumps over the lazy dog. hello world, this is a test."
SMOLLM2 = "SmolLM2-135M-Instruct"
RECIPE = "recipe.json"  # written last: a folder without it, or with another recipe, is made anew


def build_tiny(folder: Path, width: int, layers: int, seed: int, prepends_bos: bool) -> None:
    """Write a Llama with random weights, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if prepends_bos:
        bos = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", bos)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # as initialized, every layer hardly changes its input
    model.generation_config.eos_token_id = None  # random weights may choose it at any step: lengths would vary
    model.save_pretrained(folder)


def prepare_tiny(folder: Path, recipe: dict) -> bool:
    """Make the model unless it is there; say whether it had to be made."""
    marker = folder / RECIPE
    if marker.is_file() and json.loads(marker.read_text()) == recipe:
        return False
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    build_tiny(draft, **recipe)
    (draft / RECIPE).write_text(json.dumps(recipe))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return True


def default_smollm2() -> Path:
    """Where the project keeps its converted model."""
    cache = os.environ.get("EXPERTSTEER_CACHE") or Path.home() / ".cache" / "expertsteer_nnsight"
    return Path(cache).expanduser() / "models" / SMOLLM2


def link_smollm2(link: Path, target: Path) -> None:
    """Link the model's folder into the hub's."""
    target = target.expanduser().resolve()
    if not (target / "config.json").is_file():
        raise FileNotFoundError(f"{target} holds no model in transformers' format (no config.json)")
    if link.is_symlink():
        if link.resolve() == target:
            return
        link.unlink()
    link.symlink_to(target, target_is_directory=True)


def prepare(root: Path, smollm2: Path | None = None) -> None:
    """Make the folder of models; without smollm2, the real model is left out where it is not found."""
    lab = root / "lab"
    lab.mkdir(parents=True, exist_ok=True)
    for name, recipe in TINY.items():
        made = prepare_tiny(lab / name, recipe)
        print(f"lab/{name}: {'made' if made else 'there already'}")
    try:
        link_smollm2(lab / SMOLLM2, smollm2 or default_smollm2())
        print(f"lab/{SMOLLM2}: linked to {(lab / SMOLLM2).resolve()}")
    except FileNotFoundError as error:
        if smollm2:
            raise SystemExit(str(error)) from None
        print(f"lab/{SMOLLM2}: left out: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=MODELS, metavar="DIR", help=f"default: {MODELS}")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="the converted SmolLM2-135M-Instruct")
    args = parser.parse_args()
    prepare(args.root, args.smollm2)
