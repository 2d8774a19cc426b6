"""Whether what a run trains on is what a player shows, over real videos of every kind.

    python benchmarks/frame_matrix.py [--frames 200] [--draws 20]

Writes benchmarks/results/frame_matrix.json. Each video (container x codec x GOP x B-frames x edit list x rotation x bit
depth x spacing x start offset; tests/coded_clips.py) has pictures that carry their number. For each, random clips
(start, stride, count) go the way of a run, and what ``sanity_check/`` holds is compared with sequential decoding. The
frames that validation counts have to be those that sequential decoding shows, and those that were drawn.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import record

from tests.coded_clips import MATRIX, encode, held_after_training, sequential, true_numbers, validated


def main() -> None:
    parser = record.parser("frame_matrix", __doc__)
    parser.add_argument("--frames", type=int, default=200, help="pictures of each video: at most 255")
    parser.add_argument("--draws", type=int, default=20, help="random clips of each video")
    arguments = parser.parse_args()
    clips, draws = (MATRIX[:2], 2) if arguments.smoke else (MATRIX, arguments.draws)
    av.logging.set_level(av.logging.PANIC)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for clip in clips:
            long = dataclasses.replace(clip, frames=clip.frames if arguments.smoke else arguments.frames)
            path = encode(long, folder)
            facts = validated(path)
            held = held_after_training(path, facts, folder / "run", draws)
            shown = [number for _, number in sequential(path)]
            rows.append(
                {
                    "video": clip.name,
                    "codec": clip.codec,
                    "frames_validated": facts.frames,
                    "frames_shown": len(shown),
                    "pictures_as_drawn": shown == true_numbers(long),
                    "variable": facts.variable,
                    "fps": str(facts.fps),
                    "clips": len(held),
                    "wrong_clips": sum(each.found != each.expected for each in held),
                }
            )
            path.unlink()
    result = {
        "videos": len(rows),
        "clips": sum(row["clips"] for row in rows),
        "wrong_clips": sum(row["wrong_clips"] for row in rows),
        "wrong_counts": sum(row["frames_validated"] != row["frames_shown"] for row in rows),
        "videos_not_shown_as_drawn": sum(not row["pictures_as_drawn"] for row in rows),
        "rows": rows,
    }
    record.write_result(arguments, result)
    print({name: value for name, value in result.items() if name != "rows"})
    sys.exit(bool(result["wrong_clips"] or result["wrong_counts"] or result["videos_not_shown_as_drawn"]))


if __name__ == "__main__":
    main()
