import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig, SampleConfig
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.evaluate.capacity import plots
from diffmoe_ep.evaluate.capacity.intervals import check_search, search, with_threshold, write_search
from diffmoe_ep.evaluate.capacity.report import check_report, report
from diffmoe_ep.evaluate.capacity.report_files import write
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import shard_experts
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from diffmoe_ep.sampling.capacity_record import CapacityRecord
from diffmoe_ep.sampling.generate import start_noise
from diffmoe_ep.sampling.sample import Samples, sample
from ranks import run
from train.runs import busy

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    input_size=8, in_channels=1, out_channels=1, hidden_size=32, num_blocks=4, num_heads=2, num_classes=4, num_experts=8
)  # 16 tokens, MoE in blocks 1 and 3
SAMPLE = SampleConfig(steps=3, guidance=1.5, chunk=2)
INFO = DataInfo(name="dots", kind="pixels", shape=(1, 8, 8), scale=0.125, shift=-1.0, class_names=("a", "b", "c", "d"))
CLASSES, PER_CLASS, SEED = range(4), 3, 5


def build(model: ModelConfig = MODEL) -> DiT:
    """A model away from its zero start, whose thresholds cut some tokens off."""
    made = busy(0.5)(DiT(model, PoolConfig(span=4)), 0).eval()
    generator = torch.Generator().manual_seed(2)
    for layer in made.moe_layers():
        layer.router.weight.data.normal_(0.0, 1.0, generator=generator)
        if layer.predictor is not None:
            layer.predictor.fc2.weight.data.normal_(0.0, 1.5, generator=generator)
            layer.predictor.threshold.fill_(0.6)
            layer.predictor.updates.fill_(10_000)
    return made


def sample_fn(module: DiT):
    return lambda labels, config, progress: sample(module, labels, config, Mesh(), seed=SEED, progress=progress)


def made(module: DiT, config: SampleConfig = SAMPLE, **more):
    return report(module, sample_fn(module), config, INFO, Mesh(), per_class=PER_CLASS, seed=SEED, **more)


@pytest.fixture(scope="module")
def module() -> DiT:
    return build()


@pytest.fixture(scope="module")
def written(module, tmp_path_factory):
    """The report of the small model, and the folder that it was written to."""
    out = tmp_path_factory.mktemp("capacity")
    found = made(module)
    write(found, out / "deep" / "folder")
    return found, out / "deep" / "folder"


@torch.no_grad()
def loops(module: DiT, label: int, samples: range):
    """One sample at a time through Euler's steps and both halves of guidance, choices counted token by token.

    Gives for (step, layer): how many tokens each expert took (N,), and (predictor, top-k, both) pairs of the sample's
    own top-k.
    """
    module.set_inference(InferenceRule("threshold", 0.6))
    layers, num_experts = module.moe_layers(), MODEL.num_experts
    processed = np.zeros((SAMPLE.steps, len(layers), num_experts))
    pairs = np.zeros((SAMPLE.steps, len(layers), 3))
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in layers]
    for number in samples:
        x = start_noise(SEED, range(number, number + 1), (1, 8, 8))
        for step in range(SAMPLE.steps):
            velocity = []
            for condition in (label, MODEL.num_classes):
                seen.clear()
                velocity.append(
                    module(x, torch.full((1,), 1 - step / SAMPLE.steps), torch.tensor([condition])).prediction
                )
                for place, (layer, tokens) in enumerate(zip(layers, seen, strict=True)):
                    scores = torch.softmax(tokens[0] @ layer.router.weight.T, 1)
                    chances = torch.sigmoid(layer.predictor(tokens[0]))
                    for expert in range(num_experts):
                        ours = {token for token in range(16) if chances[token, expert] > 0.6}
                        theirs = set(sorted(range(16), key=lambda token: -scores[token, expert])[:2])
                        processed[step, place, expert] += len(ours)
                        pairs[step, place] += len(ours), len(theirs), len(ours & theirs)
            x = x - (velocity[1] + SAMPLE.guidance * (velocity[0] - velocity[1])) / SAMPLE.steps
    for hook in hooks:
        hook.remove()
    return processed, pairs


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# -- report ------------------------------------------------------------------------------------------------------------


