"""The dataset of a run: opened as its config says, and held against its model."""

from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.captions import CaptionSpec, check_text
from diffmoe_ep.data.index import MemberSpec
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.remote.fetch import Access
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.sampling.sample import check_pictures, check_sampling


def open_data(config: Config) -> BatchSource:
    """Open what the config names and check that it fits the model; ConfigError or DataError if not."""
    data, plain = config.data, config.data.plain
    dataset: BatchSource
    if data.mode == "resampled":
        spec = MemberSpec(
            plain.kind, plain.label, plain.array, plain.scale, plain.shift, config.model.num_classes, name="plain"
        )
        dataset = PlainTars.open(data.folder, spec, Access.of(data), config.model.condition, plain.shuffle)
    else:
        dataset = Mixture.open(data)
    check_data(config, dataset)
    return dataset


def check_data(config: Config, dataset: BatchSource) -> None:
    """Raise ConfigError unless the data fit the model."""
    manifest, model, names = dataset.manifest, config.model, ", ".join(dataset.names)
    check_text(dataset, CaptionSpec.of(model, config.text))
    if manifest.shape != (model.in_channels, model.input_size, model.input_size):
        raise ConfigError(
            f"the data in {names} are of shape {manifest.shape}, but the model takes ({model.in_channels}, {model.input_size}, "
            f"{model.input_size}); set model.in_channels={manifest.shape[0]} model.input_size={manifest.shape[1]}"
        )
    if model.condition == "class" and manifest.num_classes != model.num_classes:
        raise ConfigError(
            f"the data in {names} have {manifest.num_classes} classes, but model.num_classes is {model.num_classes}; "
            f"set model.num_classes={manifest.num_classes}"
        )
    if config.sample.grid_every:
        check_pictures(DataInfo.of(manifest), config.sample.vae)
        check_sampling(config, config.sample.grid_size)
