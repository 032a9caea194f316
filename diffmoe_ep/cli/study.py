"""Verbs that compare and measure: compare."""

import argparse
import json
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Declare compare."""
    side = verbs.add_parser("compare", help="lay runs side by side: parameters, loss, scores and capacity, over seeds")
    side.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; those that differ by their seed alone are one row")
    side.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers to FILE")
    side.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> None:
    from diffmoe_ep.study.compare import compare

    _told(compare(options.runs), options.json)


def _told(found: Any, file: Path | None) -> None:
    """Print a result, and write it as JSON if asked."""
    print("\n".join(found.lines()))
    if file is not None:
        file.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"written to {file}")
