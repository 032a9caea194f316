"""Plans against the matmuls that torch counts in real models, and every config of the repository."""

import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_ep.config import Config, ConfigError, from_tree, keys, load, to_tree
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.moe.kernels import onednn
from diffmoe_ep.planner.plan import Plan, plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "cluster")
IMAGENET = [path for path in CONFIGS if path.parent.name == "imagenet"]
BATCH = 4

SMALL: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "out_channels": 3,
    "patch": 2,
    "hidden_size": 24,
    "num_blocks": 3,
    "num_heads": 2,
}
SMALL |= {"num_classes": 5, "num_experts": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"family": "dense"},
    "diffmoe": {"family": "diffmoe"},
    "diffmoe, every block": {"family": "diffmoe", "interleave": False},
    "diffmoe, no predictor": {"family": "diffmoe", "predictor": False},
    "diffmoe, fine and shared": {
        "family": "diffmoe",
        "granularity": 2,
        "num_experts": 8,
        "shared_experts": 3,
        "num_blocks": 4,
    },
    "ec": {"family": "ec"},
    "ec, predictor": {"family": "ec", "predictor": True},
    "tc": {"family": "tc"},
    "tc, fine": {"family": "tc", "granularity": 2, "num_experts": 8, "top_k": 2},
    "tc, twice": {"family": "tc", "top_k": 2},
    "dense, text": {"family": "dense", "condition": "text", "text_width": 10, "text_length": 7},
    "diffmoe, text": {"family": "diffmoe", "condition": "text", "text_width": 10, "text_length": 7},
}


def small(changes: dict[str, Any], **rest: Any) -> Config:
    return from_tree({"model": SMALL | changes, "train": {"global_batch": BATCH}, **rest})


def built(config: Config) -> DiT:
    torch.manual_seed(0)
    model = DiT(config.model, config.pool)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def counted(model: DiT, backward: bool = False) -> Counter[str]:
    """FLOPs of one sample as torch counts them, by the plan's names; with the gradients' FLOPs if backward."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, config.in_channels, config.input_size, config.input_size, generator=generator)
    counter = FlopCounterMode(display=False, custom_mapping=onednn.flop_formulas())
    text = CaptionFeatures(
        torch.randn(BATCH, config.text_length, config.text_width, generator=generator), torch.arange(BATCH)
    )
    condition = text if config.condition == "text" else torch.zeros(BATCH, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = model(x, torch.rand(BATCH, generator=generator), condition)
        if backward:
            (out.prediction.square().mean() + out.auxiliary).backward()
    flops = {
        name.removeprefix("DiT."): sum(found.values()) / BATCH for name, found in counter.get_flop_counts().items()
    }
    parts = Counter({"other": flops["Global"]})
    kinds = {"experts": "experts", "shared": "shared experts", "router": "router", "predictor": "predictor"}
    for name, number in flops.items():
        match = re.fullmatch(r"blocks\.\d+\.(attention|cross_attention|modulation|ffn|ffn\.(\w+))", name)
        if match is None or match[2] in ("fc1", "fc2"):
            continue
        if match[2]:
            parts[kinds[match[2]]] += number
            parts["FFN"] -= number
        else:
            kind = {
                "attention": "attention",
                "cross_attention": "cross-attention",
                "modulation": "adaLN",
                "ffn": "FFN",
            }[match[1]]
            parts[kind] += number
            parts["other"] -= number
    return parts


def planned(made: Plan) -> Counter[str]:
    return Counter({part.name: part.forward for part in made.parts})


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_forward_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    config = small(changes)
    made, found = plan(config), counted(built(config).train())
    assert planned(made) == found
    assert made.forward == found.total()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_training_flops_are_three_forwards_but_for_gradients_that_nobody_needs(changes: dict[str, Any]) -> None:
    """The inputs of the patches, of the time's first map and of the predictors (detached) get no gradient."""
    config = small(changes)
    model, made = config.model, plan(config)
    tokens, layers = (model.input_size // model.patch) ** 2, len(built(config).moe_layers())
    predictors = layers if any(part.name == "predictor" and part.parameters for part in made.parts) else 0
    spared = 2 * (
        tokens * model.in_channels * model.patch**2 * model.hidden_size
        + 256 * model.hidden_size
        + predictors * tokens * model.hidden_size * model.hidden_size
    )
    assert made.training == 3 * made.forward
    assert made.training - spared == counted(built(config).train(), backward=True).total()


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0, 4.0])
def test_flops_at_a_capacity(capacity: float) -> None:
    config = small({"family": "diffmoe"})
    model = built(config).eval()
    model.set_inference(InferenceRule(selection="topk", capacity=capacity))
    made = plan(config, capacity)
    assert planned(made) == counted(model)
    assert made.training == plan(config).training  # training keeps its own capacity
    assert made.training_capacity == 1


