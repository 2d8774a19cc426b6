"""What reaches a terminal or a program: whole words, nothing that works on a terminal, one object, never a fault."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.file_proxy import FileProxy

from tests.commands.conftest import Vfun
from vfun_cli import console, families
from vfun_cli.errors import RunError
from vfun_cli.main import app
from vfun_cli.run.rundir import RunDir

# Help ----------------------------------------------------------------------------------------------------------------


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, one in getattr(command, "commands", {}).items():
        yield from commands(one, *path, name)


EVERY_COMMAND = list(commands(typer.main.get_command(app)))


def options_of(path: tuple[str, ...]) -> set[str]:
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    shown = [parameter for parameter in command.params if not parameter.hidden]
    return {name for parameter in shown for name in (*parameter.opts, *parameter.secondary_opts) if name[0] == "-"}


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["80", "60"])
def test_help_has_every_name_in_whole_and_keeps_to_the_width(
    columns: str, vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert len(EVERY_COMMAND) > 10
    for path in EVERY_COMMAND:
        said = vfun(*path, "--help")
        assert said.code == 0 and max(map(len, said.out.splitlines())) <= int(columns), path
        assert options_of(path) <= set(said.out.replace("/", " ").split()), path


def test_the_old_name_of_an_export_s_folder_goes_on_working(vfun: Vfun) -> None:
    assert vfun("export-bf16", "none", "--output", "x").err == vfun("export-bf16", "none", "--to", "x").err


# One object ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "code", "word"),
    [
        (["train", "--famly", "x"], 2, "--famly"),
        (["train", "wan-s2v", "--rank"], 2, "--rank"),
        (["train", "wan-s2v", "--seed", "many"], 2, "--seed"),
        (["train", "wan-s2v", "--adam-beta1", "1.5"], 2, "--adam-beta1"),
        (["plan-buckets", "wan-s2v", "--world-size", "0"], 2, "--world-size"),
        (["export-bf16"], 2, "CHECKPOINT"),
        (["nothing"], 2, "nothing"),
        ([], 2, "--json"),
        (["train", "wan-s2v", "--output-dir="], 2, "--output-dir"),
        (["checkpoints", "ls", ""], 2, "[RUN]"),
        (["validate-meta", "\udcff.json"], 3, r"\xff.json"),
        (["checkpoints", "ls", "x" * 300], 5, "x" * 300),
    ],
)
def test_json_is_one_object_that_names_what_is_wrong(typed: list[str], code: int, word: str, vfun: Vfun) -> None:
    said = vfun(*typed, "--json")
    found = json.loads(said.out)
    assert said.code == code and said.out.count("\n") == 1 and word in said.out.replace(r"\udcff", r"\xff")
    if "error" in found:
        assert found["error"]["exit_code"] == code and word in found["error"]["message"] and found["error"]["hint"]
        assert found["error"]["option"] in (word, None)


@pytest.mark.slow
def test_help_as_an_object_names_every_option(vfun: Vfun) -> None:
    for path in EVERY_COMMAND:
        said = vfun(*path, "--help", "--json")
        found = json.loads(said.out)["help"]
        assert said.code == 0 and said.out.count("\n") == 1
        assert options_of(path) <= {name for parameter in found["parameters"] for name in parameter["names"]}


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ZeroDivisionError("by nought"), 1),
        (OSError(28, "No space left on device", "logs"), 6),
        (MemoryError(), 4),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_whatever_ends_a_command_is_one_message_and_one_object(
    raised: BaseException, code: int, debug: tuple[str, ...], vfun: Vfun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise raised

    monkeypatch.setattr(families, "find", fail)
    said = vfun("train", "wan-s2v", "--json", *debug)
    assert (said.code, json.loads(said.out)["error"]["exit_code"]) == (code, code)
    assert ("Traceback" in said.err) == bool(debug) and ("fault of vfun" in said.err) == (code == 1)


# Hostile texts -------------------------------------------------------------------------------------------------------

HOSTILE = "a\x1b[31m\x9b2J\x07[/x][red]:warning:\u202e\u2066\x7f b\\"
"""Moves and colours of a terminal, Rich's markup and emoji, a reversal of what follows, a backslash at the end."""


