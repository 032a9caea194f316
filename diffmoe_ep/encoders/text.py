"""Text encoders, T5 and CLIP: captions to the features of their tokens, at their true lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffmoe_ep.config import ConfigError
from diffmoe_ep.encoders.local_folder import fingerprint, read_config, weight_files

SOURCES = {
    "t5": "the local folder of a T5 encoder, such as google/t5-v1_1-xxl (config.json, safetensors and tokenizer files)",
    "clip": "the local folder of a CLIP text model, such as openai/clip-vit-large-patch14 (config.json, safetensors "
    "and tokenizer files)",
}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder of transformers with its tokenizer, on a device."""

    name: str  # t5 or clip
    model: Any  # T5EncoderModel or CLIPTextModel
    tokenizer: Any
    device: torch.device
    width: int  # of a token's features
    max_length: int  # tokens; what is longer is cut
    precision: str  # float32 or bfloat16, that the model computes in
    fingerprint: str  # sha256 over config, weights and tokenizer

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """The features (length, width) float16 of each text at its true length, and whether the text had to be cut."""
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        whole = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        cut = [len(ids) > self.max_length for ids in whole]
        mask = tokens["attention_mask"].to(self.device)  # (B, longest), ones before zeros
        hidden = self.model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=mask
        ).last_hidden_state  # (B, longest, width)
        rows = hidden.half().cpu().numpy()
        return [row[:length].copy() for row, length in zip(rows, mask.sum(dim=1).tolist(), strict=True)], cut


def load_text_encoder(
    name: Literal["t5", "clip"],
    folder: Path,
    *,
    max_length: int,
    precision: str = "float32",
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load a text encoder and its tokenizer from one local folder; ConfigError says what is missing and where such
    folders come from.
    """
    config = read_config(folder, f"the {name} folder", SOURCES[name])
    kinds = {"t5": ("t5",), "clip": ("clip", "clip_text_model")}[name]
    if config.get("model_type") not in kinds:
        raise ConfigError(
            f"{folder} holds a model of type {config.get('model_type')}, expected {kinds[0]}; give {SOURCES[name]}"
        )
    if max_length < 1:
        raise ConfigError(f"the maximal length of {name} is {max_length} tokens, expected 1 or more")
    tokenizer_files = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
    if not tokenizer_files:
        raise ConfigError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); put its files beside the weights"
        )
    weights = weight_files(folder, "model")
    try:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(
            f"a text encoder needs transformers, which is missing ({error}); pip install 'diffmoe_ep[encode]'"
        ) from error
    disable_progress_bar()  # of loading, on every rank
    kind = T5EncoderModel if name == "t5" else CLIPTextModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        model = kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"{folder} does not load ({error}); give {SOURCES[name]}") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    longest = model.config.max_position_embeddings if name == "clip" else max_length
    return TextEncoder(
        name=name,
        model=model.to(device=device, dtype=PRECISIONS[precision]).eval().requires_grad_(False),
        tokenizer=tokenizer,
        device=torch.device(device),
        width=model.config.hidden_size if name == "clip" else model.config.d_model,
        max_length=min(max_length, longest),
        precision=precision,
        fingerprint=fingerprint([folder / "config.json", *weights, *tokenizer_files]),
    )
