"""Law 3: a run is the same run on any number of ranks, at any expert parallelism and ZeRO stage; and the test can
fail.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.config import Config
from ranks import run
from train.runs import config, layout, trace

pytestmark = pytest.mark.slow

LAYOUTS = [(1, 1, 0), (2, 1, 1), (2, 2, 2), (4, 2, 1), (4, 4, 2), (4, 2, 0)]  # (W, EP, ZeRO)
KINDS = {"adamw": ["train.optimizer.kind=adamw"], "sgd": ["train.optimizer.kind=sgd", "train.optimizer.lr=0.05"]}

_traces: dict[Any, list[dict[str, Any]]] = {}


def traced(given: Config, world: int, expert: int, zero: int, fault: str | None = None) -> list[dict[str, Any]]:
    """Every rank's trace of a run; each run is done once per session."""
    key = (given, world, expert, zero, fault)
    if key not in _traces:
        _traces[key] = run(world, trace, layout(given, expert, zero), fault, timeout=240)
    return _traces[key]


def differences(traces: list[dict[str, Any]], single: dict[str, Any]) -> dict[str, float]:
    """Largest difference of losses (absolute), norms and thresholds (relative), over all ranks and steps, to the run on
    one rank.
    """
    pairs = [(torch.tensor(one["loss"]), torch.tensor(single["loss"])) for one in traces]
    norms = [(torch.tensor(one["grad_norm"]), torch.tensor(single["grad_norm"])) for one in traces]
    taus = [
        (torch.stack(one["thresholds"]), torch.stack(single["thresholds"])) for one in traces if single["thresholds"]
    ]
    return {
        "loss": max(float((a - b).abs().max()) for a, b in pairs),
        "grad_norm": max(float(((a - b) / b).abs().max()) for a, b in norms),
        "thresholds": max((float(((a - b) / b).abs().max()) for a, b in taus), default=0.0),
    }


def holds(found: dict[str, float]) -> bool:
    """The law's tolerances."""
    return found["loss"] <= 1e-6 and found["grad_norm"] <= 1e-5 and found["thresholds"] <= 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_layout_is_the_same_run(digits: Path, kind: str, accumulation: int) -> None:
    given = config(digits / "train", Path("unused"), f"train.grad_accumulation={accumulation}", *KINDS[kind])
    single = traced(given, *LAYOUTS[0])[0]
    assert max(single["grad_norm"]) > 0.3  # clipping is active
    assert single["loss"][-1] < single["loss"][0]
    for layout_ in LAYOUTS[1:]:
        found = differences(traced(given, *layout_), single)
        assert holds(found), f"(W, EP, ZeRO) = {layout_}: {found}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "layout_"),
    [
        ("a pool of one rank", (2, 2, 2)),
        ("expert gradients times the replicas", (4, 2, 1)),
        ("thresholds moved twice", (2, 1, 1)),
    ],
)
def test_planted_faults_break_the_law(digits: Path, fault: str, layout_: tuple[int, int, int]) -> None:
    for kind in KINDS:
        given = config(digits / "train", Path("unused"), "train.grad_accumulation=1", *KINDS[kind])
        single = traced(given, *LAYOUTS[0])[0]
        assert not holds(differences(traced(given, *layout_, fault), single)), f"{fault} went unseen with {kind}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("span", "layout_"), [(4, (2, 2, 1)), (1, (2, 2, 1)), (12, (4, 4, 1))])
def test_spans_are_the_same_run(digits: Path, span: int, layout_: tuple[int, int, int]) -> None:
    """Pools are cut by samples and not by ranks: some inside a rank, of one sample, and over two of four ranks."""
    given = config(digits / "train", Path("unused"), f"pool.span={span}", *KINDS["sgd"])
    single = traced(given, 1, 1, 0)[0]
    found = differences(traced(given, *layout_), single)
    assert holds(found), found


VARIANTS = {
    "every block": ["model.interleave=false", "model.num_blocks=2", *KINDS["sgd"]],
    "token choice": ["model.family=tc", "pool.span=12", *KINDS["sgd"]],
    "expert choice": ["model.family=ec", "model.predictor=true", *KINDS["sgd"]],
    "fine and shared experts": ["model.granularity=2", "model.shared_experts=1", *KINDS["sgd"]],
    "weight decay": ["train.optimizer.weight_decay=0.1", *KINDS["adamw"]],
    "no clipping": ["train.max_grad_norm=0", "train.schedule={kind: cosine, warmup: 3}", *KINDS["sgd"]],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_the_same_run(digits: Path, variant: str) -> None:
    given = config(digits / "train", Path("unused"), "train.steps=8", *VARIANTS[variant])
    single, traces = traced(given, 1, 1, 0)[0], traced(given, 2, 2, 2)
    found = differences(traces, single)
    assert holds(found), found


@pytest.mark.timeout(600)
def test_a_dense_model_is_the_same_run(digits: Path) -> None:
    given = config(digits / "train", Path("unused"), "model.family=dense", "train.grad_accumulation=3", *KINDS["sgd"])
    single, traces = traced(given, 1, 1, 0)[0], traced(given, 2, 1, 2)
    assert single["thresholds"] == []
    assert max(abs(a - b) for a, b in zip(traces[1]["loss"], single["loss"], strict=True)) <= 1e-6
    assert max(abs(a / b - 1) for a, b in zip(traces[1]["grad_norm"], single["grad_norm"], strict=True)) <= 1e-5


@pytest.mark.timeout(600)
def test_averaged_weights_are_the_same(digits: Path) -> None:
    given = config(digits / "train", Path("unused"), "train.grad_accumulation=1", *KINDS["sgd"])
    single, traces = traced(given, 1, 1, 0)[0], traced(given, 4, 2, 1)
    for name, wanted in single["ema"].items():
        found = (
            torch.cat([traces[rank]["ema"][name] for rank in (0, 1)]) if ".experts." in name else traces[3]["ema"][name]
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.timeout(600)
def test_bf16_trains_the_same_weights_closely(digits: Path) -> None:
    """In bf16 the choice of single tokens may flip, but the run stays close, and its state is float32."""
    given = config(
        digits / "train", Path("unused"), "train.precision=bf16", "train.grad_accumulation=1", *KINDS["adamw"]
    )
    single, traces = traced(given, 1, 1, 0)[0], traced(given, 2, 2, 1)
    full = traced(config(digits / "train", Path("unused"), "train.grad_accumulation=1", *KINDS["adamw"]), 1, 1, 0)[0]
    assert differences(traces, single)["loss"] < 5e-3
    assert differences([single], full)["loss"] < 5e-2
    assert differences([single], full)["loss"] > 0  # it did compute in bf16
    assert all(tensor.dtype == torch.float32 for tensor in traces[0]["ema"].values())
