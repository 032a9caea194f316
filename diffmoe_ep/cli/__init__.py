"""The command `diffmoe`. Each verb reads a config or a checkpoint, and says in one line what is wrong with it."""

import argparse
import sys
import time
from collections.abc import Sequence

from diffmoe_ep.cli import bench, capacity, convert, data, evaluate, sample, train
from diffmoe_ep.config import UserError


def main(arguments: Sequence[str] | None = None, patience: float = 2.0) -> None:
    """Run a verb. A user's mistake ends every rank with exit code 2 and one message; anything else is ours and keeps
    its traceback.

    Launchers end all ranks once one has stopped, so ranks that leave the message to rank 0 stay for `patience` seconds.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if not all("=" in word and not word.startswith("-") and hasattr(options, "overrides") for word in rest):
        parser.error(
            f"unrecognised arguments: {' '.join(rest)}; settings are given as key=value, options are listed by --help"
        )
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
    """Print an error once for all ranks if it is the same on all: one of the config or the data, before they joined, or
    one agreed upon.
    """
    from diffmoe_ep.parallel.mesh import is_initialized, launched_rank, launched_world

    world, rank = launched_world(strict=False), launched_rank(strict=False)
    if world > 1 and is_initialized() and not error.everywhere:
        print(f"diffmoe: error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == 0:
        print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(patience)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffmoe", description="DiffMoE diffusion transformers with expert parallelism."
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # older DeepSpeed launchers pass it
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in (train, data, sample, evaluate, capacity, convert, bench):
        verb.add(verbs)
    return parser
