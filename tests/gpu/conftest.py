from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.on_device import everything_on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in (item for item in items if item.path.parent == Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with everything_on(torch.device("cuda")):
        yield
