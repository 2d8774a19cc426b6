"""How fast and in how much memory the frames of a clip are read, beside decord, PyAV and torchcodec as they come.

    python benchmarks/decode.py [--rounds 7]

Writes benchmarks/results/decode.json. 49 of 240 frames at 1280x720, at stride 1 and 3, from the middle of H.264 with
closed and with open GOPs (250 and 48 pictures long), to 448x256 on one thread. The others read frames by index (PyAV:
from the key frame before, by time) and resize as the first version of this program did: decord while it decodes, then
antialiased in float32. The numbers in the pictures tell which frames came: fast and wrong is wrong. Memory is the peak
of a process that reads 77 frames of 1920x1080, above what it takes before.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import record

from tests.coded_clips import numbers, picture
from vfun_cli.modeling.media.frames import read_frames
from vfun_cli.modeling.media.sizes import resize_and_crop

HEIGHT, WIDTH = 256, 448
KINDS = {
    "closed GOP": {"preset": "veryfast", "g": "48", "crf": "20", "threads": "1"},
    "open GOP": {
        "preset": "veryfast", "crf": "20", "threads": "1",
        "x264-params": "open-gop=1:keyint=48:min-keyint=48:scenecut=0:bframes=3:b-adapt=0",
    },
    "one key frame in 240": {"preset": "veryfast", "g": "250", "crf": "20", "threads": "1"},
}  # fmt: skip


def film(path: Path, options: dict[str, str], height: int, width: int, frames: int) -> Path:
    """Numbered bars above moving noise: about 4 Mbit/s at 720p."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (height // 8, width // 8 + frames, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", dict(options)
        for number in range(frames):
            shown = picture(number, height, width).copy()
            shown[height // 2 :] = noise[: height - height // 2, 8 * number : 8 * number + width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    return path


def with_vfun(path: Path, indices: Sequence[int]) -> Tensor:
    return read_frames(path, indices, HEIGHT, WIDTH)


def with_decord(path: Path, indices: Sequence[int]) -> Tensor:
    import decord

    reader = decord.VideoReader(str(path), height=512, width=910, num_threads=1)
    return _as_before(torch.from_numpy(reader.get_batch(list(indices)).asnumpy()))


def with_pyav(path: Path, indices: Sequence[int]) -> Tensor:
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        step = int(1 / stream.average_rate / stream.time_base)
        wanted = [index * step for index in indices]
        container.seek(wanted[0], stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                found.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if frame.pts >= wanted[-1]:
                break
    return _as_before(torch.stack(found))


def with_torchcodec(path: Path, indices: Sequence[int]) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return _as_before(decoder.get_frames_at(list(indices)).data)


def _as_before(pictures: Tensor) -> Tensor:
    """[F, h, w, 3] uint8 to float32 [F, 3, HEIGHT, WIDTH] in [-1, 1]."""
    pixels = pictures.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)
    return resize_and_crop(pixels, HEIGHT, WIDTH)


READERS: dict[str, Callable[[Path, Sequence[int]], Tensor]] = {
    "vfun": with_vfun, "decord": with_decord, "pyav": with_pyav, "torchcodec": with_torchcodec,
}  # fmt: skip


def shown_numbers(pixels: Tensor) -> list[int]:
    """Read off the upper half, where the bars are; the sides are cropped a little."""
    upper = pixels[:, :, : HEIGHT // 2].permute(0, 2, 3, 1).numpy()
    return numbers(upper, 127 if pixels.dtype == torch.uint8 else 0)


def usable() -> dict[str, str]:
    """Why a reader cannot run here, by name; torchcodec brings no FFmpeg along."""
    missing = {}
    for name, module in (("decord", "decord"), ("torchcodec", "torchcodec.decoders")):
        try:
            __import__(module)
        except Exception as error:  # torchcodec raises a RuntimeError where it finds no FFmpeg
            missing[name] = str(error).strip().splitlines()[0][:120]
    return missing


def memory(name: str, path: str, frames: int) -> None:
    """The peak in bytes above what is taken before, on stdout of a process of its own."""
    torch.set_num_threads(1)
    READERS[name](Path(path), [0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    READERS[name](Path(path), range(frames))
    print((_status("VmHWM") - before) * 1024)


def _status(name: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)


def peak(name: str, path: Path, frames: int) -> int:
    code = f"import decode; decode.memory({name!r}, {str(path)!r}, {frames})"
    said = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)
    return int(said.stdout.split()[-1])


def main() -> None:
    parser = record.parser("decode", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    av.logging.set_level(av.logging.PANIC)
    small = arguments.smoke
    kinds = dict(list(KINDS.items())[:1]) if small else KINDS
    missing = usable()
    names = [name for name in READERS if name not in missing]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, options in kinds.items():
            path = film(Path(folder) / "film.mp4", options, 720, 1280, 20 if small else 240)
            for stride in (1, 3):
                start = 2 if small else 70
                indices = [start + stride * place for place in range(5 if small else 49)]
                times: dict[str, list[float]] = {name: [] for name in names}
                wrong = {}
                for _ in range(1 if small else arguments.rounds):
                    for name in names:
                        began = time.perf_counter()
                        pixels = READERS[name](path, indices)
                        times[name].append(time.perf_counter() - began)
                        wrong[name] = sum(a != b for a, b in zip(shown_numbers(pixels), indices, strict=True))
                rows.append(
                    {
                        "film": kind,
                        "stride": stride,
                        "seconds": {name: round(statistics.median(taken), 4) for name, taken in times.items()},
                        "times_of_vfun": {
                            name: round(statistics.median(map(float.__truediv__, taken, times["vfun"])), 2)
                            for name, taken in times.items()
                        },
                        "wrong_frames": wrong,
                    }
                )
        large = film(Path(folder) / "large.mp4", KINDS["closed GOP"], 1080, 1920, 8 if small else 80)
        peaks = {name: peak(name, large, 6 if small else 77) for name in names}
    result = {"not_usable": missing, "rows": rows, "peak_bytes_of_77_frames_at_1080p": peaks}
    record.write_result(arguments, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
