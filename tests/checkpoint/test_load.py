"""Weights of another run into a model to be trained: which fit, which are named as not fitting, and what a reversed
clock becomes.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.checkpoint.exported import load_exported, save_exported
from diffmoe_ep.checkpoint.load import data_info_of, fragments, load_into, load_model, persistent_buffers
from diffmoe_ep.checkpoint.same_run import check_same_data, check_starts, recipe_of
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.config import Config, from_tree, override, to_tree
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.metrics import peak_memory
from train.runs import busy

MODEL = {
    "input_size": 4,
    "in_channels": 2,
    "out_channels": 4,
    "hidden_size": 16,
    "num_heads": 2,
    "num_blocks": 2,
    "num_classes": 3,
    "num_experts": 4,
}
INFO = {"kind": "moments", "shape": [2, 4, 4], "scale": 0.18, "shift": 0.0, "encoder": "", "text": []}


def config(*overrides: str, **model: Any) -> Config:
    return from_tree({"model": MODEL | model, "train": {"precision": "float32"}}, overrides)


def saved(
    folder: Path, given: Config, data_info: dict[str, Any] | None = None
) -> tuple[Path, DiT, dict[str, torch.Tensor]]:
    """A checkpoint as a run writes it, with averaged thresholds too; the live model and the averaged tensors."""
    model = busy(0.1)(DiT(given.model), 1)
    for layer in model.moe_layers():
        if layer.predictor is not None:
            for quantile in (0.3, 0.6):
                layer.predictor.update(torch.full((4,), quantile))
    live = dict(model.named_parameters()) | persistent_buffers(model)
    averaged = {name: tensor.detach() * 0.5 for name, tensor in live.items() if not name.endswith("updates")}
    pieces = fragments(live, "model", model, Mesh()) + fragments(averaged, "ema", model, Mesh())
    meta = {"config": to_tree(given), "data": data_info or INFO, "fingerprint": "0", "samples_consumed": 0}
    return save(folder, 7, pieces, meta), model, averaged


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_checkpoint_fills_a_model_and_thresholds_are_the_live_ones(
    tmp_path: Path, weights: str, condition: str
) -> None:
    given = config(condition=condition, text_width=8)
    folder, source, averaged = saved(tmp_path, given)
    model = initialize(DiT(given.model), 2)
    load_into(model, folder, weights, Mesh())  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, averaged[name] if weights == "ema" else source.state_dict()[name]), name
    for layer, other in zip(model.moe_layers(), source.moe_layers(), strict=True):
        assert layer.predictor is not None and other.predictor is not None
        assert torch.equal(layer.predictor.threshold, other.predictor.threshold)
        assert layer.predictor.updates == 2


@pytest.mark.parametrize("family", ["diffmoe", "dense"])
def test_the_reversed_time_convention_is_rewritten_to_ours(tmp_path: Path, family: str) -> None:
    """The model to be trained answers what the loaded one answers, to the bit, and only three tensors are rewritten."""
    given = config(f"model.family={family}")
    source = busy(0.3)(DiT(given.model), 1)
    folder = save_exported(source.state_dict(), given, DataInfo(), tmp_path / "single", time_convention="reversed")
    model = initialize(DiT(given.model), 2)
    load_into(model, folder, "ema", Mesh())
    x, t = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(0.05, 0.95, 5)
    wanted = load_exported(folder)
    plain = DiT(given.model)
    plain.load_state_dict(source.state_dict())
    y = torch.tensor([0, 1, 2, 3, 3])
    with torch.no_grad():
        found, there, unturned = (each.eval()(x, t, y).prediction for each in (model, wanted, plain))
    assert torch.equal(found, there)
    assert (found - unturned)[:, :2].abs().max() > 0.1
    rewritten = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, source.state_dict()[name])
    }
    assert rewritten == {"time.fc1.weight", "head.projection.weight", "head.projection.bias"}


def test_stored_positions_are_not_taken_over(tmp_path: Path) -> None:
    """A run's own checkpoints do not hold positions, so that a resumed run could not have them."""
    given = config()
    source = busy(0.3)(DiT(given.model), 1)
    tensors = source.state_dict() | {"positions": source.positions + 1e-5}
    model = initialize(DiT(given.model), 2)
    load_into(model, save_exported(tensors, given, DataInfo(), tmp_path / "single"), "ema", Mesh())
    assert torch.equal(model.positions, source.positions)
    assert torch.equal(model.head.projection.weight, source.head.projection.weight)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    given = config()
    folder = save_exported(busy(0.3)(DiT(given.model), 1), given, DataInfo(), tmp_path / "single")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="use a sound copy"):
        load_into(DiT(given.model), folder, "ema", Mesh())


