"""Where vfun hears the clicks of many kinds of sound: container x codec x rate x channels x start offset x edit list.

    python benchmarks/sound_matrix.py [--pieces 20]

Writes benchmarks/results/sound_matrix.json. Of every kind a file is encoded with clicks at known times, in sync with
white frames where it has video; pieces are read at random (start frame, stride, count) as training reads them, and the
clicks in them located. The aim: none is more than half a frame from its place; validation and reading agree about the
length to a millisecond. Levels are over the written ones. ``unstated_ms`` is what the encoder puts before the sound
where the format has no place to say so: every player is late by it, and so is vfun. ``surplus_ms`` is what is decoded
beyond the length that validation has.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import record

from tests.click_sounds import KINDS, Kind, measure, write_kind

HALF_A_FRAME = 0.5
FAINT = 0.5
"""A speech codec takes a third of a click; below this nothing was found."""
SMOKE = ("piped.wav", "a.mp3", "trimmed.mp4")


def numbers(folder: Path, kind: Kind, pieces: int) -> dict[str, Any]:
    found = measure(write_kind(folder, kind), kind, pieces)
    return {
        "name": kind.name,
        "codec": kind.codec,
        "rate": kind.rate,
        "channels": kind.layout,
        "clicks": found.clicks,
        "worst_ms": round(1000 * found.worst, 2),
        "worst_frames": round(found.worst * float(kind.fps), 3),
        "level": [round(found.quietest, 3), round(found.loudest, 3)],
        "seconds": round(float(found.length), 4),
        "unstated_ms": round(1000 * float(kind.unstated), 1),
        "surplus_ms": round(1000 * float(kind.surplus), 1),
    }


def main() -> None:
    parser = record.parser("sound_matrix", __doc__)
    parser.add_argument("--pieces", type=int, default=20, help="read of each file")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.smoke or kind.name in SMOKE]
    pieces = 3 if arguments.smoke else arguments.pieces
    with tempfile.TemporaryDirectory() as folder:
        rows = [numbers(Path(folder), kind, pieces) for kind in kinds]
    worst = max(rows, key=lambda row: abs(row["worst_frames"]))
    result = {
        "kinds": len(rows),
        "clicks": sum(row["clicks"] for row in rows),
        "largest_error": {"name": worst["name"], "ms": worst["worst_ms"], "frames": worst["worst_frames"]},
        "rows": rows,
    }
    record.write_result(arguments, result)
    for row in rows:
        print(f"{row['name']:12} {row['worst_ms']:7.2f} ms  {row['worst_frames']:7.3f} frames  level {row['level']}")
    print(f"{len(rows)} kinds, {result['clicks']} clicks, largest error {result['largest_error']}")
    assert abs(worst["worst_frames"]) <= HALF_A_FRAME and min(row["level"][0] for row in rows) > FAINT


if __name__ == "__main__":
    main()