def test_capacities_are_those_of_plain_loops(module, written):
    found, _ = written
    by_class = {label: loops(module, label, range(PER_CLASS))[0] for label in CLASSES}
    offered = 2 * PER_CLASS * 16  # tokens of a class in a step, both halves
    for one in found.classes:
        expected = 8 * by_class[one.label].mean((1, 2)) / offered
        assert 0.05 < expected.mean() < 7.5
        assert one.per_step.numpy() == pytest.approx(expected)
        assert one.capacity == pytest.approx(expected.mean())
    total = 8 * sum(by_class.values()) / (4 * offered)
    assert found.per_layer_expert_step().numpy() == pytest.approx(total)
    assert found.record.average() == pytest.approx(total.mean())


def test_classes_are_ranked_hardest_first(written):
    found, _ = written
    capacities = [one.capacity for one in found.classes]
    assert capacities == sorted(capacities, reverse=True)
    assert capacities[0] > capacities[-1]
    assert sorted(one.name for one in found.classes) == ["a", "b", "c", "d"]
    assert all(one.name == "abcd"[one.label] for one in found.classes)


def test_topk_and_predictor_are_compared_on_the_same_tokens(module, written):
    against = written[0].topk
    assert against.k == 2
    assert against.predictor.labels.tolist() == [0, 1, 2, 3]
    expected = sum(loops(module, label, range(label, label + 1))[1] for label in CLASSES)
    assert np.array_equal(against.counts.numpy(), expected)
    ours, theirs, both = np.moveaxis(expected, -1, 0)
    assert against.agreement().numpy() == pytest.approx(both / (ours + theirs - both))
    assert against.overall() == pytest.approx(both.sum() / (ours.sum() + theirs.sum() - both.sum()))
    assert 0 < against.overall() < 1
    assert against.topk.capacity.average() == 1
    assert against.predictor.capacity.processed.sum() == ours.sum()
    assert not torch.equal(against.topk.latents, against.predictor.latents)


def test_the_model_is_left_as_it_was(module):
    before = [(layer.dispatcher, layer.pools) for layer in module.moe_layers()]
    made(module, classes=[1])
    assert [(layer.dispatcher, layer.pools) for layer in module.moe_layers()] == before
    assert {layer.rule.selection for layer in module.moe_layers()} == {SAMPLE.selection}


def test_activated_parameters_follow_from_the_measured_capacity(module, written):
    found, _ = written
    capacity = found.record.average()
    experts = sum(parameter.numel() for layer in module.moe_layers() for parameter in layer.experts.parameters())
    everything = sum(parameter.numel() for parameter in module.parameters())
    assert found.activated == pytest.approx(everything - experts + capacity * experts / 8)
    dense = sum(parameter.numel() for index in (0, 2) for parameter in module.blocks[index].ffn.parameters())
    beside = sum(
        p.numel()
        for layer in module.moe_layers()
        for part in (layer.router, layer.predictor)
        for p in part.parameters()
    )
    ffn = dense + experts + beside
    assert found.estimate == pytest.approx((1 + capacity) / 9 * ffn + everything - ffn)