@pytest.mark.parametrize(
    ("source", "here", "message"),
    [
        (
            [],
            ["model.hidden_size=32"],
            r"another model: model\.hidden_size is 16 there and 32 here; set model\.hidden_size=16",
        ),
        ([], ["model.family=dense"], r"model\.family is diffmoe there and dense here"),
        ([], ["model.condition=text"], r"model\.condition is class there and text here"),
        ([], ["model.num_experts=2"], r"model\.num_experts is 4 there and 2 here"),
        ([], ["model.num_classes=5"], r"model\.num_classes is 3 there and 5 here"),
        ([], ["model.interleave=false"], r"model\.interleave is true there and false here"),
        (
            ["model.family=ec", "pool.span=1"],
            ["model.family=ec", "pool.span=1", "model.predictor=true"],
            r"model\.predictor is false there",
        ),
        (["model.family=tc", "model.top_k=2"], ["model.family=tc"], r"model\.top_k is 2 there and 1 here"),
        (["train.objective=ddpm"], [], r"train\.objective is ddpm there and flow here"),
        (
            ["model.condition=text"],
            ["model.condition=text", "model.text_width=512"],
            r"model\.text_width is 4096 there and 512 here",
        ),
        (
            ["model.condition=text"],
            ["model.condition=text", "text.encoder=clip"],
            r"text\.encoder is t5 there and clip here",
        ),
    ],
)
def test_another_architecture_is_named_by_its_first_differing_key(
    tmp_path: Path, source: list[str], here: list[str], message: str
) -> None:
    folder, _, _ = saved(tmp_path, config(*source))
    with pytest.raises(CheckpointError, match=message):
        check_starts(folder, config(*here), DataInfo.from_json(INFO))


@pytest.mark.parametrize(
    ("source", "here"),
    [
        (
            [],
            [
                "compute.kernel=loop",
                "model.threshold_decay=0.99",
                "model.predictor_weight=0.1",
                "model.predictor_reduction=mean",
            ],
        ),
        (
            [],
            [
                "seed=9",
                "train.global_batch=64",
                "pool.span=8",
                "pool.capacity=2",
                "train.optimizer.kind=sgd",
                "train.precision=bf16",
            ],
        ),
        ([], ["model.predictor=true", "model.balance_weight=1", "model.top_k=3", "model.text_width=7"]),
        (["model.family=dense"], ["model.family=dense", "model.num_experts=2", "model.interleave=false"]),
        (["model.condition=text"], ["model.condition=text", "model.num_classes=77", "model.text_length=60"]),
    ],
)
def test_what_the_weights_do_not_depend_on_may_differ(tmp_path: Path, source: list[str], here: list[str]) -> None:
    folder, _, _ = saved(tmp_path, config(*source))
    check_starts(folder, config(*here), DataInfo.from_json(INFO))


