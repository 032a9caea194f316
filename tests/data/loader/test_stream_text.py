"""The stream of captions: chosen by weight and position, cut and padded, dropped; and what a dataset must have for
it.
"""

import io
import json
import math
import os
import zlib
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader.streams import open_stream
from data_prep.write import write_dataset
from diffmoe_ep.config import ConfigError, from_tree
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.captions import CaptionSpec, check_text
from diffmoe_ep.data.codec import Caption, encode
from diffmoe_ep.data.condition import CaptionFeatures
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import DataError, Manifest, TextEncoderInfo
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.order import Order
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.data.shards import Dataset

T5, CLIP = TextEncoderInfo("t5", 3, 6, "float32", "a" * 64), TextEncoderInfo("clip", 2, 4, "float32", "b" * 64)
MANIFEST = Manifest(
    "tiny", "pixels", (1, 1, 2), "float32", 1.0, 0.0, 0, (), "made up", condition="text", text=(T5, CLIP)
)
LABELS = replace(MANIFEST, condition="class", num_classes=5, text=())
WANTED = CaptionSpec("t5", places=4, width=3)
ONLINE = replace(WANTED, online=True)
NUM_SAMPLES, SHARD_SIZE = 40, 5


def captions(number: int, manifest: Manifest = MANIFEST) -> tuple[Caption, ...]:
    """Up to three captions of sample `number`, of weights 1, 3 and 4; lengths 1 to 6, so that some have to be cut."""
    drawn = np.random.default_rng(number)
    return tuple(
        Caption(
            f"caption {nth} of {number}",
            (1.0, 3.0, 4.0)[nth],
            tuple(
                drawn.normal(size=(1 + (number + nth) % each.max_length, each.width)).astype(np.float16)
                for each in manifest.text
            ),
        )
        for nth in range(1 + number % 3)
    )


def write_tiny(folder: Path, manifest: Manifest = MANIFEST, num: int = NUM_SAMPLES) -> Dataset:
    samples = [
        (
            f"k{number:03d}",
            np.full(manifest.stored_shape, number + 1, np.float32),
            captions(number, manifest) if manifest.text or not manifest.num_classes else number % 5,
        )
        for number in range(num)
    ]
    return write_dataset(
        folder, [(key, encode(array, condition, manifest)) for key, array, condition in samples], manifest, SHARD_SIZE
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("text") / "tiny")


def make(dataset: Dataset | Mixture, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "seed": 5,
        "batch": 8,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "condition_dropout": 0.0,
        "flip": False,
        "shuffle_block": 3,
        "workers": 0,
        "prefetch": 2,
        "text": WANTED,
    }
    return open_stream(dataset, **settings | changes)


def join(batches: list[Batch]) -> Batch:
    texts = [batch.condition for batch in batches if isinstance(batch.condition, CaptionFeatures)]
    condition = CaptionFeatures(
        torch.cat([text.features for text in texts]), torch.cat([text.lengths for text in texts])
    )
    latent, noise, u, position = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("latent", "noise", "u", "position")
    )
    return Batch(
        latent, noise, u, condition, position, tuple(caption for batch in batches for caption in batch.captions)
    )


def joined(dataset: Dataset | Mixture, steps: int = 15, world: int = 1, accumulation: int = 1, **changes: Any) -> Batch:
    """The samples of `steps` steps, ranks joined within each micro-step."""
    ranks = []
    for rank in range(world):
        source = make(dataset, rank=rank, world=world, accumulation=accumulation, **changes)
        ranks.append(list(islice(source, steps * accumulation)))
        source.close()
    return join([batch for micro_step in zip(*ranks, strict=True) for batch in micro_step])


def assert_equal(found: Batch, expected: Batch) -> None:
    assert isinstance(found.condition, CaptionFeatures)
    assert isinstance(expected.condition, CaptionFeatures)
    for name in ("latent", "noise", "u", "position"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.condition.features, expected.condition.features)
    assert torch.equal(found.condition.lengths, expected.condition.lengths)
    assert found.captions == expected.captions


