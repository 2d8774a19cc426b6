"""The fork server that decoding processes come from.

A training process has threads (gloo, autograd, TensorBoard); a plain fork of it copies the locks they hold and can wait
for them for ever. The fork server is a process without threads that has imported what decoding needs.
"""

import multiprocessing
import multiprocessing.forkserver

from vfun_cli.disks.abilities import permissions_optional

PROCESSES = multiprocessing.get_context("forkserver")

DECODING = "vfun_cli.training.data.loader"


def start(adapter_module: str) -> None:
    """Start the server unless it runs. Its imports take seconds: begun early, they go on while the model is loaded."""
    PROCESSES.set_forkserver_preload([DECODING, adapter_module])
    with permissions_optional():  # of its socket, whose folder is this user's alone
        multiprocessing.forkserver.ensure_running()