def test_training_capacity_is_the_pools() -> None:
    config = small({"family": "diffmoe"}, pool={"capacity": 2.0})
    made = plan(config)
    assert (made.capacity, made.training_capacity) == (2, 2)
    assert planned(made) == counted(built(config).train())


@pytest.mark.parametrize(
    ("changes", "capacity", "message"),
    [
        ({"family": "diffmoe"}, 4.5, "between 0 and 4"),
        ({"family": "diffmoe"}, -0.1, "between 0 and 4"),
        ({"family": "diffmoe"}, float("nan"), "between 0 and 4"),
        ({"family": "diffmoe", "granularity": 2}, 3.0, "between 0 and 2"),
        ({"family": "tc", "top_k": 2}, 1.0, "C is 2"),
        ({"family": "dense"}, 0.5, "C is 1"),
    ],
)
def test_impossible_capacities_are_refused(changes: dict[str, Any], capacity: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(small(changes), capacity)


def test_a_known_model() -> None:
    """DiT-XL/2 at 256 pixels is known for 118.6 G multiply-adds."""
    made = plan(load(ROOT / "configs/imagenet/dense_xl_flow.yaml"))
    assert f"{made.forward / 2e9:.1f}" == "118.6"
    assert made.activated == made.total == made.equation_40 == 674_834_720


def test_the_table_is_aligned_and_sums_up() -> None:
    made = plan(from_tree({"model": {"size": "L"}}), 0.95)
    lines = made.lines()
    rows = [line for line in lines if re.match(r"\S.*\d\.\d{3}$", line)]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == [
        "FFN",
        "experts",
        "attention",
        "adaLN",
        "router",
        "predictor",
        "other",
        "total",
    ]
    for column in (1, 2, 3):
        ends = {[match.end() for match in re.finditer(r"\S+(?: \S+)*", row)][column] for row in rows}
        assert len(ends) == 1
    *parts, total = ([float(cell.replace(",", "")) for cell in re.split(r"\s{2,}", row)[1:]] for row in rows)
    assert total[0] == sum(part[0] for part in parts) == 1_981_700_320
    assert total[1] == pytest.approx(sum(part[1] for part in parts), abs=len(parts))
    assert total[2] == pytest.approx(sum(part[2] for part in parts), abs=0.001 * len(parts))
    assert any("Eq. 40: 454.3M" in line for line in lines) and any("C = 0.95" in line for line in lines)


def test_as_plain_data() -> None:
    made = plan(small({"family": "diffmoe"}))
    data = json.loads(json.dumps(made.as_dict()))
    assert data["total"] == sum(part["parameters"] for part in data["parts"]) == made.total
    assert (
        data["activated"] == made.activated
        and data["forward"] == made.forward
        and data["equation_40"] == made.equation_40
    )


# -- the configs of the repository -------------------------------------------------------------------------------------


@lru_cache
def loaded(path: Path) -> Config:
    return load(path)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_loads_builds_and_plans(path: Path) -> None:
    config = loaded(path)
    with torch.device("meta"):
        model = DiT(config.model, config.pool)
    assert plan(config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", IMAGENET, ids=name_of)
def test_every_paper_config_is_what_its_name_and_its_comment_say(path: Path) -> None:
    text, config = path.read_text(), loaded(path)
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    made, model = plan(config), config.model
    match = re.fullmatch(r"(dense|tc|ec|diffmoe)_(s|b|l|xl|xxl|xxxl)(?:_e(\d+))?_(flow|ddpm)", path.stem)
    assert match is not None and config.folder == f"runs/imagenet/{path.stem}"
    assert (model.family, model.size, config.train.objective) == (match[1], match[2].upper(), match[4])
    assert match[3] == (None if model.family == "dense" else str(model.num_experts))
    assert config.parallel.expert_parallel == (1 if model.family == "dense" else 8)
    assert f"deepspeed --num_gpus 8 --module diffmoe_ep train {path.relative_to(ROOT)}" in comment
    assert f"Parameters: {made.total:,}, " in comment
    assert f"{made.forward / 1e9:.1f} GFLOPs" in comment
    if model.family != "dense":
        assert f"of which {made.activated:,.0f} work" in comment and f"({made.equation_40 / 1e6:.1f}M by" in comment
    assert f"Batch: {config.train.global_batch} samples" in comment and f"Steps: {config.train.steps:,} " in comment
    for word in ("FID ", "50,000 samples", "ADM", "VAE decoder", "guidance", "averaged weights of step"):
        assert word in comment.partition("Expected")[2], word


@pytest.mark.parametrize("path", IMAGENET, ids=name_of)
def test_paper_configs_hold_only_what_differs_and_the_papers_recipe(path: Path) -> None:
    """But for the three keys that say which model it is."""
    defaults = {key.name: key.default for key in keys()}
    given = flat(yaml.safe_load(path.read_text()))
    for key, value in given.items():
        assert value != defaults[key] or key in ("model.family", "model.size", "model.num_experts"), key
    train = to_tree(loaded(path))["train"]
    optimizer, schedule = train["optimizer"], train["schedule"]
    assert (train["global_batch"], train["ema"]["decay"], optimizer["kind"], optimizer["lr"]) == (
        256,
        0.9999,
        "adamw",
        1e-4,
    )
    assert (optimizer["betas"], optimizer["weight_decay"], schedule["kind"], schedule["warmup"]) == (
        [0.9, 0.999],
        0.0,
        "constant",
        0,
    )
    assert loaded(path).data.flip and loaded(path).data.condition_dropout == 0.1 and train["max_grad_norm"] == 0.0


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_every_model_of_the_papers_tables_has_its_config() -> None:
    flow = ["dense_l", "dense_xl", "dense_xxl", "dense_xxxl", "tc_l_e16", "ec_l_e16"]
    flow += [f"diffmoe_{name}" for name in ("s_e16", "b_e16", "l_e8", "l_e16", "xl_e16")]
    ddpm = [
        "dense_l",
        "dense_xl",
        "tc_l_e16",
        "ec_l_e16",
        *(f"diffmoe_{name}" for name in ("s_e16", "b_e16", "l_e8", "l_e16")),
    ]
    assert {path.stem for path in IMAGENET} == {f"{name}_flow" for name in flow} | {f"{name}_ddpm" for name in ddpm}


TEXT = {"dense_1.2b": 1_236_063_376, "diffmoe_e16_4.6b": 4_596_486_512, "sft_journeydb": 4_596_486_512}
SISTERS = {"diffmoe_e16_410m": 410e6, "diffmoe_e16_56m": 56e6}


@pytest.mark.parametrize("name", [*TEXT, *SISTERS])
def test_text_configs_are_what_their_comments_say(name: str) -> None:
    path = ROOT / "configs" / "text" / f"{name}.yaml"
    text, config = path.read_text(), loaded(path)
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    made = plan(config)
    assert made.total == TEXT[name] if name in TEXT else abs(made.total - SISTERS[name]) < 1e6
    assert config.folder == f"runs/text/{name}" and f"configs/text/{name}.yaml" in comment
    assert not config.data.flip  # captions say left and right
    if name != "sft_journeydb":
        assert f"Parameters: {made.total:,}, " in comment and f"{made.forward / 1e9:.1f} GFLOPs" in comment
    if name.startswith("diffmoe"):
        assert f"of which {made.activated:,.0f} work" in comment and f"({made.equation_40 / 1e6:,.1f}M by" in comment


def test_the_fine_tuned_model_is_the_pretrained_one() -> None:
    trained, tuned = (
        loaded(ROOT / "configs" / "text" / f"{name}.yaml") for name in ("diffmoe_e16_4.6b", "sft_journeydb")
    )
    assert tuned.model == trained.model and tuned.pool == trained.pool
    assert tuned.init_from == trained.folder
