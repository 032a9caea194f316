"""Which checkpoint of a run folder to go on from: the newest that is as it was saved."""

import errno
from collections.abc import Sequence
from pathlib import Path

from diffmoe_ep.checkpoint.store import CheckpointError, DamagedCheckpointError, newest_first, verify
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh

DAMAGED = ".damaged"


def newest_sound(root: Path, mesh: Mesh) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in a `checkpoints` folder whose files have their checksums, and what is wrong with each
    newer one; collective, each rank reading its share.

    None: there is no checkpoint. Raises CheckpointError, on every rank alike, where there are some and none is sound: a
    run never starts anew in the place of one that is lost.
    """
    folders = mesh.same(newest_first(root) if mesh.is_first else None)
    assert isinstance(folders, list)
    damage: dict[Path, str] = {}
    for folder in folders:
        found = gather_objects(_damage(folder, mesh), mesh.world)
        if not any(found):
            return folder, damage
        damage[folder] = next(text for text in found if text)
    if damage:
        raise CheckpointError(
            f"no checkpoint in {root} is sound: {'; '.join(damage.values())}. Put a sound copy there, or give this run "
            "another folder",
            everywhere=True,
        )
    return None, {}


def set_aside(folders: Sequence[Path]) -> list[Path]:
    """Give damaged checkpoints names under which no run goes on from them; nothing is removed. On the first rank."""
    return [folder.rename(_free(folder)) for folder in folders]


def _damage(folder: Path, mesh: Mesh) -> str | None:
    try:
        verify(folder, mesh.rank, mesh.size)
    except DamagedCheckpointError as error:
        return str(error)
    except CheckpointError:  # sound, and for another program: told when it is read
        return None
    except OSError as error:
        if error.errno != errno.EIO:  # as no permission: nothing that an older checkpoint would heal
            return None
        return f"{folder} cannot be read from its disk ({error})"
    return None


def _free(folder: Path) -> Path:
    places = (folder.with_name(f"{folder.name}{DAMAGED}{'' if n == 1 else f'-{n}'}") for n in range(1, 10_000))
    return next(place for place in places if not place.exists())
