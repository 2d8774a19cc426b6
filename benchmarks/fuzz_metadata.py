"""Mutated metadata and damaged media: validation must end with a report, never with a traceback or a hang.

    python benchmarks/fuzz_metadata.py [--metadata 10000] [--media 300] [--seed 0]

Writes benchmarks/results/fuzz_metadata.json. Metadata files are mutated by bytes (JSON, JSON lines, CSV) and by values,
then read, validated against real files, rendered, turned into JSON and a clip table, and fixed. Media (mp4, mkv, wav,
jpg, png) are byte-flipped, cut, or given another file's head or tail, then probed and decoded to their end.
"""

import io
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import record
from PIL import Image
from rich.console import Console

from vfun_cli.demo.media import build_media
from vfun_cli.errors import VfunError
from vfun_cli.metadata.checks import Settings, validate
from vfun_cli.metadata.clip_needs import ClipNeeds
from vfun_cli.metadata.deep import decode_many
from vfun_cli.metadata.facts import Failure
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.fix import write_fixed
from vfun_cli.metadata.probe import probe_many
from vfun_cli.metadata.records import read_metadata
from vfun_cli.metadata.report import render, to_json

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
]  # fmt: skip


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
        return ".json", json.dumps(chosen).encode()
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
    return {"files": count, "tracebacks": failures, "slowest_s": round(slowest, 2), "codes": dict(codes.most_common())}


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
    sources = sorted(path for path in root.rglob("*") if path.suffix in (".mp4", ".mkv", ".wav", ".jpg", ".png"))
    rng, paths, kinds = random.Random(seed), [], Counter[str]()
    for number in range(count):
        source, other = rng.sample(sources, 2)
        kind, content = damage(source.read_bytes(), other.read_bytes(), rng)
        kinds[f"{kind} {source.suffix}"] += 1
        paths.append(folder / f"{number:04d}{source.suffix}")
        paths[-1].write_bytes(content)
    keys = [(str(path), "audio" if path.suffix == ".wav" else "visual") for path in paths]
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


def further_kinds(root: Path) -> None:
    """A Matroska film and a PNG picture beside the demo's mp4, wav and jpg."""
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
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.metadata, arguments.media = 50, 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root, damaged = folder / "data", folder / "damaged"
        damaged.mkdir()
        rows = json.loads(build_media(root, control=True, audio=True, images=False).read_text())
        Image.new("RGB", (64, 48), "green").save(root / "train/still.jpg")
        further_kinds(root)
        started = time.perf_counter()
        result = {
            "seed": arguments.seed,
            "metadata": fuzz_metadata(root, rows, folder, arguments.metadata, arguments.seed),
            "media": fuzz_media(root, damaged, arguments.media, arguments.seed),
        }
        result["seconds"] = round(time.perf_counter() - started, 1)
    record.write_result(arguments, result)
    print(json.dumps(result, indent=1))
    return int(bool(result["metadata"]["tracebacks"] or result["media"]["tracebacks"] or result["media"]["hangs"]))


if __name__ == "__main__":
    sys.exit(main())
