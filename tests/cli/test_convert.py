"""What an exported folder says of where its weights come from."""

import json
from pathlib import Path

from checkpoint.test_load import INFO, config
from cli.test_cli import call
from diffmoe_ep.checkpoint.load import fragments, persistent_buffers
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.config import to_tree
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.parallel.mesh import Mesh


def test_an_export_tells_how_the_recipe_changed_and_what_came_before(tmp_path: Path) -> None:
    given = config()
    model = DiT(given.model)
    ancestry = [{"path": "runs/first", "step": 9, "weights": "ema", "fingerprint": "0" * 64}]
    recipe = [{"key": "train.optimizer.lr", "step": 4, "was": 0.5, "now": 0.0001}]
    meta = {"config": to_tree(given), "data": INFO, "fingerprint": "0", "ancestry": ancestry, "recipe": recipe}
    live = dict(model.named_parameters()) | persistent_buffers(model)
    folder = save(tmp_path / "run/checkpoints", 7, fragments(live, "model", model, Mesh()), meta)
    code, _, err = call(0, "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--weights", "model")
    assert code == 0, err
    assert json.loads((tmp_path / "out/config.json").read_text())["provenance"] == {
        "checkpoint": folder.name,
        "weights": "model",
        "ancestry": ancestry,
        "recipe": recipe,
    }
