"""Prints pip constraints that keep what this Python has as it is: its packages at their versions, then those of
constraints.txt that it lacks.
"""

import importlib.metadata
import re
import sys
from pathlib import Path


def canonical(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


present = {canonical(one.metadata["Name"]): one.version for one in importlib.metadata.distributions()}
for name, version in sorted(present.items()):
    print(f"{name}=={version}")
for line in Path(sys.argv[1]).read_text().splitlines():
    if "==" in line and not line.startswith("#") and canonical(line.split("==")[0]) not in present:
        print(line)
