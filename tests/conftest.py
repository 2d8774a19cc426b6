"""The order of the test files."""

import pytest

LONGEST = ("test_readme.py", "test_blocks.py", "test_cache_fill.py")
"""Files whose slow tests take longest: begun last, one process would work on them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
