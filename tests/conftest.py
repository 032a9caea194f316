"""What every test shares: one thread, and small real data prepared once."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared handwritten digits: folders `train` and `heldout`."""
    from data_prep.__main__ import main

    folder = tmp_path_factory.mktemp("digits")
    main(["digits", "--out", str(folder)])
    return folder


@pytest.fixture(autouse=True)
def _gpu_only(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
