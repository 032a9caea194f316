"""Plans on clusters: every config on every cluster, traffic by few-line formulas, time by its own parts, tables, and
bad files.
"""

import dataclasses
import json
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from diffmoe_ep.bench.calibrate import Comparison
from diffmoe_ep.config import Config, ConfigError, from_tree, load
from diffmoe_ep.planner.cluster import Cluster, Measurement, load_cluster, load_measurement
from diffmoe_ep.planner.cluster_plan import estimate, plan_cluster
from diffmoe_ep.planner.layout import Layout
from diffmoe_ep.planner.plan import plan
from diffmoe_ep.planner.report import WIDTH, ClusterPlan, Estimate
from diffmoe_ep.planner.traffic import Flow, traffic
from diffmoe_ep.tables import size

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "configs/cluster").glob("*.yaml"))
IMAGENET = sorted((ROOT / "configs/imagenet").glob("*.yaml"))
RANKS = {"h800x8": 8, "h800x16": 16, "h800x32": 32, "h800x256": 256, "h100x8": 8, "h200x8": 8, "h200x1": 1, "cpu2": 2}


@lru_cache
def loaded(path: Path) -> Config:
    return load(path)


def cluster(name: str, **changes: Any) -> Cluster:
    return dataclasses.replace(load_cluster(ROOT / f"configs/cluster/{name}.yaml"), **changes)


def model(size: str = "L", batch: int = 256, **rest: Any) -> Config:
    return from_tree({"model": {"size": size}, "train": {"global_batch": batch}, **rest})


@pytest.mark.slow
@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_config_plans_on_every_cluster(path: Path) -> None:
    where = load_cluster(path)
    assert where.ranks == RANKS[path.stem]
    assert path.read_text().startswith("# ") and f"configs/cluster/{path.name}" in path.read_text()
    for config in map(loaded, IMAGENET):
        made = plan_cluster(config, where)
        lines = made.lines()
        assert all(estimate.memory.total > 0 and 0 < estimate.step.mfu < 1 for estimate in made.estimates)
        assert max(map(len, lines)) <= WIDTH
        assert json.loads(json.dumps(made.as_dict()))["parameters"] == plan(config).total
        assert (made.own is None) == (config.parallel.expert_parallel > where.ranks)


def test_no_cluster_is_missing() -> None:
    assert {path.stem for path in CLUSTERS} == set(RANKS)


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_rows_travel_only_within_the_expert_group() -> None:
    """8 samples of 256 tokens on each of 32 ranks, D = 1024, bf16: a rank gets its share of the rows from each of its
    group.
    """
    config = model()
    for expert, inside, across in ((1, 0, 0), (8, 7, 0), (16, 7, 8)):
        found = traffic(config, Layout(32, expert, 1, "none"), cluster("h800x32")).dispatch
        rows = 8 * 256 * 1024 * 2 / max(1, expert)
        assert (found.inside, found.across) == (rows * inside, rows * across)
        assert found.over_nodes == bool(across)


def test_gradients_of_experts_are_reduced_over_their_copies_and_dense_ones_over_all() -> None:
    config, parts = model(), {part.name: part.parameters for part in plan(model()).parts}
    experts = parts["experts"]
    dense = sum(parts.values()) - experts
    for expert in (2, 8, 16):
        found = traffic(config, Layout(32, expert, 1, "none"), cluster("h800x32"))
        copies, on_node = 32 // expert, max(1, 8 // expert)
        moved = 2 * 4 * experts / expert * (copies - 1) / copies
        assert found.expert_gradients.across == pytest.approx(moved / on_node if copies > on_node else 0)
        assert found.expert_gradients.inside == pytest.approx(moved if on_node > 1 else 0)
        assert found.dense_gradients.across == pytest.approx(2 * 4 * dense * 31 / 32 / 8)
        wide, narrow = 4 * dense * 31 / 32, 4 * experts / expert * (copies - 1) / copies
        assert found.gather.inside == pytest.approx(wide + (narrow if on_node > 1 else 0), rel=1e-4)  # but for padding
        assert found.gather.across == pytest.approx(wide / 8 + (narrow / on_node if copies > on_node else 0), rel=1e-4)
    assert traffic(config, Layout(32, 8, 0, "none"), cluster("h800x32")).gather == Flow()


