"""Verbs that look after the checkpoints of a run: checkpoint list, verify, prune."""

import sys
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.cli.options import Verb, option, positional
from diffmoe_ep.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class List:
    """Checkpoints of a run: step, time, size, who wrote them, whether they are complete. Large files are not read."""

    run: Path = positional("run folder")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of checkpoints and compare it with their checksums; exit code 1 if anything is damaged."""

    path: Path = positional("run folder, for all of its checkpoints, or one checkpoint")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Show which old checkpoints of a run may go, and with --remove remove them. The newest sound one always stays."""

    run: Path = positional("run folder that no training has")
    keep_last: int = option(2, "newest checkpoints that stay")
    keep_every: int = option(0, "those at multiples of this many steps stay; 0 = none")
    remove: bool = option(False, "remove them for good")


def _list(options: List) -> None:
    from diffmoe_ep.checkpoint.housekeeping import listing

    print("\n".join(listing(options.run).lines()))


def _verify(options: Verify) -> None:
    from diffmoe_ep.checkpoint.housekeeping import to_verify, verdict

    damaged, folders = 0, to_verify(options.path)
    for folder in folders:
        found = verdict(folder)
        damaged += bool(found.problems)
        print(found.line(), flush=True)
    print(f"{len(folders) - damaged} of {len(folders)} checkpoints are sound")
    if damaged:
        sys.exit(1)


def _prune(options: Prune) -> None:
    from diffmoe_ep.checkpoint.housekeeping import plan, remove, root_of
    from diffmoe_ep.parallel.mesh import Mesh
    from diffmoe_ep.train.run_lock import RunLock

    if options.keep_last < 1:
        raise ConfigError(f"--keep-last is {options.keep_last}; it must be at least 1")
    if options.keep_every < 0:
        raise ConfigError(f"--keep-every is {options.keep_every}; it must be at least 0")
    root = root_of(options.run)
    if root == options.run:
        raise ConfigError(f"{options.run} is no run folder; name the one in which it lies, so that no training has it")
    with RunLock(options.run, Mesh()):
        planned = plan(root, options.keep_last, options.keep_every)
        for folder in planned.stay:
            print(f"stays  {folder}{'  (the newest sound one)' * (folder == planned.sound)}")
        if options.remove:
            remove(planned.go)
        for folder in planned.go:
            print(f"{'removed' if options.remove else 'may go'}  {folder}")
    if planned.go and not options.remove:
        print("nothing was removed; --remove removes what may go")


VERBS = (
    Verb(("checkpoint", "list"), List, _list),
    Verb(("checkpoint", "verify"), Verify, _verify),
    Verb(("checkpoint", "prune"), Prune, _prune),
)
