"""Answers about files, remembered in an SQLite file until the file changes."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from vfun_cli.disks.abilities import has_record_locks

CACHE_WAIT = 1.0
"""Seconds to wait for another process that writes the cache, before doing without it."""
FACTS_VERSION = 5
"""Raise it when a probe reports something new or writes it otherwise: old caches are then not believed."""

OnProgress = Callable[[int, int], None]
"""Called with (files done, files in all)."""
Key = tuple[str, str]
"""(path, kind)"""
Answer = TypeVar("Answer")


_keeps = ContextVar("_keeps", default=True)


@contextmanager
def only_read() -> Iterator[None]:
    """Inside, what was remembered is used and nothing is added to it: a dry run writes nothing."""
    token = _keeps.set(False)
    try:
        yield
    finally:
        _keeps.reset(token)


def remembered(
    keys: Sequence[Key],
    compute: Callable[[Key], Answer],
    *,
    to_text: Callable[[Answer], str],
    from_text: Callable[[str], Answer],
    cache: Path | None,
    threads: int,
    at_once: int = 1,
    progress: OnProgress | None,
) -> dict[Key, Answer]:
    """``compute`` each (path, kind) in threads, but take answers about unchanged files from the SQLite file ``cache``.

    A file counts as unchanged when its ``_stamp`` is. A thread takes ``at_once`` files: to hand over
    one costs 25 us, a fifth of reading a header.
    """
    stamps = {path: _stamp(path) for path, _ in keys} if cache else {}
    known = _load(cache, stamps) if cache else {}
    same = [key for key in keys if key in known and known[key][0] == stamps[key[0]]]
    found: dict[Key, Answer] = {}
    with suppress(ArithmeticError, LookupError, ValueError):  # somebody else's text: then all is asked anew
        found = {key: from_text(known[key][1]) for key in same}
    missing = [key for key in keys if key not in found]
    report = progress or (lambda done, total: None)
    report(len(found), len(keys))
    size = min(at_once, len(missing) // threads + 1)
    groups = [missing[begin : begin + size] for begin in range(0, len(missing), size)]
    pool = ThreadPoolExecutor(min(threads, len(groups)) or 1)
    try:
        for group, answers in zip(groups, pool.map(lambda group: list(map(compute, group)), groups), strict=True):
            found.update(zip(group, answers, strict=True))
            report(len(found), len(keys))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the queue
        if cache and missing and _keeps.get():
            _save(cache, ((key, stamps[key[0]], to_text(found[key])) for key in missing if key in found))
    return found


# The cache: one table, one row per file and kind of probe.
_PASSING = ("unreadable-file", "decode-timeout", "decode-crash")
"""Failures that may be the machine's and not the file's: tried again next time."""
_Stamp = tuple[int, int, int]
_TABLE = """CREATE TABLE IF NOT EXISTS facts (path BLOB, kind TEXT, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER,
            facts BLOB, PRIMARY KEY (path, kind))"""
"""Bytes, because a path need not be UTF-8, and facts may quote it."""


def _stamp(path: str) -> _Stamp | None:
    """Size, time of writing, and time of any change: touch and cp -p set the second of them, nothing sets the third.

    Not the inode: some network file systems number their files anew with each mount.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _load(cache: Path, paths: Iterable[str]) -> dict[Key, tuple[_Stamp, str]]:
    """What is remembered of these files; other sets of clips may have left a million more.

    A cache that is damaged or of another version counts as empty: it can be made again.
    """
    names, found = list(map(os.fsencode, paths)), dict[Key, tuple[_Stamp, str]]()
    try:
        with closing(_connect(cache, "mode=ro" if has_record_locks(cache) else "mode=ro&nolock=1")) as database:
            if _version(database) != FACTS_VERSION:
                return {}
            for begin in range(0, len(names), _ASKED):
                some = names[begin : begin + _ASKED]
                rows = database.execute(f"{_QUESTION} WHERE path IN ({','.join('?' * len(some))})", some)
                found |= {
                    (os.fsdecode(path), kind): (tuple(stamp), os.fsdecode(facts)) for path, kind, *stamp, facts in rows
                }
    except (OSError, sqlite3.Error):
        return {}
    return found


_QUESTION = "SELECT path, kind, size, mtime_ns, ctime_ns, facts FROM facts"
_ASKED = 500
"""Paths of a question; SQLite takes 999 everywhere."""


def _version(database: sqlite3.Connection) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def _save(cache: Path, entries: Iterable[tuple[Key, _Stamp | None, str]]) -> None:
    """Remember facts; a cache that cannot be written costs time next time, nothing else."""
    rows = [
        (os.fsencode(path), kind, *stamp, os.fsencode(answer))
        for (path, kind), stamp, answer in entries
        if stamp is not None and not any(code in answer for code in _PASSING)
    ]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.touch()
        write = _write if has_record_locks(cache) else _write_beside
        try:
            write(cache, rows)
        except sqlite3.OperationalError:  # in use, or no permission
            return
        except sqlite3.DatabaseError:  # not a database, or damaged
            cache.unlink(missing_ok=True)
            write(cache, rows)
    except (OSError, sqlite3.Error):
        return


def _write_beside(cache: Path, rows: list[tuple[Any, ...]]) -> None:
    """Without locks: into a copy, which then takes the cache's place. Of two that do so at once, one is forgotten."""
    copy = cache.with_name(f".{cache.name}.{token_hex(8)}")
    try:
        if cache.exists():
            shutil.copyfile(cache, copy)
        _write(copy, rows, "nolock=1")
        copy.replace(cache)
    finally:
        copy.unlink(missing_ok=True)


def _write(cache: Path, rows: list[tuple[Any, ...]], how: str = "") -> None:
    with closing(_connect(cache, how)) as database, database:
        if _version(database) != FACTS_VERSION:
            database.execute("DROP TABLE IF EXISTS facts")
            database.execute(f"PRAGMA user_version = {FACTS_VERSION}")
        database.execute(_TABLE)
        database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?)", rows)


def _connect(cache: Path, how: str) -> sqlite3.Connection:
    """With options of SQLite's addresses."""
    return sqlite3.connect(f"{cache.absolute().as_uri()}?{how}", timeout=CACHE_WAIT, uri=True)
