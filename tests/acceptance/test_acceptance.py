"""What the acceptance run proves, when it finds a row right, wrong or out of reach, and what it exits with."""

import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.jobs import finish, start, vfun_here
from vfun_cli import families
from vfun_cli.acceptance import machine, rank, report, rows, run, step_memory
from vfun_cli.acceptance.pool import Pool
from vfun_cli.acceptance.rows import Row, all_rows, chosen
from vfun_cli.acceptance.verdicts import Outcome, Verdict, judge
from vfun_cli.config.options import BASE_PRECISIONS, options
from vfun_cli.config.strategies import STRATEGIES

CUDA = {row.name: row for row in all_rows("cuda")}
SPEAKS = "acceptance_speaks"
"""A module that prints its arguments and exits with the first."""


def script(row: Row) -> str:
    """The last command of a row, as a line."""
    return " ".join(row.commands[-1])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_its_step_in_both_precisions_with_adapters_and_sharded(family: str) -> None:
    for what in ("cpu", "fp32", "bf16", "fsdp", "lora", "made-up-cpu", "made-up", "made-up-low-vram"):
        assert f"{family}/{what}" in CUDA, what
    assert CUDA[f"{family}/fp32"].reference == f"{family}/cpu"
    assert "--device cpu" in script(CUDA[f"{family}/cpu"]) and "--device cuda" in script(CUDA[f"{family}/fp32"])


@pytest.mark.slow
def test_the_step_of_a_demo_takes_what_is_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = families.find("cogvideox-fun")
    found = list(step_memory.cases(spec, "cpu", share=1))
    choices = options()["gradient_checkpointing"][2].choices
    assert [(case.command, case.checkpointing) for case in found if isinstance(case, step_memory.Case)] == [
        (command, checkpointing) for command in ("train", "lora") for checkpointing in choices
    ]
    for case in found:
        assert isinstance(case, step_memory.Case) and abs(case.off) < 0.02, case
        assert min(case.seen.kept, case.seen.forward, case.seen.backward, case.seen.step) > 0


@pytest.mark.parametrize("family", rows.FIRST)
def test_every_strategy_base_and_way_to_save_memory_has_a_row(family: str) -> None:
    strategies = [f"--strategy {name} " for name in STRATEGIES if name != "single"]
    bases = [f"--base-precision {name}" for name in BASE_PRECISIONS if name != "bf16"]
    others = ["--low-vram", "--cache ", "--compile", "--use-ema", '"activation_offload": true']
    others += [f"--gradient-checkpointing {how}" for how in ("attention", "selective")]
    lines = [script(row) for name, row in CUDA.items() if name.startswith(family)]
    for option in [*strategies, *bases, *others]:
        assert any(option in line for line in lines), option


def test_every_strategy_that_shards_has_a_row_with_a_moving_average_that_is_looked_at() -> None:
    averaged = [script(row) for name, row in CUDA.items() if "/averaged-" in name]
    assert len(averaged) == sum(bool(strategy.sharded) for strategy in STRATEGIES.values()) > 3
    for line in averaged:
        assert "--use-ema" in line and "--validation-steps 1 " in line


def test_rows_build_on_rows_before_them_and_the_one_that_takes_the_memory_is_last_and_alone() -> None:
    names = list(CUDA)
    assert len(names) == len(all_rows("cuda")) == len(set(names))
    for place, row in enumerate(CUDA.values()):
        for other in (row.after, row.reference):
            assert other is None or names.index(other) < place, row.name
    assert [row.name for row in CUDA.values() if row.alone] == names[-1:]
    assert CUDA[names[-1]].exit_code == 4


def test_what_a_resumed_run_ends_with_is_compared_and_so_is_its_export() -> None:
    resumed = [row for name, row in CUDA.items() if "/resume-" in name]
    assert len(resumed) == 3
    for row in resumed:
        whole = CUDA[row.reference or ""]
        assert row.steps == (3, 4) and row.weights == whole.weights == ("checkpoint-4", "checkpoint-4-outputs")
        assert f"{whole.name}/checkpoint-2" in " ".join(row.commands[0])
        for each in (row, whole):
            assert script(each) == f"vfun_cli export-bf16 {rows.RUNS}/{each.name}/checkpoint-4"