def test_tables_hold_the_measurements(written):
    found, out = written
    steps = rows(out / "capacity_per_step.csv")
    assert [int(row["step"]) for row in steps] == [0, 1, 2]
    assert [float(row["capacity"]) for row in steps] == pytest.approx(found.record.per_step().tolist(), rel=1e-5)
    cube = rows(out / "capacity_per_layer_expert.csv")
    assert len(cube) == 3 * 2 * 8
    assert {(row["layer"], row["block"]) for row in cube} == {("0", "1"), ("1", "3")}
    for row in cube:
        value = found.per_layer_expert_step()[int(row["step"]), int(row["layer"]), int(row["expert"])]
        assert float(row["capacity"]) == pytest.approx(float(value), rel=1e-5)
    classes = rows(out / "capacity_per_class.csv")
    assert [row["rank"] for row in classes] == ["1", "2", "3", "4"]
    assert [(int(row["class"]), row["name"]) for row in classes] == [(one.label, one.name) for one in found.classes]
    assert [float(row["capacity"]) for row in classes] == pytest.approx(
        [one.capacity for one in found.classes], rel=1e-5
    )
    pairs = rows(out / "topk_against_predictor.csv")
    assert [[int(row[name]) for name in ("predictor", "topk", "both")] for row in pairs] == found.topk.counts.flatten(
        0, 1
    ).long().tolist()
    assert [float(row["agreement"]) for row in pairs] == pytest.approx(
        found.topk.agreement().flatten().tolist(), rel=1e-5
    )


def test_plots_are_pictures_with_something_on_them(written):
    _, out = written
    names = {
        "capacity_per_step",
        "capacity_per_layer_expert",
        "expert_dynamics",
        "capacity_per_class",
        "hardest_easiest",
    }
    assert {path.stem for path in out.glob("*.png")} == names | {"topk_against_predictor"}
    for path in out.glob("*.png"):
        _check_picture(path)


def _check_picture(path):
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
        assert 300 <= width <= 2500 and 150 <= height <= 2500
        assert np.asarray(image.convert("RGB")).std() > 5


def test_plots_of_a_large_model_stay_pictures_of_a_page(tmp_path):
    random = np.random.default_rng(0)
    cube = random.uniform(0, 3, (40, 24, 16))
    plots.expert_map(tmp_path / "map.png", cube, list(range(1, 48, 2)))
    plots.expert_curves(tmp_path / "curves.png", cube, list(range(1, 48, 2)))
    names = [f"{kind}, another name" for kind in ("barrel", "notebook computer of old")] * 500
    ranked = list(zip(names, sorted(random.uniform(0.9, 1.1, 1000), reverse=True), strict=True))
    plots.classes(tmp_path / "classes.png", ranked, 1.0)
    plots.classes(tmp_path / "same.png", [("one", 1.0), ("two", 1.0)], 1.0)
    for path in tmp_path.glob("*.png"):
        _check_picture(path)


def test_the_summary_is_aligned_and_the_dictionary_is_json(written):
    found, _ = written
    lines = found.lines()
    text = "\n".join(lines)
    assert f"{found.record.average():.4f}" in text
    hardest = ", ".join(f"{one.name} {one.capacity:.3f}" for one in found.classes[:2])
    assert [line.split("  ", 1)[1].strip() for line in lines if line.startswith("hardest classes")] == [hardest]
    assert len({len(line) - len(line[22:].lstrip()) for line in lines[1:3]}) == 1
    assert "by Eq. 40" in text and "top-k at batch 1" in text
    assert json.loads(json.dumps(found.as_dict()))["capacity"] == found.record.average()


@pytest.mark.parametrize("info", [replace(INFO, kind="moments", class_names=()), DataInfo()])
def test_latents_of_a_vae_and_what_nobody_knows_are_measured_but_not_shown(module, tmp_path, info):
    found = report(module, sample_fn(module), SAMPLE, info, Mesh(), per_class=1, seed=SEED)
    write(found, tmp_path)
    assert not (tmp_path / "hardest_easiest.png").exists()
    assert (tmp_path / "topk_against_predictor.png").exists()
    assert {one.name for one in found.classes} == {"0", "1", "2", "3"}


def test_count_takes_as_many_but_by_score(module):
    found = made(module, replace(SAMPLE, selection="count"), classes=[0, 2])
    threshold = made(module, classes=[0, 2])
    first = [
        result.topk.counts[0, 0] for result in (found, threshold)
    ]  # the first layer of the first step sees the same tokens
    assert first[0][0] == first[1][0]
    assert first[0][2] >= first[1][2]


