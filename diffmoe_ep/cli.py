"""The command `diffmoe`: train, sample, evaluate. Each verb reads a config or a checkpoint, and says in one line what is wrong with it."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from diffmoe_ep.config import (
    Config,
    ConfigError,
    SampleConfig,
    UserError,
    check_world,
    dump,
    has_experts,
    keys,
    load,
    num_tokens,
    override,
    pool_samples,
    to_tree,
    tokens_per_expert,
)

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from diffmoe_ep.evaluate.capacity import Drawer
    from diffmoe_ep.evaluate.draw import Drawn
    from diffmoe_ep.model.dit import DiT
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
    except UserError as error:
        _tell(error, patience)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(error: UserError, patience: float) -> None:
    """Print an error once for all ranks if it is the same on all: one of the config or the data, before they joined, or one agreed upon."""
    from diffmoe_ep.parallel import mesh as meshes

    world, rank = meshes.launched_world(strict=False), meshes.launched_rank(strict=False)
    if world > 1 and meshes.joined() and not error.everywhere:
        print(f"diffmoe: error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == 0:
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
    sample.add_argument("--threshold", type=float, default=None, help="one constant threshold for all experts (sample.threshold)")
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
        verb.add_argument("--samples", type=int, default=num, help=f"number of samples (default {num})")
        verb.add_argument("--seed", type=int, default=None, help="seed of the samples' first noise (default: the run's)")

    _more_verbs(verbs)
    every = verbs.add_parser("keys", help="print every config key with its type, default and meaning")
    every.set_defaults(run=_keys)
    return parser


def _more_verbs(verbs: Any) -> None:
    plan = verbs.add_parser("plan", help="print parameters by module, activated parameters and FLOPs of a config; builds nothing")
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--capacity", type=float, default=None, help="inference capacity C (default: training's)")
    plan.set_defaults(run=_plan)

    capacity = verbs.add_parser("capacity", help="where a trained model spends its compute").add_subparsers(required=True, metavar="WHAT")
    report = capacity.add_parser("report", help="capacity by sampling step, layer, expert and class, as CSV and plots")
    report.add_argument("--out", required=True, type=Path, help="folder for tables and plots")
    report.add_argument("--classes", type=_numbers, default=None, metavar="0,1,2", help="classes (default: all)")
    report.add_argument("--per-class", dest="samples", type=int, default=8, help="samples of each class (default 8)")
    report.set_defaults(run=_capacity_report)
    search = capacity.add_parser("search", help="try constant thresholds and pick the best with C at most 1 (interval search)")
    search.add_argument(
        "--thresholds", required=True, type=_thresholds, metavar="0.3,0.5,dynamic", help="constants to try, and dynamic or raw"
    )
    search.add_argument("--reference", required=True, type=Path, help="dataset folder of the training images")
    search.add_argument("--heldout", required=True, type=Path, help="dataset folder of held-out images")
    search.add_argument("--out", type=Path, default=None, help="folder for thresholds.csv and thresholds.png")
    search.add_argument("--samples", type=int, default=500, help="samples for each threshold (default 500)")
    search.set_defaults(run=_capacity_search)
    for verb in (report, search):
        verb.add_argument("path", type=Path, help="run folder, or one checkpoint in it")
        verb.add_argument("overrides", nargs="*", metavar="key=value")
        verb.add_argument("--seed", type=int, default=None, help="seed of the samples' first noise (default: the run's)")

    bring = verbs.add_parser("import", help="read a checkpoint of the published reference implementation")
    bring.add_argument("--reference", required=True, type=Path, metavar="FILE.pt", help="its checkpoint")
    bring.add_argument("--out", required=True, type=Path, help="new folder, which load_model reads")
    bring.add_argument("--heads", type=int, default=None, help="attention heads, which a checkpoint does not tell")
    bring.add_argument("--input-size", type=int, default=None, help="height of the latent, if the checkpoint has no positions")
    bring.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set to load (default ema)")
    bring.add_argument("--objective", choices=("flow", "ddpm"), default="flow", help="what it was trained to predict (default flow)")
    bring.set_defaults(run=_import)
    give = verbs.add_parser(
        "export", help="write a trained model as safetensors, or as a checkpoint of the published reference implementation"
    )
    give.add_argument("path", type=Path, help="run folder, checkpoint, or folder with model.safetensors and config.json")
    give.add_argument("--out", type=Path, default=None, help="new folder for model.safetensors and config.json")
    give.add_argument("--to-reference", type=Path, default=None, metavar="FILE.pt", help="new reference checkpoint")
    give.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set of a run to write (default ema)")
    give.set_defaults(run=_export)


def _thresholds(text: str) -> list[Any]:
    try:
        return [part if part in ("dynamic", "raw") else float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of thresholds such as 0.3,0.5,dynamic") from None


def _plan(options: argparse.Namespace) -> None:
    from diffmoe_ep.model.plan import plan

    print("\n".join(plan(load(options.config, options.overrides), options.capacity).lines()))


def _import(options: argparse.Namespace) -> None:
    from diffmoe_ep.checkpoint.reference import import_reference

    out = import_reference(
        options.reference,
        options.out,
        heads=options.heads,
        input_size=options.input_size,
        weights=options.weights,
        objective=options.objective,
    )
    print(f"written to {out}: load_model({str(out)!r}) reads it")


def _export(options: argparse.Namespace) -> None:
    from diffmoe_ep.checkpoint.exchange import config_of, facts_of, load_model
    from diffmoe_ep.checkpoint.reference import export_reference
    from diffmoe_ep.checkpoint.single import is_single, save_single
    from diffmoe_ep.checkpoint.store import resolve

    if options.out is None and options.to_reference is None:
        raise ConfigError("nothing to write: give --out FOLDER (safetensors), --to-reference FILE.pt, or both")
    with TemporaryDirectory(prefix="diffmoe-") as aside:
        folder = options.path
        if not is_single(folder):
            checkpoint, folder = resolve(options.path), options.out or Path(aside) / "model"
            save_single(load_model(checkpoint, options.weights), config_of(checkpoint), facts_of(checkpoint), folder)
        elif options.out is not None:
            raise ConfigError(f"{options.path} is in the single-file form already; leave --out away")
        if options.to_reference is not None:
            export_reference(folder, options.to_reference)
    print("written to " + " and ".join(str(path) for path in (options.out, options.to_reference) if path is not None))


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
        ("shared experts", sizes.shared),
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
    if has_experts(config.model):
        span, each = pool_samples(config), config.model.num_experts // expert
        pool = span * num_tokens(config.model)
        over = f"pool of {span} samples, {pool} tokens, over {max(1, span // local)} rank{'s' * (span > local)}"
        if config.model.family == "tc":
            print(f"{over}; each token takes {config.model.top_k} of {config.model.num_experts} experts")
        else:
            k = tokens_per_expert(pool, config.pool.capacity, config.model.num_experts, granularity=config.model.granularity)
            print(f"{over}; each expert takes {k}")
        for rank in range(min(world, 64)):
            first = rank % expert * each
            print(f"  rank {rank}: experts {first} to {first + each - 1}, copy {rank // expert} of {world // expert}")
    if world != launched_world():
        print(
            f"parallel.expert={expert} needs at least {expert} processes, this is one: "
            f"start with deepspeed --num_gpus {expert} --module diffmoe_ep train ..."
        )


# -- sample and evaluate ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What samples are drawn from."""

    checkpoint: Path
    config: Config  # the run's, with the command's overrides
    facts: dict[str, Any]  # of the data that it was trained on
    seed: int  # of the samples' first noise


