"""Verbs that compare, measure and verify: compare, bench, verify."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.cli.data import add_bench
from diffmoe_ep.config import SIZES, ConfigError, from_tree, load

if TYPE_CHECKING:
    import torch

    from diffmoe_ep.parallel.mesh import Mesh


def add(verbs: Any) -> None:
    """Declare compare, bench and verify."""
    side = verbs.add_parser("compare", help="lay runs side by side: parameters, loss, scores and capacity, over seeds")
    side.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders; those that differ by their seed alone are one row",
    )
    side.add_argument(
        "--composition", action="store_true", help="how well text-to-image runs follow their prompts, a row each"
    )
    side.set_defaults(run=_compare)

    benches = verbs.add_parser("bench", help="measure, as ratios within one run").add_subparsers(
        required=True, metavar="WHAT"
    )
    select = benches.add_parser(
        "select", help="the exact top-k over ranks by each algorithm, and what it would cost on up to 4096 ranks"
    )
    select.add_argument("--tokens", type=int, default=1024, help="tokens of each rank (default 1024)")
    select.add_argument("--experts", type=int, default=16, help="experts (default 16)")
    select.add_argument("--hidden", type=int, default=384, help="width D of a dispatched row (default 384)")
    select.add_argument("--capacity", type=float, default=1.0, help="capacity factor C (default 1)")
    select.add_argument("--no-predictor", action="store_true", help="without a capacity predictor's columns")
    select.add_argument(
        "--compute",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of a dispatched row (default float32)",
    )
    select.add_argument("--repetitions", type=int, default=20, help="interleaved repetitions (default 20)")
    select.add_argument("--per-node", type=int, default=8, help="ranks of a machine, for the cost model (default 8)")
    select.set_defaults(run=_bench_select)
    layer = benches.add_parser(
        "layer", help="our layer beside a dense FFN, DeepSpeed's layer, a plain loop, and the matmuls alone"
    )
    layer.add_argument(
        "--sizes",
        type=_cases,
        default=None,
        metavar="D:tokens:N,...",
        help="for example 384:8192:16 (default: S, B and L)",
    )
    layer.add_argument(
        "--compile",
        action="store_true",
        help="with torch.compile, as compute.compile does: the dense FFN and our layer",
    )
    step = benches.add_parser("step", help="a training step of a model with experts beside its dense twin")
    step.add_argument("--size", choices=tuple(SIZES), default="S", help="the paper's size (default S)")
    step.add_argument("--experts", type=int, default=16, help="experts (default 16)")
    step.add_argument("--batch", type=int, default=4, help="samples of a step, 256 tokens each (default 4)")
    step.add_argument(
        "--cluster",
        default=None,
        metavar="FILE",
        help="also the planner's prediction beside a measured step, for example configs/cluster/cpu2.yaml",
    )
    model = benches.add_parser(
        "train", help="training steps of a config's model on this device beside the plan's time and memory"
    )
    model.add_argument(
        "config", help="YAML file; its samples are made up, the same at every step, so that the loss must fall"
    )
    model.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example train.global_batch=8 train.optimizer.lr=1e-3"
    )
    model.add_argument("--cluster", required=True, metavar="FILE", help="for example configs/cluster/h200x1.yaml")
    model.add_argument("--turns", type=int, default=10, help="timed steps (default 10)")
    model.set_defaults(run=_bench_train)
    many = benches.add_parser("experts", help="the cost of a token in our layer for 2 to 64 experts")
    many.add_argument("--hidden", type=int, default=384, help="width D (default 384)")
    many.add_argument(
        "--rows", type=int, default=512, help="rows of every expert; 0: the number of tokens stays (default 512)"
    )
    many.add_argument("--tokens", type=int, default=8192, help="tokens with --rows 0 (default 8192)")
    for verb, function in ((layer, _bench_layer), (step, _bench_step), (many, _bench_experts)):
        verb.add_argument("--turns", type=int, default=20, help="interleaved turns (default 20)")
        verb.add_argument(
            "--compute", choices=("float32", "bfloat16"), default="float32", help="compute type (default float32)"
        )
        verb.set_defaults(run=function)
    add_bench(benches)
    for verb in (side, select, layer, step, many, model):
        verb.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers to FILE")

    verify = verbs.add_parser(
        "verify", help="check on these ranks and this back end that many ranks compute what one computes"
    )
    verify.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="where to compute (default: GPUs where there are some)"
    )
    verify.add_argument("--timeout-minutes", type=float, default=10.0, help="longest wait for a peer (default 10)")
    verify.set_defaults(run=_verify)


def _compare(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.compare import compare
    from diffmoe_ep.evaluate.digits.compare_composition import compare_composition

    _told(options.json, runs=compare_composition(options.runs) if options.composition else compare(options.runs))


def _bench_select(options: argparse.Namespace) -> None:
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
        _told(options.json, measured=measured, predicted=predict(work, per_node=options.per_node))
    destroy_mesh()


def _bench_layer(options: argparse.Namespace) -> None:
    from diffmoe_ep.bench.layer import CASES, Case, bench_layer

    mesh = _bench_mesh(options)
    cases = CASES if options.sizes is None else [Case(*size) for size in options.sizes]
    _measured(
        mesh, options, measured=bench_layer(mesh, cases, options.turns, _compute(options), compiled=options.compile)
    )


def _bench_step(options: argparse.Namespace) -> None:
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


def _bench_train(options: argparse.Namespace) -> None:
    from diffmoe_ep.bench.calibrate import compare
    from diffmoe_ep.planner.cluster import load_cluster

    config, cluster = load(options.config, options.overrides), load_cluster(options.cluster)
    mesh = _bench_mesh(options, alone=True)
    _measured(mesh, options, measured=compare(config, cluster, mesh, options.turns))


def _bench_experts(options: argparse.Namespace) -> None:
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


def _bench_mesh(options: argparse.Namespace, alone: bool = False) -> "Mesh":
    """Join the launched ranks, which share the experts and one pool."""
    from diffmoe_ep.parallel.mesh import init_mesh, launched_world

    world = launched_world()
    if alone and world > 1:
        raise ConfigError(f"this bench measures one process, and {world} were started; start it without a launcher")
    if options.turns < 2:
        raise ConfigError(f"--turns is {options.turns}; it must be at least 2, and 20 to be believed")
    return init_mesh(world, world, 10)


def _measured(mesh: "Mesh", options: argparse.Namespace, **found: Any) -> None:
    from diffmoe_ep.parallel.mesh import destroy_mesh

    if mesh.is_first:
        _told(options.json, **found)
    destroy_mesh()


def _compute(options: argparse.Namespace) -> "torch.dtype":
    import torch

    return torch.bfloat16 if options.compute == "bfloat16" else torch.float32


def _cases(text: str) -> list[tuple[int, ...]]:
    """D:tokens:N,... as numbers."""
    parts = [part.split(":") for part in text.split(",")]
    if not all(len(part) == 3 and all(number.isdigit() and int(number) for number in part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 384:8192:16,1024:4096:16")
    return [tuple(map(int, part)) for part in parts]


def _verify(options: argparse.Namespace) -> None:
    from diffmoe_ep.verify.verify import run

    run(options)


def _told(file: Path | None, **found: Any) -> None:
    """Print results, and write them as JSON if asked."""
    print("\n\n".join("\n".join(part.lines()) for part in found.values()))
    if file is not None:
        content = (
            {name: part.as_dict() for name, part in found.items()}
            if len(found) > 1
            else next(iter(found.values())).as_dict()
        )
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written to {file}")