def test_only_takes_along_what_a_row_builds_on() -> None:
    assert [row.name for row in chosen(all_rows("cpu"), ["wan-s2v/made-up-cpu"])] == [
        "wan-s2v/demo",
        "wan-s2v/made-up-cpu",
    ]
    named = [row.name for row in chosen(all_rows("cpu"), ["resume-fsdp", "made-up-lora"])]
    assert named[:2] == ["wan-s2v/demo", "cogvideox-fun/demo"]
    assert {"wan-s2v/whole-fsdp", "wan-s2v/resume-fsdp", "wan-s2v/made-up", "wan-s2v/made-up-cpu"} <= set(named)
    said = vfun_here("acceptance", "--only", "no such row")
    assert said.code == 2 and "'no such row'" in said.err


ROW = Row(name="a/row", proves="it", commands=(("vfun_cli",),), reference="a/reference", bound=0.01)
RIGHT = Outcome(exit_codes=(0,), losses={1: 1.0, 2: 0.5})
MEMORY = Row(name="a/memory", proves="it", commands=(("m",),), losses=False, says_how_far_off=True, bound=0.1)
SAID = Outcome(
    exit_codes=(0,), said="a train block, 8 frames of 64x64: 2 GiB, forecast 1.98, -1.0 %\nat most 0.01 off\n"
)


@pytest.mark.parametrize(
    ("row", "outcome", "reference", "why"),
    [
        (ROW, RIGHT, RIGHT, None),
        (ROW, replace(RIGHT, losses={1: 1.005, 2: 0.5}), RIGHT, None),
        (ROW, replace(RIGHT, losses={1: 1.0, 2: 0.51}), RIGHT, "step 2 is 0.51"),
        (replace(ROW, bound=0.0), replace(RIGHT, losses={1: 1.0, 2: 0.5 + 1e-9}), RIGHT, "step 2"),
        (replace(ROW, steps=(1,)), replace(RIGHT, losses={1: 1.0, 2: 9.0}), RIGHT, None),
        (ROW, replace(RIGHT, losses={1: 1.0}), RIGHT, "step 2 is none"),
        (ROW, replace(RIGHT, losses={1: 1.0, 2: None}), RIGHT, "step 2 is no number"),
        (ROW, replace(RIGHT, losses={}), RIGHT, "recorded no loss"),
        (ROW, RIGHT, None, "nothing to compare with"),
        (ROW, Outcome(exit_codes=(1,), said="error: no such thing.\nnext: look"), RIGHT, "no such thing"),
        (ROW, replace(RIGHT, too_long=True, seconds=900), RIGHT, "ended after 900 s"),
        (replace(ROW, exit_code=4), RIGHT, RIGHT, "exit code 0 instead of 4"),
        (replace(ROW, exit_code=4, losses=False, reference=None), Outcome(exit_codes=(4,)), None, None),
        (replace(ROW, never_says=("restart",)), replace(RIGHT, said="restart 1 of 1"), RIGHT, "said 'restart'"),
        (replace(ROW, says=("memory",)), replace(RIGHT, said="something else"), RIGHT, "did not say 'memory'"),
        (MEMORY, SAID, None, None),
        (MEMORY, replace(SAID, said="at most 0.11 off\n"), None, "is 0.11 off"),
        (MEMORY, replace(SAID, said="all are left out\n"), None, "did not say how far"),
    ],
)
def test_a_wrong_result_is_found(row: Row, outcome: Outcome, reference: Outcome | None, why: str | None) -> None:
    verdict = judge(row, outcome, reference)
    assert verdict.kind == ("right" if why is None else "wrong")
    assert (why or "") in verdict.why


def test_what_a_row_says_of_a_forecast_is_in_its_record(tmp_path: Path) -> None:
    pool = Pool(place=tmp_path, lacks={}, deadline=0)
    pool.outcomes[MEMORY.name], pool.verdicts[MEMORY.name] = SAID, judge(MEMORY, SAID, None)
    (found,) = report.record([MEMORY], pool)
    assert (found["deviation"], found["bound"]) == (0.01, 0.1) and found["said"] == SAID.said.splitlines()


def written(folder: Path, **tensors: Tensor) -> Path:
    """An export with these tensors."""
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


