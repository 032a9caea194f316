"""Verbs that compare, measure and verify: compare, bench, verify."""

import argparse
import json
from pathlib import Path
from typing import Any

from diffmoe_ep.config import ConfigError


def add(verbs: Any) -> None:
    """Declare compare, bench and verify."""
    side = verbs.add_parser("compare", help="lay runs side by side: parameters, loss, scores and capacity, over seeds")
    side.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; those that differ by their seed alone are one row")
    side.set_defaults(run=_compare)

    benches = verbs.add_parser("bench", help="measure, as ratios within one run").add_subparsers(required=True, metavar="WHAT")
    select = benches.add_parser("select", help="the exact top-k over ranks by each algorithm, and what it would cost on up to 4096 ranks")
    select.add_argument("--tokens", type=int, default=1024, help="tokens of each rank (default 1024)")
    select.add_argument("--experts", type=int, default=16, help="experts (default 16)")
    select.add_argument("--hidden", type=int, default=384, help="width D of a dispatched row (default 384)")
    select.add_argument("--capacity", type=float, default=1.0, help="capacity factor C (default 1)")
    select.add_argument("--no-predictor", action="store_true", help="without a capacity predictor's columns")
    select.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="type of a dispatched row (default float32)")
    select.add_argument("--repetitions", type=int, default=20, help="interleaved repetitions (default 20)")
    select.add_argument("--per-node", type=int, default=8, help="ranks of a machine, for the cost model (default 8)")
    select.set_defaults(run=_bench_select)
    for verb in (side, select):
        verb.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers to FILE")

    verify = verbs.add_parser("verify", help="check on these ranks and this back end that many ranks compute what one computes")
    verify.add_argument("--device", choices=("cpu", "cuda"), default=None, help="where to compute (default: GPUs where there are some)")
    verify.add_argument("--timeout-minutes", type=float, default=10.0, help="longest wait for a peer (default 10)")
    verify.set_defaults(run=_verify)


def _compare(options: argparse.Namespace) -> None:
    from diffmoe_ep.study.compare import compare

    _told(options.json, runs=compare(options.runs))


def _bench_select(options: argparse.Namespace) -> None:
    from diffmoe_ep.parallel import mesh as meshes
    from diffmoe_ep.study.bench_select import Work, measure, predict

    for name in ("tokens", "experts", "hidden", "repetitions", "per_node"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    work = Work(options.tokens, options.experts, options.hidden, not options.no_predictor, options.capacity, options.compute)
    mesh = meshes.start(1, 1, 10)
    measured = measure(mesh, work, options.repetitions)
    if measured is not None:
        _told(options.json, measured=measured, predicted=predict(work, per_node=options.per_node))
    meshes.stop()


def _verify(options: argparse.Namespace) -> None:
    from diffmoe_ep.study.verify import run

    run(options)


def _told(file: Path | None, **found: Any) -> None:
    """Print results, and write them as JSON if asked."""
    print("\n\n".join("\n".join(part.lines()) for part in found.values()))
    if file is not None:
        content = {name: part.as_dict() for name, part in found.items()} if len(found) > 1 else next(iter(found.values())).as_dict()
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written to {file}")
