"""Prompts: from words to what a model sees of them.

Every prompt is encoded by itself, so that its features do not depend on the others, and kept as float16, as features
are stored. Equal words share one encoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffmoe_ep.config import Config, ConfigError, SampleConfig
from diffmoe_ep.config.foreign import read_bytes
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.checked import read_chosen
from diffmoe_ep.data.condition import CaptionFeatures, padded
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.encoders.text import SOURCES, TextEncoder, load_text_encoder

SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Prompts:
    """Words with the features of their tokens, padded for the model only when they are sliced."""

    words: tuple[str, ...]
    rows: tuple[Tensor, ...]  # of each (length, E) float16 on the CPU; length 0 is the null caption
    places: int  # tokens that the model sees, M
    width: int  # of a token's features, E

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, which: slice) -> CaptionFeatures:
        return padded([row.float() for row in self.rows[which]], self.places, self.width)

    def select(self, numbers: Sequence[int]) -> "Prompts":
        """The prompts of these numbers, again as often as one is named."""
        return replace(self, words=tuple(self.words[n] for n in numbers), rows=tuple(self.rows[n] for n in numbers))

    def part(self, first: int, end: int) -> "Prompts":
        """Prompts first to end - 1."""
        return replace(self, words=self.words[first:end], rows=self.rows[first:end])


def grid_prompts(config: SampleConfig) -> tuple[str, ...]:
    """The prompts that training's grids show by `sample.prompts`; none where they show captions of the data."""
    if isinstance(config.prompts, str):
        return tuple(read_prompts(Path(config.prompts), "sample.prompts"))
    return config.prompts


def read_prompts(path: Path, where: str = "--prompts") -> list[str]:
    """The prompts of a text file, one on each line; empty lines and lines that start with # are passed over. where: who
    names the file.
    """
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{where} {path} cannot be read ({error.strerror}); give a text file with a prompt on each line"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} {path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"{where} {path} holds no prompt; give a text file with a prompt on each line")
    return found


def load_encoder(config: Config, data_info: DataInfo, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder whose features the model was trained on; ConfigError where it is not to be had, or `text.folder` is
    another.

    data_info: of the data that the model was trained on. Where they hold features, their encoder's fingerprint, length
    and precision count.
    """
    name, folder = config.text.encoder, config.text.folder
    stored = None if config.text.online else data_info.text_encoder(name)
    if folder is None:
        made = f" (fingerprint {stored.fingerprint[:12]})" if stored else ""
        raise ConfigError(
            f"text.folder is not set, so prompts cannot be encoded; set it to the run's {name}{made}: {SOURCES[name]}"
        )
    length = stored.max_length if stored else config.model.text_length
    precision = stored.precision if stored else config.text.precision
    encoder = load_text_encoder(name, Path(folder), max_length=length, precision=precision, device=device)
    if encoder.width != config.model.text_width:
        raise ConfigError(
            f"text.folder {folder} has features of width {encoder.width}, but model.text_width is "
            f"{config.model.text_width}; "
            "set text.folder to the encoder that the run was trained with"
        )
    if stored and encoder.fingerprint != stored.fingerprint:
        raise ConfigError(
            f"text.folder {folder} is another encoder (fingerprint {encoder.fingerprint[:12]}) than the one that "
            "made the features of "
            f"{data_info.name} (fingerprint {stored.fingerprint[:12]}); set text.folder to the folder that the data "
            "were prepared with"
        )
    return encoder


def encode(encoder: TextEncoder, words: Sequence[str], places: int) -> tuple[Prompts, list[str]]:
    """Encode prompts for a model that sees `places` tokens; returns them, and notes that some are empty, or
    cut.
    """
    done: dict[str, Tensor] = {}
    notes = []
    for text in words:
        if text in done:
            continue
        if not text.strip():
            notes.append("an empty prompt is drawn as the null caption, without any guidance by words")
            done[text] = torch.zeros(0, encoder.width, dtype=torch.float16)
            continue
        (row,), (cut,) = encoder.features([text])
        if cut or len(row) > places:
            shown = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
            notes.append(
                f"the prompt {shown!r} has more than {min(places, encoder.max_length)} tokens and is cut there"
            )
        done[text] = torch.from_numpy(row[:places].copy())
    return Prompts(tuple(words), tuple(done[text] for text in words), places, encoder.width), notes


def first_captions(dataset: Mixture, text: CaptionSpec, count: int, encoder: TextEncoder | None = None) -> Prompts:
    """The first captions of a dataset's first samples as prompts, again from the start where there are too few.

    Their stored features are used; `encoder` is for captions that are encoded while training.
    """
    part = dataset.parts[0]
    places = [(shard, sample) for shard, size in enumerate(part.sizes[:count]) for sample in range(min(size, count))][
        :count
    ]
    captions = [read_chosen(part, shard, sample, text, 0.0)[1] for shard, sample in places]
    words = [captions[number % len(captions)].text for number in range(count)]
    if text.stored(part.manifest) is None:
        if encoder is None:
            raise ConfigError(
                f"{dataset.names[0]} holds no features of its captions; set text.folder, or sample.grid_every=0"
            )
        return encode(encoder, words, text.places)[0]
    rows = [torch.from_numpy(caption.features[0][: text.places].copy()) for caption in captions]
    return Prompts(tuple(words), tuple(rows[number % len(rows)] for number in range(count)), text.places, text.width)