def chosen(position: int, number: int) -> Caption:
    """An independent reference: the interval of the weights that the position's draw falls into."""
    held = captions(number)
    point = generator_for(5, position, "caption").random() * sum(caption.weight for caption in held)
    for caption in held:
        if point < caption.weight:
            return caption
        point -= caption.weight
    raise AssertionError("the draw is below 1")


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("text", [WANTED, ONLINE, CaptionSpec("clip", 4, 2)], ids=["t5", "online", "clip"])
def test_a_batch_is_what_its_positions_say(tiny: Dataset, text: CaptionSpec, drop: float) -> None:
    batch, order = joined(tiny, text=text, condition_dropout=drop), Order(tiny.sizes, 5, 3)
    assert isinstance(batch.condition, CaptionFeatures)
    assert batch.condition.features.shape == (120, 4, 0 if text.online else text.width)
    assert batch.condition.features.dtype == torch.float32
    assert batch.condition.lengths.dtype == torch.int64
    assert len(batch.captions) == (120 if text.online else 0)
    for position in range(120):
        shard, sample = order.locate(position)
        number = shard * SHARD_SIZE + sample
        assert batch.latent[position].unique().item() == number + 1
        caption, dropped = chosen(position, number), generator_for(5, position, "drop").random() < drop
        length = int(batch.condition.lengths[position])
        if text.online:
            assert batch.captions[position] == ("" if dropped else caption.text)
            assert length == 0
            continue
        rows = caption.features[0 if text.encoder == "t5" else 1].astype(np.float32)
        assert length == (0 if dropped else min(len(rows), 4))
        expected = np.zeros((4, text.width), np.float32)
        expected[:length] = rows[:length]
        np.testing.assert_array_equal(batch.condition.features[position].numpy(), expected)


