"""Verbs that carry models between forms: import, export."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from diffmoe_ep.cli.options import Verb, option, positional, required
from diffmoe_ep.config import ConfigError, override


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read a checkpoint of the published reference implementation."""

    published: Path = required("its checkpoint", "FILE.pt")
    out: Path = required("new folder, which load_model reads")
    heads: int | None = option(None, "attention heads, which a checkpoint does not hold")
    input_size: int | None = option(None, "height of the latent, if the checkpoint has no positions")
    weights: Literal["ema", "model"] = option("ema", "which set to load")
    objective: Literal["flow", "ddpm"] = option("flow", "what it was trained to predict")
    one_set: bool = option(False, "do not keep the other set for the way back (half the disk)")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model as safetensors, or as a checkpoint of the published reference implementation."""

    path: Path = positional("run folder, checkpoint, or folder with model.safetensors and config.json")
    out: Path | None = option(None, "new folder for model.safetensors and config.json")
    to_published: Path | None = option(None, "new checkpoint of the published implementation", "FILE.pt")
    weights: Literal["ema", "model"] | None = option(None, "which set of a run to write (default ema)")


def _import(options: Import) -> None:
    from diffmoe_ep.checkpoint.import_published import import_published

    out = import_published(
        options.published,
        options.out,
        heads=options.heads,
        input_size=options.input_size,
        weights=options.weights,
        objective=options.objective,
        both=not options.one_set,
    )
    print(f"written to {out}: load_model({str(out)!r}) reads it")


def _export(options: Export) -> None:
    from diffmoe_ep.checkpoint.export_published import export_published
    from diffmoe_ep.checkpoint.exported import is_exported, save_exported
    from diffmoe_ep.checkpoint.load import config_of, data_info_of, load_model
    from diffmoe_ep.checkpoint.same_run import recipe_of
    from diffmoe_ep.checkpoint.store import resolve
    from diffmoe_ep.train.warm_start import ancestry_of

    if options.out is None and options.to_published is None:
        raise ConfigError("nothing to write: give --out FOLDER (safetensors), --to-published FILE.pt, or both")
    with TemporaryDirectory(prefix="diffmoe-") as aside:
        folder = options.path
        if not is_exported(folder):
            checkpoint, folder = resolve(options.path), options.out or Path(aside) / "model"
            weights: Literal["ema", "model"] = options.weights or "ema"
            config = override(config_of(checkpoint), [f"sample.weights={weights}"])
            provenance = {
                "checkpoint": checkpoint.name,
                "weights": weights,
                "ancestry": [dict(one) for one in ancestry_of(checkpoint)],
                "recipe": [asdict(change) for change in recipe_of(checkpoint)],
            }
            save_exported(
                load_model(checkpoint, weights), config, data_info_of(checkpoint), folder, provenance=provenance
            )
        elif options.out is not None:
            raise ConfigError(f"{options.path} is in the exported form already; leave --out away")
        elif options.weights not in (None, held := config_of(folder).sample.weights):
            raise ConfigError(f"{folder} holds one set of weights, {held}; leave --weights away")
        if options.to_published is not None:
            export_published(folder, options.to_published)
    print("written to " + " and ".join(str(path) for path in (options.out, options.to_published) if path is not None))


VERBS = (Verb(("import",), Import, _import), Verb(("export",), Export, _export))