@pytest.mark.parametrize("family", ["tc", "ec"])
def test_families_without_predictor_have_a_report_without_comparison(family, tmp_path):
    found = made(build(replace(MODEL, family=family)))
    write(found, tmp_path)
    assert found.topk is None
    assert found.record.average() == 1
    assert not (tmp_path / "topk_against_predictor.csv").exists()
    assert all("top-k" not in line for line in found.lines())


def test_few_tokens_leave_the_comparison_out():
    found = made(build(replace(MODEL, num_experts=32)), classes=[0])
    assert found.topk is None


def test_what_cannot_be_reported_is_refused_before_drawing(module):
    def never(labels, sample, progress):
        raise AssertionError

    dense = DiT(replace(MODEL, family="dense"))
    with pytest.raises(ConfigError, match="model.family is dense"):
        report(dense, never, SAMPLE, INFO, Mesh(), per_class=1, seed=0)
    with pytest.raises(ConfigError, match="--per-class is 0"):
        report(module, never, SAMPLE, INFO, Mesh(), per_class=0, seed=0)
    with pytest.raises(ConfigError, match="class 4 does not exist"):
        check_report(MODEL, 1, [1, 4])
    with pytest.raises(ConfigError, match="no MoE layer"):
        check_report(replace(MODEL, num_blocks=1), 1)


def test_steps_of_the_solver_s_own_are_refused(module):
    def longer(labels, config, progress):
        return sample(module, labels, replace(config, steps=4), Mesh(), seed=0)

    with pytest.raises(ConfigError, match=r"took 4 steps of its own where sample\.steps is 3"):
        report(module, longer, SAMPLE, INFO, Mesh(), per_class=1, seed=0)


# -- search ------------------------------------------------------------------------------------------------------------


def toy(capacities):
    """A drawer whose capacity at each threshold is given; the drawn latents are the threshold."""

    def draw_with(threshold):
        processed = torch.full((1, 1, 2), 2 * capacities[threshold]).double()
        value = -1.0 if isinstance(threshold, str) else threshold
        return Samples(
            torch.full((1, 1, 1, 1), value), torch.zeros(1), CapacityRecord(processed, torch.full((1, 1), 4.0).double())
        )

    return draw_with


CAPACITIES = {0.2: 1.4, 0.4: 1.0, 0.6: 0.8, 0.9: 0.5, "dynamic": 0.9}
SCORES = {0.2: 1.0, 0.4: 3.0, 0.6: 2.0, 0.9: 9.0, "dynamic": 0.5}


def by_table(scores):
    return lambda drawn: next(
        score
        for name, score in scores.items()
        if math.isclose(-1.0 if name == "dynamic" else name, float(drawn.latents), rel_tol=1e-6)
    )


def test_the_best_constant_within_the_limit_is_picked():
    found = search(toy(CAPACITIES), list(CAPACITIES), by_table(SCORES), score="distance")
    assert [(one.threshold, one.score) for one in found.candidates] == list(SCORES.items())
    assert [one.capacity for one in found.candidates] == pytest.approx(list(CAPACITIES.values()))
    assert found.best is found.candidates[2]  # 0.2 spends too much, and dynamic is no constant
    higher = search(toy(CAPACITIES), list(CAPACITIES), by_table(SCORES), lower_is_better=False)
    assert higher.best.threshold == 0.9
    wide = search(toy(CAPACITIES), list(CAPACITIES), by_table(SCORES), limit=1.5)
    assert wide.best.threshold == 0.2


def test_no_number_never_wins_and_of_equals_the_cheaper_does():
    scores = {0.2: 1.0, 0.4: 2.0, 0.6: 2.0, 0.9: math.nan}
    assert search(toy(CAPACITIES), list(scores), by_table(scores)).best.threshold == 0.6
    nothing = search(toy(CAPACITIES), [0.9], by_table(scores))
    assert nothing.best is None
    assert "finite score" in nothing.lines()[-1]


