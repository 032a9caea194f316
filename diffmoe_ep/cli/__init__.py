"""The command `diffmoe`. Each verb reads a config or a checkpoint, and says in one line what is wrong with it."""

import argparse
import difflib
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from diffmoe_ep.cli import (
    bench,
    capacity,
    checkpoint,
    compare,
    convert,
    data,
    doctor,
    evaluate,
    keys,
    plan,
    sample,
    soak,
    train,
    verify,
    watch,
)
from diffmoe_ep.cli.options import Verb, build, declare
from diffmoe_ep.config import ConfigError, UserError
from diffmoe_ep.config import keys as all_keys
from diffmoe_ep.config.names import hint
from diffmoe_ep.processes import follow_launchers

FILES = (
    train,
    watch,
    sample,
    evaluate,
    compare,
    capacity,
    plan,
    keys,
    data,
    checkpoint,
    convert,
    bench,
    verify,
    soak,
    doctor,
)
VERBS: tuple[Verb, ...] = tuple(verb for file in FILES for verb in file.VERBS)
GROUPS = {
    "capacity": "where a trained model spends its compute",
    "data": "index, check and look at datasets",
    "checkpoint": "list, verify and prune the checkpoints of a run",
    "bench": "measure, as ratios within one run",
}
ELSEWHERE = {  # what verbs are called in other programs
    "sample": "generate generation infer inference draw images",
    "evaluate": "eval score scores fid metrics test",
    "train": "finetune fine-tune sft pretrain fit resume run start launch",
    "plan": "count params parameters flops cost memory estimate",
    "keys": "config configs help options settings",
    "data": "dataset datasets",
    "checkpoint": "checkpoints ckpt ckpts",
    "bench": "benchmark measure profile",
    "soak": "chaos stress torture endurance",
    "compare": "diff table report",
    "watch": "monitor tail follow status dashboard top progress",
    "doctor": "check diagnose diagnostics env environment info nccl",
    "import": "load from-pt",
    "export": "convert save to-pt",
}
ABOUT = "DiffMoE diffusion transformers with expert parallelism: a run on N GPUs is the same run as on one."
AFTER = """\
examples:
  diffmoe train configs/digits.yaml train.steps=200 folder=runs/digits
  diffmoe sample runs/digits --out samples sample.guidance=2
  diffmoe plan configs/imagenet/diffmoe_b_e16_flow.yaml --cluster configs/cluster/h800x8.yaml
  deepspeed --num_gpus 8 --module diffmoe_ep train configs/digits.yaml parallel.expert_parallel=8

settings are key=value; `diffmoe keys` lists all, `diffmoe keys lr` what has to do with a word."""


