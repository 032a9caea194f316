"""The layout as a test: imports run downward, folders of one level stay apart, and each outside package has its
place.
"""

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Units of diffmoe_ep by level: a unit may import units of lower levels and itself.
LEVELS = {
    "config": 0, "processes": 0, "tables": 0,
    "data": 1, "diffusion": 1, "encoders": 1, "parallel": 1,
    "moe": 2,
    "model": 3,
    "sampling": 4, "planner": 4, "checkpoint": 4,
    "evaluate": 5, "train": 5,  # strangers to each other
    "study": 6, "bench": 6, "doctor": 6, "verify": 6,
    "cli": 7,
}  # fmt: skip
TOP = {"__init__": "cli", "__main__": "cli"}  # the public face and the command line are one unit
DATA_PREP_MAY_IMPORT = {"config", "data", "encoders"}

# Outside names -> the folders and files that may import them (or, for attributes of torch and os, name them).
FENCES = {
    "torch.distributed": ("diffmoe_ep/parallel/", "diffmoe_ep/checkpoint/"),
    "megatron": ("diffmoe_ep/parallel/", "diffmoe_ep/moe/kernels/"),
    "deepspeed": ("diffmoe_ep/train/engine.py", "diffmoe_ep/model/parallelize.py", "diffmoe_ep/bench/"),
    "webdataset": ("diffmoe_ep/data/", "data_prep/", "diffmoe_ep/bench/"),
    "diffusers": ("diffmoe_ep/encoders/",),
    "transformers": ("diffmoe_ep/encoders/", "data_prep/tiny_t5.py"),
    "yaml": ("diffmoe_ep/config/",),
    "os.environ": (  # who a process is among others, and what has to be set before torch is imported
        "diffmoe_ep/parallel/mesh.py",
        "diffmoe_ep/cli/__init__.py",
        "data_prep/__main__.py",
    ),
    "os.getenv": ("diffmoe_ep/parallel/mesh.py",),
    "os.putenv": ("diffmoe_ep/parallel/mesh.py",),
    "apex": ("diffmoe_ep/train/engine.py",),
    "argparse": (  # published checkpoints hold a Namespace
        "diffmoe_ep/cli/",
        "data_prep/",
        "diffmoe_ep/checkpoint/import_published.py",
        "diffmoe_ep/checkpoint/export_published.py",
    ),
}
# Not in the core install, or slow to import: inside functions only.
EXTRAS = (
    "boto3", "botocore", "isal", "matplotlib", "PIL", "safetensors", "scipy", "sklearn", "tensorboard", "torchdiffeq",
    "wandb",
)  # fmt: skip
# A name stands for one thing. Files of these rooms may bear the name of what they start, measure or prove; so may, by
# the table, a file for the thing beside it.
MIRRORING = ("diffmoe_ep/cli/", "diffmoe_ep/bench/", "diffmoe_ep/verify/")
MIRRORS = {
    "diffmoe_ep/evaluate/capacity/report.py": "diffmoe_ep/planner/report.py",  # a subject's numbers, to read
}
NO_NAMES = {"utils", "util", "common", "base", "helpers", "helper", "misc"}
MOST_LINES = 600


def violations(root: Path) -> list[str]:
    """Every breach of the tables above in root/diffmoe_ep and root/data_prep, each naming file, line and rule."""
    files = {
        path.relative_to(root).as_posix(): path
        for folder in ("diffmoe_ep", "data_prep")
        for path in (root / folder).rglob("*.py")
    }
    found = list(namesakes(files))
    edges: dict[str, set[str]] = {}
    for name, path in sorted(files.items()):
        text = path.read_text()
        tree = ast.parse(text)
        found += [
            f"{name}: no file or folder is called {part}"
            for part in Path(name).with_suffix("").parts
            if part in NO_NAMES
        ]
        if name.startswith("diffmoe_ep/") and unit(name) is None:
            found.append(f"{name}: has no level in the table")
        if text.count("\n") > MOST_LINES:
            found.append(f"{name}: {text.count(chr(10))} lines, at most {MOST_LINES}")
        edges[name] = set()
        for line, target in named(tree, name):
            edges[name].update(own_file(target, files))
            found += [f"{name}:{line}: {rule}" for rule in breaches(name, target)]
        found += [
            f"{name}:{line}: {target} is an extra: import it inside the function"
            for line, target in imported_at_once(tree)
        ]
    try:
        graphlib.TopologicalSorter({name: targets - {name} for name, targets in edges.items()}).prepare()
    except graphlib.CycleError as cycle:
        found.append(f"imports run in a circle: {' -> '.join(cycle.args[1])}")
    return found


