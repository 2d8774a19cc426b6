"""What every command does before a run: check its rows, and make the plan's table of clips from them."""

import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vfun_cli import console
from vfun_cli.config.options import RunConfig
from vfun_cli.errors import MetadataError
from vfun_cli.families.spec import FamilySpec
from vfun_cli.metadata.checks import (
    MEDIA_TYPES,
    MediaType,
    Report,
    Settings,
    table_without_files,
    validate,
)
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.codes import Problem
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.records import Metadata, is_folder, read_metadata
from vfun_cli.metadata.report import summary_of_warnings
from vfun_cli.plan.captions import long_captions
from vfun_cli.plan.options import plan_options

if TYPE_CHECKING:
    from vfun_cli.metadata.table import ClipTable

CACHE = Path("~/.cache/vfun/headers.sqlite")
"""Remembered file headers, by path, for as long as the file does not change."""


EVERY_FIELD = (
    MetadataField(name="file_path", media="visual"),
    MetadataField(name="control_file_path", media="control", required=False),
    MetadataField(name="audio_path", media="audio", required=False),
)
"""What rows may hold when no family is named."""


def check_rows(config: RunConfig, spec: FamilySpec, *, deep_timeout: float | None = None) -> Report:
    """Validate the metadata of a run as its family and settings need it.

    With ``deep_timeout`` everything is decoded too, at most so many seconds a file.

    Raises:
        ConfigError: options with which nothing can be planned.
    """
    assert config.train_data_meta is not None
    report = _validate(
        config.train_data_meta,
        config.train_data_dir,
        spec.fields,
        spec.media_types,
        needs=spec.plan.clip_needs(config.video_sample_stride),
        deep_timeout=deep_timeout,
    )
    if not report.ok:
        return report
    captions = captions_of(report.metadata, report.bad_rows)
    long = long_captions(spec, config.pretrained_model_name_or_path, captions)
    return report.plus([*long, *left_out_by_plan(config, spec, report)])


def captions_of(metadata: Metadata, bad_rows: Collection[int] = ()) -> dict[int, str]:
    """The texts of the rows that can be trained, by row."""
    return {
        record.row: text
        for record in metadata.records
        if record.row not in bad_rows and isinstance(text := record.fields.get("text"), str)
    }


CODES_OF_REASONS = {"unsupported-type": "unsupported-type", "too-short": "clip-too-short", "too-small": "too-small"}
"""What validation calls the plan's reasons; the other reasons are errors of the file, found before."""


def left_out_by_plan(config: RunConfig, spec: FamilySpec, report: Report) -> list[Problem]:
    """The rows without errors that the plan would still leave out, asked of the plan itself.

    With the released model's dimensions: the data must not seem bad because the model directory is.
    """
    from vfun_cli.plan.clips import dropped, prepare  # with numpy: not for metadata that cannot be read

    visual = next(field.name for field in spec.fields if field.media == "visual")
    clips = prepare(spec, spec.model.dims, report.table(), plan_options(config))
    problems = [
        Problem(row=row, code=CODES_OF_REASONS[reason], message=words, field=visual)
        for row, reason, words in dropped(clips)
    ]
    if problems and not clips.used.any():
        message = f"the plan leaves out all {len(problems)} rows without errors"
        problems.append(Problem(row=None, code="nothing-to-train", message=message))
    return problems


def check_rows_of_any_family(meta: Path, root: Path, *, deep_timeout: float | None = None) -> Report:
    """Validate what every family needs; ``deep_timeout`` as in :func:`check_rows`."""
    return _validate(meta, root, EVERY_FIELD, MEDIA_TYPES, needs=None, deep_timeout=deep_timeout)


def check_folder(metadata: Metadata, spec: FamilySpec | None) -> Report:
    """Validate what a folder gives as a family needs it, or as every family does; whatever the settings of a run."""
    fields, media_types = (EVERY_FIELD, MEDIA_TYPES) if spec is None else (spec.fields, spec.media_types)
    with progress() as stage:
        settings = Settings(cache=header_cache(), progress=stage)
        return validate(metadata, fields, media_types, metadata.path, settings=settings)


def _validate(
    meta: Path,
    root: Path | None,
    fields: Sequence[MetadataField],
    media_types: Sequence[MediaType],
    *,
    needs: ClipNeeds | None,
    deep_timeout: float | None,
) -> Report:
    with progress() as stage:
        settings = Settings(cache=header_cache(), progress=stage)
        if deep_timeout is not None:
            settings = replace(settings, deep=True, deep_timeout=deep_timeout)
        return validate(read_metadata(meta), fields, media_types, root, needs=needs, settings=settings)


def header_cache() -> Path | None:
    """Where headers are remembered; nowhere for a user without a home."""
    try:
        return CACHE.expanduser()
    except RuntimeError:  # no HOME, and a number that no user has: usual in containers
        return None


def validate_command(config: RunConfig, spec: FamilySpec) -> str:
    """The command that checks the metadata of a run as the run does."""
    words = ["vfun", "validate-meta", str(config.train_data_meta), "--family", spec.name]
    if config.train_data_dir not in (None, config.train_data_meta):  # a folder is its own root
        words += ["--data-root", str(config.train_data_dir)]
    model = config.pretrained_model_name_or_path
    if model is not None and model.is_dir():  # its tokenizer counts the captions
        words += ["--pretrained-model-name-or-path", str(model)]
    return shlex.join(words)


def checked_rows(config: RunConfig, spec: FamilySpec) -> Report:
    """The rows of a run, which are all good; what is odd about them is told.

    Raises:
        MetadataError: rows that cannot be trained on; the message names them.
    """
    report = check_rows(config, spec)
    for line in summary_of_warnings(report):
        console.warn(line)
    if any(problem.severity == "warning" for problem in report.problems):
        console.hint(f"The rows, counted from 0: {validate_command(config, spec)}")
    report.require_ok()
    return report


def of_validation(config: RunConfig) -> RunConfig:
    """The configuration with the rows to validate on in the place of those to train on."""
    assert config.validation_meta is not None
    root = config.validation_meta if is_folder(config.validation_meta) else config.train_data_dir
    return replace(config, train_data_meta=config.validation_meta, train_data_dir=root)


def validation_table(config: RunConfig, spec: FamilySpec, *, trust_stated: bool = False) -> "ClipTable | None":
    """The clips of ``validation_meta``, whose rows are all good; None where there is none.

    Args:
        trust_stated: rows that state everything are believed, as for a plan of a cluster run.

    Raises:
        MetadataError: rows that cannot be looked at; the message names them, the hint how to see all.
    """
    if config.validation_meta is None:
        return None
    own = of_validation(config)
    try:
        return (stated_table(own, spec) if trust_stated else None) or checked_rows(own, spec).table()
    except MetadataError as error:
        raise error.with_command(validate_command(own, spec)) from None


def stated_table(config: RunConfig, spec: FamilySpec) -> "ClipTable | None":
    """The clips of rows that state everything, to plan a cluster run on a laptop; None if they do not."""
    assert config.train_data_meta is not None
    metadata = read_metadata(config.train_data_meta)
    table = table_without_files(metadata)
    if table is not None:
        for problem in long_captions(spec, config.pretrained_model_name_or_path, captions_of(metadata)):
            console.warn(f"{problem.code}: {problem.message}")
    return table


class _Rate(ProgressColumn):
    """Files a second."""

    def render(self, task: Task) -> Text:
        """Empty until there is something to measure."""
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="dim")


@contextmanager
def progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A progress bar with rate and time left for the stages of a validation; silent when not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console.err, transient=True, disable=not console.err.is_terminal) as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            return advance

        yield stage
