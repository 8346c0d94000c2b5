"""Runs these tests on kernels: in the interpreter if TRITON_INTERPRET=1, else on a GPU if there is one (make gpu)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.on_device import everything_on

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests in a process that imported triton for compilation, where they would silently test the torch references."""
    for item in (item for item in items if item.path.parent == Path(__file__).parent):
        if not INTERPRETED and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 from the start of the process: make test"))
        elif ON_GPU and "beyond_2_31" in item.name:
            item.add_marker(pytest.mark.skip(reason="reads a file of the host; tests/gpu has this one on the GPU"))


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    if not ON_GPU:
        yield
        return
    with everything_on(torch.device("cuda")):
        yield
