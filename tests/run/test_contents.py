"""That what a run reads is known by its contents, whatever it is called and whenever it was written."""

import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vfun_cli.checkpoints.given import Given
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.records import read_metadata
from vfun_cli.run.contents import (
    DATA,
    EVERY,
    METADATA,
    MODEL,
    WHOLE,
    Contents,
    contents_of,
    file_digests,
    model_files,
    what_changed,
    write_contents,
)

FIELDS = (MetadataField(name="file_path", media="visual"),)
TENSORS = {"a.norm": 512, "b.weight": 3 << 20, "c.bias": 512, "d.weight": 1 << 20}
"""Bytes."""


def safetensors(path: Path, changed: str | None = None) -> Path:
    """A file of a few megabytes, one byte of one tensor changed."""
    header, end, data = {}, 0, b""
    for name, size in TENSORS.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
        data += (b"y" if name == changed else b"x") + bytes(size - 1)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def spoiled(path: Path, place: float) -> Path:
    """The file with one byte changed, under the old name, size and modification time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(int(place * (status.st_size - 1)))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return path


@pytest.mark.parametrize(
    ("size", "places"),
    [(1, [0.0]), (1000, [0.0, 0.3, 1.0]), (WHOLE, [0.7]), (WHOLE + 1, [0, 0.5, 1]), (5 * EVERY, [0, 0.25, 0.5, 1])],
)
def test_a_changed_byte_under_the_same_name_size_and_time_is_noticed(
    size: int, places: list[float], tmp_path: Path
) -> None:
    file, cache = tmp_path / "clip.mp4", tmp_path / "cache.sqlite"
    with file.open("wb") as opened:
        opened.truncate(size)
    seen = [file_digests([file], cache=cache)[file]]
    assert file_digests([file], cache=cache)[file] == seen[0]
    for place in places:
        spoiled(file, place)
        seen.append(file_digests([file], cache=cache)[file])
    assert len(set(seen)) == 1 + len(places)


@pytest.mark.parametrize("name", TENSORS)
def test_a_single_tensor_that_was_exchanged_is_noticed(name: str, tmp_path: Path) -> None:
    before, after = safetensors(tmp_path / "before.safetensors"), safetensors(tmp_path / "after.safetensors", name)
    assert before.stat().st_size == after.stat().st_size
    found = file_digests([before, after])
    assert found[before] != found[after]


def test_an_archive_is_known_by_the_checksums_of_its_members(tmp_path: Path) -> None:
    files = [tmp_path / "before.pth", tmp_path / "after.pth"]
    for file, byte in zip(files, (b"x", b"y"), strict=True):
        with zipfile.ZipFile(file, "w") as archive:  # without compression, as torch.save writes it
            for number in range(600):
                content = (byte if number == 10 else b"x") * 4096
                archive.writestr(zipfile.ZipInfo(f"archive/data/{number}"), content)
    assert len(set(file_digests(files).values())) == 2


def test_a_model_is_its_files_wherever_they_lie_and_links_lead(tmp_path: Path) -> None:
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    (model / "vae").mkdir(parents=True)
    (model / ".cache").mkdir()
    blobs.mkdir()
    (blobs / "3fa9").write_text("{}")
    (model / "config.json").symlink_to(blobs / "3fa9")
    (model / "text_encoder").symlink_to(model / "vae")
    (model / "vae" / "loop").symlink_to(model)
    for name in ("vae/weights.bin", "README.md", ".cache/state.json", "picture.png"):
        (model / name).write_text("x")
    os.mkfifo(model / "pipe.json")
    assert list(model_files(model)) == ["config.json", "text_encoder/weights.bin", "vae/weights.bin"]


def test_a_name_that_is_no_text_is_read_like_any_other(tmp_path: Path) -> None:
    file, cache = tmp_path / os.fsdecode(b"\xff.json"), tmp_path / "cache.sqlite"
    file.write_text("{}")
    assert file_digests([file], cache=cache) == file_digests([file])
    (found,) = model_files(tmp_path)
    assert Contents(pieces={found: "0"}).digest


def contents(folder: Path, rows: list[dict[str, object]]) -> dict[str, Contents]:
    """Of a data set of three clips and a model of one file."""
    for name in ("0", "1", "2"):
        (folder / f"{name}.mp4").write_text(name)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "meta.json").write_text(json.dumps(rows))
    metadata = read_metadata(folder / "meta.json")
    return contents_of(metadata, FIELDS, folder, folder / "model", Given(), cache=None, progress=None)


def rows(folder: str = "") -> list[dict[str, object]]:
    return [{"file_path": f"{folder}{name}.mp4", "text": f"clip {name}"} for name in (0, 1, 2)]


def caption(rows: list[dict[str, object]]) -> None:
    rows[1]["text"] = "something else"


def swap(rows: list[dict[str, object]]) -> None:
    rows[0]["file_path"], rows[2]["file_path"] = rows[2]["file_path"], rows[0]["file_path"]


def drop(rows: list[dict[str, object]]) -> None:
    rows.pop()


def repaint(rows: list[dict[str, object]]) -> None:
    rows[1]["colour"] = "red"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (caption, {METADATA: "row 1 has other contents than when the run began"}),
        (swap, {DATA: r"row 0, file_path \(2.mp4\) has other contents .*; row 2, file_path \(0.mp4\) has other .*"}),
        (drop, {METADATA: "row 2 is gone", DATA: "row 2, file_path is gone"}),
        (repaint, {}),
    ],
)
def test_what_changed_is_said_by_row_and_file(
    change: Callable[[list[dict[str, object]]], None], words: dict[str, str], tmp_path: Path
) -> None:
    before = contents(tmp_path, rows())
    write_contents(tmp_path / "contents.json", before)
    changed = rows()
    change(changed)
    now = contents(tmp_path, changed)
    other = [name for name in now if now[name].digest != before[name].digest]
    assert other == list(words)
    for name in other:
        said = what_changed(tmp_path / "contents.json", name, before[name].digest, now[name])
        assert re.fullmatch(words[name], said), said
        assert "not those" in what_changed(tmp_path / "none.json", name, before[name].digest, now[name])


def test_a_data_set_that_moved_is_the_same_though_its_rows_have_absolute_paths(tmp_path: Path) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    here, there = (contents(place, rows(f"{place}/")) for place in places)
    assert {name: each.digest for name, each in here.items()} == {name: each.digest for name, each in there.items()}
    assert set(here) == {METADATA, DATA, MODEL}


def test_a_file_of_gigabytes_takes_less_than_a_second(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    with file.open("wb") as opened:
        opened.truncate(20 << 30)  # takes no room
    begin = time.monotonic()
    file_digests([file])
    assert time.monotonic() - begin < 1


def test_the_digest_of_a_row_with_one_caption_is_what_it_always_was_and_a_list_has_its_own(tmp_path: Path) -> None:
    size = {"type": "video", "width": 640, "height": 480, "frames": 99, "fps": 25}
    one = {"file_path": "0.mp4", "text": "A dog, running.", **size}
    several = one | {"text": ["A dog, running.", "A dog."]}
    found = contents(tmp_path, [one, {"file_path": "1.mp4"}, several, several | {"text": several["text"][::-1]}])
    digests = [*found[METADATA].pieces.values()]
    assert digests[:2] == ["b2810fbabf2f40b8", "23932fbd589c265f"]
    assert len(set(digests)) == 4
