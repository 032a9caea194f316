"""JourneyDB's archives and annotation lines: prompt and caption with weights, for each rank only those of its
archives.
"""

import json
from pathlib import Path

import pytest

from data_prep import journeydb
from data_prep.__main__ import main
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.codec import Caption
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.shards import Dataset
from pictures import content, picture, tar

pytest.importorskip("PIL")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two archives of four images, in JourneyDB's layout; annotations in another order, some of them without prompt or
    caption.
    """
    lines = []
    for archive in ("000", "001"):
        names = [f"./{archive}/{archive}-{number}-af.jpg" for number in range(4)]
        tar(
            tmp_path / "imgs" / f"{archive}.tgz",
            {name: picture(number, kind="JPEG") for number, name in enumerate(names)},
            "w:gz",
        )
        for number, name in enumerate(names):
            annotation: dict[str, object] = {
                "img_path": name,
                "Task1": {"Style": ["oil"]},
                "Task2": {"Caption": f"caption {archive} {number}"},
            }
            annotation["prompt"] = f"prompt {archive} {number} --v 4"
            if number == 1:
                annotation["Task2"] = {}
            if number == 2:
                annotation["prompt"] = None
            if not (archive == "001" and number == 3):
                lines.append(json.dumps(annotation))
    lines.append(json.dumps({"img_path": "./777/another.jpg", "prompt": "elsewhere"}))
    (tmp_path / "anno.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    return tmp_path


def prepare(folder: Path, out: Path, *more: str) -> int:
    common = [
        "--source",
        str(folder / "imgs"),
        "--annotations",
        str(folder / "anno.jsonl"),
        "--out",
        str(out),
        "--image-size",
        "8",
    ]
    return main(
        ["journeydb", *common, "--min-side", "1", "--max-bad", "0.2", "--shard-size", "3", "--readers", "1", *more]
    )


def test_prompts_and_captions_with_their_weights(published: Path, tmp_path: Path) -> None:
    assert prepare(published, tmp_path / "out", "--prompt-weight", "0.5", "--caption-weight", "2") == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.sizes == (3, 1, 3)
    places = [(shard, sample) for shard, size in enumerate(dataset.sizes) for sample in range(size)]
    found = {dataset.address(*place)[1]: read_sample(dataset, *place)[1] for place in places}
    assert found["000000-000000"] == (Caption("prompt 000 0 --v 4", 0.5), Caption("caption 000 0", 2.0))
    assert found["000001-000001"] == (Caption("prompt 001 1 --v 4", 0.5),)
    assert found["000001-000002"] == (Caption("caption 001 2", 2.0),)
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert bad == [{"place": "001.tgz:./001/001-3-af.jpg", "reason": "no annotation line"}]


def test_weight_nought_leaves_prompts_out(published: Path, tmp_path: Path) -> None:
    assert prepare(published, tmp_path / "out", "--prompt-weight", "0", "--max-bad", "0.5") == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.manifest.num_samples == 5  # without caption or annotation: one and two
    assert read_sample(dataset, 0, 0)[1] == (Caption("caption 000 0", 1.0),)


def test_two_ranks_make_the_same(published: Path, tmp_path: Path) -> None:
    assert prepare(published, tmp_path / "one") == 0
    assert prepare(published, tmp_path / "two", "--world", "2", "--rank", "1") == 0
    assert prepare(published, tmp_path / "two", "--world", "2", "--rank", "0") == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_rank_holds_the_lines_of_its_archives_only(published: Path) -> None:
    found = journeydb.read_annotations(published / "anno.jsonl", {"001"})
    assert sorted(found) == [f"001/001-{number}-af.jpg" for number in range(3)]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "x"}', '{"img_path": 3}', '{"img_path": "a/b.jpg", "Task2": 3}', '"x"']
)
def test_a_line_that_is_no_annotation_is_named(published: Path, tmp_path: Path, line: str) -> None:
    with (published / "anno.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="anno.jsonl, line 9: .*fetch the file again"):
        journeydb.read_annotations(published / "anno.jsonl", {"001"})


def test_what_is_missing_is_named(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(published, tmp_path / "out", "--prompt-weight", "0", "--caption-weight", "0") == 2
    assert "not both 0" in capsys.readouterr().err
    (published / "anno.jsonl").unlink()
    assert prepare(published, tmp_path / "out") == 2
    assert "anno.jsonl is not a file; give JourneyDB's file of JSON lines with --annotations" in capsys.readouterr().err
    (tmp_path / "nothing" / "imgs").mkdir(parents=True)
    assert prepare(tmp_path / "nothing", tmp_path / "out") == 2
    assert "holds no archives" in capsys.readouterr().err
