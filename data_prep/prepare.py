"""Prepare a source on any number of ranks; files in the output folder are all that the ranks know of one another.

Unit u of the source is made by rank u mod world. A shard that is finished has a journal beside the shards,
journal/SHARD.json: what the manifest will say of it, and which of its samples were bad. When every unit is finished,
rank 0 makes the manifest and the list of bad samples of the journals. A run that was cut short, or is repeated, makes
only what is missing or damaged; the bytes are the same.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.encode import Bad, Encoding
from data_prep.shard import Sample, aside, write_shard, writing_to
from data_prep.source import Raw, Source
from data_prep.write import same_but_shards
from diffmoe_ep.data.manifest import MANIFEST_NAME, DataError, Manifest, Shard, read_manifest
from diffmoe_ep.data.shards import Dataset, shard_problem

JOURNAL, RECIPE, BAD = "journal", "recipe.json", "bad.jsonl"


@dataclass(frozen=True)
class Note:
    """The journal of one finished shard, or of one that has no sample because all were bad."""

    shard: Shard | None
    seen: int  # samples of the source, bad ones included
    cut: int  # captions that were too long for an encoder
    bad: tuple[Bad, ...]


@dataclass(frozen=True)
class Report:
    """What came of a preparation."""

    seen: int  # samples of the source
    bad: int  # of them left out
    cut: int  # captions that were too long for an encoder and were cut
    made: int  # shards that this call wrote; 0: all were there


@dataclass(frozen=True)
class Preparation:
    """A source on its way into a folder; every rank has an equal one but for `rank`."""

    folder: Path
    source: Source
    encoding: Encoding
    manifest: Manifest  # the manifest without shards
    shard_size: int  # samples of the source in a shard
    max_bad: float = 0.01  # share of bad samples above which there is no dataset
    rank: int = 0
    world: int = 1
    patience: float = 3600.0  # seconds that rank 0 waits while no other rank finishes anything

    def run(self, progress: Callable[[int], object] = lambda _: None) -> Report | None:
        """Make this rank's shards; then, on rank 0, wait for those of the others and make the dataset of them. None on
        other ranks.

        `progress` is called with numbers of samples of the source, as they are done. DataError if the folder holds
        something else, the source cannot be read, or too much of it is bad.
        """
        with writing_to(self.folder):
            self._demand_own_folder()
            made = self._units(progress)
            return self._finish(made) if self.rank == 0 else None

    def _demand_own_folder(self) -> None:
        """DataError if the folder holds files of others, or what was begun with other options."""
        if not 0 <= self.rank < self.world:
            raise DataError(f"--rank {self.rank} of --world {self.world} does not exist; ranks count from 0")
        shard = re.compile(rf"{re.escape(self.manifest.name)}-\d{{6,}}(-\d{{4,}})?\.(tar|index\.npy)(\.partial)?")
        own = re.compile(rf"{JOURNAL}|({re.escape(MANIFEST_NAME)}|{re.escape(BAD)})(\.\d+\.partial)?")
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        foreign = [name for name in names if not own.fullmatch(name) and not shard.fullmatch(name)]
        if foreign:
            raise DataError(
                f"{self.folder} holds other files ({', '.join(foreign[:3])}); choose another folder with --out, or "
                "empty it"
            )
        if (self.folder / MANIFEST_NAME).exists():
            found = read_manifest(self.folder / MANIFEST_NAME)
            if not same_but_shards(found, self.manifest):
                differing = [
                    field.name for field in fields(Manifest) if field.name not in ("shards", "num_samples", "format")
                ]
                key = next(key for key in differing if getattr(found, key) != getattr(self.manifest, key))
                raise DataError(
                    f"{self.folder} holds another dataset: its {key} is {str(getattr(found, key))[:80]}, now it would "
                    "be"
                    f" {str(getattr(self.manifest, key))[:80]}; choose another folder with --out"
                )
        (self.folder / JOURNAL).mkdir(parents=True, exist_ok=True)
        recipe = {
            **asdict(self.manifest),
            "shard_size": self.shard_size,
            "batch": self.encoding.batch,
            "min_side": self.source.min_side,
            "num_units": self.source.num_units,
        }
        text = json.dumps(recipe, indent=2) + "\n"
        path = self.folder / JOURNAL / RECIPE
        begun = _journal(path)
        if begun is None:
            self._write(path, text)
        elif begun != json.loads(text):
            key = next(key for key in recipe if begun.get(key) != json.loads(text)[key])
            raise DataError(
                f"{self.folder} was begun with another {key} ({str(begun.get(key))[:80]}, now "
                f"{str(recipe[key])[:80]}); go on with the"
                " options and the source of that run, or choose another folder with --out"
            )

    def _units(self, progress: Callable[[int], object]) -> int:
        """Make the units of this rank that are not there, and return how many shards that took; stops where too many
        samples are bad.
        """
        made = seen = bad = 0
        units = range(self.rank, self.source.num_units, self.world)
        for done, unit in enumerate(units, start=1):
            notes = self._noted(unit, checksum=True)
            if notes is None:
                made += self._unit(unit, progress)
                notes = self._noted(unit, checksum=False)
            else:
                progress(sum(note.seen for note in notes))
            assert notes is not None
            seen, bad = seen + sum(note.seen for note in notes), bad + sum(len(note.bad) for note in notes)
            expected = self.source.num_samples or seen / done * self.source.num_units
            if bad > self.max_bad * expected:  # more than all units together may have
                self._refuse(
                    seen, [found for unit in units[:done] for note in self._noted(unit) or () for found in note.bad]
                )
        return made

    def _unit(self, unit: int, progress: Callable[[int], object]) -> int:
        """Make the shards of a unit that are not there, and return their number."""
        raws = enumerate(self.source.read(unit))
        size = self.shard_size
        parts, made = 0, 0
        for part, group in groupby(raws, key=lambda numbered: numbered[0] // size if self.source.cut else 0):
            name = self._stem(unit, part)
            note = self._note(name, checksum=True)
            if note is None:
                note = self._shard(name, (raw for _, raw in group), progress)
                made += 1
            else:
                progress(note.seen)
            parts = part + 1
        self._write(self.folder / JOURNAL / f"{self._stem(unit)}.end.json", json.dumps({"parts": parts}) + "\n")
        return made

    def _shard(self, stem: str, raws: Iterator[Raw], progress: Callable[[int], object]) -> Note:
        """Make one shard and its journal."""
        seen, cut, bad = 0, 0, []

        def good() -> Iterator[Sample]:
            nonlocal seen, cut
            for found, cuts in self.encoding.samples(raws, self.manifest, self.source.min_side):
                seen, cut = seen + 1, cut + cuts
                progress(1)
                if isinstance(found, Bad):
                    bad.append(found)
                else:
                    yield found

        shard = write_shard(self.folder, f"{stem}.tar", good(), self.manifest)
        note = Note(shard, seen, cut, tuple(bad))
        self._write(self.folder / JOURNAL / f"{stem}.json", json.dumps(asdict(note)) + "\n")
        return note

    def _noted(self, unit: int, checksum: bool | None = None) -> list[Note] | None:
        """The journals of a finished unit, or None if work is left; `checksum`: read its shards, only look at them, or
        (None) neither.
        """
        end = _journal(self.folder / JOURNAL / f"{self._stem(unit)}.end.json")
        if end is None:
            return None
        notes = [self._note(self._stem(unit, part), checksum) for part in range(end["parts"])]
        return None if None in notes else [note for note in notes if note is not None]

    def _note(self, stem: str, checksum: bool | None) -> Note | None:
        """The journal of a finished shard that is sound, or None."""
        content = _journal(self.folder / JOURNAL / f"{stem}.json")
        if content is None:
            return None
        shard = Shard(**content["shard"]) if content["shard"] else None
        if (
            shard is not None
            and checksum is not None
            and shard_problem(self.folder, shard, self.manifest.fields, checksum)
        ):
            return None
        return Note(shard, content["seen"], content["cut"], tuple(Bad(**found) for found in content["bad"]))

    def _finish(self, made: int) -> Report:
        """Wait for every unit, then write the list of bad samples and the manifest, and remove what is not of this
        dataset.
        """
        notes = [note for unit in self._waited_for() for note in unit]
        seen, bad = sum(note.seen for note in notes), [found for note in notes for found in note.bad]
        if seen and len(bad) > self.max_bad * seen:
            self._refuse(seen, bad)
        self._list_bad(bad)
        shards = tuple(note.shard for note in notes if note.shard is not None)
        if not shards:
            raise DataError(
                f"the source has no sample that can be used ({seen} seen, {len(bad)} bad); see {self.folder / BAD}"
            )
        text = replace(self.manifest, shards=shards, num_samples=sum(shard.num_samples for shard in shards)).to_json()
        path = self.folder / MANIFEST_NAME
        if not path.exists() or path.read_text() != text:
            self._write(path, text)
        expected = {MANIFEST_NAME, BAD, JOURNAL} | {name for shard in shards for name in (shard.name, shard.index_name)}
        for found in self.folder.iterdir():  # leftovers of a run that was cut short; all names were looked at before
            if found.name not in expected:
                found.unlink()
        Dataset.open(self.folder).close()
        return Report(seen, len(bad), sum(note.cut for note in notes), made)

    def _waited_for(self) -> list[list[Note]]:
        """The journals of all units; DataError when no other rank finishes one within the patience of this one."""
        found: dict[int, list[Note]] = {}
        since = time.monotonic()
        while True:
            missing = [unit for unit in range(self.source.num_units) if unit not in found]
            news = {unit: notes for unit in missing if (notes := self._noted(unit, checksum=False)) is not None}
            found |= news
            if len(found) == self.source.num_units:
                return [found[unit] for unit in range(self.source.num_units)]
            if news:
                since = time.monotonic()
            if time.monotonic() - since > self.patience:
                absent = [unit for unit in missing if unit not in found]
                ranks = sorted({unit % self.world for unit in absent})
                raise DataError(
                    f"{len(absent)} of {self.source.num_units} units are not there and none came in "
                    f"{self.patience:.0f} s: ranks"
                    f" {', '.join(map(str, ranks[:8]))} of {self.world} have stopped or never started; run the command "
                    "again"
                )
            time.sleep(min(1.0, self.patience / 10))

    def _refuse(self, seen: int, bad: list[Bad]) -> None:
        """DataError for too many bad samples; the list of them is written first."""
        self._list_bad(bad)
        first = "; ".join(f"{found.place}: {found.reason}" for found in bad[:3])
        raise DataError(
            f"{len(bad)} of the {seen} samples seen so far are bad, more than --max-bad {self.max_bad:g} of all "
            f"({first});"
            f" see {self.folder / BAD}, mend the source, or allow more with --max-bad"
        )

    def _list_bad(self, bad: list[Bad]) -> None:
        text = "".join(json.dumps(asdict(found)) + "\n" for found in bad)
        path = self.folder / BAD
        if not path.exists() or path.read_text() != text:
            self._write(path, text)

    def _stem(self, unit: int, part: int | None = None) -> str:
        """The name of a unit, or of one of its shards; a source whose units make one shard each has no parts in its
        names.
        """
        stem = f"{self.manifest.name}-{unit:06d}"
        return stem if part is None or not self.source.cut else f"{stem}-{part:04d}"

    def _write(self, path: Path, text: str) -> None:
        with aside(path, f".{self.rank}") as file:  # several ranks may write the same file, with the same content
            file.write(text.encode())


def _journal(path: Path) -> dict[str, Any] | None:
    """A journal file's content; None if there is none, or it is damaged: then what it describes is made again."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content
