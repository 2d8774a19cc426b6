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
from vfun_cli.config.datasets import DataSet
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
from vfun_cli.metadata.fields import MetadataField, texts_of
from vfun_cli.metadata.records import Metadata, read_metadata, root_of
from vfun_cli.metadata.report import summary_of_warnings
from vfun_cli.modeling.captions import possible_captions
from vfun_cli.plan.captions import caption_options, long_captions
from vfun_cli.plan.options import plan_options
from vfun_cli.plan.sets import joined_reports, meta_of, one_by_one, read_rows

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
    """Validate the metadata of a run's one data set as its family and settings need it.

    With ``deep_timeout`` everything is decoded too, at most so many seconds a file.

    Raises:
        ConfigError: options with which nothing can be planned.
    """
    report = _validate(
        read_metadata(meta_of(config)),
        config.train_data_dir,
        spec.fields,
        spec.media_types,
        needs=spec.plan.clip_needs(config.video_sample_stride),
        deep_timeout=deep_timeout,
    )
    if not report.ok:
        return report
    captions = captions_of(config, report.metadata, report.bad_rows)
    long = long_captions(spec, config.pretrained_model_name_or_path, captions)
    return report.plus([*long, *left_out_by_plan(config, spec, report)])


def captions_of(config: RunConfig, metadata: Metadata, bad_rows: Collection[int] = ()) -> list[tuple[int, str]]:
    """Every caption that the rows which can be trained may train with, and its row."""
    options = [caption_options(config, each) for each in config.train_data_meta]
    return [
        (record.row, caption)
        for record in metadata.records
        if record.row not in bad_rows
        for caption in possible_captions(texts_of(record.fields), options[metadata.set_of(record.row)])
        if caption
    ]


def undrawn_captions(config: RunConfig, report: Report) -> str | None:
    """In words, that some rows have more captions than are ever drawn for them; None where none has."""
    most = max((len(texts_of(record.fields)) for record in report.metadata.records), default=0)
    if config.cache_variants is None or most <= config.cache_variants:
        return None
    return (
        f"Rows have up to {most} captions, and --cache-variants {config.cache_variants} draws at most so many of them: "
        f"--cache-variants {most} leaves room for all."
    )


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
    return _validate(read_metadata(meta), root, EVERY_FIELD, MEDIA_TYPES, needs=None, deep_timeout=deep_timeout)


def check_folder(metadata: Metadata, spec: FamilySpec | None) -> Report:
    """Validate what a folder gives as a family needs it, or as every family does; whatever the settings of a run."""
    fields, media_types = (EVERY_FIELD, MEDIA_TYPES) if spec is None else (spec.fields, spec.media_types)
    return _validate(metadata, metadata.path, fields, media_types, needs=None, deep_timeout=None)


def _validate(
    metadata: Metadata,
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
        return validate(metadata, fields, media_types, root, needs=needs, settings=settings)


def header_cache() -> Path | None:
    """Where headers are remembered; nowhere for a user without a home."""
    try:
        return CACHE.expanduser()
    except RuntimeError:  # no HOME, and a number that no user has: usual in containers
        return None


def validate_command(config: RunConfig, spec: FamilySpec) -> str:
    """The command that checks the metadata of a run as the run does."""
    sets = config.train_data_meta
    # Several sets of other roots are those of vfun.toml, which that command reads too.
    placed = len(sets) > 1 and any(each.root not in (None, each.folder()) for each in sets)
    words = ["vfun", "validate-meta", *([] if placed else [str(each.meta) for each in sets]), "--family", spec.name]
    its_own = len(sets) == 1 and config.train_data_dir == sets[0].meta  # a folder is its own root
    if config.train_data_dir is not None and not placed and not its_own:
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
    reports, bad = [], []
    for each in one_by_one(config):
        report = check_rows(each, spec)
        of_which = f"{meta_of(each)}: " if len(config.train_data_meta) > 1 else ""
        for line in summary_of_warnings(report):
            console.warn(f"{of_which}{line}")
        if any(problem.severity == "warning" for problem in report.problems):
            console.hint(f"The rows, counted from 0: {validate_command(each, spec)}")
        try:
            report.require_ok()
        except MetadataError as error:
            bad.append(error)
        reports.append(report)
    if bad:
        raise MetadataError("\n".join(error.message for error in bad), hint=bad[0].hint)
    return joined_reports(config, reports)


def of_validation(config: RunConfig) -> RunConfig:
    """The configuration with the rows to validate on in the place of those to train on."""
    meta = config.validation_meta
    if meta is None:
        return replace(config, train_data_meta=())
    return replace(config, train_data_meta=(DataSet(meta=meta),), train_data_dir=root_of(meta, config.train_data_dir))


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
    metadata = read_rows(config)
    table = table_without_files(metadata)
    if table is not None:
        captions = captions_of(config, metadata)
        for problem in long_captions(spec, config.pretrained_model_name_or_path, captions):
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
