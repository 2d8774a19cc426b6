"""What vfun says to twenty broken set-ups: the right exit code, one clear message, a next step, inputs untouched."""

import json
import os
import re
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands.conftest import QUICK, TRAIN, Vfun, digest
from tests.jobs import finish, listened_at, start, training_processes, wait_for_step
from vfun_cli.lfs import START
from vfun_cli.run.rundir import RunDir

MODEL = Path("vfun-demo/wan-s2v/model")
DATA = Path("vfun-demo/wan-s2v/data")
META = DATA / "metadata.json"
OUTPUT = Path("vfun-demo/output_dir")


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A set-up that cannot work."""

    name: str
    code: int
    words: tuple[str, ...]
    """What the message says, whatever else it says."""
    command: tuple[str, ...] = TRAIN
    damage: Callable[[], object] = lambda: None


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def first_shard() -> Path:
    return min(MODEL.glob("*.safetensors"))


def drop_a_tensor() -> None:
    """Write the shard again without its last tensor; the index still places it there."""
    content = first_shard().read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    last = max(names, key=lambda name: header[name]["data_offsets"][1])
    start = header.pop(last)["data_offsets"][0]
    text = json.dumps(header).encode()
    first_shard().write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :][:start])


def change_rows(change: Callable[[list[dict[str, str]]], object]) -> None:
    rows = json.loads(META.read_text(encoding="utf-8"))
    change(rows)
    META.write_text(json.dumps(rows), encoding="utf-8")


def hold_a_run() -> None:
    OUTPUT.mkdir(parents=True)
    (OUTPUT / "run.json").write_text("{}")
    (OUTPUT / "metrics.jsonl").write_text('{"step": 1}\n')


def hold_a_checkpoint_without_manifest() -> None:
    hold_a_run()
    (OUTPUT / "checkpoint-4").mkdir()
    (OUTPUT / "checkpoint-4" / "state.json").write_text("{}")


BROKEN = (
    Broken(
        name="no model directory",
        command=(*TRAIN, "--pretrained-model-name-or-path", "models/none"),
        code=5,
        words=("models/none", "--pretrained-model-name-or-path"),
    ),
    Broken(
        name="truncated shard",
        damage=lambda: cut(first_shard(), 0.8),
        code=5,
        words=("diffusion_pytorch_model-00001-of-00002.safetensors", "truncated", "again"),
    ),
    Broken(
        name="missing shard",
        damage=lambda: first_shard().unlink(),
        code=5,
        words=("diffusion_pytorch_model-00001-of-00002.safetensors", "missing", "again"),
    ),
    Broken(name="missing key", damage=drop_a_tensor, code=5, words=("index.json", "do not hold", "again")),
    Broken(
        name="truncated VAE",
        damage=lambda: cut(MODEL / "Wan2.1_VAE.pth", 0.5),
        code=5,
        words=("Wan2.1_VAE.pth", "cut short", "again"),
    ),
    Broken(
        name="git-lfs pointer instead of a tokenizer",
        damage=lambda: (MODEL / "google/umt5-xxl/tokenizer.json").write_bytes(START),
        code=5,
        words=("umt5-xxl/tokenizer.json is a git-lfs pointer", "git lfs pull"),
    ),
    Broken(
        name="wrong family for the directory",
        command=(*TRAIN, "--pretrained-model-name-or-path", "vfun-demo/cogvideox-fun/model"),
        code=5,
        words=("looks like a cogvideox-fun model", "Train cogvideox-fun"),
    ),
    Broken(
        name="damaged configuration",
        damage=lambda: (MODEL / "config.json").write_text("{"),
        code=5,
        words=("config.json",),
    ),
    Broken(
        name="missing metadata",
        command=(*TRAIN, "--train-data-meta", "none.json"),
        code=3,
        words=("none.json", "vfun validate-meta"),
    ),
    Broken(
        name="row without audio",
        damage=lambda: change_rows(lambda rows: rows[2].pop("audio_path")),
        code=3,
        words=("row 2", "audio_path", f"vfun validate-meta {META} --family wan-s2v --data-root {DATA}"),
    ),
    Broken(
        name="unreadable mp4",
        damage=lambda: cut(DATA / "train/00000002.mp4", 0.3),
        code=3,
        words=("row 1", "train/00000002.mp4"),
    ),
    Broken(
        name="text file named .mp4",
        damage=lambda: (DATA / "train/00000004.mp4").write_text("no video, " * 300),
        code=3,
        words=("row 3", "train/00000004.mp4"),
    ),
    Broken(
        name="zero-frame clip",
        damage=lambda: (DATA / "train/00000001.mp4").write_bytes(b""),
        code=3,
        words=("row 0", "train/00000001.mp4"),
    ),
    Broken(
        name="unknown option",
        command=("train", "wan-s2v", "--lerning-rate", "1e-4"),
        code=2,
        words=("--lerning-rate", "--learning-rate"),
    ),
    Broken(name="unknown family", command=("train", "wan-s2w"), code=2, words=("wan-s2w", "Did you mean 'wan-s2v'?")),
    Broken(
        name="unknown key in vfun.toml",
        damage=lambda: Path("vfun.toml").write_text("lerning_rate = 1e-4\n"),
        code=2,
        words=("vfun.toml", "lerning_rate", "Did you mean 'learning_rate'?"),
    ),
    Broken(
        name="output directory in use",
        damage=hold_a_run,
        code=2,
        words=("already holds a run", "--output-dir", "--overwrite"),
    ),
    Broken(
        name="no write permission",
        damage=lambda: Path("a file").write_text(""),
        command=(*TRAIN, "--output-dir", "a file/run"),
        code=6,
        words=("cannot write to a file/run", "--output-dir"),
    ),
    Broken(
        name="impossible batch size",
        command=(*TRAIN, "--train-batch-size", "100000"),
        code=2,
        words=("100000", "6 clips", "--train-batch-size"),
    ),
    Broken(
        name="more processes than devices",
        command=(*TRAIN, "--ddp", "--num-processes", "100000"),
        code=6,
        words=("100000 processes", "--num-processes"),
    ),
    Broken(
        name="checkpoint without manifest",
        damage=hold_a_checkpoint_without_manifest,
        command=("resume", "--demo"),
        code=5,
        words=("checkpoint",),
    ),
    Broken(
        name="export of a checkpoint without manifest",
        damage=hold_a_checkpoint_without_manifest,
        command=("export-bf16", "checkpoint-4", "--demo"),
        code=5,
        words=("checkpoint-4",),
    ),
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_setup_is_one_message_with_a_next_step_and_one_object(broken: Broken, place: Path, vfun: Vfun) -> None:
    broken.damage()
    before = digest(place)
    said = vfun(*broken.command, "--json")
    content = json.loads(said.out)
    assert content["schema"] == 1 and content["error"]["exit_code"] == broken.code == said.code, said.err
    text = " ".join(said.err.split())
    assert all(word in text for word in broken.words), said.err
    assert len(re.findall(r"^\W*error\b", said.err, re.IGNORECASE | re.MULTILINE)) == 1, said.err
    assert re.search(r"next:|Try .*vfun", said.err), said.err
    assert "Traceback" not in said.err
    assert "Bucket plan" not in said.err, "an error comes before the preview, not under it"
    assert digest(place) == before
    assert not list(place.rglob("launcher.log")), "the launcher was started"


@pytest.mark.slow
def test_ranks_of_one_machine_listen_within_it_and_a_killed_one_is_named_with_its_signal(place: Path) -> None:
    job = start(*TRAIN, *QUICK, "--ddp", "--max-train-steps", "10000")
    run = RunDir(place / OUTPUT)
    wait_for_step(run, 1, job)
    launchers, ranks = training_processes(run)
    assert len(ranks) == 2 and listened_at([*launchers, *ranks]) == {"127.0.0.1"}
    os.kill(ranks[1], signal.SIGKILL)
    said = finish(job, 1)
    assert "rank 1" in said.err and "SIGKILL" in said.err and "Traceback" not in said.err, said.err
    assert "No checkpoint was saved: the same command with --overwrite" in said.err
