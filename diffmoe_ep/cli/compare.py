"""The verb that lays runs side by side: compare."""

from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.cli.options import Verb, option, positional
from diffmoe_ep.cli.results import show


@dataclass(frozen=True, kw_only=True)
class Options:
    """Lay runs side by side: parameters, loss, scores and capacity, over seeds."""

    runs: tuple[Path, ...] = positional("run folders; those that differ by their seed alone are one row", metavar="RUN")
    composition: bool = option(False, "how well text-to-image runs follow their prompts, a row each")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


def _compare(options: Options) -> None:
    from diffmoe_ep.evaluate.compare import compare
    from diffmoe_ep.evaluate.digits.compare_composition import compare_composition

    show(options.json, runs=compare_composition(options.runs) if options.composition else compare(options.runs))


VERBS = (Verb(("compare",), Options, _compare),)
