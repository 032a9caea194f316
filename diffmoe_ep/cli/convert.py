"""Verbs that carry models between forms: import, export."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from diffmoe_ep.config import ConfigError, override


def add(verbs: Any) -> None:
    """Declare import and export."""
    bring = verbs.add_parser("import", help="read a checkpoint of the published reference implementation")
    bring.add_argument("--reference", required=True, type=Path, metavar="FILE.pt", help="its checkpoint")
    bring.add_argument("--out", required=True, type=Path, help="new folder, which load_model reads")
    bring.add_argument("--heads", type=int, default=None, help="attention heads, which a checkpoint does not tell")
    bring.add_argument(
        "--input-size", type=int, default=None, help="height of the latent, if the checkpoint has no positions"
    )
    bring.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set to load (default ema)")
    bring.add_argument(
        "--objective", choices=("flow", "ddpm"), default="flow", help="what it was trained to predict (default flow)"
    )
    bring.add_argument(
        "--one-set", action="store_true", help="do not keep the other set for the way back (half the disk)"
    )
    bring.set_defaults(run=_import)
    give = verbs.add_parser(
        "export",
        help="write a trained model as safetensors, or as a checkpoint of the published reference implementation",
    )
    give.add_argument(
        "path", type=Path, help="run folder, checkpoint, or folder with model.safetensors and config.json"
    )
    give.add_argument("--out", type=Path, default=None, help="new folder for model.safetensors and config.json")
    give.add_argument("--to-reference", type=Path, default=None, metavar="FILE.pt", help="new reference checkpoint")
    give.add_argument(
        "--weights", choices=("ema", "model"), default=None, help="which set of a run to write (default ema)"
    )
    give.set_defaults(run=_export)


def _import(options: argparse.Namespace) -> None:
    from diffmoe_ep.checkpoint.reference import import_reference

    out = import_reference(
        options.reference,
        options.out,
        heads=options.heads,
        input_size=options.input_size,
        weights=options.weights,
        objective=options.objective,
        both=not options.one_set,
    )
    print(f"written to {out}: load_model({str(out)!r}) reads it")


def _export(options: argparse.Namespace) -> None:
    from diffmoe_ep.checkpoint.exported import is_exported, save_exported
    from diffmoe_ep.checkpoint.load import config_of, data_info_of, load_model
    from diffmoe_ep.checkpoint.reference import export_reference
    from diffmoe_ep.checkpoint.store import resolve
    from diffmoe_ep.train.start import ancestry_of

    if options.out is None and options.to_reference is None:
        raise ConfigError("nothing to write: give --out FOLDER (safetensors), --to-reference FILE.pt, or both")
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
            }
            save_exported(
                load_model(checkpoint, weights), config, data_info_of(checkpoint), folder, provenance=provenance
            )
        elif options.out is not None:
            raise ConfigError(f"{options.path} is in the single-file form already; leave --out away")
        elif options.weights not in (None, held := config_of(folder).sample.weights):
            raise ConfigError(f"{folder} holds one set of weights, {held}; leave --weights away")
        if options.to_reference is not None:
            export_reference(folder, options.to_reference)
    print("written to " + " and ".join(str(path) for path in (options.out, options.to_reference) if path is not None))
