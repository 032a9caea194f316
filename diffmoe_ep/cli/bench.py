"""Verbs that measure, as ratios within one run: bench select, layer, step, train, experts, stream, save."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffmoe_ep.cli.options import Verb, option, overrides, positional, required
from diffmoe_ep.cli.results import show
from diffmoe_ep.config import ConfigError, from_tree, load

if TYPE_CHECKING:
    import torch

    from diffmoe_ep.parallel.mesh import Mesh

Compute = Literal["float32", "bfloat16"]


def _cases(text: str) -> list[tuple[int, ...]]:
    """D:tokens:N,... as numbers."""
    parts = [part.split(":") for part in text.split(",")]
    if not all(len(part) == 3 and all(number.isdigit() and int(number) for number in part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 384:8192:16,1024:4096:16")
    return [tuple(map(int, part)) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Select:
    """The exact top-k over ranks by each algorithm, and what it would cost on up to 4096 ranks."""

    tokens: int = option(1024, "tokens of each rank")
    experts: int = option(16, "experts")
    hidden: int = option(384, "width D of a dispatched row")
    capacity: float = option(1.0, "capacity factor C")
    no_predictor: bool = option(False, "without a capacity predictor's columns")
    compute: Compute = option("float32", "type of a dispatched row")
    repetitions: int = option(20, "interleaved repetitions")
    per_node: int = option(8, "ranks of a machine, for the cost model")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A measurement in turns."""

    turns: int = option(20, "interleaved turns")
    compute: Compute = option("float32", "compute type")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


@dataclass(frozen=True, kw_only=True)
class Layer(Turns):
    """Our layer beside a dense FFN, DeepSpeed's layer, a plain loop, and the matmuls alone."""

    sizes: tuple[tuple[int, ...], ...] | None = option(
        None, "for example 384:8192:16 (default: S, B and L)", "D:tokens:N,...", _cases
    )
    compile: bool = option(False, "with torch.compile, as compute.compile does: the dense FFN and our layer")


