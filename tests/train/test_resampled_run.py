"""Training on plain tars without an index: what the second mode promises, seen from the trainer."""

from pathlib import Path

import pytest

from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.parallel.mesh import destroy_mesh
from diffmoe_ep.train.metrics import Clock
from diffmoe_ep.train.preflight import open_data
from diffmoe_ep.train.trainer import Trainer, start_mesh
from ranks import run
from train.runs import config

pytestmark = pytest.mark.slow

STEPS = 12


def plain(digits: Path, *overrides: str) -> Config:
    """The tars of the digits, their manifest and indexes not looked at."""
    given = [
        "data.mode=resampled",
        "data.plain={kind: pixels, array: pixels.npy, scale: 0.125, shift: -1.0, shuffle: 100}",
    ]
    return config(digits / "train", Path("unused"), f"train.steps={STEPS}", *given, *overrides)


def losses(rank: int, given: Config) -> tuple[list[float], list[str]]:
    """The losses of a run, and what it tells of the data."""
    mesh = start_mesh(given)
    dataset = open_data(given)
    assert isinstance(dataset, PlainTars)
    trainer = Trainer(given, mesh, dataset)
    found = [trainer.measure(trainer.train_step(Clock(0)))["loss"] for _ in range(given.train.steps)]
    told = sorted(trainer.measure_run())
    trainer.stream.close()
    destroy_mesh()
    return found, told


@pytest.mark.timeout(300)
def test_a_start_can_be_repeated_and_learns(digits: Path) -> None:
    given = plain(digits, "train.optimizer.lr=3e-3")
    (first, told), (again, _), (other, _) = (run(1, losses, one)[0] for one in (given, given, plain(digits, "seed=1")))
    assert first == again and first != other
    assert sum(first[-3:]) < sum(first[:3])
    assert told == ["bad_samples", "peak_memory_gb"]  # no epochs


@pytest.mark.timeout(300)
def test_ranks_draw_their_own_and_train_together(digits: Path) -> None:
    (one, _), (two, _) = run(2, losses, plain(digits, "parallel.expert_parallel=2"))
    assert one == two and all(0 < loss < 10 for loss in one)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.lanes=2"], "data.lanes is only for indexed datasets"),
        (["model.condition=text"], "captions come as words; set text.online=true"),
        (["model.num_classes=10", "data.plain={array: other.npy}"], "has no member other.npy"),
    ],
)
def test_what_it_cannot_do_is_told(digits: Path, overrides: list[str], told: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=told):
        open_data(plain(digits, *overrides))
