"""A T5 of a few hundred thousand parameters that reads bytes, made here: text to image where nothing can be downloaded.

Its classes, files and tokenizer are those of every T5 (`load_text_encoder` loads it like any other), but it knows only
what it was trained on here.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe_ep.config import ConfigError

RECIPE = "recipe.json"  # beside the model's files: what it was made of
UNTOLD = -100  # the answer to a question that a text says nothing about


@dataclass(frozen=True)
class Lesson:
    """Texts, and what each of them answers to a fixed list of questions."""

    texts: Sequence[str]
    answers: Tensor  # (B, questions) int64, UNTOLD where a text does not answer


def make_tiny_t5(
    folder: Path,
    lessons: Callable[[int], Lesson],
    *,
    questions: int,
    answers: int,
    steps: int,
    seed: int = 0,
    width: int = 64,
    layers: int = 3,
    rate: float = 3e-3,
    made_of: str = "",
    progress: Callable[[float], object] = lambda _: None,
) -> bool:
    """Make a T5 encoder and its byte tokenizer in a folder; returns whether there was anything to do.

    The encoder learns the lessons of `steps` steps under heads that are then thrown away; with no steps its weights are
    random. The weights follow from the arguments (`made_of` stands for the lessons) alone, one thread computes them.
    progress is told each step's loss. ConfigError where the folder holds anything else.
    """
    recipe = {"steps": steps, "seed": seed, "width": width, "layers": layers, "rate": rate, "made_of": made_of}
    if _is_there(folder, recipe):
        return False
    try:
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(
            f"a text encoder needs transformers, which is missing ({error}); pip install 'diffmoe_ep[encode]'"
        ) from error
    disable_progress_bar()  # of saving
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=384,
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=width // 16,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number may change last bits
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, heads = T5EncoderModel(config), _Heads(width, questions, answers)
        _learn(encoder, heads, tokenizer, lessons, steps, rate, progress)
    finally:
        torch.set_num_threads(threads)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    encoder.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)
    return True


class _Heads(nn.Module):
    """Answers to a list of questions, each read from an encoder's features by one attention with a trained query."""

    def __init__(self, width: int, questions: int, answers: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(questions, width))
        self.attention = nn.MultiheadAttention(width, width // 16, batch_first=True)
        self.answers = nn.Parameter(torch.randn(questions, width, answers) * width**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features (B, M, E), mask (B, M) bool -> logits (B, questions, answers)."""
        queries = self.queries.expand(len(features), -1, -1)  # (B, questions, E)
        read, _ = self.attention(queries, features, features, key_padding_mask=~mask, need_weights=False)
        return torch.einsum("bqe,qea->bqa", read, self.answers)


def _is_there(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds just this model; ConfigError if it holds anything else. An empty folder is removed."""
    try:
        found = json.loads((folder / RECIPE).read_bytes())
    except (FileNotFoundError, ValueError):
        if folder.exists():
            try:
                folder.rmdir()
            except OSError as error:
                raise ConfigError(
                    f"{folder} holds other files; choose another folder with --out, or empty it"
                ) from error
        folder.parent.mkdir(parents=True, exist_ok=True)
        return False
    differing = [key for key, value in recipe.items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{folder} holds an encoder made with other settings ({key} {found.get(key)}, now {recipe[key]}); "
            "choose another folder with --out"
        )
    return True


def _learn(
    encoder: Any,
    heads: _Heads,
    tokenizer: Any,
    lessons: Callable[[int], Lesson],
    steps: int,
    rate: float,
    progress: Callable[[float], object],
) -> None:
    """Teach encoder and heads the lessons, at a rate that rises for a tenth of the steps and then falls to zero."""
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        lesson = lessons(step)
        tokens = tokenizer(list(lesson.texts), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"]
        logits = heads(encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state, mask.bool())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), lesson.answers.flatten(), ignore_index=UNTOLD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        progress(float(loss.detach()))