def breaches(name: str, target: str) -> Iterator[str]:
    """The rules that file `name` breaks by naming the module or attribute `target`."""
    for fence, places in FENCES.items():
        if within(target, fence) and not name.startswith(places):
            yield f"{target} belongs to {', '.join(places)}"
    if within(target, "data_prep") and not name.startswith("data_prep/"):
        yield "data_prep is a program, nothing imports it"
    if not within(target, "diffmoe_ep"):
        return
    ours, theirs = unit(name), unit(target.replace(".", "/")) or "cli"  # what is not in the table is a name of the face
    if name.startswith("data_prep/"):
        if theirs not in DATA_PREP_MAY_IMPORT:
            yield f"data_prep may import only {', '.join(sorted(DATA_PREP_MAY_IMPORT))} of diffmoe_ep, not {target}"
    elif ours is not None and ours != theirs and LEVELS[theirs] >= LEVELS[ours]:
        yield f"{ours} (level {LEVELS[ours]}) imports {target} (level {LEVELS[theirs]})"


def namesakes(files: Iterable[str]) -> Iterator[str]:
    """Files whose basename another file has for something else."""
    bearers: dict[str, str] = {}
    for name in sorted(files):
        base = Path(name).name
        if base.startswith("__") or name.startswith(MIRRORING) or name in MIRRORS:
            continue
        if base in bearers:
            yield f"{name}: {bearers[base]} has that name; find another, or say in MIRRORS what it is to it"
        bearers.setdefault(base, name)


def unit(name: str) -> str | None:
    """The row of the table for a file such as diffmoe_ep/moe/pool.py."""
    part = Path(name).with_suffix("").parts[1] if "/" in name else "__init__"
    part = TOP.get(part, part)
    return part if part in LEVELS else None


def within(name: str, fence: str) -> bool:
    """Whether a dotted name is `fence` or stands below it."""
    return name == fence or name.startswith(fence + ".")