def test_selection_by_each_algorithm() -> None:
    """The gathered scores: 4 bytes of each token, expert and predictor from each other rank."""
    found = traffic(model(), Layout(32, 8, 1, "none"), cluster("h800x32"))
    gather = found.selections["gather"]
    assert gather.inside + gather.across == 4 * 2048 * 32 * 31 and gather.rounds == 1
    assert gather.inside == pytest.approx(4 * 2048 * 32 * 7)
    assert found.algorithm in ("owner", "radix") and found.selection is found.selections[found.algorithm]
    forced = traffic(model(compute={"topk": "gather"}), Layout(32, 8, 1, "none"), cluster("h800x32"))
    assert forced.algorithm == "gather" and forced.selection == gather
    inside = traffic(model(pool={"span": 8}), Layout(32, 8, 1, "none"), cluster("h800x32"))
    assert inside.algorithm is None and inside.selection == Flow()


def test_a_flow_takes_as_long_as_its_slower_link() -> None:
    where = cluster("h800x32", node_gbs=100.0, network_gbs=10.0, node_us=10.0, network_us=30.0)
    assert Flow(1e9, 0.5e9, 2, True).seconds(where) == pytest.approx(0.05 + 60e-6)
    assert Flow(1e9, 0.0, 1).seconds(where) == pytest.approx(0.01 + 10e-6)
    assert Flow().seconds(where) == 0


# -- time --------------------------------------------------------------------------------------------------------------


def made(config: Config, layout: Layout, where: Cluster) -> Estimate:
    return estimate(config, layout, where)


def test_without_limits_but_the_matmul_mfu_is_that_of_the_matmul() -> None:
    """With memory, links and starts for nothing, a dense step is its FLOPs at the matmul's rate."""
    free = {"bandwidth_gbs": 1e12, "fresh_gbs": 1e12, "gelu_gelements": 1e12, "node_gbs": 1e12, "network_gbs": 1e12}
    free |= {"node_us": 0.0, "network_us": 0.0, "launch_us": 0.0, "bf16_tflops": 500.0, "peak_tflops": 1000.0}
    config = from_tree({"model": {"family": "dense", "size": "L"}})
    found = made(config, Layout(8, 1, 1, "none"), cluster("h800x8", **free))
    assert found.step.mfu == pytest.approx(0.5, rel=0.01)
    assert found.step.seconds == pytest.approx(plan(config).training * 256 / 8 / 500e12, rel=0.01)
    block = made(config, Layout(8, 1, 1, "block"), cluster("h800x8", **free))
    assert block.step.seconds == pytest.approx(4 / 3 * found.step.seconds, rel=0.01)


def test_overlap_hides_the_shorter_of_travel_and_compute() -> None:
    config = model(batch=512)
    for link in (5.0, 160.0, 5000.0):
        step = made(config, Layout(8, 8, 1, "none"), cluster("h800x8", node_gbs=link)).step
        assert step.hidden == pytest.approx(min(step.parts["dispatch"], step.parts["experts"]) / 2)
        assert step.overlapped == pytest.approx(step.seconds - step.hidden)
    alone = made(config, Layout(8, 1, 1, "none"), cluster("h800x8")).step
    assert alone.parts["dispatch"] == alone.hidden == 0


def test_accumulation_reduces_once_but_at_stage_2() -> None:
    config = from_tree({"model": {"size": "L"}, "train": {"global_batch": 512, "grad_accumulation": 4}})
    first, second = (made(config, Layout(8, 1, zero, "none"), cluster("h800x8")).step.parts for zero in (1, 2))
    assert second["gradient reduction"] == pytest.approx(4 * first["gradient reduction"])
    assert first["optimizer"] == second["optimizer"]


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_and_the_best_is_the_fastest_that_does() -> None:
    planned = plan_cluster(model(batch=4096, parallel={"expert_parallel": 8}), cluster("h800x8"))
    own, best = planned.own, planned.best
    assert own is not None and best is not None and own.over > 0 and best.verdict == "yes"
    assert best.layout.recompute != "none" and best.step.seconds == min(
        one.step.seconds for one in planned.estimates if one.verdict == "yes"
    )
    text = "\n".join(planned.lines())
    assert f"{size(own.over)} more than there is; most of it is activations" in text
    layout = f"parallel.expert_parallel={best.layout.expert} parallel.zero_stage={best.layout.zero}"
    assert f"{layout} compute.recompute={best.layout.recompute}" in text


def test_nothing_fits() -> None:
    planned = plan_cluster(model(), cluster("h800x8", memory_gb=5.0))
    assert planned.best is None and planned.closest.over > 0
    assert "No layout fits. The one that needs least is EP" in "\n".join(planned.lines())


