import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a process that imported triton for compilation these tests would silently test the torch references."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 from the start of the process: make test"))
