"""Reference files that are refused: what would run code, tensors of another model, questions left open."""

import argparse
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.published import ARGS, State, saved, state
from diffmoe_ep.checkpoint.import_published import import_published
from diffmoe_ep.checkpoint.store import CheckpointError

# ---- What is refused ----


class Attack:
    """Runs something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class Allowed:
    """A class that some other library told torch to trust."""


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["args", "ema", "opt", "inside args"])
def test_a_file_that_would_run_something_is_refused(tmp_path: Path, place: str, old: bool) -> None:
    target = tmp_path / "it ran"
    for function, arguments, name in (
        (os.mkdir, (str(target),), "posix.mkdir"),
        (eval, (f"open({str(target)!r}, 'w')",), "eval"),
        (getattr, (argparse.Namespace, "__init__"), "getattr"),
    ):
        attack = Attack(function, *arguments)
        value = {"args": attack, "ema": {"a": attack}, "opt": [attack], "inside args": argparse.Namespace(lr=attack)}[
            place
        ]
        content = {"model": {}, "ema": state(), "args": ARGS} | {place.removeprefix("inside "): value}
        torch.save(content, tmp_path / "forged.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(
            CheckpointError, match=f"holds more than tensors and plain arguments: it asks for {name}.*It was not run"
        ) as info:
            import_published(tmp_path / "forged.pt", tmp_path / "out", heads=3)
        assert "weights_only" not in str(info.value)  # torch's own message advises to open the file without protection
        assert not target.exists() and not (tmp_path / "out").exists()


def test_what_others_allowed_is_refused_too(tmp_path: Path) -> None:
    torch.save({"ema": state(), "args": Allowed()}, tmp_path / "file.pt")
    with torch.serialization.safe_globals([Allowed]):
        before = torch.serialization.get_safe_globals()
        with pytest.raises(CheckpointError, match=r"it asks for .*Allowed"):
            import_published(tmp_path / "file.pt", tmp_path / "out", heads=3)
        assert set(torch.serialization.get_safe_globals()) == set(before) >= {Allowed}


def test_a_file_whose_bytes_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    """torch.load looks at no checksum."""
    path = saved(tmp_path, state())
    content = bytearray(path.read_bytes())
    place = content.find(state()["x_embedder.proj.weight"].numpy().tobytes())
    content[place + 2] ^= 1  # the last bit but a few of one weight
    path.write_bytes(content)
    assert place > 0
    with pytest.raises(CheckpointError, match=r"is damaged: .*data/\d+ in it has not its checksum; use a sound copy"):
        import_published(path, tmp_path / "out", heads=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = state()
    weights["x_embedder.proj.bias"][1] = value
    with pytest.raises(CheckpointError, match="ema: x_embedder.proj.bias holds values that are not finite"):
        import_published(saved(tmp_path, weights), tmp_path / "out", heads=3)


def without(*names: str) -> Callable[[State], None]:
    return lambda w: [w.pop(name) for name in names] and None


def put(name: str, value: Any) -> Callable[[State], None]:
    return lambda w: w.update({name: value(w) if callable(value) else value})


def shift_blocks(w: State) -> None:
    for name in [name for name in w if name.startswith("blocks.1.")]:
        w[name.replace("blocks.1.", "blocks.2.")] = w.pop(name)


def swap_blocks(w: State) -> None:
    for name in [name for name in w if name.startswith("blocks.")]:
        w[
            name.replace("blocks.0.", "blocks.x.").replace("blocks.1.", "blocks.0.").replace("blocks.x.", "blocks.1.")
        ] = w.pop(name)


BAD: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (
        without("blocks.1.mlp.experts.3.fc2.bias"),
        r"ema has no tensor blocks.1.mlp.experts.3.fc2.bias, of shape \(24,\)",
    ),
    "no patches": (
        without("x_embedder.proj.weight"),
        "has no tensor x_embedder.proj.weight: it is no checkpoint of the reference",
    ),
    "unknown": (put("blocks.0.norm1.weight", torch.ones(24)), "ema holds blocks.0.norm1.weight, which"),
    "more experts": (put("blocks.1.mlp.experts.4.fc1.bias", torch.ones(96)), "holds blocks.1.mlp.experts.4.fc1.bias"),
    "shape": (
        put("blocks.1.mlp.experts.0.fc1.weight", torch.ones(48, 24)),
        r"fc1.weight has shape \(48, 24\) there and \(96, 24\)",
    ),
    "type": (
        put("t_embedder.mlp.0.bias", torch.ones(24).bfloat16()),
        "t_embedder.mlp.0.bias has type torch.bfloat16 there and F32",
    ),
    "dimensions": (
        put("final_layer.linear.weight", torch.ones(32)),
        r"final_layer.linear.weight has shape \(32,\); it has 2 dimensions",
    ),
    "head": (
        put("final_layer.linear.weight", torch.ones(31, 24)),
        "final_layer.linear.weight has 31 rows, no multiple of the patch's",
    ),
    "value": (put("x_embedder.proj.bias", [1.0]), "x_embedder.proj.bias is no plain tensor"),
    "expanded": (put("x_embedder.proj.bias", torch.ones(1).expand(10**12)), "x_embedder.proj.bias is no plain tensor"),
    "sparse": (put("x_embedder.proj.bias", torch.ones(24).to_sparse()), "x_embedder.proj.bias is no plain tensor"),
    "no square": (
        put("pos_embed", lambda w: w["pos_embed"][:, :8]),
        r"pos_embed has shape \(1, 8, 24\); it is \(1, T, D\) of a square",
    ),
    "position halves": (
        put("pos_embed", lambda w: w["pos_embed"].roll(12, 2)),
        "pos_embed are not the fixed sine-cosine positions",
    ),
    "trained positions": (
        put("pos_embed", lambda w: w["pos_embed"] + 0.01),
        r"differ by 0.01\): there the first half of D codes",
    ),
    "unknown positions": (
        put("pos_embed", lambda w: w["pos_embed"].flip(1)),
        "pos_embed are not the fixed sine-cosine positions",
    ),
    "wide positions": (put("pos_embed", torch.ones(1, 9, 26)), r"pos_embed is \(1, 9, 26\)"),
    "decay": (
        put("blocks.1.mlp.ema_decay", torch.tensor(1.5)),
        "blocks.1.mlp.ema_decay is 1.5; it is one number between 0 and 1",
    ),
    "no predictor": (
        without(*(name for name in state() if "capacity_predictor" in name)),
        "has no blocks.1.mlp.capacity_predictor.0.weight, so its experts are not DiffMoE's .*DiffMoE and Dense can "
        "be imported",
    ),
    "gap": (shift_blocks, "blocks are not numbered 0, 1, 2"),
    "other blocks": (swap_blocks, "blocks 0 are MoE; only every odd block, every block or none"),
    "prefix": (put("module.x_embedder.proj.bias", torch.ones(24)), "ema holds module.x_embedder.proj.bias"),
    "mixed prefix": (
        lambda w: (w.update(OrderedDict({"module.a": w.pop("pos_embed")} | w)), w.move_to_end("module.a", last=False)),
        "x_embedder.proj.weight does not begin with 'module.'",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_other_tensors_are_refused_by_name(tmp_path: Path, change: Callable[[State], Any], message: str) -> None:
    w = OrderedDict(state())
    change(w)
    file = saved(tmp_path, w)
    with pytest.raises(CheckpointError, match=message):
        import_published(file, tmp_path / "out", heads=3)
    assert not (tmp_path / "out").exists()


def test_the_other_set_is_checked_as_well(tmp_path: Path) -> None:
    file = saved(tmp_path, state(), state(experts=2))
    with pytest.raises(
        CheckpointError, match=r"model: blocks.1.mlp.gate_weight has shape \(2, 24\) there and \(4, 24\)"
    ):
        import_published(file, tmp_path / "out", heads=3)


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    file = saved(tmp_path)
    with pytest.raises(CheckpointError, match="do not tell --heads; give --heads$"):
        import_published(file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--heads 5 does not divide the hidden size 24"):
        import_published(file, tmp_path / "out", heads=5)
    with pytest.raises(CheckpointError, match="is of --input-size 6 by its pos_embed, not 32"):
        import_published(file, tmp_path / "out", heads=3, input_size=32)
    assert import_published(file, tmp_path / "out", heads=3, input_size=6).is_dir()


def test_a_published_width_comes_with_a_hint(tmp_path: Path) -> None:
    file = saved(tmp_path, state(hidden=384, blocks=1, experts=0, side=1))
    with pytest.raises(
        CheckpointError, match=r"give --heads \(of the published models, the one of hidden size 384 has 6 heads\)"
    ):
        import_published(file, tmp_path / "out")


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refused(content: Any, message: str, **options: Any) -> None:
        if isinstance(content, bytes):
            (tmp_path / "file.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match=message):
            import_published(tmp_path / "file.pt", tmp_path / "out", heads=3, **options)

    with pytest.raises(CheckpointError, match="nowhere.pt is not a file"):
        import_published(tmp_path / "nowhere.pt", tmp_path / "out", heads=3)
    refused(b"", "cannot be read")
    refused(b"some text that is no checkpoint", "holds more than tensors|cannot be read")
    refused(saved(tmp_path).read_bytes()[:5000], "cannot be read|holds more than tensors")
    refused(state(), "is no dictionary with model, ema and args")
    refused([state()], "is no dictionary with model, ema and args")
    refused(
        {"model": state(), "args": ARGS}, r"holds no ema \(it holds model, args\); ask for what it has with --weights"
    )
    refused({"ema": {}}, "ema is no state of a model")
    refused({"ema": state()["pos_embed"]}, "ema is no state of a model")


def test_arguments_that_are_no_plain_data_are_kept_as_text(tmp_path: Path) -> None:
    args = argparse.Namespace(decays=(0.9, 0.99), inner=argparse.Namespace(a=1), worst=math.inf)
    folder = import_published(saved(tmp_path, args=args), tmp_path / "out", heads=3)
    kept = json.loads((folder / "config.json").read_text())["provenance"]["args"]
    assert kept == {"decays": [0.9, 0.99], "inner": "Namespace(a=1)", "worst": "inf"}