def test_it_says_so_when_none_is_cheap_enough():
    found = search(toy(CAPACITIES), [0.2], by_table(SCORES))
    assert found.best is None
    assert found.lines()[-1] == "none of these constants has C_infer^avg <= 1: try thresholds above 0.2"
    assert json.loads(json.dumps(found.as_dict()))["best"] is None


def test_the_table_of_a_search(tmp_path):
    found = search(toy(CAPACITIES), list(CAPACITIES), by_table(SCORES), score="distance")
    lines = found.lines()
    assert [line.split()[0] for line in lines[:-1]] == ["threshold", "0.2", "0.4", "0.6", "0.9", "dynamic"]
    assert lines[1].endswith("C > 1") and lines[3].endswith("best with C <= 1") and lines[5].endswith("for comparison")
    assert lines[-1] == "best: sample.threshold=0.6"
    assert write_search(found, tmp_path) == ["thresholds.csv", "thresholds.png"]
    table = rows(tmp_path / "thresholds.csv")
    assert [row["threshold"] for row in table if row["best"] == "1"] == ["0.6"]
    assert [float(row["distance"]) for row in table] == list(SCORES.values())
    _check_picture(tmp_path / "thresholds.png")


def test_a_real_search_spends_less_at_higher_thresholds(module):
    labels = torch.arange(4)
    found = search(
        with_threshold(sample_fn(module), labels, SAMPLE),
        [0.0, 0.5, 0.9, 1.0],
        lambda drawn: float(drawn.latents.square().mean()),
    )
    capacities = [one.capacity for one in found.candidates]
    assert capacities[0] == 8 and capacities[3] == 0
    assert capacities[0] > capacities[1] > capacities[2] > capacities[3]
    assert found.best is not None and found.best.capacity <= 1


def test_other_ranks_get_nothing():
    assert search(lambda threshold: None, [0.1, 0.2], lambda drawn: 0.0) is None


@pytest.mark.parametrize(
    ("changes", "sample", "thresholds", "message"),
    [
        ({"family": "dense"}, {}, [0.5], "family is dense"),
        ({"family": "tc"}, {}, [0.5], "family tc has no capacity predictor"),
        ({"family": "ec"}, {}, [0.5], "or one of ec trained with model.predictor=true"),
        ({}, {"selection": "topk"}, [0.5], "selection is topk"),
        ({}, {}, ["dynamic"], "names no constant"),
        ({}, {}, [0.5, 1.5], "holds 1.5"),
        ({}, {}, [math.nan], "holds nan"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, sample, thresholds, message):
    with pytest.raises(ConfigError, match=message):
        check_search(replace(MODEL, **changes), replace(SAMPLE, **sample), thresholds)


def test_expert_choice_with_a_predictor_can_be_searched():
    check_search(replace(MODEL, family="ec", predictor=True), SAMPLE, [0.5])


# -- ranks -------------------------------------------------------------------------------------------------------------


def report_on_ranks(rank: int):
    """The same report with the experts over two ranks: what the first rank counts, None of the other."""
    mesh = init_mesh(2, 1, 1.0, device="cpu")
    module = shard_experts(build(), mesh)

    def sharded(labels, config, progress):
        return sample(module, labels, config, mesh, seed=SEED, progress=progress)

    found = report(module, sharded, SAMPLE, INFO, mesh, per_class=PER_CLASS, seed=SEED)
    return None if found is None else (found.record, found.topk.counts, [one.label for one in found.classes])


def test_two_ranks_count_what_one_does(written):
    first, second = run(2, report_on_ranks)
    found, _ = written
    assert second is None
    record, counts, classes = first
    assert torch.equal(record.tokens, found.record.tokens)
    assert torch.equal(record.processed, found.record.processed)
    assert torch.equal(counts, found.topk.counts)
    assert classes == [one.label for one in found.classes]
