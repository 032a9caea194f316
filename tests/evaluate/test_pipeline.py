import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.write import write_dataset
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.evaluate.pipeline import load_images, score
from diffmoe_ep.sampling.capacity_record import CapacityRecord

FACTS = Manifest("dots", "pixels", (1, 4, 4), "uint8", 1 / 8, -1.0, 3, (), "made up")
RECORD = CapacityRecord(torch.tensor([[[3.0, 1.0]], [[2.0, 1.0]]]).double(), torch.full((2, 1), 4.0).double())


def _images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of three classes; class c is bright in row c."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 6, (count, 1, 4, 4), dtype=np.uint8)
    images[np.arange(count), 0, labels] += 9
    return torch.from_numpy(images), torch.from_numpy(labels)


TRAIN, HELDOUT = _images(120, 0), _images(40, 1)


def _write(folder, facts, arrays, labels):
    samples = [
        (f"{i:04d}", encode(array, int(label), facts))
        for i, (array, label) in enumerate(zip(arrays, labels, strict=True))
    ]
    write_dataset(folder, samples, facts, shard_size=50)


def test_images_come_back_in_storage_order(tmp_path):
    _write(tmp_path / "dots", FACTS, TRAIN[0].numpy(), TRAIN[1])
    images, labels = load_images(tmp_path / "dots")
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(images, TRAIN[0])
    assert torch.equal(labels, TRAIN[1])


def test_only_stored_pixels_can_be_scored(tmp_path):
    facts = replace(FACTS, dtype="float32")
    _write(tmp_path / "dots", facts, TRAIN[0].numpy().astype(np.float32), TRAIN[1])
    with pytest.raises(DataError, match="float32 pixels, scoring reads uint8 pixels"):
        load_images(tmp_path / "dots")


def test_good_samples_score_like_held_out_images():
    samples, labels = _images(90, 2)
    scores = score(samples, labels, TRAIN, HELDOUT, RECORD)
    assert (scores.num_samples, scores.num_train, scores.num_heldout, scores.num_equal) == (90, 120, 40, 40)
    assert scores.accuracy == scores.accuracy_heldout == 1
    assert scores.frechet < scores.frechet_equal < 2 * scores.frechet_equal_heldout
    assert scores.nearest == pytest.approx(scores.nearest_heldout, rel=0.2)
    assert scores.closest_share < 0.1


def test_samples_of_the_wrong_class_lose_accuracy_alone():
    samples, labels = _images(90, 2)
    right, wrong = (score(samples, classes, TRAIN, HELDOUT, RECORD) for classes in (labels, (labels + 1) % 3))
    assert wrong == replace(right, accuracy=0.0)


def test_noise_is_far_from_the_training_images():
    noise = torch.from_numpy(np.random.default_rng(3).integers(0, 17, (90, 1, 4, 4), dtype=np.uint8))
    scores = score(noise, torch.arange(90) % 3, TRAIN, HELDOUT, RECORD)
    assert scores.accuracy < 0.7
    assert scores.frechet_equal > 3 * scores.frechet_equal_heldout
    assert scores.nearest > 1.5 * scores.nearest_heldout


def test_a_copier_is_seen():
    scores = score(TRAIN[0][:60], TRAIN[1][:60], TRAIN, HELDOUT, RECORD)
    assert scores.nearest == 0
    assert scores.closest_share == 1


def test_samples_sorted_by_class_score_as_well_as_mixed_ones():
    samples, labels = _images(300, 2)
    order = labels.argsort(stable=True)
    mixed, ordered = (
        score(samples, labels, TRAIN, HELDOUT, RECORD),
        score(samples[order], labels[order], TRAIN, HELDOUT, RECORD),
    )
    assert ordered.frechet == pytest.approx(mixed.frechet)
    assert ordered.frechet_equal < 2 * mixed.frechet_equal  # it takes samples of every class


def test_capacity_is_reported_by_step_and_on_average():
    scores = score(*_images(20, 2), TRAIN, HELDOUT, RECORD)
    assert scores.capacity == pytest.approx(0.875)
    assert scores.capacity_per_step == pytest.approx((1.0, 0.75))
    dense = score(*_images(20, 2), TRAIN, HELDOUT, CapacityRecord.empty())
    assert (dense.capacity, dense.capacity_per_step) == (1.0, ())
    assert "dense model" in dense.lines()[-1]


def test_the_table_is_aligned_and_the_dictionary_is_json():
    scores = score(*_images(90, 2), TRAIN, HELDOUT, RECORD)
    lines = scores.lines()
    end = lines[0].index("held-out") + len("held-out")
    for line in lines[1:]:
        assert line[end : end + 2] == "  "  # columns end together, notes start together
        assert line[end + 2] != " "
    assert "40 each" in lines[2]
    assert "0.75 to 1.00" in lines[-1]
    assert json.loads(json.dumps(scores.as_dict()))["num_equal"] == 40


def test_images_that_do_not_fit_together_are_named():
    with pytest.raises(ValueError, match="held-out images are"):
        score(*_images(20, 2), TRAIN, (torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.zeros(5)), RECORD)
    with pytest.raises(ValueError, match="samples images: 20 with 19 labels"):
        score(_images(20, 2)[0], _images(19, 2)[1], TRAIN, HELDOUT, RECORD)
