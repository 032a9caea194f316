"""The command `diffmoe`: train, sample, evaluate. Each verb reads a config or a checkpoint, and says in one line what is wrong with it."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.config import Config, ConfigError, check_world, dump, keys, load, num_tokens, override, pool_samples, tokens_per_expert

if TYPE_CHECKING:
    from diffmoe_ep.evaluate.draw import Drawn
    from diffmoe_ep.parallel.mesh import Mesh


def main(arguments: Sequence[str] | None = None, patience: float = 2.0) -> None:
    """Run a verb. A user's mistake ends every rank with exit code 2 and one message; anything else is ours and keeps its traceback.

    Launchers end all ranks once one has stopped, so ranks that leave the message to rank 0 stay for `patience` seconds.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if not all("=" in word and not word.startswith("-") and hasattr(options, "overrides") for word in rest):
        parser.error(f"unrecognised arguments: {' '.join(rest)}; settings are given as key=value, options are listed by --help")
    if rest:  # overrides that stand behind an option, which argparse leaves over
        options.overrides = [*options.overrides, *rest]
    try:
        options.run(options)
    except ValueError as error:
        if not _is_told(error):
            raise
        _tell(error, patience)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_told(error: ValueError) -> bool:
    """Whether an error is meant for the user: the three kinds that the package raises for mistakes."""
    return isinstance(error, ConfigError) or type(error).__name__ in ("DataError", "CheckpointError")


def _tell(error: ValueError, patience: float) -> None:
    """Print an error once for all ranks if it is the same on all: of the config, or agreed upon; a bad sample is one rank's alone."""
    from diffmoe_ep.parallel.mesh import launched_rank, launched_world

    if type(error).__name__ == "DataError" and launched_world() > 1:
        print(f"diffmoe: error: rank {launched_rank()}: {error}", file=sys.stderr, flush=True)
    elif launched_rank() == 0:
        print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(patience)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffmoe", description="DiffMoE diffusion transformers with expert parallelism.")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # older DeepSpeed launchers pass it
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train a model, or continue its run", epilog="Keys and defaults: diffmoe keys")
    train.add_argument("config", help="YAML file, for example configs/digits.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example train.steps=20 parallel.expert=2")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved config, the parameter counts and the layout of ranks, and stop"
    )
    train.set_defaults(run=_train)

    sample = verbs.add_parser("sample", help="draw images from a run or checkpoint")
    sample.add_argument("--out", required=True, type=Path, help="folder for samples.npz and grid.png")
    sample.add_argument("--classes", type=_numbers, default=None, metavar="0,1,2", help="classes in turn (default: all)")
    sample.set_defaults(run=_sample)

    evaluate = verbs.add_parser("evaluate", help="score samples of a run or checkpoint against real images")
    evaluate.add_argument("--reference", required=True, type=Path, help="dataset folder of the training images")
    evaluate.add_argument("--heldout", required=True, type=Path, help="dataset folder of held-out images")
    evaluate.add_argument("--out", type=Path, default=None, help="folder for scores.json and grid.png")
    evaluate.set_defaults(run=_evaluate)

    for verb, num in ((sample, 100), (evaluate, 500)):
        verb.add_argument("path", type=Path, help="run folder, or one checkpoint in it")
        verb.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example sample.steps=50 sample.selection=count parallel.expert=2"
        )
        verb.add_argument("--num", type=int, default=num, help=f"number of samples (default {num})")
        verb.add_argument("--seed", type=int, default=None, help="seed of the samples' first noise (default: the run's)")

    every = verbs.add_parser("keys", help="print every config key with its type, default and meaning")
    every.set_defaults(run=_keys)
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of class numbers such as 0,1,2") from None


def _keys(_: argparse.Namespace) -> None:
    for key, kind, default, doc in keys():
        print(f"{key}: {kind} = {json.dumps(default)}\n    {doc}")


# -- train ------------------------------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)
    if options.dry_run:
        _dry_run(config)
        return
    from diffmoe_ep.train.trainer import train

    train(config)


def _dry_run(config: Config) -> None:
    """Print what a run would be: its config, its size and its layout over the launched ranks (or the fewest it needs)."""
    from diffmoe_ep.model.count import count
    from diffmoe_ep.parallel.mesh import launched_rank, launched_world

    world = max(launched_world(), config.parallel.expert if launched_world() == 1 else 1)
    check_world(config, world)
    if launched_rank() != 0:
        return
    sizes, expert = count(config.model), config.parallel.expert
    print(dump(config), end="")
    print("---")
    rows = [
        ("FFN of dense blocks", sizes.dense_ffn),
        ("experts", sizes.experts),
        ("router", sizes.router),
        ("capacity predictor", sizes.predictor),
        ("attention", sizes.attention),
        ("adaLN", sizes.modulation),
        ("embeddings and head", sizes.other),
        ("total", sizes.total),
        ("activated at C = 1", round(sizes.activated())),
    ]
    for name, number in rows:
        print(f"{name:<22}{number:>16,}")
    local = config.train.batch // config.train.accumulation // world
    print("---")
    print(
        f"{world} rank{'s' * (world > 1)}: each {local} of the {config.train.batch // config.train.accumulation} samples of a micro-step, "
        f"{config.train.accumulation} micro-step{'s' * (config.train.accumulation > 1)} a step"
    )
    if config.model.family == "diffmoe":
        span, each = pool_samples(config), config.model.num_experts // expert
        pool = span * num_tokens(config.model)
        k = tokens_per_expert(pool, config.pool.capacity, config.model.num_experts)
        print(f"pool of {span} samples, {pool} tokens, over {max(1, span // local)} rank{'s' * (span > local)}; each expert takes {k}")
        for rank in range(min(world, 64)):
            first = rank % expert * each
            print(f"  rank {rank}: experts {first} to {first + each - 1}, copy {rank // expert} of {world // expert}")
    if world != launched_world():
        print(
            f"parallel.expert={expert} needs at least {expert} processes, this is one: "
            f"start with deepspeed --num_gpus {expert} --module diffmoe_ep train ..."
        )


