"""Counts from the config alone against the paper's sizes and against the parameters that a model really has."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_ep.config import SIZES, ModelConfig, PoolConfig
from diffmoe_ep.model.count import count, equation_40
from diffmoe_ep.model.dit import DiT


def sized(size: str, family: str = "diffmoe", num_experts: int = 16) -> ModelConfig:
    hidden, blocks, heads = SIZES[size]
    return ModelConfig(
        family=family, size=size, hidden_size=hidden, num_blocks=blocks, num_heads=heads, num_experts=num_experts
    )  # type: ignore[arg-type]


def on_meta(model: ModelConfig, pool: PoolConfig | None = None) -> DiT:
    with torch.device("meta"):
        return DiT(model, pool)


def numel(model: DiT) -> dict[str, int]:
    """Parameters by field of Count, sorted by their names alone."""
    kinds = {
        ".experts.": "experts",
        ".shared.": "shared",
        ".router.": "router",
        ".predictor.": "predictor",
        ".attention.": "attention",
    }
    kinds |= {".cross_attention.": "cross_attention"}
    sums = dict.fromkeys([*kinds.values(), "dense_ffn", "modulation", "other"], 0)
    for name, parameter in model.named_parameters():
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind is None and name.startswith("blocks."):
            kind = "modulation" if ".modulation." in name else "dense_ffn"
        sums[kind or "other"] += parameter.numel()
    return sums


PAPER = {
    ("S", "dense", 1): 32_865_056,
    ("B", "dense", 1): 130_315_808,
    ("L", "dense", 1): 457_840_672,
    ("XL", "dense", 1): 674_834_720,
    ("S", "diffmoe", 16): 140_167_040,
    ("B", "diffmoe", 16): 559_025_792,
    ("L", "diffmoe", 2): 571_209_784,
    ("L", "diffmoe", 4): 772_708_432,
    ("L", "diffmoe", 8): 1_175_705_728,
    ("L", "diffmoe", 16): 1_981_700_320,
    ("XL", "diffmoe", 16): 2_924_690_944,
    ("S", "tc", 16): 139_243_040,
    ("S", "ec", 16): 139_243_040,
    ("L", "tc", 16): 1_968_908_320,
    ("L", "ec", 16): 1_968_908_320,
}


@pytest.mark.parametrize(
    ("shape", "total"), PAPER.items(), ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else ""
)
def test_the_papers_models(shape: tuple[str, str, int], total: int) -> None:
    model = sized(*shape)
    assert count(model).total == total == sum(parameter.numel() for parameter in on_meta(model).parameters())


@pytest.mark.parametrize(("size", "millions"), [("XXL", "950.92"), ("XXXL", "1352.58")])
def test_the_largest_dense_models(size: str, millions: str) -> None:
    model = sized(size, "dense")
    assert f"{count(model).total / 1e6:.2f}" == millions
    assert count(model).total == sum(parameter.numel() for parameter in on_meta(model).parameters())


@pytest.mark.parametrize(
    ("num_experts", "ffn", "total"),
    [(2, "314.8", "571.2"), (4, "516.3", "772.7"), (8, "919.3", "1175.7"), (16, "1725.3", "1981.7")],
)
def test_the_papers_modules(num_experts: int, ffn: str, total: str) -> None:
    """Table 9: FFN holds router and predictor."""
    sizes = count(sized("L", num_experts=num_experts))
    assert f"{sizes.ffn / 1e6:.1f}" == ffn
    assert f"{sizes.total / 1e6:.1f}" == total
    assert round(sizes.attention / 1e6, 2) == 100.76
    assert round(sizes.modulation / 1e6, 2) == 151.14


def test_the_papers_dense_modules() -> None:
    sizes = count(sized("L", "dense"))
    assert round(sizes.ffn / 1e6, 2) == 201.45
    assert sizes.total - sizes.ffn - sizes.attention - sizes.modulation == sizes.other


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small models of every family and shape."""
    heads, granularity = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    family = draw(st.sampled_from(["diffmoe", "ec", "tc", "dense"]))
    return ModelConfig(
        family=family,
        input_size=4,
        in_channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(3, 6)),
        patch=draw(st.sampled_from([1, 2])),
        hidden_size=4 * heads * draw(st.integers(1, 5)),
        num_blocks=draw(st.integers(1, 5)),
        num_heads=heads,
        condition=draw(st.sampled_from(["class", "text"])),
        num_classes=draw(st.integers(1, 9)),
        text_width=draw(st.integers(1, 9)),
        interleave=draw(st.booleans()),
        num_experts=granularity * draw(st.integers(1, 4)),
        granularity=granularity,
        shared_experts=draw(st.integers(0, 3)),
        predictor=None if family == "tc" else draw(st.sampled_from([None, True, False])),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(models())
def test_every_kind_of_module_is_counted_as_it_is_built(model: ModelConfig) -> None:
    sizes = dataclasses.asdict(count(model))
    built = numel(on_meta(model))
    assert {name: sizes[name] for name in built} == built
    assert count(model).total == sum(built.values())


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(models())
def test_at_full_capacity_everything_is_activated(model: ModelConfig) -> None:
    full = model.num_experts / model.granularity
    assert count(model).activated(full) == pytest.approx(count(model).total, rel=1e-12)
    assert equation_40(model, full) == pytest.approx(count(model).total, rel=1e-12)


def test_equation_40_of_the_paper() -> None:
    """1 dense block for each MoE block: (1 + C) / (1 + N) of the FFN parameters."""
    model = sized("L")
    sizes = count(model)
    for capacity, millions in ((1.0, "459.4"), (0.95, "454.3")):
        paper = (1 + capacity) / 17 * sizes.ffn + sizes.attention + sizes.modulation + sizes.other
        assert equation_40(model, capacity) == pytest.approx(paper, rel=1e-12)
        assert f"{paper / 1e6:.1f}" == millions
    assert f"{sizes.activated(1.0) / 1e6:.1f}" == "470.8"  # exactly: router and predictor always run
    assert equation_40(sized("L", "dense")) == 457_840_672


def test_equation_40_counts_the_blocks_that_there_are() -> None:
    """Biases and routers aside, an estimate by blocks must agree with the exact count when nothing but experts fills
    the MoE layer.
    """
    for changes in ({"num_blocks": 5}, {"interleave": False}, {"granularity": 2}, {"shared_experts": 2}):
        model = dataclasses.replace(
            ModelConfig(hidden_size=2048, num_heads=16, num_blocks=4, num_experts=8, predictor=False), **changes
        )
        assert equation_40(model, 0.5) == pytest.approx(count(model).activated(0.5), rel=2e-3)


def test_activated_at_trainings_own_capacity() -> None:
    """Fine-grained experts keep the work; two choices of a token double its experts' work."""
    coarse, fine = sized("S", "tc"), dataclasses.replace(sized("S", "tc", 32), granularity=2, top_k=2)
    double = dataclasses.replace(coarse, top_k=2)
    assert (count(coarse).capacity, count(fine).capacity, count(double).capacity) == (1, 1, 2)
    one = count(coarse).experts / 16
    assert count(coarse).activated() == count(coarse).always + one
    assert count(double).activated() == count(coarse).always + 2 * one
    assert count(fine).activated() - count(fine).always == pytest.approx(one, rel=1e-3)  # but for the output biases
