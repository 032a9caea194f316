"""From batches to what the model is conditioned on: labels, or captions, encoded here where they come as words."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.same_run import check_same_encoder
from diffmoe_ep.config import Config
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.condition import Condition, padded
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.encoders.text import TextEncoder
from diffmoe_ep.parallel.collectives import first_object
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.prompts import Prompts, encode, first_captions, grid_prompts, load_encoder
from diffmoe_ep.sampling.sample import classes_in_turn


class Conditioner:
    """Returns a batch's condition. With `text.online` every rank has a frozen encoder of its own, on its device."""

    def __init__(self, config: Config, dataset: BatchSource, mesh: Mesh, checkpoint: Path | None = None) -> None:
        """Load the encoder if one is needed; collective. ConfigError, on all ranks alike, where some rank cannot, or
        where it is not the one of the checkpoint that the run continues.
        """
        self.config, self.dataset, self.device = config, dataset, mesh.device
        self.text = CaptionSpec.of(config.model, config.text)
        self.encoder: TextEncoder | None = None
        self.prompts: Prompts | None = None  # those of sample.prompts
        self.encoder_fingerprint: str | None = None  # of the encoder that made the features, then or now; None: labels
        if self.text is None:
            return
        problem = None
        try:
            if self.text.online:
                self.encoder = load_encoder(config, DataInfo.of(dataset.manifest), mesh.device)
            features = self.encoder or self.text.stored(dataset.manifest)
            self.encoder_fingerprint = None if features is None else features.fingerprint
            if checkpoint is not None and features is not None:
                check_same_encoder(checkpoint, config, features.fingerprint)
            if config.sample.grid_every and mesh.is_first:
                self.prompts = self._encode(grid_prompts(config.sample))
        except ValueError as error:
            problem = str(error)
        mesh.agree(problem)
        self.prompts = first_object(self.prompts, mesh.world)

    def _encode(self, words: Sequence[str]) -> Prompts | None:
        """Encode prompts, with an encoder that is loaded for it alone where there is none."""
        if not words:
            return None
        encoder = self.encoder or load_encoder(self.config, DataInfo.of(self.dataset.manifest), self.device)
        prompts, notes = encode(encoder, words, self.config.model.text_length)
        for note in notes:
            print(f"sample.prompts: {note}", file=sys.stderr, flush=True)
        return prompts

    def __call__(self, batch: Batch) -> Condition:
        """A batch's labels, or its captions' features; a caption that was dropped is not encoded."""
        if not batch.captions:
            return batch.condition
        assert self.encoder is not None and self.text is not None
        words = [caption for caption in batch.captions if caption]
        features = iter(self.encoder.features(words)[0] if words else ())
        none = torch.zeros(0, self.text.width)
        # features are float16, as stored ones are
        rows = [torch.from_numpy(next(features)).float() if caption else none for caption in batch.captions]
        return padded(rows, self.text.places, self.text.width).to(self.device)

    def for_grid(self, count: int) -> Tensor | Prompts:
        """What a sample grid shows: the prompts of the config, classes in turn, or the dataset's first captions."""
        if self.prompts is not None:
            return self.prompts
        if self.text is not None:
            assert isinstance(self.dataset, Mixture), "the config has no grids of plain tars"
            return first_captions(self.dataset, self.text, count, self.encoder)
        return classes_in_turn(count, list(range(self.config.model.num_classes)))