@pytest.mark.parametrize(("world", "accumulation", "workers"), [(2, 1, 0), (4, 2, 0), (1, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("text", [WANTED, ONLINE], ids=["stored", "online"])
def test_ranks_and_workers_change_nothing(
    tiny: Dataset, text: CaptionSpec, world: int, accumulation: int, workers: int
) -> None:
    expected = joined(tiny, steps=6, text=text, condition_dropout=0.3)
    assert_equal(joined(tiny, 6, world, accumulation, workers=workers, text=text, condition_dropout=0.3), expected)


def test_a_resumed_stream_continues(tiny: Dataset) -> None:
    assert_equal(join([joined(tiny, 3), joined(tiny, 3, world=2, samples_consumed=24)]), joined(tiny, 6))


@pytest.mark.slow
def test_frequencies_follow_the_weights(tiny: Dataset) -> None:
    found = Counter(caption for caption in joined(tiny, steps=1500, text=ONLINE).captions)  # 300 epochs
    for number in range(NUM_SAMPLES):
        held = captions(number)
        assert sum(found[caption.text] for caption in held) == 300
        for caption in held:
            share = caption.weight / sum(each.weight for each in held)
            assert abs(found[caption.text] / 300 - share) <= 4.5 * (share * (1 - share) / 300) ** 0.5


def test_captions_leave_every_other_draw_as_it_is(tiny: Dataset, tmp_path: Path) -> None:
    labelled, found = list(islice(make(write_tiny(tmp_path / "labels", LABELS), text=None), 4)), joined(tiny, 4)
    for name in ("latent", "noise", "u", "position"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in labelled]), getattr(found, name))


def test_everything_dropped_is_the_null_caption(tiny: Dataset) -> None:
    batch = joined(tiny, 3, condition_dropout=math.nextafter(1, 0))
    assert isinstance(batch.condition, CaptionFeatures)
    assert batch.condition.features.shape == (24, 4, 3)
    assert not batch.condition.features.any()
    assert not batch.condition.lengths.any()


def test_a_batch_of_captions_moves() -> None:
    text = CaptionFeatures(torch.zeros(2, 3, 4), torch.tensor([1, 2]))
    moved = Batch(
        torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.zeros(2), text, torch.arange(2), ("a", "b")
    ).to("meta", True)
    assert isinstance(moved.condition, CaptionFeatures)
    assert moved.condition.features.device.type == moved.condition.lengths.device.type == "meta"
    assert moved.captions == ("a", "b")


def test_a_label_model_and_a_text_model_take_their_own_data(tiny: Dataset, tmp_path: Path) -> None:
    labels = write_tiny(tmp_path / "labels", LABELS)
    with pytest.raises(
        ConfigError, match="tiny holds captions, but model.condition is class; set model.condition=text"
    ):
        make(tiny, text=None)
    with pytest.raises(
        ConfigError, match="labels holds labels, but model.condition is text; set model.condition=class"
    ):
        make(labels)
    with pytest.raises(ConfigError, match="labels holds labels"):
        make(labels, text=ONLINE)
    check_text(Mixture([labels]), None)


@pytest.mark.parametrize(
    ("wanted", "held", "message"),
    [
        (
            WANTED,
            (CLIP,),
            r"text\.encoder is t5, but .*tiny holds no features of it: it has clip \(width 2\); .*--t5 "
            r"FOLDER.*text\.online=true",
        ),
        (WANTED, (), "it has none at all"),
        (
            replace(WANTED, width=8),
            (T5,),
            r"the t5 features in .*tiny are 3 wide, but model\.text_width is 8; set model\.text_width=3",
        ),
        (replace(ONLINE, width=8), (T5,), None),
        (ONLINE, (), None),
    ],
)
def test_features_that_are_not_there_are_told(
    tmp_path: Path, wanted: CaptionSpec, held: tuple[TextEncoderInfo, ...], message: str | None
) -> None:
    mixture = Mixture([write_tiny(tmp_path / "tiny", replace(MANIFEST, text=held), 6)])
    if message is None:
        assert len(next(make(mixture, text=wanted, batch=2))) == 2
        return
    for ask in (lambda: check_text(mixture, wanted), lambda: make(mixture, text=wanted)):
        with pytest.raises(ConfigError, match=message):
            ask()


def test_mixed_features_must_be_of_one_encoder(tiny: Dataset, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", replace(MANIFEST, text=(replace(T5, fingerprint="c" * 64), CLIP)))
    longer = write_tiny(tmp_path / "longer", replace(MANIFEST, text=(replace(T5, max_length=9),)))
    with pytest.raises(
        ConfigError,
        match=f"the t5 features in .*other were made by .* fingerprint {'c' * 64}, those in .*tiny by .*{'a' * 64}",
    ):
        make(Mixture([tiny, other]))
    assert len(joined(Mixture([tiny, other]), 3, text=ONLINE).captions) == 24
    assert len(joined(Mixture([tiny, other]), 3, text=CaptionSpec("clip", 4, 2))) == 24
    assert_equal(joined(Mixture([tiny, longer]), 6, world=2), joined(Mixture([tiny, longer]), 6))


def test_what_a_model_wants_is_what_its_config_says() -> None:
    config = from_tree({"model": {"condition": "text", "text_width": 8, "text_length": 7}, "text": {"encoder": "clip"}})
    assert CaptionSpec.of(config.model, config.text) == CaptionSpec("clip", 7, 8, False)
    assert CaptionSpec.of(from_tree({}).model, config.text) is None


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def overwrite(dataset: Dataset, number: int, member: str, change: Any) -> None:
    """Store other bytes of the same length in a member, with a checksum that fits."""
    path = Path(dataset.folder) / dataset.manifest.shards[number // SHARD_SIZE].index_name
    index = np.load(path)
    row = index[member][number % SHARD_SIZE]
    with path.with_name(path.name.replace(".index.npy", ".tar")).open("r+b") as file:
        content = change(os.pread(file.fileno(), int(row["size"]), int(row["offset"])))
        assert len(content) == row["size"]
        os.pwrite(file.fileno(), content, int(row["offset"]))
    index[member]["crc32"][number % SHARD_SIZE] = zlib.crc32(content)
    np.save(path, index)


def nan_in_the_last_caption(content: bytes) -> bytes:
    return content[:-2] + np.float16(np.nan).tobytes()


def another_width(content: bytes) -> bytes:
    values = np.load(io.BytesIO(content))
    return npy(values.reshape(3, -1))


def no_weight(content: bytes) -> bytes:
    return content.replace(b'"weight": 1.0', b'"weight": 0.0')


FAULTS = {
    "NaN": ("text.t5.npy", nan_in_the_last_caption),
    "width": ("text.t5.npy", another_width),
    "weight": ("captions.json", no_weight),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_captions_are_replaced_and_only_those(tiny: Dataset, tmp_path: Path, fault: str) -> None:
    """Samples 4 and 19 have two captions; the NaN lies in the second, so it is met where that is taken, and nowhere
    else.
    """
    spoiled = write_tiny(tmp_path / "tiny")
    for number in (4, 19):
        overwrite(spoiled, number, *FAULTS[fault])
    expected, found, runs = joined(tiny), {}, {world: tmp_path / f"run{world}" for world in (1, 4)}
    for world, run in runs.items():
        ranks = []
        for rank in range(world):
            source = make(
                spoiled, rank=rank, world=world, max_bad_fraction=0.5, quarantine_file=quarantine.rank_file(run, rank)
            )
            ranks.append(list(islice(source, 15)))
        found[world] = join([batch for micro_step in zip(*ranks, strict=True) for batch in micro_step])
    assert_equal(found[4], found[1])
    listed = quarantine.read(runs[1])
    assert listed == quarantine.read(runs[4])
    assert {sample.key for sample in listed} == {"k004", "k019"}
    positions = {position for sample in listed for position in sample.positions}
    numbers = {position: int(expected.latent[position, 0, 0, 0]) - 1 for position in range(120)}
    met = {position for position, number in numbers.items() if number in (4, 19)}
    if fault == "NaN":
        met = {position for position in met if chosen(position, numbers[position]).weight == 3.0}
    assert positions == met
    same = [position for position in range(120) if position not in positions]
    assert torch.equal(found[1].latent[same], expected.latent[same])
    assert isinstance(found[1].condition, CaptionFeatures)
    assert isinstance(expected.condition, CaptionFeatures)
    assert torch.equal(found[1].condition.features[same], expected.condition.features[same])
    assert torch.isfinite(found[1].condition.features).all()
    assert all(int(found[1].latent[position, 0, 0, 0]) - 1 not in (4, 19) for position in positions)


def test_the_features_of_other_encoders_are_not_read(tmp_path: Path) -> None:
    dataset = write_tiny(tmp_path / "tiny")
    index = np.load(Path(dataset.folder) / "tiny-000000.index.npy")
    for number in range(SHARD_SIZE):
        with (Path(dataset.folder) / "tiny-000000.tar").open("r+b") as file:
            file.seek(int(index["text.clip.npy"]["offset"][number]))
            file.write(b"?")
    assert len(joined(dataset, 5)) == 40
    assert len(joined(dataset, 5, text=ONLINE)) == 40
    with pytest.raises(DataError, match=r"text\.clip\.npy is damaged"):
        joined(dataset, 5, text=CaptionSpec("clip", 4, 2))


@pytest.mark.parametrize(
    "content", [{"text": "\ud800", "weight": 1}, {"text": "a", "weight": 10**400}, {"text": "a", "weight": 1e200}]
)
def test_words_and_weights_that_nothing_can_use_are_faults(tmp_path: Path, content: dict[str, Any]) -> None:
    dataset = write_tiny(tmp_path / "tiny", replace(MANIFEST, text=()), 5)
    entry = json.dumps([content | {"lengths": {}}]).encode()
    overwritten = Dataset(Path(dataset.folder), dataset.manifest)
    read = overwritten.read
    overwritten.read = lambda *place: read(*place) | {"captions.json": entry}  # type: ignore[method-assign]
    wrong = r"(: weight .* is not a number above 0| is not JSON \(it holds (half a character|a whole number of 401))"
    with pytest.raises(DataError, match=r"captions\.json" + wrong):
        next(make(overwritten, text=ONLINE, batch=2))
