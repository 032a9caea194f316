"""A T5 encoder of a few hundred thousand parameters for the captions of the digits: text to image where nothing can be
downloaded.

Its classes, files and tokenizer (of bytes) are those of every T5, so `load_text_encoder` loads it like any other. Its
weights are its own, trained here for a few minutes on captions alone, without any image: it learns to answer which
digit stands in which cell, how many there are of each, and how two stand to each other. That is supervision which a
real T5 has no need of: from a random or hardly trained encoder of bytes, which digit stands where is hard to read (a
digit is a byte, its place the fifteen bytes behind it). It knows the wording of these captions and no English.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep import digits
from data_prep.digits_captions import GRID, Placed, captions, compose
from diffmoe_ep.config import ConfigError

RECIPE = "recipe.json"  # beside the model's files: what it was made of
MADE_OF = "questions on the captions of the digits; 1"  # of the recipe; the number changes with the lessons
STEPS, BATCH = 2400, 32
CANVAS = 24  # captions do not depend on it
CELLS = GRID * GRID
# The digit in each cell; the number of each digit; the two of a relation, and which is above.
QUESTIONS = CELLS + 10 + 3
ANSWERS = 11  # digits and, in a cell, none; numbers; no and yes
UNTOLD = -100  # the answer to a question that a text says nothing about
KINDS = (0, 0, 1, 0, 0, 2)  # of captions, step by step: places, counts, relation


@dataclass(frozen=True)
class Lesson:
    """What a step teaches."""

    texts: Sequence[str]
    answers: Tensor  # (B, QUESTIONS) int64, UNTOLD where a text does not answer


def make_tiny_t5(
    folder: Path,
    steps: int = STEPS,
    seed: int = 0,
    width: int = 64,
    layers: int = 3,
    lr: float = 3e-3,
    progress: Callable[[float], object] = lambda _: None,
) -> bool:
    """Make the encoder and its tokenizer in a folder; returns whether there was anything to do.

    The encoder learns the lessons of `steps` steps under heads that are then thrown away; with no steps its weights are
    random. The weights follow from the arguments alone, one thread computes them. progress is called with each step's
    loss. ConfigError where the folder holds anything else.
    """
    # "rate", as in the folders that are there already.
    recipe = {"steps": steps, "seed": seed, "width": width, "layers": layers, "rate": lr, "made_of": MADE_OF}
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
        vocab_size=384, d_model=width, d_kv=16, d_ff=2 * width, num_layers=layers, num_heads=width // 16,
        dropout_rate=0.0, relative_attention_num_buckets=32, relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number may change last bits
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, heads = T5EncoderModel(config), _Heads(width)
        _learn(encoder, heads, tokenizer, steps, lr, progress)
    finally:
        torch.set_num_threads(threads)
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


# ---- Training ----


class _Heads(nn.Module):
    """Answers to the questions, each read from an encoder's features by one attention with a trained query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUESTIONS, width))
        self.attention = nn.MultiheadAttention(width, width // 16, batch_first=True)
        self.answers = nn.Parameter(torch.randn(QUESTIONS, width, ANSWERS) * width**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features (B, M, E), mask (B, M) bool -> logits (B, QUESTIONS, ANSWERS)."""
        queries = self.queries.expand(len(features), -1, -1)  # (B, QUESTIONS, E)
        read, _ = self.attention(queries, features, features, key_padding_mask=~mask, need_weights=False)
        return torch.einsum("bqe,qea->bqa", read, self.answers)


def _learn(
    encoder: Any, heads: _Heads, tokenizer: Any, steps: int, lr: float, progress: Callable[[float], object]
) -> None:
    """Teach encoder and heads the lessons; the learning rate rises for a tenth of the steps and then falls to zero."""
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        taught = lesson(step)
        tokens = tokenizer(list(taught.texts), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"]
        logits = heads(encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state, mask.bool())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), taught.answers.flatten(), ignore_index=UNTOLD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        progress(float(loss.detach()))


# ---- Lessons ----


def lesson(step: int) -> Lesson:
    """What a step teaches. Its captions are all of one kind, so that they are about equally long."""
    kind = KINDS[step % len(KINDS)]
    canvases = [_placed(number, two=kind == 2) for number in range(step * BATCH, (step + 1) * BATCH)]
    answers = torch.tensor([answered(placed, kind) for placed in canvases])  # (B, QUESTIONS)
    return Lesson([captions(placed)[kind].text for placed in canvases], answers)


def answered(placed: tuple[Placed, ...], kind: int) -> list[int]:
    """What caption number `kind` of a canvas answers to each question."""
    cells, relation = [UNTOLD] * CELLS, [UNTOLD] * 3
    if kind == 0:
        cells = [ANSWERS - 1] * CELLS
        for found in placed:
            cells[found.row * GRID + found.column] = found.digit
    if kind != 1 and len(placed) == 2:
        first, second = placed
        relation = [first.digit, second.digit, int(first.row < second.row)]
    return [*cells, *(sum(found.digit == digit for found in placed) for digit in range(10)), *relation]


def _placed(number: int, two: bool = False) -> tuple[Placed, ...]:
    """What canvas `number` shows; or, where it must be two digits, a canvas that follows from the number."""
    labels, members = _digits()
    tries = (compose("train", number + (again << 40), CANVAS, labels, members) for again in count())
    return next(placed for placed in tries if not two or len(placed) == 2)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Labels of the source's digits, and which of them are for training."""
    _, labels = digits.load()
    return labels, np.flatnonzero(~digits.heldout_mask(labels))
