"""One task at a time in a thread of its own, whose error the training loop meets."""

import threading
from collections.abc import Callable


class Background:
    """Runs a task in a thread; the caller meets its error at the next ``raise_error`` or ``wait``."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task; the one before must have been waited for."""
        self._thread = threading.Thread(target=self._run, args=(task,), name="checkpoint", daemon=True)
        self._thread.start()

    def raise_error(self) -> None:
        """Raise what the task raised, if it has ended that way."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the task, if there is one, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            self._error = error