WEIGHTS = {"a": torch.tensor([3.0, 4.0]).bfloat16(), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (WEIGHTS, None),
        (WEIGHTS | {"b": torch.tensor([0, 0, 1e-3])}, None),  # 2e-4 of the length of all, which is 5
        (WEIGHTS | {"a": torch.tensor([3.0, 4.1])}, "the weights of export are 0.02 off those of a/reference"),
        (WEIGHTS | {"b": torch.tensor([0, 0, math.nan])}, "inf off"),
        (WEIGHTS | {"b": torch.zeros(4)}, "inf off"),
        ({"a": WEIGHTS["a"]}, "inf off"),
        (None, "is not a directory"),
    ],
)
def test_weights_that_are_not_the_references_are_found(
    found: dict[str, Tensor] | None, why: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "export" if found is None else written(tmp_path / "export", **found)
    reference = replace(RIGHT, weights=(written(tmp_path / "reference", **WEIGHTS),))
    verdict = judge(ROW, replace(RIGHT, weights=(folder,)), reference)
    assert verdict.kind == ("right" if why is None else "wrong") and (why or "") in verdict.why
    if found is not None and why is None:
        exact = judge(replace(ROW, bound=0.0), replace(RIGHT, weights=(folder,)), reference)
        assert exact.kind == ("right" if found is WEIGHTS else "wrong")


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """One whose commands take no time: a module of their own."""
    (tmp_path / f"{SPEAKS}.py").write_text(
        "import sys, time\ntime.sleep(float(sys.argv[2]))\nsys.exit(int(sys.argv[1]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Pool(place=tmp_path, lacks={"av": "PyAV (av) is not installed"}, deadline=time.monotonic() + 1000)


def row(name: str, code: int = 0, **fields: Any) -> Row:
    seconds = fields.pop("seconds", 0)
    return Row(name=name, proves="", commands=((SPEAKS, str(code), str(seconds)),), **{"losses": False, **fields})


def test_what_cannot_run_says_why_and_what_stands_alone_does_not_wait_for_it(pool: Pool) -> None:
    pool.run([
        row("a/bad", 3), row("a/after", after="a/bad"), row("a/media", needs=("av",)), row("a/good", alone=True),
    ], 2)  # fmt: skip
    found = {name: (verdict.kind, verdict.why) for name, verdict in pool.verdicts.items()}
    assert found["a/bad"][0] == "wrong" and "exit code 3" in found["a/bad"][1]
    assert found["a/after"] == ("skipped", "a/bad is wrong")
    assert found["a/media"] == ("skipped", "PyAV (av) is not installed")
    assert found["a/good"] == ("right", "")


def test_at_the_end_of_its_time_a_row_is_ended_and_the_others_are_not_begun(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfun_cli.acceptance.pool.LEAST", 0.1)
    monkeypatch.setattr("vfun_cli.acceptance.pool.END", 0.1)
    pool.deadline = time.monotonic() + 0.3
    pool.run([row("a/long", seconds=60), row("a/next")], 1)
    assert {verdict.kind for verdict in pool.verdicts.values()} == {"not run"}
    assert all("out of time" in verdict.why for verdict in pool.verdicts.values())


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [(("right", "skipped"), 0), (("right", "not run"), 0), (("right", "wrong"), 1), (("skipped", "not run"), 1)],
)
def test_the_exit_code_says_whether_all_that_ran_is_right(
    verdicts: tuple[Any, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = ("right", *verdicts)  # the demo itself proves nothing
    made_up = [row("demo"), *(row(f"wan-s2v/{number}", after="demo") for number in range(1, len(verdicts)))]

    def settled(self: Pool, rows: list[Row], jobs: int) -> None:
        for each, kind in zip(rows, verdicts, strict=True):
            self.verdicts[each.name] = Verdict(kind=kind, why=f"because {kind}")

    monkeypatch.setattr(rows, "all_rows", lambda device: made_up)
    monkeypatch.setattr(Pool, "run", settled)
    said = vfun_here("acceptance", "--device", "cpu", "--output-dir", tmp_path / "found")
    assert said.code == code
    found = json.loads((tmp_path / "found" / run.RECORD).read_text())
    assert [each["verdict"] for each in found["rows"]] == list(verdicts)
    assert found["hardware"]["cpu"] and found["versions"]["python"] and found["device"] == "cpu"
    assert all(f"is {kind}: because {kind}" in said.out for kind in verdicts if kind != "right")
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [run.RECORD, run.FAILURES]


DEEPSPEED, PYAV = "DeepSpeed is not installed", "PyAV (av) is not installed"


@pytest.mark.parametrize(
    ("hidden", "zero", "others"),
    [
        (("deepspeed",), DEEPSPEED, None),
        (("av",), PYAV, PYAV),
        (("av", "deepspeed"), f"{PYAV}; {DEEPSPEED}", PYAV),
        (("decord",), None, None),  # nothing reads it while training
    ],
)
def test_rows_say_of_every_package_that_they_need_that_it_is_not_installed(
    hidden: tuple[str, ...], zero: str | None, others: str | None, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name in hidden else find_spec(name))
    pool.lacks, pool.deadline = machine.lacks("cuda"), time.monotonic()  # no time for those that could run
    pool.run(list(CUDA.values()), 1)
    why = {name: verdict.why if verdict.kind == "skipped" else None for name, verdict in pool.verdicts.items()}
    zeros = {name for name in why if "zero" in name}
    typed = {name for name in why if "--demo" in script(CUDA[name]) or "/resume-" in name or "/whole-" in name} - zeros
    assert len(zeros) == 11 and len(typed) > 50
    assert {why[name] for name in zeros} == {zero}
    assert {why[name] for name in typed} == {others}
    assert {why[name] for name in why.keys() - zeros - typed} == {None}  # made-up clips, in every family
    assert {f"{family}/made-up" for family in families.FAMILIES} <= why.keys() - typed


def test_made_up_media_depend_on_the_file_and_the_place() -> None:
    one, again, other = (rank.frames(name, [0, 1], 4, 6) for name in ("a.mp4", "a.mp4", "b.mp4"))
    assert one.shape == (2, 3, 4, 6) and one.equal(again)
    assert not one.equal(other) and not one[0].equal(one[1])


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of torch's check for waits, newest last; without a GPU torch has none."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


@pytest.mark.parametrize(
    ("device", "step", "during"), [("cuda", 0, "default"), ("cuda", 1, "error"), ("cpu", 1, "default")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_every_step_on_a_gpu_but_the_first_refuses_to_wait_and_what_follows_may_again(
    device: str, step: int, during: str, fails: bool, mode: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def enqueue(trainer: Any, step: int, micro_batches: list[Any]) -> str:
        seen.append(mode[-1])
        if fails:
            raise RuntimeError("called a synchronizing CUDA operation")
        return "pending"

    monkeypatch.setattr(rank, "enqueue", enqueue)
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device(device)))
    if fails:
        with pytest.raises(RuntimeError, match="synchronizing"):
            rank.without_waits(trainer, step, [])
    else:
        assert rank.without_waits(trainer, step, []) == "pending"
    assert seen == [during] and mode[-1] == "default"


@pytest.mark.slow
def test_the_package_can_be_started_as_a_module() -> None:
    command = [sys.executable, "-m", "vfun_cli.acceptance", "--device", "cpu", "--list", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(json.loads(said.stdout)["rows"]) == [row.name for row in all_rows("cpu")]


def test_a_command_is_shown_as_it_is_typed() -> None:
    assert report.typed(("vfun_cli", "train", "a b")) == "vfun train 'a b'"
    assert shlex.split(report.typed((rows.MADE_UP, "wan-s2v"))) == ["python", "-m", rows.MADE_UP, "wan-s2v"]


HIDES = """
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
def find(cls, name, path=None, target=None):
    return None if name.split(".")[0] in ("av", "deepspeed", "decord") else found(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find)
"""


@pytest.mark.long
def test_without_pyav_and_deepspeed_a_family_is_still_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDES)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *(path for path in sys.path if path)]))
    only = ("--only", "cogvideox-fun/zero2", "--only", "cogvideox-fun/made-up")
    said = finish(start("acceptance", "--device", "cpu", "--json", *only, "--jobs", 2, cwd=tmp_path))
    found = {each["name"].split("/")[1]: each for each in json.loads(said.out)["rows"]}
    verdicts = {name: each["verdict"] for name, each in found.items()}
    proved, skipped = ("demo", "made-up-cpu", "made-up"), ("cpu", "bf16", "zero2")
    assert verdicts == dict.fromkeys(proved, "right") | dict.fromkeys(skipped, "skipped")
    assert found["made-up"]["deviation"] == 0 and len(found["made-up"]["losses"]) == rows.STEPS
    assert [found[name]["why"] for name in skipped] == [PYAV, PYAV, f"{PYAV}; {DEEPSPEED}"]