def test_days_follow_from_the_rate() -> None:
    planned = plan_cluster(model(), cluster("h800x8"), samples=1_281_167)
    one = planned.estimates[0]
    assert planned.days(one) == pytest.approx(1_281_167 / 256 * one.step.seconds / 86400)
    data = planned.as_dict()["layouts"][0]
    assert data["samples_per_day"] == pytest.approx(86400 * 256 / one.step.seconds) and data["days"] == planned.days(
        one
    )


def test_a_layout_that_is_not_possible_is_told_with_its_reason() -> None:
    planned = plan_cluster(model(parallel={"expert_parallel": 8}), cluster("h200x1"))
    assert planned.own is None and planned.best is not None
    assert re.search(
        r"not possible here: parallel\.expert_parallel is 8 but only 1 process", "\n".join(planned.lines())
    )
    with pytest.raises(ConfigError, match=r"train\.global_batch .* do not divide over 256 ranks"):
        plan_cluster(model(batch=64), cluster("h800x256"))


def test_a_plan_takes_well_under_a_second() -> None:
    """Of the processor's own time, so that a busy machine does not matter."""
    config, where = load(ROOT / "configs/imagenet/diffmoe_xl_e16_flow.yaml"), cluster("h800x256")
    start = time.process_time()
    plan_cluster(config, where)
    assert time.process_time() - start < 5


def test_tables_are_aligned() -> None:
    lines = plan_cluster(model(), cluster("h800x32")).lines()
    head = next(index for index, line in enumerate(lines) if line.startswith("EP"))
    ends = [
        {match.end() for match in re.finditer(r"\S+(?: (?:[kMG]B[!~]?|ms|s|M))?", line)}
        for line in lines[head + 2 : head + 14]
    ]
    assert len(set.intersection(*ends)) >= 11


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("memory_gb: 80\n", None),
        ("memory: 80\n", r"unknown key memory; did you mean memory_gb\?"),
        ("memory_gb: much\n", r"memory_gb: expected a number, got 'much'"),
        ("memory_gb: 0\n", r"memory_gb is 0\.0; it must be greater than 0"),
        ("", r"lacks memory_gb; the keys are device"),
        ("memory_gb: 3\n", r"reserve_gb 4 leaves nothing of memory_gb 3"),
    ],
)
def test_cluster_files_are_strict(tmp_path: Path, change: str, message: str | None) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text((ROOT / "configs/cluster/h800x8.yaml").read_text().replace("memory_gb: 80\n", change))
    if message is None:
        assert load_cluster(path).memory_gb == 80
        return
    with pytest.raises(ConfigError, match=message) as raised:
        load_cluster(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "not a mapping"), ("a: [", "is not YAML"), (None, "does not exist")]
)
def test_what_is_no_cluster_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)


def test_measured_rates_take_the_place_of_the_files(tmp_path: Path) -> None:
    found = Measurement(device="mine", bf16_tflops=700.0, node_gbs=150.0)
    found.save(tmp_path / "measured.json")
    assert load_measurement(tmp_path / "measured.json") == found
    where = load_cluster(ROOT / "configs/cluster/h800x8.yaml", tmp_path / "measured.json")
    assert where == cluster("h800x8", bf16_tflops=700.0, node_gbs=150.0)
    (tmp_path / "measured.json").write_text('{"bf16_tflops": -1}')
    with pytest.raises(ConfigError, match=r"measured\.json: bf16_tflops is -1\.0; it must be greater than 0"):
        load_measurement(tmp_path / "measured.json")


def test_a_comparison_tells_its_error() -> None:
    planned = plan_cluster(model(), cluster("h800x8"))
    one = planned.estimates[0]
    peak = one.memory.total * 2
    found = Comparison(
        "a step", Measurement(bf16_tflops=700.0), one, one.step.seconds / 1.25, 1.0, 2.0, 0.5, (1.5, 0.5), peak
    )
    assert found.mfu == pytest.approx(1.25 * one.step.mfu)
    assert found.error == pytest.approx(0.25)
    text = "\n".join(found.lines())
    assert "error +25.0%" in text and "bf16_tflops 700" in text and "load 0.50" in text
    assert "error -50.0%" in text and "1.5000 at first, 0.5000 after 2 steps" in text
    assert json.loads(json.dumps(found.as_dict()))["error"] == pytest.approx(0.25)


def test_a_plan_is_a_value() -> None:
    assert isinstance(plan_cluster(model(), cluster("cpu2")), ClusterPlan)
