"""One task at a time in a thread of its own, whose error its caller meets."""

import threading
from collections.abc import Callable


class Background:
    """Runs a task in a thread; the caller meets its error at the next ``raise_error`` or ``wait``.

    The end of the process does not wait for a thread that hangs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        """Of the thread."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task; the one before must have been waited for."""
        self._thread = threading.Thread(target=self._run, args=(task,), name=self.name, daemon=True)
        self._thread.start()

    def raise_error(self) -> None:
        """Raise what the task raised, if it has ended that way."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the task, if there is one, and raise what it raised.

        Returns:
            False if it has not ended within so many seconds.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        self.raise_error()
        return True

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            self._error = error
