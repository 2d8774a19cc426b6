"""Mutated metadata and damaged media: validation must end with a report, never with a traceback or a hang.

    python benchmarks/fuzz_metadata.py [--metadata 10000] [--media 300] [--playlists 300] [--seed 0]

Writes benchmarks/results/fuzz_metadata.json. Metadata files are mutated by bytes (JSON, JSON lines, CSV) and by values,
then read, validated against real files, rendered, turned into JSON and a clip table, and fixed. Media (mp4, mkv, wav,
jpg, png) are byte-flipped, cut, or given another file's head or tail, then probed and decoded to their end.

Playlists, other texts that name files and addresses, and rows whose paths look like addresses go through validation,
--deep and the reader of training, whole and damaged: none may be followed, and a socket on loopback, which they name,
must hear nothing. What those name is a good video, so that following it would count.
"""

import io
import json
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

import record

from tests.hostile_media import PLAYLISTS, accepted
from vfun_cli.config.datasets import parse_data_sets
from vfun_cli.config.options import RunConfig
from vfun_cli.demo.media import build_media
from vfun_cli.errors import VfunError
from vfun_cli.families.wan_s2v import SPEC
from vfun_cli.metadata.checks import Settings, validate
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.deep import Kind, decode_many
from vfun_cli.metadata.facts import Failure
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.fix import write_fixed
from vfun_cli.metadata.probe import probe_many
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.report import render, to_json
from vfun_cli.training.data.stream import row_reader

FIELDS = (
    MetadataField(name="file_path", media="visual"),
    MetadataField(name="audio_path", media="audio"),
    MetadataField(name="control_file_path", media="control", required=False),
)
TIMEOUT = 20.0
"""Seconds a media file may take to decode before its process is killed."""
LEFTOVER = 10.0
"""Seconds beyond TIMEOUT in which an answer must be there all the same."""
VALUES: list[Any] = [
    None, True, -1, 0, 3, 1e308, float("nan"), float("inf"), 10**30, "", " ", "x" * 5000, "\0", "\ud800", "../x", "/",
    "30000/1001", "1/0", "image", "video", "Video", [], {}, ["a"], {"a": 1}, "[/red]", "a\nb", "\u202e", "ä.mp4",
    10**4000, "1e999999999", "9" * 4000, json.loads("[" * 400 + "]" * 400), "\x1b[31m", "\x9b", "a" * 300, "a/" * 3000,
    "pipe.mp4", "pipe.wav", "zero.mp4", "train", ".", "/dev/zero", "/proc/kmsg", "/proc/self/mem", "link/1.mp4",
    "http:/127.0.0.1:1/1.mp4", "file:train/1.mp4", "concat:a|b", "~", "%d.png", "\\", "train/\udcff.mp4",
]  # fmt: skip


ENCODINGS = (("utf-8",), ("utf-8-sig",), ("utf-16",), ("utf-16-be",), ("cp037",))


def mutate_values(row: dict[str, Any], rng: random.Random) -> Any:
    """A row with some fields changed, removed, renamed or added; sometimes no row at all."""
    if rng.random() < 0.05:
        return rng.choice(VALUES)
    row = dict(row)
    for _ in range(rng.randrange(4)):
        key = rng.choice([*row, "width", "height", "frames", "fps", "typ", "file_paht", ""])
        if rng.random() < 0.2:
            row.pop(key, None)
        else:
            row[key] = rng.choice(VALUES)
    return row


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Up to six places overwritten, cut or repeated; sometimes only a piece is left."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 7)):
        if not data:
            break
        at = rng.randrange(len(data))
        new = rng.choice([bytes([rng.randrange(256)]), b'"', b"\n", b",", b"{", b"]", b"\xff\xfe", b"\0", b"\\u"])
        data[at : at + rng.randrange(4)] = new
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    return bytes(data)


def metadata_file(rows: list[dict[str, Any]], rng: random.Random) -> tuple[str, bytes]:
    """(suffix, content) of one mutated file."""
    chosen = [mutate_values(row, rng) for row in rng.choices(rows, k=rng.randrange(6))]
    if rng.random() < 0.5:
        return ".json", json.dumps(chosen).encode(*rng.choices(ENCODINGS, [20, 1, 1, 1, 1])[0])
    plain = rng.choices(rows, k=3)
    kind = rng.choice([".json", ".jsonl", ".csv", ".txt"])
    if kind == ".csv":
        lines = [",".join(plain[0]), *(",".join(f'"{value}"' for value in row.values()) for row in plain)]
        return kind, mutate_bytes("\n".join(lines).encode(), rng)
    if kind == ".jsonl":
        return kind, mutate_bytes("\n".join(map(json.dumps, plain)).encode(), rng)
    return kind, mutate_bytes(json.dumps(plain, indent=1).encode(), rng)


