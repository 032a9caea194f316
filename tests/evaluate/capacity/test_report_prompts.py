"""Capacity by prompt: a report over captions is that of drawing each prompt by itself, ranked and told by its words."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffmoe_ep.config import ConfigError, ModelConfig, PoolConfig, SampleConfig
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.evaluate.capacity.report import report
from diffmoe_ep.evaluate.capacity.report_files import write
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.prompts import Prompts
from diffmoe_ep.sampling.sample import Samples, sample
from train.runs import busy

MODEL = ModelConfig(
    condition="text",
    text_width=6,
    text_length=5,
    input_size=8,
    in_channels=1,
    out_channels=1,
    hidden_size=32,
    num_blocks=4,
    num_heads=2,
    num_experts=8,
)
SAMPLE = SampleConfig(steps=3, guidance=1.5, chunk=2)
INFO = DataInfo(name="dots", kind="pixels", shape=(1, 8, 8), scale=0.125, shift=-1.0)
WORDS = ("one digit: a 3 at the top left", "two 5s, and a very long tail of words that no bar has room for", "an 8", "")
SEED, EACH = 5, 3


@pytest.fixture(scope="module")
def module() -> DiT:
    """A model away from its zero start, whose thresholds cut some tokens off and whose captions have a say."""
    made = busy(0.5)(DiT(MODEL, PoolConfig(span=4)), 0).eval()
    generator = torch.Generator().manual_seed(2)
    for block in made.blocks:
        block.cross_attention.projection.weight.data.normal_(0.0, 1.0, generator=generator)
    for layer in made.moe_layers():
        layer.router.weight.data.normal_(0.0, 1.0, generator=generator)
        layer.predictor.fc2.weight.data.normal_(0.0, 1.5, generator=generator)
        layer.predictor.threshold.fill_(0.6)
        layer.predictor.updates.fill_(10_000)
    return made


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(3)
    rows = tuple(torch.randn(length, MODEL.text_width, generator=generator).half() for length in (5, 4, 1, 0))
    return Prompts(WORDS, rows, MODEL.text_length, MODEL.text_width)


def sampled(module: DiT, requested: Prompts | torch.Tensor, config: SampleConfig = SAMPLE) -> Samples:
    found = sample(module, requested, config, Mesh(), seed=SEED)
    assert found is not None
    return found


@pytest.mark.slow
def test_every_prompt_costs_what_drawing_it_alone_costs(module: DiT, prompts: Prompts, tmp_path: Path) -> None:
    sample_fn = lambda requested, config, _: sampled(module, requested, config)  # noqa: E731
    found = report(module, sample_fn, SAMPLE, INFO, Mesh(), per_class=EACH, seed=SEED, prompts=prompts)
    assert found is not None
    write(found, tmp_path)
    alone = {
        words: sampled(module, prompts.select([number] * EACH)).capacity.average() for number, words in enumerate(WORDS)
    }
    assert len(set(alone.values())) == len(WORDS)  # prompts differ
    assert {one.name: one.capacity for one in found.classes} == pytest.approx(alone)
    assert [one.capacity for one in found.classes] == sorted(alone.values(), reverse=True)
    assert found.record.average() == pytest.approx(sum(alone.values()) / len(alone))
    told = "\n".join(found.lines())
    assert f"3 of each of 4 prompts, seed {SEED}" in told and f"hardest prompts         {found.classes[0].name}" in told
    with (tmp_path / "capacity_per_prompt.csv").open() as file:
        ranked = list(csv.DictReader(file))
    assert [(row["rank"], row["name"]) for row in ranked] == [
        (str(rank), one.name) for rank, one in enumerate(found.classes, 1)
    ]
    assert [float(row["capacity"]) for row in ranked] == pytest.approx(
        [one.capacity for one in found.classes], rel=1e-5
    )
    assert found.as_dict()["capacity_per_prompt"] == {one.name: one.capacity for one in found.classes}
    assert {"capacity_per_prompt.png", "hardest_easiest.png", "topk_against_predictor.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_other_kind_of_condition_is_refused(module: DiT, prompts: Prompts) -> None:
    def never(*_: object) -> Samples:
        raise AssertionError

    with pytest.raises(ConfigError, match="say what to draw"):
        report(module, never, SAMPLE, INFO, Mesh(), per_class=1, seed=0)
    with pytest.raises(ConfigError, match="has no classes"):
        report(module, never, SAMPLE, INFO, Mesh(), per_class=1, seed=0, prompts=prompts, classes=[1])
    labelled = DiT(replace(MODEL, condition="class"))
    with pytest.raises(ConfigError, match="conditioned on classes"):
        report(labelled, never, SAMPLE, INFO, Mesh(), per_class=1, seed=0, prompts=prompts)