def text(fingerprint: str) -> dict[str, Any]:
    features = {"name": "t5", "width": 4096, "max_length": 120, "precision": "float32", "fingerprint": fingerprint}
    return INFO | {"text": [features]}


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (INFO, INFO | {"scale": 0.36}, r"trained on data whose scale is 0\.18, but that of this run's data is 0\.36"),
        (INFO, INFO | {"shift": 0.1}, r"shift is 0\.0, but that of this run's data is 0\.1"),
        (INFO, INFO | {"kind": "pixels"}, r"kind is moments, but that of this run's data is pixels"),
        (INFO | {"encoder": "a"}, INFO | {"encoder": "b"}, "encoder is a, but"),
        (text("a"), text("b"), r"fingerprint of text features \(t5\) is a, but"),
    ],
)
def test_latents_and_features_of_other_encoders_are_refused(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    folder, _, _ = saved(tmp_path, config(), there)
    with pytest.raises(CheckpointError, match=message):
        check_starts(folder, config(), DataInfo.from_json(here))
    for known in (there, {"name": "reference", "kind": "moments"}, {}):
        check_starts(folder, config(), DataInfo.from_json(known))


def test_what_one_side_does_not_know_is_no_reason(tmp_path: Path) -> None:
    pixels = INFO | {"kind": "pixels", "scale": 2.0}
    folder, _, _ = saved(tmp_path, config(), pixels)
    check_starts(
        folder, config(), DataInfo.from_json(pixels | {"scale": 1.0})
    )  # pixels are scaled from whatever they are stored as
    check_starts(
        folder, config(), DataInfo.from_json({key: value for key, value in pixels.items() if key != "text"})
    )  # of an older format


def test_a_single_file_has_one_set_of_weights(tmp_path: Path) -> None:
    given = config()
    kept = dataclasses.replace(given, sample=dataclasses.replace(given.sample, weights="model"))
    folder = save_exported(busy(0.3)(DiT(given.model), 1), kept, DataInfo(), tmp_path / "single")
    with pytest.raises(CheckpointError, match="holds one set of weights, model, not ema; set init_weights=model"):
        check_starts(folder, given, DataInfo.from_json(INFO))
    check_starts(folder, override(given, ["init_weights=model"]), DataInfo.from_json(INFO))


# -- checkpoints and exported folders of strangers, whose checksums are right ------------------------------------------


def signed(folder: Path, change: dict[str, Any], step: Any = 7) -> None:
    """Lays changes over a checkpoint's meta (None: the key goes) and makes its checksum good."""
    content = json.loads((folder / "meta.json").read_text())
    content["meta"] = {key: value for key, value in (content["meta"] | change).items() if value is not None}
    text = json.dumps(content | {"step": step})
    old = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(text)
    sums = (folder / "SHA256SUMS").read_text().replace(old, hashlib.sha256(text.encode()).hexdigest())
    (folder / "SHA256SUMS").write_text(sums)


def all_that_is_asked(folder: Path) -> None:
    load_model(folder)
    data_info_of(folder)
    recipe_of(folder)
    check_same_data(folder, config(), "0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "its meta.json has no config: it was not saved by a training"),
        ({"data": None}, "its meta.json has no data"),
        ({"fingerprint": None}, "its meta.json has no fingerprint"),
        ({"fingerprint": 7}, "its meta.json has no fingerprint"),
        ({"recipe": [{"key": "seed"}]}, "its meta.json has a recipe change .*, which is none"),
        ({"recipe": "none"}, "its meta.json has no recipe"),
        ({"config": {"model": {"size": [1]}}}, "model.size"),
        ({"data": {"text": [{"name": 5}]}}, "text of the data is"),
        ({"data": {"class_names": [5]}}, "class_names of the data are not all text"),
    ],
)
def test_what_a_meta_file_lacks_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder, *_ = saved(tmp_path, config())
    signed(folder, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        all_that_is_asked(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("step", [10**18, -1, True, "7", None])
def test_a_step_that_none_can_be_is_named(tmp_path: Path, step: Any) -> None:
    folder, *_ = saved(tmp_path, config())
    signed(folder, {}, step)
    with pytest.raises(CheckpointError, match="it was not saved by this program"):
        load_model(folder)


HUGE = [{"num_blocks": 5000}, {"num_experts": 1024}, {"hidden_size": 2**20}, {"num_classes": 10**9}]


@pytest.mark.parametrize("change", HUGE)
def test_a_config_of_another_size_takes_no_memory(tmp_path: Path, change: dict[str, int]) -> None:
    given = config()
    folder, model, _ = saved(tmp_path / "run", given)
    save_exported(model, given, DataInfo(), tmp_path / "exported")
    huge = to_tree(given) | {"model": to_tree(given.model) | change}
    signed(folder, {"config": huge})
    path = tmp_path / "exported/config.json"
    content = json.loads(path.read_text())
    content["config"]["model"] |= change
    path.write_text(json.dumps(content))
    before = peak_memory(torch.device("cpu"))
    for place in (folder, tmp_path / "exported"):
        with pytest.raises(
            CheckpointError, match=r"another model|in a model of its config|too few for the 5000 blocks"
        ):
            load_model(place)
    assert peak_memory(torch.device("cpu")) - before < 256 << 20
