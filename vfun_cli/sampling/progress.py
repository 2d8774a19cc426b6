"""How far the videos are: on a terminal a bar for each process, and under them how many are made and what is next."""

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from vfun_cli import console
from vfun_cli.sampling.events import MADE, Event

PACE_OF = 3600.0
"""Seconds of steps from which the time that is left is estimated: of a large video, a single one takes minutes."""


class Bars:
    """What is on the terminal while the context is entered; nothing where none is."""

    def __init__(self, videos: Sequence[str]) -> None:
        self.total = _Total(videos)
        self.tasks: dict[int, tuple[str, TaskID]] = {}
        self.progress = _OverTotal(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            console=console.err,
            expand=True,
            transient=True,
            speed_estimate_period=PACE_OF,
            disable=not console.err.is_terminal,
        )
        self.progress.under = self.total

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, process: int, event: Event) -> None:
        """What a process tells."""
        self.total.hear(event)
        if event.exit_code is not None:
            return
        name, count = f"{event.video or event.doing}{', base' * event.of_base}", f"{event.done}/{event.total}"
        task = self._task(process, name)
        self.progress.update(
            task, completed=event.done, total=event.total or None, count=count if event.total else "", refresh=True
        )

    def _task(self, process: int, name: str) -> TaskID:
        """The bar of a process, empty again when it begins something else."""
        before, task = self.tasks.get(process, ("", None))
        if task is None:
            task = self.progress.add_task(name, count="")
        elif before != name:
            self.progress.reset(task, description=name)
        self.tasks[process] = name, task
        return task


class _Total:
    """A line about all videos."""

    def __init__(self, videos: Sequence[str]) -> None:
        self.num_videos, self.waiting = len(videos), list(videos)
        self.made = self.failed = 0

    def hear(self, event: Event) -> None:
        """Count it."""
        if event.video in self.waiting:
            self.waiting.remove(event.video)
        if event.exit_code is not None:
            self.made += event.exit_code == MADE
            self.failed += event.exit_code != MADE

    def __rich__(self) -> Text:
        failed = f", {self.failed} failed" if self.failed else ""
        coming = f", next: {self.waiting[0]}" if self.waiting else ""
        text = f"{self.made} of {self.num_videos} made{failed}{coming}"
        return Text(text, style="dim", overflow="ellipsis", no_wrap=True)


class _OverTotal(Progress):
    """Bars, and a line under them."""

    under: RenderableType = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars and the line."""
        yield self.make_tasks_table(self.tasks)
        yield self.under
