"""How an export comes to its place: whole or not at all, one at a time, over nothing but an older export."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deaths import each_death
from vfun_cli.checkpoints.export import RECORD, check_output, replacing
from vfun_cli.errors import ConfigError


def put(output: Path, content: str) -> None:
    with replacing(output, needed=0, overwrite=True) as folder:
        (folder / "model.safetensors").write_text(content)
        (folder / "config.json").write_text("{}")


def held(output: Path) -> str | None:
    return (output / "model.safetensors").read_text() if output.exists() else None


@pytest.mark.slow
def test_death_at_any_moment_leaves_the_old_export_or_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "place"
    output = place / "out"

    def prepare() -> None:
        shutil.rmtree(place, ignore_errors=True)
        put(output, "old")

    def after() -> None:
        if not output.exists():  # between two renames: the next export sets it right, whether it succeeds or not
            with pytest.raises(ConfigError, match="exists already"), replacing(output, needed=0, overwrite=False):
                pass
        assert held(output) in ("old", "new")
        put(output, "newer")
        assert held(output) == "newer" and list(place.iterdir()) == [output]

    assert each_death(prepare, lambda: put(output, "new"), after, place) > 10


def test_an_export_that_fails_at_the_last_moment_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", Path.rename
    put(output, "old")

    def fails(path: Path, target: Path) -> Path:
        if path.name == ".out.partial":
            raise OSError("an error of the disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="an error of the disk"):
        put(output, "new")
    assert held(output) == "old" and list(tmp_path.iterdir()) == [output]


def exports(output: Path, number: int) -> int:
    """In a child: export again and again; its process."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        done = 0
        while done < 20:
            try:
                with replacing(output, needed=0, overwrite=True) as folder:
                    for name in "abcd":
                        (folder / name).write_text(str(number))
                done += 1
            except ConfigError as error:
                assert error.message.startswith(f"another export to {output} is at work (")
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
def test_exports_at_the_same_time_are_whole_or_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    children = [exports(output, number) for number in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(file.name for file in output.iterdir()) == [RECORD, *"abcd"]
    assert len({(output / name).read_text() for name in "abcd"}) == 1
    assert list(tmp_path.iterdir()) == [output]


OTHERS: dict[str, Callable[[Path], object]] = {
    "a file of another kind": lambda folder: (folder / "notes.txt").write_text(""),
    "a folder": lambda folder: (folder / "model").mkdir(),
    "a link": lambda folder: (folder / "config.json").symlink_to(folder),
}


@pytest.mark.parametrize("other", OTHERS)
def test_only_an_older_export_is_written_over(other: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    OTHERS[other](output)
    with pytest.raises(ConfigError, match="no export of vfun wrote"):
        check_output(output, "bf16", overwrite=True, sources=())
    with pytest.raises(ConfigError, match="no export of vfun wrote"):
        put(output, "new")
    assert len(list(output.iterdir())) == 1


def test_an_export_whose_record_is_damaged_is_left_and_another_place_is_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "out"
    put(output, "old")
    (output / RECORD).write_text('{"schema": 1, "files": 7}')
    with pytest.raises(ConfigError, match="no longer says what it wrote") as caught:
        check_output(output, "bf16", overwrite=True, sources=())
    assert "Name another --output" in str(caught.value.hint)


@pytest.mark.parametrize("output", ["run/checkpoint-4", "run/checkpoint-4/model", "run", "model", "link"])
def test_an_export_never_deletes_what_it_is_made_from(output: str, tmp_path: Path) -> None:
    reads = (tmp_path / "run" / "checkpoint-4", tmp_path / "model" / "transformer")
    for folder in (reads[0] / "model", reads[1]):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(reads[1])
    with pytest.raises(ConfigError, match="which an export leaves alone"):
        check_output(tmp_path / output, "bf16", overwrite=True, sources=reads)
    check_output(tmp_path / "run" / "checkpoint-4-outputs", "bf16", overwrite=True, sources=reads)