def everything(path: Path, root: Path, folder: Path) -> Counter[str]:
    """What the commands do with a metadata file; the codes of what they found."""
    report = validate(
        read_metadata(path), FIELDS, ("video",), root,
        needs=ClipNeeds(min_frames=5, stride=2, max_fps=30), settings=Settings(threads=1, cache=folder / "cache"),
    )  # fmt: skip
    render(report, Console(file=io.StringIO(), width=100))
    json.dumps(to_json(report), ensure_ascii=False).encode("utf-8")
    if len(report.table()) != report.ok:
        raise AssertionError(f"{len(report.table())} rows in the table, {report.ok} good")
    output = folder / "fixed"
    output.unlink(missing_ok=True)
    try:
        write_fixed(report, output)
        if read_metadata(output).problems:
            raise AssertionError("the fixed copy has problems")
    except VfunError:  # nothing left to write
        pass
    return Counter(problem.code for problem in report.problems)


def fuzz_metadata(root: Path, rows: list[dict[str, Any]], folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Counts of codes, and every traceback."""
    rng, codes, failures, slowest = random.Random(seed), Counter[str](), [], 0.0
    for number in range(count):
        suffix, content = metadata_file(rows, rng)
        path = folder / f"metadata{suffix}"
        path.write_bytes(content)
        started = time.perf_counter()
        try:
            codes += everything(path, root, folder)
        except Exception:
            failures.append({"number": number, "suffix": suffix, "traceback": traceback.format_exc()[-2000:]})
        slowest = max(slowest, time.perf_counter() - started)
        path.unlink()
    return {
        "files": count,
        "tracebacks": failures,
        "slowest_s": round(slowest, 2),
        "hangs": int(slowest > TIMEOUT),
        "codes": dict(codes.most_common()),
    }


def damage(content: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(kind of damage, damaged content)."""
    kind = rng.choice(["flipped", "cut", "swapped"])
    if kind == "cut":
        return kind, content[: rng.randrange(len(content))]
    if kind == "swapped":
        at = rng.randrange(1, min(len(content), len(other)))
        return kind, rng.choice([content[:at] + other[at:], other[:at] + content[at:]])
    data = bytearray(content)
    index = max(data.find(b"moov"), 0) if rng.random() < 0.5 else 0  # headers are short: half of the hits go there
    for _ in range(rng.choice([1, 8, 64, 512])):
        data[rng.randrange(index, len(data))] = rng.randrange(256)
    return kind, bytes(data)


def fuzz_media(root: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Probe and decode damaged copies of every kind of file; how each ended."""
    suffixes = (".mp4", ".mkv", ".wav", ".jpg", ".png")
    sources = sorted(path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    rng, paths, kinds = random.Random(seed), [], Counter[str]()
    for number in range(count):
        source, other = rng.sample(sources, 2)
        kind, content = damage(source.read_bytes(), other.read_bytes(), rng)
        kinds[f"{kind} {source.suffix}"] += 1
        paths.append(folder / f"{number:04d}{source.suffix}")
        paths[-1].write_bytes(content)
    keys: list[tuple[str, Kind]] = [(str(path), "audio" if path.suffix == ".wav" else "visual") for path in paths]
    ends, failures, slowest = Counter[str](), [], 0.0
    for key in keys:
        started = time.perf_counter()
        try:
            header = probe_many([key], threads=1)[key]
            deep = header if isinstance(header, Failure) else decode_many([key], timeout=TIMEOUT, threads=1)[key]
            ends[f"header: {header.code}" if isinstance(header, Failure) else
                 f"decoding: {deep.code}" if isinstance(deep, Failure) else "decodes"] += 1  # fmt: skip
        except Exception:
            failures.append({"file": key[0], "traceback": traceback.format_exc()[-2000:]})
        slowest = max(slowest, time.perf_counter() - started)
    return {
        "files": count,
        "tracebacks": failures,
        "slowest_s": round(slowest, 2),
        "hangs": int(slowest > TIMEOUT + LEFTOVER),
        "damage": dict(kinds.most_common()),
        "ends": dict(ends.most_common()),
    }


@contextmanager
def listening() -> Iterator[tuple[int, list[bytes]]]:
    """A port on loopback, and, once it is closed, who connected to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server.getsockname()[1], heard
        server.setblocking(False)
        while True:
            try:
                connection, _ = server.accept()
            except BlockingIOError:
                return
            with connection:
                heard.append(connection.recv(100))


def fuzz_playlists(root: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Whole and damaged files that name others, and paths that look like addresses: what was followed, who was called.

    In the working directory, which is the data root: that is where a path could be taken for an address.
    """
    rng, followed, read_wrongly, slowest = random.Random(seed), [], [], 0.0
    before = Path.cwd()
    film = (root / "train/film.mkv").read_bytes()
    (folder / "film.mkv").write_bytes(film)
    os.chdir(folder)
    with listening() as (port, heard):
        targets = (
            "film.mkv", f"{folder}/film.mkv", f"file:{folder}/film.mkv", f"subfile,,start,0,end,0,,:{folder}/film.mkv",
            f"http://127.0.0.1:{port}/1.mkv", f"tcp://127.0.0.1:{port}", f"rtmp://127.0.0.1:{port}/1/1",
        )  # fmt: skip
        for number in range(count):
            name, target = rng.choice(list(PLAYLISTS)), rng.choice(targets)
            path = folder / f"{number:04d}-{name}"
            content = PLAYLISTS[name].format(target).encode()
            path.write_bytes(mutate_bytes(content, rng) if number % 3 == 2 else content)
            started = time.perf_counter()
            followed += [{"file": name, "names": target, "by": by} for by in accepted(path)]
            slowest = max(slowest, time.perf_counter() - started)
        addresses = (
            f"http:/127.0.0.1:{port}/1.mkv", f"tcp:/127.0.0.1:{port}", "subfile,,start,0,end,0,,:film.mkv", "pipe:0",
            "concat:film.mkv|film.mkv", "file:1.mkv", "async:film.mkv", "crypto:film.mkv", "data:video,0", "fd:0",
        )  # fmt: skip
        for address in addresses:  # each is a file that lies there
            Path(address).parent.mkdir(parents=True, exist_ok=True)
            Path(address).write_bytes(film)
            Path("rows.json").write_text(json.dumps([{"file_path": address, "text": "", "type": "video"}]))
            config = RunConfig(train_data_meta=parse_data_sets("rows.json", "rows"), train_data_dir=Path())
            took = accepted(row_reader(config, SPEC)(0).record["file_path"])
            if took != ["header, visual", "deep, picture", "training, frames"]:
                read_wrongly.append({"path": address, "by": took})
    os.chdir(before)
    return {
        "files": count,
        "paths": len(addresses),
        "followed": followed,
        "read_wrongly": read_wrongly,
        "heard": [text.decode("latin-1") for text in heard],
        "slowest_s": round(slowest, 2),
    }


def further_kinds(root: Path) -> None:
    """A Matroska film and a PNG picture beside the demo's mp4, wav and jpg; pipes, a device, a link to nowhere."""
    for name in ("pipe.mp4", "pipe.wav"):
        os.mkfifo(root / name)
    (root / "zero.mp4").symlink_to("/dev/zero")
    (root / "link").symlink_to("link")
    with av.open(str(root / "train/film.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(root / "train/noise.png")


def main() -> int:
    parser = record.parser("fuzz_metadata", __doc__)
    parser.add_argument("--metadata", type=int, default=10_000)
    parser.add_argument("--media", type=int, default=300)
    parser.add_argument("--playlists", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.metadata, arguments.media, arguments.playlists = 50, 5, 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, damaged = folder / "data", folder / "damaged"
        damaged.mkdir()
        (folder / "playlists").mkdir()
        rows = json.loads(build_media(root, control=True, audio=True, images=False).read_text())
        Image.new("RGB", (64, 48), "green").save(root / "train/still.jpg")
        further_kinds(root)
        started = time.perf_counter()
        result = {
            "seed": arguments.seed,
            "metadata": fuzz_metadata(root, rows, folder, arguments.metadata, arguments.seed),
            "media": fuzz_media(root, damaged, arguments.media, arguments.seed),
            "playlists": fuzz_playlists(root, folder / "playlists", arguments.playlists, arguments.seed),
        }
        result["seconds"] = round(time.perf_counter() - started, 1)
    record.write_result(arguments, result)
    print(json.dumps(result, indent=1))
    faults = [*map(result["metadata"].get, ["tracebacks", "hangs"]), *map(result["media"].get, ["tracebacks", "hangs"]),
              *map(result["playlists"].get, ["followed", "read_wrongly", "heard"])]  # fmt: skip
    return int(any(faults))


if __name__ == "__main__":
    sys.exit(main())
