"""The fuzz test at length: python -m fuzz --cases 10000, in all; prints a line for each loader, and every fault."""

import argparse
import faulthandler
import sys
import warnings

import torch

from diffmoe_ep.tables import table
from fuzz.count import OUTCOMES, count
from fuzz.subjects import subjects


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="in all, the same number for each loader")
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="a part of a loader's name")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # numpy's, of headers that an old Python could have written
    torch.set_num_threads(1)
    chosen = [subject for subject in subjects() if options.only in subject.name]
    each = -(-options.cases // len(chosen))
    rows: list[tuple[str, ...]] = [("loader", "cases", *OUTCOMES)]
    totals, faults = [0] * len(OUTCOMES), list[str]()
    for subject in chosen:
        print(f"{subject.name}: {each} cases", file=sys.stderr, flush=True)
        counted = count(subject, range(options.first, options.first + each), options.seed)
        numbers = [counted.outcomes[outcome] for outcome in OUTCOMES]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        rows.append((subject.name, str(each), *map(str, numbers)))
        faults += counted.faults
        print("".join(f"{fault}\n" for fault in counted.faults[:5]), end="", file=sys.stderr, flush=True)
    rows.append(("all", str(each * len(chosen)), *map(str, totals)))
    print("\n".join(table(rows)))
    if faults:
        sys.exit(f"{len(faults)} faults; the first of each loader stand above")


if __name__ == "__main__":
    main()
