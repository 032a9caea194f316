"""What every test shares: one thread, and small real data prepared once."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fast run has laws over one and two ranks, all in one process, which starts the ranks once; on four ranks they
    are slow.
    """
    for item in items:
        assert isinstance(item, pytest.Function)
        if hasattr(item, "callspec") and item.callspec.params.get("world") == 4:
            item.add_marker(pytest.mark.slow)
        on_ranks = "ranks" in {getattr(value, "__module__", "") for value in vars(item.module).values()}
        item.add_marker(pytest.mark.xdist_group("on ranks" if on_ranks else str(item.path)))


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