def _source(options: argparse.Namespace) -> Source:
    """Find the checkpoint and check everything that follows from it; parallel.expert is 1 unless an override says otherwise."""
    from diffmoe_ep.checkpoint.exchange import config_of, facts_of
    from diffmoe_ep.checkpoint.store import resolve
    from diffmoe_ep.evaluate.draw import check_sampling
    from diffmoe_ep.parallel.mesh import launched_world

    checkpoint = resolve(options.path)
    config = override(config_of(checkpoint), ["parallel.expert=1", *options.overrides])
    world, expert = launched_world(), config.parallel.expert
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; it must be at least 1")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed is {options.seed}; it must be at least 0 and less than 2^63")
    if world % expert:
        started = f"{world} process{'es were' if world > 1 else ' was'} started"
        raise ConfigError(f"parallel.expert is {expert} and {started}; start a multiple of parallel.expert, or leave it at 1")
    check_sampling(config, options.samples)
    return Source(checkpoint, config, facts_of(checkpoint), config.seed if options.seed is None else options.seed)


def _loaded(source: Source) -> "tuple[DiT, Mesh]":
    """Load the checkpoint over all launched ranks."""
    from diffmoe_ep.checkpoint.exchange import load_sharded
    from diffmoe_ep.parallel import mesh as meshes

    config = source.config
    mesh = meshes.start(config.parallel.expert, 1, config.parallel.timeout_minutes)
    return load_sharded(source.checkpoint, config.sample.weights, config, mesh), mesh


def _bar(mesh: "Mesh", title: str) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(unit="step", desc=title, disable=not (mesh.is_first and sys.stderr.isatty()))


def _draw(source: Source, labels: "Tensor") -> "Drawn | None":
    """Load the checkpoint and draw a sample for each label; the first rank gets them."""
    from diffmoe_ep.evaluate.draw import draw

    model, mesh = _loaded(source)
    with _bar(mesh, f"{len(labels)} samples") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        objective = source.config.train.objective
        return draw(model, labels, source.config.sample, mesh, seed=source.seed, objective=objective, progress=show)


