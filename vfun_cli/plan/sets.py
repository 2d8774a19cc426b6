"""The data sets of a run, taken together: rows are counted on from one to the next, in the order of the options."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from vfun_cli.config.datasets import DataSet
from vfun_cli.config.options import RunConfig
from vfun_cli.metadata.checks import Report
from vfun_cli.metadata.codes import Problem
from vfun_cli.metadata.records import Metadata, Record, SetOfRows, metadata_digest, read_metadata
from vfun_cli.metadata.stored import stored_rows


def one_by_one(config: RunConfig) -> list[RunConfig]:
    """The configuration with each of its data sets alone."""
    return [
        replace(config, train_data_meta=(each,), train_data_dir=each.root or config.train_data_dir)
        for each in config.train_data_meta
    ]


def meta_of(config: RunConfig) -> Path:
    """The metadata of a configuration of one data set."""
    (only,) = config.train_data_meta
    return only.meta


def read_rows(config: RunConfig) -> Metadata:
    """All rows of a run."""
    return joined(config, [read_metadata(each.meta) for each in config.train_data_meta])


def rows_by_number(config: RunConfig, stored: Path | None, digest: str) -> tuple[Metadata, Callable[[int], Record]]:
    """What the rows of a run are, and a function that gives one.

    Args:
        stored: where a launch has stored them; what was started by hand after a dry run reads the metadata instead.
        digest: of the rows (``rows_digest``).
    """
    found = None if stored is None else stored_rows(stored, digest)
    if found is None:
        metadata = read_rows(config)
        return metadata, {record.row: record for record in metadata.records}.__getitem__
    about, fields_of = found
    roots = [each.train_data_dir for each in one_by_one(config)]

    def record_of(row: int) -> Record:
        fields = fields_of(row)
        return Record(row=row, fields=fields, raw=fields, root=roots[about.set_of(row)] if about.sets else None)

    return about, record_of


def joined(config: RunConfig, read: Sequence[Metadata]) -> Metadata:
    """The metadata of a configuration's sets as one; of one set of which nothing else is said, its own."""
    sets = config.train_data_meta
    if len(sets) == 1 and _said(sets[0]) is None:
        return read[0]
    firsts = [0, *accumulate(each.rows for each in read)]
    records: list[Record] = []
    problems: list[Problem] = []
    for metadata, config_of_set, first in zip(read, one_by_one(config), firsts, strict=False):
        root = config_of_set.train_data_dir
        records += [replace(record, row=record.row + first, root=root) for record in metadata.records]
        problems += [_moved(problem, first) for problem in metadata.problems]
    return Metadata(
        path=read[0].path,
        format=read[0].format,
        rows=firsts[-1],
        records=tuple(records),
        problems=tuple(problems),
        sets=tuple(
            SetOfRows(name=str(each.meta), first=first, said=_said(each) or "")
            for each, first in zip(sets, firsts, strict=False)
        ),
    )


def joined_reports(config: RunConfig, reports: Sequence[Report]) -> Report:
    """What the validations of the sets found, as one."""
    metadata = joined(config, [report.metadata for report in reports])
    if not metadata.sets:
        return reports[0]
    together = list(zip(reports, (each.first for each in metadata.sets), strict=True))
    return Report(
        metadata=metadata,
        media_types=reports[0].media_types,
        problems=tuple(_moved(problem, first) for report, first in together for problem in report.problems),
        clips={
            row + first: replace(clip, row=row + first)
            for report, first in together
            for row, clip in report.clips.items()
        },
        bad_rows=frozenset(row + first for report, first in together for row in report.bad_rows),
    )


def rows_digest(sets: Sequence[DataSet]) -> str:
    """SHA-256 of the metadata of all sets, and of what else is said of them."""
    if len(sets) == 1 and _said(sets[0]) is None:
        return metadata_digest(sets[0].meta)
    lines = [f"{metadata_digest(each.meta)} {_said(each) or ''}" for each in sets]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _said(data: DataSet) -> str | None:
    """What is said of a set beside where it lies, as text; None: nothing."""
    said = replace(data, root=None).to_json()
    return None if isinstance(said, str) else json.dumps({name: said[name] for name in said if name != "meta"})


def _moved(problem: Problem, first: int) -> Problem:
    return problem if problem.row is None else replace(problem, row=problem.row + first)