@dataclass(frozen=True, kw_only=True)
class Step(Turns):
    """A training step of a model with experts beside its dense twin."""

    size: Literal["S", "B", "L", "XL", "XXL", "XXXL"] = option("S", "the paper's size")
    experts: int = option(16, "experts")
    batch: int = option(4, "samples of a step, 256 tokens each")
    cluster: Path | None = option(
        None,
        "also the planner's prediction beside a measured step, for example configs/cluster/cpu2.yaml",
        "FILE",
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training steps of a config's model on this device beside the plan's time and memory. Its samples are made up, the
    same at every step, so that the loss must fall.
    """

    config: Path = positional("YAML file")
    overrides: tuple[str, ...] = overrides("train.global_batch=8 train.optimizer.lr=1e-3")
    cluster: Path = required("for example configs/cluster/h200x1.yaml", "FILE")
    turns: int = option(10, "timed steps")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


@dataclass(frozen=True, kw_only=True)
class Experts(Turns):
    """The cost of a token in our layer for 2 to 64 experts."""

    hidden: int = option(384, "width D")
    rows: int = option(512, "rows of every expert; 0: the number of tokens stays")
    tokens: int = option(8192, "tokens with --rows 0")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Samples per second of one process, against reading the bytes and plain webdataset."""

    folder: Path | None = positional("dataset with labels (default: a synthetic one is written to --out)", None)
    out: Path = option(Path("bench_stream"), "folder for the synthetic set")
    synthetic: int = option(16384, "its samples of 32 KiB (0.6 GB by default: 16384)", "N")
    samples: int | None = option(None, "samples of a turn (default: all, at most 512)")
    turns: int = option(40, "turns, of which the fastest counts")
    workers: int = option(2, "worker processes of the training loop")
    step_seconds: float = option(0.5, "length of its steps of 64 samples")
    steps: int = option(20, "its steps")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


@dataclass(frozen=True, kw_only=True)
class Save:
    """A checkpoint in the background and in the foreground, beside a plain write of the same bytes."""

    out: Path = required("folder on the disk that is measured; what is written there is removed again")
    gb: float = option(1.0, "10^9 bytes, dealt over the ranks; each holds its part twice more")
    turns: int = option(5, "turns")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


def _run_select(options: Select) -> None:
    from diffmoe_ep.bench.topk import Work, measure, predict
    from diffmoe_ep.parallel.mesh import destroy_mesh, init_mesh

    for name in ("tokens", "experts", "hidden", "repetitions", "per_node"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    work = Work(
        options.tokens, options.experts, options.hidden, not options.no_predictor, options.capacity, options.compute
    )
    mesh = init_mesh(1, 1, 10)
    measured = measure(mesh, work, options.repetitions)
    if measured is not None:
        show(options.json, measured=measured, predicted=predict(work, per_node=options.per_node))
    destroy_mesh()


def _run_layer(options: Layer) -> None:
    from diffmoe_ep.bench.layer import CASES, Case, bench_layer

    mesh = _bench_mesh(options)
    cases = CASES if options.sizes is None else [Case(*size) for size in options.sizes]
    _measured(
        mesh, options, measured=bench_layer(mesh, cases, options.turns, _compute(options), compiled=options.compile)
    )


def _run_step(options: Step) -> None:
    from diffmoe_ep.bench.step import bench_step

    mesh = _bench_mesh(options, alone=True)
    precision = "bf16" if options.compute == "bfloat16" else "float32"
    tree = {
        "model": {"size": options.size, "num_experts": options.experts},
        "train": {"global_batch": options.batch, "precision": precision},
    }
    found: dict[str, Any] = {"measured": bench_step(from_tree(tree), mesh, options.turns)}
    if options.cluster is not None:  # what the planner says of the same step
        from diffmoe_ep.bench.calibrate import compare
        from diffmoe_ep.planner.cluster import load_cluster

        for family in ("dense", "diffmoe"):
            config = from_tree(tree, [f"model.family={family}"])
            found[family] = compare(config, load_cluster(options.cluster), mesh, max(3, options.turns // 2))
    _measured(mesh, options, **found)


def _run_train(options: Train) -> None:
    from diffmoe_ep.bench.calibrate import compare
    from diffmoe_ep.planner.cluster import load_cluster

    config, cluster = load(options.config, options.overrides), load_cluster(options.cluster)
    mesh = _bench_mesh(options, alone=True)
    _measured(mesh, options, measured=compare(config, cluster, mesh, options.turns))


def _run_experts(options: Experts) -> None:
    from diffmoe_ep.bench.experts import bench_experts

    mesh = _bench_mesh(options, alone=True)
    found = bench_experts(
        mesh,
        options.hidden,
        rows_each=options.rows or None,
        tokens=options.tokens,
        turns=options.turns,
        compute=_compute(options),
    )
    _measured(mesh, options, measured=found)


def _run_save(options: Save) -> None:
    from diffmoe_ep.bench.save import bench_save

    if not options.gb > 0:
        raise ConfigError(f"--gb is {options.gb}; it must be greater than 0")
    mesh = _bench_mesh(options)
    _measured(mesh, options, measured=bench_save(mesh, options.out, options.gb, options.turns))


def _bench_mesh(options: Turns | Train | Save, alone: bool = False) -> "Mesh":
    """Join the launched ranks, which share the experts and one pool."""
    from diffmoe_ep.parallel.mesh import init_mesh, launched_world

    world = launched_world()
    if alone and world > 1:
        raise ConfigError(f"this bench measures one process, and {world} were started; start it without a launcher")
    if options.turns < 2:
        raise ConfigError(f"--turns is {options.turns}; it must be at least 2, and 20 to be believed")
    return init_mesh(world, world, 10)


def _measured(mesh: "Mesh", options: Turns | Train | Save, **found: Any) -> None:
    from diffmoe_ep.parallel.mesh import destroy_mesh

    if mesh.is_first:
        show(options.json, **found)
    destroy_mesh()


def _compute(options: Turns) -> "torch.dtype":
    import torch

    return torch.bfloat16 if options.compute == "bfloat16" else torch.float32


def _run_stream(options: Stream) -> None:
    from diffmoe_ep.bench.stream import bench, write_json, write_synthetic
    from diffmoe_ep.parallel.allocator import keep_freed_memory

    keep_freed_memory()  # as a rank on CPUs; else all of them mostly wait for pages that the system clears
    for name in ("synthetic", "turns", "workers", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    folder = options.folder
    if folder is None:
        folder = options.out
        write_synthetic(folder, options.synthetic, (4, 32, 32), shard_size=1024)
    found = bench(folder, options.turns, options.samples, options.workers, options.step_seconds, options.steps)
    print("\n".join(found.lines()))
    if options.json is not None:
        write_json(found, options.json)
        print(f"written to {options.json}")


VERBS = (
    Verb(("bench", "select"), Select, _run_select),
    Verb(("bench", "layer"), Layer, _run_layer),
    Verb(("bench", "step"), Step, _run_step),
    Verb(("bench", "train"), Train, _run_train),
    Verb(("bench", "experts"), Experts, _run_experts),
    Verb(("bench", "stream"), Stream, _run_stream),
    Verb(("bench", "save"), Save, _run_save),
)
