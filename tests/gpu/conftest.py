from collections.abc import Iterator

import pytest
import torch

from tests.on_device import everything_on

HERE = str(__file__).rsplit("/", 1)[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if str(item.path).startswith(HERE):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with everything_on(torch.device("cuda")):
        yield