def main(arguments: Sequence[str] | None = None, patience: float = 2.0) -> None:
    """Run a verb. A user's mistake ends every rank with exit code 2 and one message; anything else is ours and keeps
    its traceback.

    Launchers end all ranks once one has stopped, so ranks that leave the message to rank 0 stay for `patience` seconds.
    A rank that ends because another one did leaves with the exit code of that one.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are stacks; ours are lines
    follow_launchers()
    try:
        verb, options = parse(sys.argv[1:] if arguments is None else arguments)
        verb.run(options)
    except UserError as error:
        _show(error, patience)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(arguments: Sequence[str]) -> tuple[Verb, object]:
    """The verb that is called and its options; ConfigError for a verb or an option that does not exist. Other mistakes
    and --help end the program, as argparse does.
    """
    arguments = _without_local_rank(arguments)
    parser = argparse.ArgumentParser(prog="diffmoe", description=ABOUT, epilog=AFTER, formatter_class=_wide_and_raw)
    below: dict[tuple[str, ...], Any] = {(): parser.add_subparsers(required=True, metavar="VERB", title="verbs")}
    parsers: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    for verb in VERBS:
        text = " ".join((verb.options.__doc__ or "").split())
        lead = text[0].lower() + text[1:].partition(". ")[0].rstrip(".")
        path, name = verb.words[:-1], verb.words[-1]
        if path not in below:
            group = below[()].add_parser(
                path[0], help=GROUPS[path[0]], description=f"{_sentence(GROUPS[path[0]])}.", formatter_class=_wide
            )
            below[path] = group.add_subparsers(required=True, metavar="WHAT", title="verbs")
        made = below[path].add_parser(name, help=lead, description=text, allow_abbrev=False, formatter_class=_wide)
        declare(made, verb.options)
        made.set_defaults(verb=verb)
        parsers[verb.words] = made
    _check_verbs(arguments)
    for words, made in parsers.items():
        if _words(arguments)[: len(words)] == words:
            _check_flags(arguments, made, words)
    parsed, rest = parser.parse_known_args(arguments)
    chosen: Verb = parsed.verb
    takes = any(entry.name == "overrides" for entry in fields(chosen.options))
    if not all("=" in word and not word.startswith("-") and takes for word in rest):
        raise ConfigError(f"{' '.join(rest)} cannot be understood here; see diffmoe {' '.join(chosen.words)} --help")
    if rest:  # settings that stand behind an option, which argparse leaves over
        parsed.overrides = [*(parsed.overrides or ()), *rest]
    return chosen, build(chosen.options, parsed)


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(
        prog, max_help_position=30, width=min(110, shutil.get_terminal_size((110, 24)).columns)
    )


def _wide_and_raw(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110)


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Without --local_rank=N, which some launchers put before a program's own words; the environment says it too."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not re.match(r"--local[_-]rank=", word):
            kept.append(word)
    return kept


def _words(arguments: Sequence[str]) -> tuple[str, ...]:
    """What is called: the first two words that are no flags."""
    return tuple(word for word in arguments if not word.startswith("-"))[:2]


def _check_verbs(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a verb that does not exist, with the one that is meant."""
    words = _words(arguments)
    places: list[tuple[tuple[str, ...], str]] = [((), word) for word in words[:1]]
    if words and words[0] in GROUPS and words[1:] and "-h" not in arguments and "--help" not in arguments:
        places.append((words[:1], words[1]))
    for path, word in places:
        known = list(dict.fromkeys(verb.words[len(path)] for verb in VERBS if verb.words[: len(path)] == path))
        if word in known:
            continue
        meant = [verb for verb, names in ELSEWHERE.items() if word.lower() in names.split() and not path]
        guess = next(iter(meant or difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)
        hint = f"did you mean {guess}?" if guess else f"the verbs are {', '.join(known)}"
        raise ConfigError(f"diffmoe {' '.join((*path, word))}: there is no verb {word}; {hint}")


def _check_flags(arguments: Sequence[str], parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
    """Raise ConfigError for an option that a verb does not have, with the one, or the setting, that is meant."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    for word in arguments:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in ("--", *known):
            continue
        raise ConfigError(f"diffmoe {' '.join(words)} has no option {flag}; {_meant(flag, known, parser)}")


def _meant(flag: str, known: Sequence[str], parser: argparse.ArgumentParser) -> str:
    name, every = flag[2:], [key.name for key in all_keys()]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    if any(action.dest == "overrides" for action in parser._actions):
        key = name.replace("-", "_")
        return f"settings are given as key=value: {f'{key}=...' if key in every else hint(key, (), every)}"
    return f"it has {', '.join(known)}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _show(error: UserError, patience: float) -> None:
    """Print an error once for all ranks if it is the same on all: one of the config or the data, before they joined, or
    one agreed upon.
    """
    from diffmoe_ep.parallel.mesh import is_initialized, launched_rank, launched_world, local_rank

    world, rank = launched_world(strict=False), launched_rank(strict=False)
    if error.said:
        return
    if error.named or (world > 1 and error.alone and local_rank(strict=False) == 0):
        print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
    elif world > 1 and is_initialized() and not error.everywhere:
        print(f"diffmoe: error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == 0:
        print(f"diffmoe: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(patience)
