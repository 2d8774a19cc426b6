"""How fast validation reads headers, beside a bare PyAV loop over the same files, and how fast it is the second time.

    python benchmarks/validate_throughput.py [--files 600] [--cached 100000]

Writes benchmarks/results/validate_throughput.json. The bare loop opens each file with as many threads and reads what
any planner needs (size, frames, frame rate; rate and length of sound); validation also checks for truncation, variable
frame rate, rotation, silence and everything that compares a row with its files.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import record

from vfun_cli.demo.media import build_media
from vfun_cli.devices import cpu_cores
from vfun_cli.metadata.checks import Settings, validate
from vfun_cli.metadata.fields import MetadataField
from vfun_cli.metadata.probe import MediaKind, probe_many
from vfun_cli.metadata.records import read_metadata

FIELDS = (
    MetadataField(name="file_path", media="visual"),
    MetadataField(name="audio_path", media="audio"),
    MetadataField(name="control_file_path", media="control"),
)
ROUNDS = 15


def bare_probe(path: str) -> tuple[Any, ...]:
    with av.open(path) as container:
        if container.streams.video:
            video = container.streams.video[0]
            return video.width, video.height, video.frames, video.average_rate
        audio = container.streams.audio[0]
        return audio.rate, audio.channels, audio.duration


def rows_over(root: Path, count: int) -> list[dict[str, Any]]:
    """``count`` rows, each over its own three files: copies of the demo clips."""
    source = json.loads(build_media(root / "source", control=True, audio=True, images=False).read_text())
    rows = []
    for number in range(count):
        row = dict(source[number % len(source)], text=f"Clip {number}.")
        for field in FIELDS:
            name = f"{field.media}/{number:06d}{Path(row[field.name]).suffix}"
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(root / "source" / row[field.name], root / name)
            row[field.name] = name
        rows.append(row)
    return rows


def seconds(work: Any) -> float:
    return both_clocks(work)[0]


def both_clocks(work: Any) -> tuple[float, float]:
    """Seconds of the clock and of the CPUs; other programs on the machine move the first alone."""
    start, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - worked


def compare(paths: list[tuple[str, MediaKind]], threads: int) -> dict[str, Any]:
    """Files a second of both, taken in turns: medians, and the median of each turn's ratio."""
    files = [path for path, _ in paths]

    def bare() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(bare_probe, files))

    bare()  # the page cache is warm for both
    rounds = [(both_clocks(bare), both_clocks(lambda: probe_many(paths, threads=threads))) for _ in range(ROUNDS)]
    return {
        "files": len(files),
        "bare_pyav": round(len(files) / statistics.median(theirs[0] for theirs, _ in rounds)),
        "vfun": round(len(files) / statistics.median(ours[0] for _, ours in rounds)),
        "ratio": round(statistics.median(theirs[0] / ours[0] for theirs, ours in rounds), 3),
        "cpu_time_ratio": round(statistics.median(theirs[1] / ours[1] for theirs, ours in rounds), 3),
    }


def cached(root: Path, rows: list[dict[str, Any]], count: int, threads: int) -> dict[str, Any]:
    """Validate ``count`` files twice with a cache: hard links to the videos, one row each."""
    many = []
    (root / "many").mkdir()
    for number in range(count):
        name = f"many/{number:06d}.mp4"
        os.link(root / rows[number % len(rows)]["file_path"], root / name)
        many.append({"file_path": name, "text": f"Clip {number}.", "type": "video"})
    path = root / "many.json"
    path.write_text(json.dumps(many))
    settings = Settings(cache=root / "cache.sqlite", threads=threads)
    problems = 0

    def run() -> None:
        nonlocal problems
        problems = len(validate(read_metadata(path), FIELDS[:1], ("video",), root, settings=settings).problems)

    first, second = seconds(run), seconds(run)
    assert problems == 0
    return {"files": count, "first_s": round(first, 2), "second_s": round(second, 2)}


def main() -> None:
    parser = record.parser("validate_throughput", __doc__)
    parser.add_argument("--files", type=int, default=600, help="rows; each has a video, a control clip and a sound")
    parser.add_argument("--cached", type=int, default=100_000)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.files, arguments.cached = 6, 20
    threads = 2 * cpu_cores()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = rows_over(root, arguments.files)
        video: list[tuple[str, MediaKind]] = [(str(root / row["file_path"]), "visual") for row in rows]
        sound: list[tuple[str, MediaKind]] = [(str(root / row["audio_path"]), "audio") for row in rows]
        result = {
            "threads": threads,
            "files_per_second": {
                "videos": compare(video, threads),
                "sounds": compare(sound, threads),
                "both": compare(video + sound, threads),
            },
            "cached": cached(root, rows, arguments.cached, threads),
        }
    record.write_result(arguments, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
