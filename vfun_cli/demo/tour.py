"""``make demo``: the whole path of one model, with the commands a person would type, each shown before it runs."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.text import Text

from vfun_cli import children
from vfun_cli.console import err
from vfun_cli.demo.default import FOLDER, OUTPUT_DIR
from vfun_cli.errors import EXIT_INTERRUPTED
from vfun_cli.run.rundir import RunDir

FAMILY = "wan-s2v"


def main() -> None:
    """Validate, plan, train under FSDP on two processes, interrupt, resume, export."""
    shutil.rmtree(OUTPUT_DIR, ignore_errors=True)
    _run("validate-meta", "--family", FAMILY, "--demo")
    _run("plan-buckets", FAMILY, "--demo")
    _interrupted_run("train", FAMILY, "--fsdp", "--demo")
    _run("resume", "--demo")
    newest = max(OUTPUT_DIR.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    _run("export-bf16", newest.name, "--demo")
    err.print(Text.assemble(("done", "bold green"), f": everything is under {FOLDER}/"))


def _command(arguments: tuple[str, ...]) -> list[str]:
    err.print(Text(f"\n$ vfun {shlex.join(arguments)}", "bold cyan"))
    return children.command("vfun_cli", *arguments)


def _run(*arguments: str) -> None:
    code = subprocess.run(_command(arguments), check=False).returncode
    if code:
        sys.exit(code)


def _interrupted_run(*arguments: str) -> None:
    """Start a run and press Ctrl-C after its first checkpoint, as a person would."""
    process = subprocess.Popen(_command(arguments))
    while process.poll() is None and not _trained_past_a_checkpoint(OUTPUT_DIR):
        time.sleep(0.2)
    if process.poll() is None:
        err.print(Text("^C", "bold cyan"))
        os.kill(process.pid, signal.SIGINT)
    code = process.wait()
    if code not in (0, EXIT_INTERRUPTED):
        sys.exit(code)


def _trained_past_a_checkpoint(output_dir: Path) -> bool:
    return any(output_dir.glob("checkpoint-*")) and RunDir(output_dir).metrics.exists()


if __name__ == "__main__":
    main()