# -- sample and evaluate ----------------------------------------------------------------------------------------------------------------


def _draw(options: argparse.Namespace, classes: list[int] | None) -> "tuple[Drawn, dict[str, Any], Config, Mesh]":
    """Load a checkpoint over all launched ranks and draw samples; parallel.expert is 1 unless an override says otherwise."""
    from tqdm import tqdm

    from diffmoe_ep.checkpoint.exchange import config_of, facts_of, load_sharded
    from diffmoe_ep.checkpoint.store import resolve
    from diffmoe_ep.evaluate.draw import check_labels, classes_in_turn, draw
    from diffmoe_ep.parallel import mesh as meshes

    if options.num < 1:
        raise ConfigError(f"--num is {options.num}; it must be at least 1")
    folder = resolve(options.path)
    config = override(config_of(folder), ["parallel.expert=1", *options.overrides])
    classes = classes if classes is not None else list(range(config.model.num_classes))
    check_labels(classes, config.model)
    world = meshes.launched_world()
    if world % config.parallel.expert:
        raise ConfigError(
            f"parallel.expert is {config.parallel.expert} and {world} process{'es were' if world > 1 else ' was'} started; "
            "start a multiple of parallel.expert, or leave it at 1"
        )
    mesh = meshes.start(config.parallel.expert, 1, config.parallel.timeout_minutes)
    model = load_sharded(folder, config.sample.weights, config, mesh)
    seed = config.seed if options.seed is None else options.seed
    with tqdm(
        total=config.sample.steps, unit="step", desc=f"{options.num} samples", disable=not (mesh.is_first and sys.stderr.isatty())
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        drawn = draw(model, classes_in_turn(options.num, classes), config.sample, mesh, seed=seed, progress=show)
    return drawn, facts_of(folder) | {"checkpoint": str(folder), "seed": seed}, config, mesh


def _save_grid(drawn: "Drawn", facts: dict[str, Any], path: Path, most: int = 200) -> Any:
    """Write the first samples as a grid; gives all of them as stored pixels."""
    from diffmoe_ep.evaluate.draw import pixels_of
    from diffmoe_ep.evaluate.picture import grid

    pixels = pixels_of(drawn.latents, facts)
    columns = min(10, len(pixels))
    grid(pixels[:most], path, columns=columns, highest=round((1 - facts["shift"]) / facts["scale"]))
    return pixels


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made ({error.strerror}); give a folder that can be written") from error
    return path


def _sample(options: argparse.Namespace) -> None:
    import numpy as np

    from diffmoe_ep.parallel import mesh as meshes

    out = _folder(options.out)
    try:
        drawn, facts, config, mesh = _draw(options, options.classes)
        if mesh.is_first:
            pixels = _save_grid(drawn, facts, out / "grid.png") if facts["kind"] == "pixels" else None
            arrays = {"latents": drawn.latents.numpy(), "labels": drawn.labels.numpy()} | (
                {} if pixels is None else {"pixels": pixels.numpy()}
            )
            np.savez(out / "samples.npz", **arrays)
            print(
                f"{len(drawn.labels)} samples of {facts['checkpoint']}: seed {facts['seed']}, {config.sample.steps} Euler steps, guidance "
                f"{config.sample.guidance:g}, selection {config.sample.selection}, C_infer^avg {drawn.capacity.average():.3f}"
            )
            print(f"written to {out}: samples.npz" + (", grid.png" if pixels is not None else ""))
    finally:
        meshes.stop()


def _evaluate(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.pipeline import load_images, score
    from diffmoe_ep.parallel import mesh as meshes

    train, heldout = load_images(options.reference), load_images(options.heldout)
    out = None if options.out is None else _folder(options.out)
    try:
        drawn, facts, config, mesh = _draw(options, None)
        if mesh.is_first:
            from diffmoe_ep.evaluate.draw import pixels_of

            pixels = pixels_of(drawn.latents, facts)
            scores = score(pixels, drawn.labels, train, heldout, drawn.capacity)
            print("\n".join(scores.lines()))
            if out is not None:
                _save_grid(drawn, facts, out / "grid.png")
                protocol = {
                    "checkpoint": facts["checkpoint"],
                    "seed": facts["seed"],
                    "sample": dump(config).partition("sample:\n")[2].partition("log:\n")[0],
                }
                (out / "scores.json").write_text(json.dumps({**scores.as_dict(), "protocol": protocol}, indent=2) + "\n", encoding="utf-8")
                print(f"written to {out}: scores.json, grid.png")
    finally:
        meshes.stop()


if __name__ == "__main__":
    main()