def named(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, wherever it does, and of attributes of torch and os."""
    package = list(Path(name).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in FENCES and dotted.startswith(("torch.", "os.")):
                yield node.lineno, dotted
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, str(first.value)) for first in node.args[:1] if isinstance(first, ast.Constant))


def imported_at_once(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of the extras that the mere import of a file would import."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in EXTRAS)  # type: ignore[attr-defined]


def own_file(target: str, files: dict[str, Path]) -> Iterator[str]:
    """The file of this project that a dotted name (a module, or something in one) comes from."""
    for dotted in (target, target.rpartition(".")[0]):
        for name in (dotted.replace(".", "/") + ".py", dotted.replace(".", "/") + "/__init__.py"):
            if name in files:
                yield name
                return


def test_the_project_keeps_its_layout() -> None:
    assert violations(ROOT) == []


PLANTED = {
    "upward": (
        "diffmoe_ep/moe/pool.py",
        "from diffmoe_ep.model import dit",
        "moe (level 2) imports diffmoe_ep.model.dit (level 3)",
    ),
    "sideways": ("diffmoe_ep/data/loader/stream.py", "import diffmoe_ep.parallel.mesh", "data (level 1) imports"),
    "strangers": ("diffmoe_ep/train/trainer.py", "from diffmoe_ep.evaluate import scores", "train (level 5) imports"),
    "benches do not verify": (
        "diffmoe_ep/bench/step.py",
        "from diffmoe_ep.verify import layer",
        "bench (level 6) imports",
    ),
    "sampling knows no scores": (
        "diffmoe_ep/sampling/sample.py",
        "import diffmoe_ep.evaluate.scores",
        "sampling (level 4) imports",
    ),
    "the plan knows no training": (
        "diffmoe_ep/planner/time.py",
        "import diffmoe_ep.train.engine",
        "planner (level 4) imports",
    ),
    "inside a function": (
        "diffmoe_ep/evaluate/scores.py",
        "def f():\n    from diffmoe_ep.train import ema",
        "evaluate (level 5) imports",
    ),
    "for types only": (
        "diffmoe_ep/moe/pool.py",
        "if TYPE_CHECKING:\n    from diffmoe_ep.train import ema",
        "moe (level 2) imports",
    ),
    "relative": ("diffmoe_ep/moe/pool.py", "from ..model import dit", "moe (level 2) imports diffmoe_ep.model.dit"),
    "the face": (
        "diffmoe_ep/train/trainer.py",
        "from diffmoe_ep import load_model",
        "train (level 5) imports diffmoe_ep.load_model",
    ),
    "by name": ("diffmoe_ep/moe/pool.py", "importlib.import_module('diffmoe_ep.train.ema')", "moe (level 2) imports"),
    "no level": ("diffmoe_ep/extra/thing.py", "", "has no level in the table"),
    "program": ("diffmoe_ep/cli/__init__.py", "import data_prep.digits", "nothing imports it"),
    "preparation": ("data_prep/digits.py", "from diffmoe_ep.model import dit", "data_prep may import only"),
    "process groups": (
        "diffmoe_ep/train/engine.py",
        "import torch.distributed as dist",
        "torch.distributed belongs to",
    ),
    "process groups, from": (
        "diffmoe_ep/train/engine.py",
        "from torch import distributed",
        "torch.distributed belongs to",
    ),
    "process groups, attribute": (
        "diffmoe_ep/moe/pool.py",
        "import torch\ntorch.distributed.barrier()",
        "torch.distributed belongs to",
    ),
    "megatron": (
        "diffmoe_ep/train/engine.py",
        "from megatron.core import parallel_state",
        "megatron.core.parallel_state belongs to",
    ),
    "deepspeed": ("diffmoe_ep/train/trainer.py", "import deepspeed", "deepspeed belongs to"),
    "webdataset": ("diffmoe_ep/train/trainer.py", "import webdataset as wds", "webdataset belongs to"),
    "diffusers": ("diffmoe_ep/data/codec.py", "import diffusers", "diffusers belongs to"),
    "transformers": ("diffmoe_ep/evaluate/scores.py", "import transformers", "transformers belongs to"),
    "yaml": ("data_prep/digits.py", "import yaml", "yaml belongs to"),
    "environment": ("diffmoe_ep/train/engine.py", "import os\nos.environ['A'] = '1'", "os.environ belongs to"),
    "environment, from": ("diffmoe_ep/train/engine.py", "from os import environ", "os.environ belongs to"),
    "environment, getenv": ("diffmoe_ep/train/engine.py", "import os\nx = os.getenv('A')", "os.getenv belongs to"),
    "extra": (
        "diffmoe_ep/train/log.py",
        "try:\n    from PIL import Image\nexcept ImportError:\n    pass",
        "PIL is an extra",
    ),
    "namesake": ("diffmoe_ep/train/layer.py", "", "diffmoe_ep/moe/layer.py has that name"),
    "name": ("diffmoe_ep/moe/utils.py", "", "no file or folder is called utils"),
    "length": ("diffmoe_ep/moe/pool.py", "x = 1\n" * 601, "601 lines"),
}


@pytest.mark.parametrize(("file", "text", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_each_planted_violation_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    write(tmp_path, {"diffmoe_ep/moe/layer.py": "", file: text})
    found = violations(tmp_path)
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(file)


def test_a_circle_within_a_folder_is_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "diffmoe_ep/moe/pool.py": "import diffmoe_ep.moe.layer",
            "diffmoe_ep/moe/layer.py": "from diffmoe_ep.moe import pool",
        },
    )
    assert ["circle" in line for line in violations(tmp_path)] == [True]


def test_namesakes_in_the_table_exist() -> None:
    assert [name for pair in MIRRORS.items() for name in pair if not (ROOT / name).exists()] == []


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    allowed = {
        "diffmoe_ep/__init__.py": "from diffmoe_ep.checkpoint.load import load_model",
        "diffmoe_ep/__main__.py": "from diffmoe_ep.cli import main",
        "diffmoe_ep/cli/__init__.py": "from diffmoe_ep import config\nfrom diffmoe_ep.train.trainer import train",
        "diffmoe_ep/config/__init__.py": "import yaml",
        "diffmoe_ep/checkpoint/store.py": "import torch.distributed.checkpoint as dcp\nimport diffmoe_ep.model.dit",
        "diffmoe_ep/parallel/mesh.py": "x = os.environ\nimport torch.distributed, megatron.core",
        "diffmoe_ep/train/engine.py": "import deepspeed",
        "diffmoe_ep/train/log.py": "def f():\n    import matplotlib\nif TYPE_CHECKING:\n    from PIL import Image",
        "data_prep/digits.py": "import webdataset\nfrom diffmoe_ep.data.codec import Batch\nimport data_prep.write",
    }
    write(tmp_path, allowed)
    assert violations(tmp_path) == []


def write(root: Path, files: dict[str, str]) -> None:
    """A small project of these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
