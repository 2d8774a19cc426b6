"""``vfun cache``: it encodes what is missing, once, whoever fills the cache with it and however a fill ends."""

import functools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Job, finish, held_out, kill_all, losses, records, start, wait_for
from vfun_cli import families
from vfun_cli.demo import default as demo_default
from vfun_cli.encoding.cache import read_entry
from vfun_cli.errors import EXIT_PREEMPTED
from vfun_cli.run.cachedir import entries, partials
from vfun_cli.run.rundir import RunDir

pytestmark = pytest.mark.slow

S2V, I2V = "wan-s2v", "hunyuanvideo-i2v"
WITHIN = 30
"""Seconds, of which a quiet machine takes three."""
CLIPS = 6
"""Of a demo."""
EPOCHS = {S2V: 1, I2V: 2}
"""With one variant, a clip is cut alike in each of them."""


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own with the demos that the tests ask for."""
    folder = tmp_path_factory.mktemp("fill")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")  # everywhere: sums on two threads are rounded differently
        for family in (S2V, I2V):
            demo_default.make(families.find(family))
        yield folder


Alone = Callable[[str], tuple[Path, int]]


@pytest.fixture(scope="module")
def alone(workplace: Path) -> Alone:
    """The cache that one undisturbed fill of a family leaves, not to be changed, and of how many clips it told."""

    @functools.cache
    def of(family: str) -> tuple[Path, int]:
        folder = workplace / f"alone-{family}"
        return folder, encoded(whole(fill(folder, family)))

    return of


def fill(folder: Path, family: str, *more: object, ranks: int = 1) -> Job:
    return start(
        "cache", family, "--demo", "--cache", folder, "--cache-variants", 1,
        "--max-train-steps", EPOCHS[family] * CLIPS // ranks, "--num-processes", ranks,
        "--video-sample-size", 64, "--token-sample-size", 64, "--no-enable-bucket",
        "--mixed-precision", "no", "--dataloader-num-workers", 0, *more,
    )  # fmt: skip


def whole(job: Job) -> str:
    said = finish(job)
    return said.out + said.err


def encoded(said: str) -> int:
    found = re.search(r"done: (\d+) clips encoded", said)
    assert found, said
    return int(found[1])


@pytest.mark.long
def test_the_clips_of_the_validation_are_encoded_too(workplace: Path, alone: Alone, tmp_path: Path) -> None:
    """And kept by --prune: the run finds all that it looks at, and adds nothing but what samples are made from."""
    folder, count = alone(S2V)
    shutil.copytree(folder, tmp_path / "cache")
    rows = json.loads(Path(f"vfun-demo/{S2V}/data/metadata.json").read_text(encoding="utf-8"))
    own = [rows[0] | {"text": "a caption that no row of the training has"}]
    Path(f"vfun-demo/{S2V}/data/validation.json").write_text(json.dumps(own), encoding="utf-8")
    given = ("--validation-meta", f"vfun-demo/{S2V}/data/validation.json")
    assert encoded(whole(fill(tmp_path / "cache", S2V, *given))) == 1
    filled = contents(tmp_path / "cache")
    assert encoded(whole(fill(tmp_path / "cache", S2V, *given, "--prune"))) == 0
    finish(start(
        "train", S2V, "--demo", "--cache", tmp_path / "cache", "--cache-variants", 1, "--max-train-steps", 0,
        "--num-processes", 1, "--video-sample-size", 64, "--token-sample-size", 64, "--no-enable-bucket",
        "--mixed-precision", "no", "--dataloader-num-workers", 0, "--output-dir", tmp_path / "run", *given,
        "--no-validation-samples",
    ))  # fmt: skip
    assert list(held_out(RunDir(tmp_path / "run"))) == [(0, "trained")]
    assert contents(tmp_path / "cache") == filled and count > 0


def test_a_fill_makes_every_caption_that_a_run_draws_and_the_run_is_that_without_a_cache(tmp_path: Path) -> None:
    """Of clips with five captions, in three epochs of which two are different."""
    data = Path(f"vfun-demo/{I2V}/data")
    rows = json.loads((data / "metadata.json").read_text(encoding="utf-8"))
    several = [row | {"text": [f"{row['text']}, {word}, more" for word in ("a", "b", "c", "d", "e")]} for row in rows]
    (data / "several.json").write_text(json.dumps(several), encoding="utf-8")
    given = (
        "--train-data-meta", data / "several.json", "--cache-variants", 2, "--max-train-steps", 3 * CLIPS,
        "--caption-prefix", "ohwx, ", "--caption-suffix", "film", "--caption-dropout", 0.3, "--shuffle-tags",
    )  # fmt: skip
    said = finish(fill(tmp_path / "cache", I2V, *given))
    assert encoded(said.out + said.err) > CLIPS
    assert "Rows have up to 5 captions, and --cache-variants 2" in " ".join(said.err.split())
    filled = stamps(tmp_path / "cache")
    found = {}
    for name, cache in (("cached", ("--cache", tmp_path / "cache")), ("encoded", ())):
        finish(start(
            "train", I2V, "--demo", "--num-processes", 1, "--video-sample-size", 64, "--token-sample-size", 64,
            "--no-enable-bucket", "--mixed-precision", "no", "--dataloader-num-workers", 0, *given, *cache,
            "--output-dir", tmp_path / name,
        ))  # fmt: skip
        found[name] = losses(RunDir(tmp_path / name))
    assert stamps(tmp_path / "cache") == filled
    assert found["cached"] == found["encoded"] and len({*found["cached"]}) == 3 * CLIPS


def contents(folder: Path) -> dict[str, dict[str, list[float]]]:
    return {
        path.name: {name: tensor.flatten().tolist() for name, tensor in read_entry(path).items()}
        for path in entries(folder)
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each entry: those of one that is written again are others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in entries(folder)}


def clips_done(folder: Path) -> int:
    """By the progress of the fill at work, or of the one that was killed."""
    return max((line["step"] for run in folder.glob("fill/*") for line in records(RunDir(run))), default=0)


@pytest.mark.long
def test_a_killed_fill_loses_nothing_but_the_entry_in_hand(alone: Alone, tmp_path: Path) -> None:
    job = fill(tmp_path, S2V)
    wait_for(lambda: clips_done(tmp_path) >= 2, job)
    kill_all(job)
    done, survived, before = clips_done(tmp_path), contents(tmp_path), stamps(tmp_path)  # each is whole
    assert 2 <= done < CLIPS and len([*partials(tmp_path)]) <= 1

    missing = encoded(whole(fill(tmp_path, S2V)))
    assert missing in (CLIPS - done, CLIPS - done - 1)  # one may have been finished and not been counted yet
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    expected = contents(alone(S2V)[0])
    assert contents(tmp_path) == expected
    assert len(survived) < len(expected) and all(expected[name] == content for name, content in survived.items())


def test_a_request_to_stop_reaches_all_ranks(tmp_path: Path) -> None:
    variants = 100  # each rank has work for minutes
    more = ("--cache-variants", variants, "--max-train-steps", variants * CLIPS // 2)
    job = fill(tmp_path, S2V, *more, ranks=2)
    wait_for(lambda: clips_done(tmp_path) >= 1, job)
    os.kill(job.pid, signal.SIGTERM)
    assert re.search(r"stopped: \d+ clips encoded", finish(job, EXIT_PREEMPTED, within=WITHIN).out)


@pytest.mark.long
def test_two_fills_at_once_leave_a_whole_cache(alone: Alone, tmp_path: Path) -> None:
    one, two = fill(tmp_path, S2V), fill(tmp_path, S2V)
    whole(one)
    whole(two)
    assert contents(tmp_path) == contents(alone(S2V)[0])
    assert not [*partials(tmp_path)]


def test_two_ranks_share_the_clips_and_make_the_same_entries(alone: Alone, tmp_path: Path) -> None:
    said = whole(fill(tmp_path, I2V, ranks=2))
    folder, clips = alone(I2V)
    assert contents(tmp_path) == contents(folder)
    assert encoded(said) == clips  # each by one rank, although some train on one in the first epoch, then on the other
    assert f"looking which of its {CLIPS} clips are not there yet" in said
    done, share = re.findall(r"step (\d+)/(\d+)  \1 clips encoded", said)[-1]
    assert done == share and 0 < int(share) < clips  # rank 0's own


@pytest.mark.parametrize(
    ("family", "new"),  # HunyuanVideo has two text encoders
    [pytest.param(S2V, 1, marks=pytest.mark.long, id=S2V), pytest.param(I2V, 2, id=I2V)],
)
def test_another_caption_makes_its_own_entries_and_leaves_all_others(
    family: str, new: int, alone: Alone, workplace: Path, tmp_path: Path
) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(workplace / "vfun-demo" / family / "data", data)
    shutil.copytree(alone(family)[0], cache)
    change_a_caption(data / "metadata.json")
    before = stamps(cache)
    metadata = ("--train-data-dir", str(data), "--train-data-meta", str(data / "metadata.json"))
    said = whole(fill(cache, family, *metadata))
    assert encoded(said) == 1
    after = stamps(cache)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + new


def change_a_caption(metadata: Path) -> None:
    records: list[dict[str, Any]] = json.loads(metadata.read_text(encoding="utf-8"))
    records[3]["text"] += " Slowly."
    metadata.write_text(json.dumps(records), encoding="utf-8")


@pytest.mark.long
def test_prune_deletes_what_the_run_does_not_need_and_nothing_else(alone: Alone, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(alone(I2V)[0], cache)
    before = stamps(cache)
    alien = next(entries(cache)).with_name(f"{'ab' * 16}.safetensors")
    left = alien.with_name(f".{'ab' * 16}.0123456789abcdef")
    for path in (alien, left):
        shutil.copy(next(entries(cache)), path)
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert encoded(whole(fill(cache, I2V, "--prune"))) == 0
    assert stamps(cache) == before and not left.exists()
