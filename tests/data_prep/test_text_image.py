"""Images with captions, from img2dataset's tars and from folders; captions that are none are bad samples with a
reason.
"""

import json
from pathlib import Path

import pytest

from data_prep import text_image
from data_prep.__main__ import main
from data_prep.image import square
from data_prep.source import BadSample
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.codec import Caption
from diffmoe_ep.data.shards import Dataset
from pictures import picture, tar

pytest.importorskip("PIL")


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"txt": b" a cat \n"}, "a cat"),
        ({"txt": "eine Tür".encode(), "json": b'{"caption": "other"}'}, "eine Tür"),
        ({"json": b'{"caption": "a dog", "url": "x"}'}, "a dog"),
    ],
)
def test_captions(members: dict[str, bytes], caption: str) -> None:
    assert text_image.caption_of(members) == caption


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no caption"),
        ({"txt": b"  \n"}, "no caption"),
        ({"txt": b"\xff\xfe"}, "does not decode"),
        ({"json": b"{"}, "does not decode"),
        ({"json": b"[" * 100_000}, "does not decode"),
        ({"json": b"[1]"}, "no caption"),
        ({"json": b'{"caption": null}'}, "no caption"),
        ({"json": b'{"caption": 7}'}, "no caption"),
        ({"json": rb'{"caption": "half \ud800"}'}, "no Unicode"),
    ],
)
def test_what_is_no_caption(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        text_image.caption_of(members)


def read(folder: Path) -> dict[str, tuple[bytes, object]]:
    dataset = Dataset.open(folder)
    places = [(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]
    found = {dataset.address(*place)[1]: read_sample(dataset, *place) for place in places}
    return {key: (array.tobytes(), condition) for key, (array, condition) in found.items()}


def test_tars_are_taken_as_they_are(tmp_path: Path) -> None:
    pictures = [picture(number, kind="JPEG") for number in range(5)]
    files = {
        "000000000.jpg": pictures[0], "000000000.txt": b"zero", "000000000.json": b'{"caption": "other"}',
        "000000001.json": b'{"status": "failed_to_download"}',
        "../../000000002.png": pictures[2], "../../000000002.txt": b"two",
        "000000003.jpg": pictures[3],
        "000000004.WEBP": pictures[4], "000000004.json": b'{"caption": "four"}',
    }  # fmt: skip
    tar(tmp_path / "in" / "00000.tar", files)
    tar(tmp_path / "in" / "00001.tar", {"a.b/000010000.jpg": pictures[1], "a.b/000010000.txt": b"one"})
    options = ["--image-size", "8", "--min-side", "1", "--shard-size", "3", "--max-bad", "0.5", "--readers", "1"]
    assert main(["text_image", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]) == 0
    assert read(tmp_path / "out") == {
        "000000-000000": (square(pictures[0], 8, 1).tobytes(), (Caption("zero"),)),
        "000000-000002": (square(pictures[2], 8, 1).tobytes(), (Caption("two"),)),
        "000000-000004": (square(pictures[4], 8, 1).tobytes(), (Caption("four"),)),
        "000001-000000": (square(pictures[1], 8, 1).tobytes(), (Caption("one"),)),
    }
    dataset = Dataset.open(tmp_path / "out")
    assert [shard.name for shard in dataset.manifest.shards] == [
        f"text-image-{name}.tar" for name in ("000000-0000", "000000-0001", "000001-0000")
    ]
    assert (dataset.manifest.condition, dataset.manifest.num_classes, dataset.manifest.fields) == (
        "text",
        0,
        ("captions.json", "pixels.npy"),
    )
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert bad == [
        {"place": "00000.tar:000000001", "reason": "no image"},
        {"place": "00000.tar:000000003", "reason": "no caption"},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_tar_that_is_cut_gives_what_is_whole(tmp_path: Path) -> None:
    files = {
        f"{number:09d}.{ending}": picture(number) if ending == "jpg" else b"text"
        for number in range(4)
        for ending in ("jpg", "txt")
    }
    path = tar(tmp_path / "in" / "00000.tar", files)
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"000000002.txt") + 100])
    options = ["--image-size", "8", "--min-side", "1", "--max-bad", "0.5", "--readers", "1"]
    assert main(["text_image", "--source", str(path), "--out", str(tmp_path / "out"), *options]) == 0
    assert sorted(read(tmp_path / "out")) == ["000000-000000", "000000-000001"]
    bad = [json.loads(line)["reason"] for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert bad[0] == "no caption"  # its image is whole, its caption was cut off
    assert bad[1].startswith("the archive is damaged after 000000002.jpg")


def test_a_folder_of_images_with_captions_beside(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, name in enumerate(("a.jpg", "deep/er/b.png", "c.jpg", "d.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    (folder / "a.txt").write_text("an a")
    (folder / "deep" / "er" / "b.json").write_text('{"caption": "a b"}')
    (folder / "c.txt").write_text("")
    (folder / "outside").symlink_to(tmp_path)
    options = ["--image-size", "8", "--min-side", "1", "--max-bad", "0.5", "--readers", "1"]
    assert main(["text_image", "--source", str(folder), "--out", str(tmp_path / "out"), *options]) == 0
    assert {key: condition for key, (_, condition) in read(tmp_path / "out").items()} == {
        "a": (Caption("an a"),),
        "b": (Caption("a b"),),
    }
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert sorted(entry["place"] for entry in bad) == ["c.jpg", "d.jpg"]


def test_small_images_are_bad_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(
        tmp_path / "in" / "00000.tar",
        {"0.jpg": picture(0), "0.txt": b"small", "1.jpg": picture(1, 80, 64), "1.txt": b"large"},
    )
    assert (
        main(["text_image", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--image-size", "64"])
        == 2
    )
    told = capsys.readouterr().err
    assert (
        "1 of the 2 samples seen so far are bad, more than --max-bad 0.01 of all (00000.tar:0: 20 x 16 pixels are "
        "too small" in told
    )
