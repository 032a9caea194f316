"""A T5 of a few hundred thousand parameters that reads bytes, made here: text to image where nothing can be downloaded.

Its classes, files and tokenizer are those of every T5 (`load_text_encoder` loads it like any other), but it knows only what it was
trained on here.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffmoe_ep.config import ConfigError

RECIPE = "recipe.json"  # beside the model's files: what it was made of
Pairs = Sequence[tuple[str, str]]  # (what the encoder reads, what the decoder must write)


def make_tiny_t5(
    folder: Path,
    pairs: Callable[[int], Pairs],
    *,
    steps: int,
    seed: int = 0,
    width: int = 64,
    layers: int = 3,
    rate: float = 2e-3,
    made_of: str = "",
    progress: Callable[[float], object] = lambda _: None,
) -> bool:
    """Make a T5 encoder and its byte tokenizer in a folder; returns whether there was anything to do.

    An encoder-decoder learns the text pairs of `steps` steps, then only the encoder is kept; with no steps its weights are random. The
    weights follow from the arguments (`made_of` stands for the pairs) alone, one thread computes them. progress is told each step's loss.
    ConfigError where the folder holds anything else.
    """
    recipe = {"steps": steps, "seed": seed, "width": width, "layers": layers, "rate": rate, "made_of": made_of}
    if _is_there(folder, recipe):
        return False
    try:
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration
    except ImportError as error:
        raise ConfigError(f"a text encoder needs transformers, which is missing ({error}); pip install 'diffmoe_ep[encode]'") from error
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=384, d_model=width, d_kv=16, d_ff=2 * width, num_layers=layers, num_decoder_layers=1, num_heads=width // 16,
        relative_attention_num_buckets=32, relative_attention_max_distance=64, dropout_rate=0.0, feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number may change last bits
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            whole = T5ForConditionalGeneration(config)
        _learn(whole, tokenizer, pairs, steps, rate, progress)
    finally:
        torch.set_num_threads(threads)
    encoder = T5EncoderModel(config)
    encoder.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in encoder.state_dict()})
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    encoder.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)
    return True


def _is_there(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds just this model; ConfigError if it holds anything else. An empty folder is removed."""
    try:
        found = json.loads((folder / RECIPE).read_bytes())
    except (FileNotFoundError, ValueError):
        if folder.exists():
            try:
                folder.rmdir()
            except OSError as error:
                raise ConfigError(f"{folder} holds other files; choose another folder with --out, or empty it") from error
        folder.parent.mkdir(parents=True, exist_ok=True)
        return False
    differing = [key for key, value in recipe.items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{folder} holds an encoder made with another {key} ({found.get(key)}, now {recipe[key]}); choose another folder with --out"
        )
    return True


def _learn(whole: Any, tokenizer: Any, pairs: Callable[[int], Pairs], steps: int, rate: float, progress: Callable[[float], object]) -> None:
    """Teach an encoder-decoder the pairs of every step, at a rate that rises for a tenth of the steps and then falls to zero."""
    optimizer = torch.optim.AdamW(whole.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        sources, targets = zip(*pairs(step), strict=True)
        read = tokenizer(list(sources), padding=True, return_tensors="pt")
        written = tokenizer(list(targets), padding=True, return_tensors="pt")
        labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, -100)  # (B, longest); -100: no loss there
        loss = whole(input_ids=read["input_ids"], attention_mask=read["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
        progress(float(loss.detach()))
