"""The order of the test files, and the signals that tests send."""

import signal

import pytest

LONGEST = ("test_readme.py", "test_blocks.py", "test_cache_fill.py")
"""Files whose slow tests take longest: begun last, one process would work on them alone."""

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}


def pytest_configure() -> None:
    """Under ``nohup make test &`` these are ignored, here and in all that tests start; some tests are about them."""
    for number, handler in USUAL.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
