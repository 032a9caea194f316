"""The real encoder classes with tiny random weights and tokenizers that need no downloads."""

import json
from pathlib import Path

import torch


def save_vae(folder: Path, seed: int = 0, **more: object) -> Path:
    """An AutoencoderKL of two levels: an image's side is twice its latent's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**{**sizes, **kinds, "sample_size": 16, **more}).save_pretrained(folder)
    return folder


def save_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 encoder that reads bytes."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP text model whose tokens are letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=0, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return folder
