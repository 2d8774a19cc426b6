"""The order of the test files, the signals that tests send, and the garbage collector."""

import gc
import signal

import pytest
from hypothesis import settings

LONGEST = ("test_readme.py", "test_blocks.py", "test_cache_fill.py")
"""Files whose slow tests take longest: begun last, one process would work on them alone."""

gc.disable()  # until the tests are collected: nothing of what they import is garbage

settings.register_profile("no deadline", deadline=None)  # a busy machine needs longer than 200 ms for a first call
settings.load_profile("no deadline")

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}


def pytest_configure() -> None:
    """Under ``nohup make test &`` these are ignored, here and in all that tests start; some tests are about them."""
    for number, handler in USUAL.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """What is imported is not looked at again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
