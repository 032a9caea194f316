"""ImageNet's layouts, folders and tars of every kind, give the same samples."""

from pathlib import Path

import pytest

from data_prep import imagenet
from data_prep.__main__ import main
from data_prep.files import keys
from data_prep.image import square
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.shards import Dataset
from pictures import picture, tar

pytest.importorskip("PIL")
CLASSES = ("n01440764", "n02084071", "n02085620")
PICTURES = {
    f"{name}/{name}_{number}.JPEG": picture(10 * label + number, kind="JPEG")
    for label, name in enumerate(CLASSES)
    for number in range(5)
}


def lay_out(folder: Path, layout: str) -> Path:
    """The pictures in one of the layouts in which they are handed around."""
    folder.mkdir()
    per_class = {name: {k.split("/")[1]: v for k, v in PICTURES.items() if k.startswith(name)} for name in CLASSES}
    if layout == "folders":
        for name, content in PICTURES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    elif layout == "tar per class":
        for name in CLASSES:
            tar(folder / f"{name}.tar", per_class[name])
    elif layout == "one tar":
        return tar(folder / "train.tar", {f"./train/{name}": content for name, content in PICTURES.items()})
    else:  # a tar of tars, as image-net.org hands out
        inner = {f"{name}.tar": tar(folder / "inner" / f"{name}.tar", per_class[name]).read_bytes() for name in CLASSES}
        return tar(folder / "ILSVRC2012_img_train.tar", inner)
    return folder


def samples(folder: Path) -> dict[str, tuple[bytes, int]]:
    dataset = Dataset.open(folder)
    places = [(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]
    read = {dataset.address(*place)[1]: read_sample(dataset, *place) for place in places}
    return {key: (array.tobytes(), label) for key, (array, label) in read.items() if isinstance(label, int)}


@pytest.mark.parametrize("layout", ["folders", "tar per class", "one tar", "tar of tars"])
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = lay_out(tmp_path / "in", layout), tmp_path / "out"
    options = ["--image-size", "8", "--shard-size", "4", "--readers", "2"]
    assert main(["imagenet", "--source", str(source), "--out", str(out), *options]) == 0
    told = capsys.readouterr().out
    assert "15 samples in 4 units (written)" in told and "3 classes, from n01440764 to n02085620" in told
    assert "non-commercial" in told
    manifest = Dataset.open(out).manifest
    assert (manifest.num_classes, manifest.class_names, manifest.image_size, manifest.kind) == (3, CLASSES, 8, "pixels")
    expected = {
        Path(name).stem: (square(content, 8, 1).tobytes(), CLASSES.index(name.split("/")[0]))
        for name, content in PICTURES.items()
    }
    assert samples(out) == expected


def test_classes_are_mixed_over_the_shards(tmp_path: Path) -> None:
    source = imagenet.source(lay_out(tmp_path / "in", "folders"), 5)
    labels = [[raw.condition for raw in source.read(unit)] for unit in range(source.num_units)]
    assert sorted(label for of_shard in labels for label in of_shard) == sorted([0, 1, 2] * 5)
    assert all(len(set(of_shard)) > 1 for of_shard in labels)


def test_keys_are_file_names_where_those_are_plain_and_differ() -> None:
    assert keys(["a/x_1.JPEG", "b/x-2.png"]) == ["x_1", "x-2"]
    for names in (["a/x.jpg", "b/x.jpg"], ["a/x y.jpg", "b/z.jpg"], ["a/x.y.jpg"], ["a/" + 65 * "x" + ".jpg"]):
        assert keys(names) == [f"{number:08d}" for number in range(len(names))]


def test_what_is_no_imagenet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images .* --source"):
        imagenet.source(tmp_path / "empty", 4)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.jpg").write_bytes(picture(0))
    with pytest.raises(DataError, match="a.jpg lies in no class's folder"):
        imagenet.source(tmp_path / "loose", 4)
    with pytest.raises(DataError, match="absent: cannot be read"):
        imagenet.source(tmp_path / "absent", 4)
    tar(tmp_path / "texts" / "n1.tar", {"a.txt": b"text"})
    with pytest.raises(DataError, match="hold no images"):
        imagenet.source(tmp_path / "texts", 4)
    whole = tar(tmp_path / "cut" / "n1.tar", PICTURES).read_bytes()
    (tmp_path / "cut" / "n1.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="n1.tar: is not a whole, uncompressed tar .* fetch it again"):
        imagenet.source(tmp_path / "cut", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flips", "2"], "--flips 2 is for latents"),
        (["--vae", "absent"], "the VAE folder absent is not a folder .* local folder of a diffusers AutoencoderKL"),
        (["--rank", "3", "--world", "2"], "--rank 3 of --world 2"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = lay_out(tmp_path / "in", "folders")
    assert (
        main(["imagenet", "--source", str(source), "--out", str(tmp_path / "out"), "--image-size", "8", *options]) == 2
    )
    told = capsys.readouterr().err
    assert all(part in told for part in message.split(" .* "))
    assert told.count("\n") == 1