def assert_tame(text: str) -> None:
    assert "unexpected" not in text and "Traceback" not in text
    assert not [c for c in text if c != "\n" and not c.isprintable()], ascii(text)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which every name and text is hostile."""
    monkeypatch.chdir(tmp_path)
    row = {"file_path": f"{HOSTILE}\nerror: b.mp4", "text": HOSTILE, "type": "video", HOSTILE: HOSTILE}
    stated = {"width": 640, "height": 480, "frames": 99, "fps": 25, **row}
    (tmp_path / HOSTILE).mkdir(parents=True)
    (tmp_path / f"{HOSTILE}.json").write_text(json.dumps([row, stated, {"type": HOSTILE}]), encoding="utf-8")
    (tmp_path / "stated.json").write_text(json.dumps([stated]), encoding="utf-8")
    run = RunDir(tmp_path / HOSTILE)
    run.checkpoint(2).mkdir(parents=True)
    for name in ("manifest.json", "state.json"):
        (run.checkpoint(2) / name).write_text(json.dumps({HOSTILE: HOSTILE}))
    run.run_json.write_text(json.dumps({HOSTILE: HOSTILE}))
    return tmp_path


@pytest.mark.parametrize(
    "typed",
    [
        ["validate-meta", f"{HOSTILE}.json"],
        ["validate-meta", f"{HOSTILE}.json", "--family", HOSTILE],
        ["plan-buckets", "wan-s2v", "--meta", "stated.json", "--why", "0"],
        ["plan-buckets", "wan-s2v", "--meta", f"{HOSTILE}.json"],
        ["train", HOSTILE],
        ["train", "wan-s2v", f"--{HOSTILE}"],
        ["train", "wan-s2v", "--train-mode", HOSTILE, "--output-dir", HOSTILE],
        ["train", "wan-s2v", "--pretrained-model-name-or-path", HOSTILE, "--train-data-meta", f"{HOSTILE}.json"],
        ["checkpoints", "ls", HOSTILE],
        ["checkpoints", "verify", f"{HOSTILE}/checkpoint-2"],
        ["checkpoints", "diff", HOSTILE, HOSTILE],
        ["export-bf16", f"{HOSTILE}/checkpoint-2", "--to", HOSTILE],
        ["resume", HOSTILE],
        [HOSTILE],
    ],
    ids=str,
)
def test_nothing_in_names_and_texts_works_on_the_terminal(typed: list[str], hostile: Path, vfun: Vfun) -> None:
    for more in ((), ("--json",), ("--debug",)):
        said = vfun(*typed, *more)
        assert_tame(said.out)
        assert_tame(said.err.replace("Traceback", ""))
        assert not [line for line in said.err.splitlines() if line.startswith("error: b.mp4")]
        if more == ("--json",):
            json.loads(said.out)


@pytest.mark.parametrize("text", [f'"{HOSTILE}" = 1', f"output_dir = '''{HOSTILE}\n'''\nseed = '{HOSTILE}'", HOSTILE])
def test_a_hostile_settings_file_is_quoted_tamely(text: str, hostile: Path, vfun: Vfun) -> None:
    (hostile / "vfun.toml").write_text(text.replace("\x1b", "\\u001b"), encoding="utf-8")
    said = vfun("train", "wan-s2v")
    assert said.code == 2
    assert_tame(said.out + said.err)


def test_everything_printed_goes_through_one_function(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE, "red"))
    for printed in (HOSTILE, Text(HOSTILE), Text.assemble((HOSTILE, "bold"), HOSTILE), table):
        console.out.print(printed)
        console.err.print(printed, soft_wrap=True)
    console.warn(HOSTILE)
    console.hint(HOSTILE)
    console.report(RunError(HOSTILE, hint=HOSTILE))
    console.print_json({HOSTILE: HOSTILE})
    said = capsys.readouterr()
    assert_tame(said.out + said.err)
    assert "[/x][red]:warning:" in said.out and json.loads(said.out.splitlines()[-1])[HOSTILE] == HOSTILE


def test_what_is_printed_beside_a_bar_goes_past_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, Rich puts proxies before the streams while it draws: they come back to the console."""
    monkeypatch.setattr(sys, "stdout", FileProxy(console.out, sys.stdout))
    monkeypatch.setattr(sys, "stderr", FileProxy(console.err, sys.stderr))
    console.out.print("result")
    console.warn("slow")
    console.print_json({"a": 1})
    said = capsys.readouterr()
    assert said.out == 'result\n{"schema": 1, "a": 1}\n' and said.err == "warning: slow\n"


def test_json_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vfun_cli", "checkpoints", "ls", "é\udcff", "--json"], capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "é" in json.loads(done.stdout.decode("utf-8"))["error"]["message"]


# Ends ----------------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, sys
class Press:
    def find_spec(self, name, *more):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
if {module!r} == "the end":
    import atexit
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["vfun", "plan-buckets", "wan-s2v", "--json"]
from vfun_cli.entry import main
main()
"""


@pytest.mark.parametrize("module", ["vfun_cli.main", "typer.main", "numpy", "the end"])
def test_ctrl_c_is_130_without_a_traceback_wherever_it_comes(module: str, tmp_path: Path) -> None:
    script = INTERRUPTED.format(module=module)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "interrupted" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stdout.count("\n") == (1 if module in ("numpy", "the end") else 0)


READ_ENOUGH = """
import os
from vfun_cli import console
from vfun_cli.main import main

read, write = os.pipe()
os.dup2(write, 1)
os.close(write)
show = console.out.print

def show_and_leave(*shown, **how):
    show(*shown, **how)
    console.flush()
    os.close(read)

console.out.print = show_and_leave
main(["train", "--help"])
"""


def test_who_has_read_enough_of_a_help_is_told_nothing(tmp_path: Path) -> None:
    """As ``vfun train --help | head``: the help is written at once, and nothing after the reader has gone."""
    done = subprocess.run([sys.executable, "-c", READ_ENOUGH], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_who_reads_no_further_is_told_nothing(tmp_path: Path) -> None:
    """As ``vfun ... | head``; and a lost stderr costs no result."""
    for lost in ("stdout", "stderr"):
        end, start = os.pipe()
        os.close(end)
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, lost: start}
        done = subprocess.run(
            [sys.executable, "-m", "vfun_cli", "plan-buckets", "wan-s2v"], cwd=tmp_path, check=False, **streams
        )
        os.close(start)
        if lost == "stdout":
            assert done.returncode == 128 + signal.SIGPIPE and b"rror" not in done.stderr and b"pipe" not in done.stderr
        else:
            assert done.returncode == 0 and b"Bucket plan" in done.stdout


@pytest.mark.parametrize("typed", ["plan-buckets wan-s2v", "--version --json"])
def test_a_full_disk_behind_stdout_is_an_error_that_says_so(typed: str, tmp_path: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); from vfun_cli.entry import main; main()"
    )
    with (tmp_path / "full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", limited, *typed.split()], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 6 and "cannot be written to stdout: File too large" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
