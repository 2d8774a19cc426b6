"""The fork server that decoding processes come from.

A training process has threads (gloo, autograd, TensorBoard); a plain fork of it copies the locks they hold and can wait
for them for ever. The fork server is a process without threads that has imported what decoding needs. It is best made
by forking the training process before that has any: then it costs no imports (4 s of processor time for Wan-S2V) and
shares their memory (294 MiB).
"""

import gc
import importlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from vfun_cli.disks.abilities import permissions_optional
from vfun_cli.imports import uncollected
from vfun_cli.training.signals import leave_signals_to_the_rank

PROCESSES = multiprocessing.get_context("forkserver")

DECODING = "vfun_cli.training.data.loader"


def start_early(adapter_module: str) -> None:
    """Start the server as a fork of this process, which may use no device and no thread of torch yet."""
    with uncollected():
        for module in (DECODING, adapter_module):
            importlib.import_module(module)
    if threading.active_count() > 1:  # a profiler's, or a lock that is a lease: the server can still be started
        return
    multiprocessing.resource_tracker.ensure_running()
    with _forking():
        start(adapter_module)


def start(adapter_module: str) -> None:
    """Start the server, as an interpreter of its own, unless it runs."""
    PROCESSES.set_forkserver_preload([DECODING, adapter_module])
    with permissions_optional():  # of its socket, whose folder is this user's alone
        multiprocessing.forkserver.ensure_running()


@contextmanager
def _forking() -> Iterator[None]:
    """Let multiprocessing fork this process where it would start another interpreter."""
    spawn = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = _fork
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = spawn


def _fork(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """A fork that runs the interpreter's command, ``args[-1]``, with these files and the standard ones alone."""
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # each collection would write to every object, and so copy the memory that is shared
    process = os.fork()
    if process:
        return process
    try:
        leave_signals_to_the_rank()
        kept = [2, *sorted(passfds), os.sysconf("SC_OPEN_MAX")]
        for before, after in pairwise(kept):
            os.closerange(before + 1, after)
        exec(args[-1], {})
    except SystemExit:  # no process is left that it could serve
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