def _drawer(source: Source, model: "DiT", mesh: "Mesh") -> "Drawer":
    """Draw with the loaded model and any sampling settings."""
    from diffmoe_ep.evaluate.draw import draw

    def drawer(labels: "Tensor", sample: SampleConfig, progress: Callable[[int, int], None] | None) -> "Drawn | None":
        return draw(model, labels, sample, mesh, seed=source.seed, objective=source.config.train.objective, progress=progress)

    return drawer


def _capacity_report(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.capacity import check_report, report
    from diffmoe_ep.parallel import mesh as meshes

    source, out = _source(options), _folder(options.out)
    check_report(source.config.model, options.samples, options.classes)
    model, mesh = _loaded(source)
    with _bar(mesh, "classes") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = report(
            model, _drawer(source, model, mesh), source.config.sample, source.facts, mesh,
            per_class=options.samples, seed=source.seed, out=out, classes=options.classes, progress=show,
        )  # fmt: skip
    if found is not None:
        print("\n".join(found.lines()))
        print(f"written to {out}")
    meshes.stop()


def _capacity_search(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.capacity_search import check_search, search, with_threshold, write_search
    from diffmoe_ep.evaluate.draw import check_pictures, classes_in_turn, pixels_of
    from diffmoe_ep.evaluate.pipeline import check_real, load_images, score
    from diffmoe_ep.parallel import mesh as meshes

    train, heldout = load_images(options.reference), load_images(options.heldout)
    source = _source(options)
    check_search(source.config.model, source.config.sample, options.thresholds)
    check_pictures(source.facts)
    check_real(options.samples, tuple(source.facts["shape"]), {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else _folder(options.out)
    model, mesh = _loaded(source)
    labels = classes_in_turn(options.samples, list(range(source.config.model.num_classes)))

    def scorer(drawn: "Drawn") -> float:
        return score(pixels_of(drawn, source.facts), drawn.labels, train, heldout, drawn.capacity).frechet

    draw_with = with_threshold(_drawer(source, model, mesh), labels, source.config.sample)
    found = search(draw_with, options.thresholds, scorer, score="Fréchet distance")
    if found is not None:
        print("\n".join(found.lines()))
        if out is not None:
            print(f"written to {out}: {', '.join(write_search(found, out))}")
    meshes.stop()


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made ({error.strerror}); give a folder that can be written") from error
    return path


def _sample(options: argparse.Namespace) -> None:
    import numpy as np

    from diffmoe_ep.evaluate.draw import check_labels, check_pictures, classes_in_turn, pixels_of, write_grid
    from diffmoe_ep.parallel import mesh as meshes

    if options.threshold is not None:
        options.overrides = [*options.overrides, f"sample.threshold={options.threshold}"]
    source, out = _source(options), _folder(options.out)
    config, pictures = source.config, source.facts["kind"] == "pixels"
    classes = options.classes if options.classes is not None else list(range(config.model.num_classes))
    check_labels(classes, config.model)
    if pictures:
        check_pictures(source.facts)
    drawn = _draw(source, classes_in_turn(options.samples, classes))
    if drawn is not None:
        arrays: dict[str, Any] = {"latents": drawn.latents.numpy(), "labels": drawn.labels.numpy()}
        if pictures:
            arrays["pixels"] = pixels_of(drawn, source.facts).numpy()
        np.savez(out / "samples.npz", **arrays)
        if pictures:
            write_grid(drawn, source.facts, out / "grid.png")
        print(
            f"{len(drawn.labels)} samples of {source.checkpoint}: seed {source.seed}, {config.sample.sampler} {config.sample.steps} steps, "
            f"guidance {config.sample.guidance:g}, selection {config.sample.selection}, C_infer^avg {drawn.capacity.average():.3f}"
        )
        print(f"written to {out}: samples.npz" + (", grid.png" if pictures else ""))
    meshes.stop()


def _evaluate(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.draw import check_pictures, classes_in_turn, pixels_of, write_grid
    from diffmoe_ep.evaluate.pipeline import check_real, load_images, score
    from diffmoe_ep.parallel import mesh as meshes

    train, heldout = load_images(options.reference), load_images(options.heldout)
    source = _source(options)
    check_pictures(source.facts)
    check_real(options.samples, tuple(source.facts["shape"]), {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else _folder(options.out)
    drawn = _draw(source, classes_in_turn(options.samples, list(range(source.config.model.num_classes))))
    if drawn is not None:
        scores = score(pixels_of(drawn, source.facts), drawn.labels, train, heldout, drawn.capacity)
        print("\n".join(scores.lines()))
        if out is not None:
            protocol = {"checkpoint": str(source.checkpoint), "seed": source.seed, "sample": to_tree(source.config.sample)}
            (out / "scores.json").write_text(json.dumps({**scores.as_dict(), "protocol": protocol}, indent=2) + "\n", encoding="utf-8")
            write_grid(drawn, source.facts, out / "grid.png")
            print(f"written to {out}: scores.json, grid.png")
    meshes.stop()


if __name__ == "__main__":
    main()
