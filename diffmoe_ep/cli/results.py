"""How verbs that find numbers show them."""

import json
from pathlib import Path
from typing import Any


def show(file: Path | None, **found: Any) -> None:
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
