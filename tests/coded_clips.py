"""Real videos whose every picture carries its own number: container x codec x GOP x B-frames x edit list x rotation x
bit depth x spacing x start offset. Shared by the tests and by ``benchmarks/frame_matrix.py``.
"""

import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from vfun_cli.encoding.encode import load
from vfun_cli.families.cogvideox_fun.adapter import CogVideoXFunAdapter
from vfun_cli.metadata.facts import VisualFacts
from vfun_cli.metadata.probe import probe_many
from vfun_cli.modeling.adapter import AdapterOptions, SampleRequest
from vfun_cli.modeling.clips import frame_indices
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.run.rundir import RunDir
from vfun_cli.training.data.loader import LoadedBatch, MicroBatch
from vfun_cli.training.sanity_check import write_first_batch

BITS = 8
KEY_EVERY = 12
"""Pictures from one key frame to the next."""
HEIGHT, WIDTH = 64, 128
X264 = {"preset": "ultrafast", "threads": "1", "crf": "20", "sc_threshold": "0"}
OPEN_264 = {**X264, "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:b-pyramid=normal"}
CLOSED_264 = {**X264, "g": "12", "bf": "2", "b_strategy": "0"}
INTRA_264 = {**X264, "g": "1"}
REFRESH_264 = {**X264, "x264-params": "intra-refresh=1:keyint=12:bframes=0"}
X265 = "log-level=none:pools=none:frame-threads=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
OPEN_265 = {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=1"}
CLOSED_265 = {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=0"}
AV1 = {"preset": "10", "svtav1-params": "lp=1:keyint=12", "crf": "8"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "12", "auto-alt-ref": "1", "lag-in-frames": "10", "crf": "20"}
VP8 = {"deadline": "realtime", "cpu-used": "8", "g": "24", "crf": "10", "b": "1M"}
MPEG = {"g": "12", "bf": "2", "qscale": "2", "threads": "1"}


def even(index: int) -> Fraction:
    """Pictures as far apart as the rate says, in units of it."""
    return Fraction(index)


def phone(index: int) -> Fraction:
    """A phone's film: every fifth picture is late, and a second is missing in the middle."""
    return Fraction(index) + (Fraction(2, 5) if index % 5 == 4 else 0) + (25 if index >= 30 else 0)


def screen(index: int) -> Fraction:
    """A screen recording: a picture only where something moved."""
    return Fraction(index + 3 * (index // 4) + 6 * (index // 11))


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One video of the matrix."""

    name: str
    """File name; its suffix is the container's."""
    codec: str
    options: dict[str, str] = field(default_factory=dict)
    """Of the encoder."""
    container: str | None = None
    """FFmpeg's name of the muxer where the suffix does not say it."""
    muxer: dict[str, str] = field(default_factory=dict)
    pixels: str = "yuv420p"
    fps: Fraction = Fraction(25)
    frames: int = 48
    spacing: Callable[[int], Fraction] = even
    hidden: int = 0
    """Pictures at the start that an edit list hides (a trim without encoding)."""
    lead: bool = False
    """Cut at the second key frame, so that the pictures in front of it refer to what is gone."""
    late: int = 0
    """Pictures' times by which the film starts late."""
    rotation: int = 0
    """Degrees clockwise that a player turns it."""


def _264(name: str, options: dict[str, str] = CLOSED_264, **more: Any) -> Coded:
    return Coded(name=name, codec="libx264", options=options, **more)


def _265(name: str, options: dict[str, str] = OPEN_265, **more: Any) -> Coded:
    return Coded(name=name, codec="libx265", options=options, **more)


def _mpeg(name: str, codec: str, **more: Any) -> Coded:
    return Coded(name=name, codec=codec, options=more.pop("options", MPEG), **more)


NTSC, FILM = Fraction(30000, 1001), Fraction(24000, 1001)
M2TS = {"mpegts_m2ts_mode": "1"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
MATRIX: tuple[Coded, ...] = (
    # H.264
    _264("closed.mp4"),
    _264("open.mp4", OPEN_264),
    _264("intra.mp4", INTRA_264),
    _264("refresh.mp4", REFRESH_264),
    _264("ntsc.mp4", fps=NTSC),
    _264("film.mov", fps=FILM),
    _264("open.mov", OPEN_264),
    _264("ten-bit.mp4", pixels="yuv420p10le"),
    _264("four-four-four.mp4", pixels="yuv444p"),
    _264("trim.mp4", hidden=7),
    _264("trim-open.mp4", OPEN_264, hidden=17),
    _264("trim.mov", hidden=20),
    _264("late.mp4", late=9),
    _264("late-open.mov", OPEN_264, late=5),
    _264("turned90.mp4", rotation=90),
    _264("turned180.mp4", rotation=180),
    _264("turned270-open.mov", OPEN_264, rotation=270),
    _264("turned90-trim.mp4", rotation=90, hidden=7),
    _264("phone.mp4", spacing=phone),
    _264("phone-open.mp4", OPEN_264, spacing=phone),
    _264("screen.mp4", spacing=screen),
    _264("fragments.mp4", muxer=FRAGMENTS),
    _264("fragments-open.mp4", OPEN_264, muxer=FRAGMENTS),
    _264("cut-open.mp4", OPEN_264, lead=True),
    _264("cut-plain.mp4", OPEN_264, lead=True, muxer={"use_editlist": "0"}),
    _264("closed.mkv"),
    _264("open.mkv", OPEN_264),
    _264("ntsc.mkv", fps=NTSC),
    _264("late.mkv", late=9),
    _264("phone.mkv", spacing=phone),
    _264("cut-open.mkv", OPEN_264, lead=True),
    _264("turned.mkv", rotation=90),
    _264("closed.avi"),
    _264("open.avi", OPEN_264),
    _264("closed.ts"),
    _264("open.ts", OPEN_264),
    _264("late.ts", late=9),
    _264("cut-open.ts", OPEN_264, lead=True),
    _264("phone.ts", spacing=phone),
    _264("open.m2ts", OPEN_264, container="mpegts", muxer=M2TS),
    _264("closed.flv"),
    _264("ntsc.flv", fps=NTSC),
    _264("open.flv", OPEN_264),
    # HEVC
    _265("open-hevc.mp4"),
    _265("closed-hevc.mov", CLOSED_265),
    _265("ten-bit-hevc.mp4", pixels="yuv420p10le"),
    _265("trim-hevc.mp4", hidden=17),
    _265("turned-hevc.mov", rotation=90),
    _265("late-hevc.mp4", late=3),
    _265("phone-hevc.mp4", spacing=phone),
    _265("cut-hevc.mp4", lead=True),
    _265("open-hevc.mkv"),
    _265("cut-hevc.mkv", lead=True),
    _265("cut-plain-hevc.mov", lead=True, muxer={"use_editlist": "0"}),
    _265("open-hevc.ts"),
    _265("cut-hevc.ts", lead=True),
    # AV1, VP9
    Coded(name="av1.mp4", codec="libsvtav1", options=AV1),
    Coded(name="ten-bit-av1.mkv", codec="libsvtav1", options=AV1, pixels="yuv420p10le"),
    Coded(name="trim-av1.mp4", codec="libsvtav1", options=AV1, hidden=7),
    Coded(name="av1.webm", codec="libsvtav1", options=AV1),
    Coded(name="vp9.webm", codec="libvpx-vp9", options=VP9),
    Coded(name="vp9.mp4", codec="libvpx-vp9", options=VP9),
    Coded(name="phone-vp9.webm", codec="libvpx-vp9", options=VP9, spacing=phone),
    Coded(name="vp8.webm", codec="libvpx", options=VP8),
    Coded(name="ntsc-vp8.mkv", codec="libvpx", options=VP8, fps=NTSC),
    # MPEG-1, -2, -4, Windows Media
    _mpeg("mpeg1.mpg", "mpeg1video", container="mpeg"),
    _mpeg("mpeg2.mpg", "mpeg2video", container="vob"),
    _mpeg("mpeg2.vob", "mpeg2video", fps=NTSC),
    _mpeg("mpeg2.ts", "mpeg2video"),
    _mpeg("mpeg2.mp4", "mpeg2video"),
    _mpeg("mpeg2.mkv", "mpeg2video"),
    _mpeg("mpeg2.mxf", "mpeg2video"),
    _mpeg("mpeg4.avi", "mpeg4"),
    _mpeg("mpeg4.mp4", "mpeg4"),
    _mpeg("mpeg4-simple.avi", "mpeg4", options={**MPEG, "bf": "0"}),
    _mpeg("mpeg4-gaps.avi", "mpeg4", options={**MPEG, "bf": "0"}, spacing=screen),
    _mpeg("msmpeg4.avi", "msmpeg4", options={**MPEG, "bf": "0"}),
    _mpeg("wmv2.wmv", "wmv2", options={**MPEG, "bf": "0"}),
    _mpeg("wmv2-ntsc.asf", "wmv2", options={**MPEG, "bf": "0"}, fps=NTSC),
    _264("h264.asf"),
    _mpeg("flv1.flv", "flv", options={**MPEG, "bf": "0"}),
    # One picture after another
    Coded(name="motion.avi", codec="mjpeg", options={"qscale": "2"}, pixels="yuvj420p"),
    Coded(name="motion.mov", codec="mjpeg", options={"qscale": "2"}, pixels="yuvj420p"),
    Coded(name="prores.mov", codec="prores_ks", pixels="yuv422p10le"),
    Coded(name="trim-prores.mov", codec="prores_ks", pixels="yuv422p10le", hidden=7),
    Coded(name="ffv1.mkv", codec="ffv1", pixels="yuv420p"),
    Coded(name="animation.gif", codec="gif", pixels="rgb8"),
    Coded(name="animation.apng", codec="apng", pixels="rgb24"),
    Coded(name="animation.png", codec="apng", pixels="rgb24", container="apng"),
)  # fmt: skip


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Eight bars from left to right, the highest bit first: white is 1; [height, width, 3]."""
    bars = np.array([235 if number >> bit & 1 else 20 for bit in reversed(range(BITS))], np.uint8)
    row = bars[np.arange(width) * BITS // width]
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (height, width, 3)))


def numbers(pixels: NDArray[Any], middle: float = 127) -> list[int]:
    """The numbers that pictures carry, whatever their size: [F, h, w, 3]; ``middle`` lies between black and white."""
    width = pixels.shape[2]
    centres = [(2 * bar + 1) * width // (2 * BITS) for bar in range(BITS)]
    quarter = max(1, width // (4 * BITS))
    found = []
    for shown in pixels:
        bars = [shown[:, centre - quarter : centre + quarter].mean() > middle for centre in centres]
        found.append(sum(int(bit) << place for place, bit in enumerate(reversed(bars))))
    return found


def encode(clip: Coded, folder: Path) -> Path:
    """Write one video of the matrix; returns its path."""
    path = folder / clip.name
    whole = path.with_name(f"whole-{path.name}") if clip.hidden or clip.lead else path
    with av.open(str(whole), "w", format=clip.container, options=clip.muxer) as container:
        stream = container.add_stream(clip.codec, rate=clip.fps)
        stored = [np.rot90(picture(number), clip.rotation // 90) for number in range(clip.frames)]
        (stream.height, stream.width), stream.pix_fmt = stored[0].shape[:2], clip.pixels
        stream.options = dict(clip.options)
        if clip.rotation and path.suffix == ".mkv":
            stream.set_display_rotation(-clip.rotation)
        unit = 1 / clip.fps
        if clip.spacing is not even:
            unit = Fraction(1, 1000) if path.suffix in (".mkv", ".webm") else unit / 10
            stream.codec_context.time_base = unit
        for number, shown in enumerate(stored):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")
            frame.pts = round((clip.spacing(number) + clip.late) / clip.fps / unit)
            frame.time_base = unit
            container.mux(_timed(stream.encode(frame), clip))
        container.mux(_timed(stream.encode(), clip))
    if whole is not path:
        _cut(whole, path, clip)
        whole.unlink()
    if clip.rotation and path.suffix != ".mkv":
        turn(path, clip.rotation)
    return path


def _timed(packets: list[av.Packet], clip: Coded) -> list[av.Packet]:
    """x265 leaves the times of decoding of two pictures, which are never reordered, to what its memory held before."""
    for packet in packets:
        if clip.frames <= 2:
            packet.dts = packet.pts
    return packets


def true_numbers(clip: Coded) -> list[int]:
    """The numbers of the pictures that a player shows; a cut without an edit list begins at the second key frame."""
    return list(range(KEY_EVERY if clip.lead else clip.hidden, clip.frames))


def _cut(source: Path, path: Path, clip: Coded) -> None:
    """Copy packets: hide the first pictures behind an edit list, or begin at the second key frame."""
    with av.open(str(source)) as read, av.open(str(path), "w", format=clip.container, options=clip.muxer) as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream, opaque=True)
        packets = [packet for packet in read.demux(stream) if packet.size]
        shift = min(packet.pts for packet in packets)
        if clip.lead:
            second = [place for place, packet in enumerate(packets) if packet.is_keyframe][1]
            packets = packets[second:]
            shift = packets[0].dts  # leading pictures keep a time of their own
        else:
            shift += round(clip.hidden / clip.fps / stream.time_base)
        for packet in packets:
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = copy
            written.mux(packet)


def turn(path: Path, degrees: int) -> None:
    """Ask players to show an mp4 turned clockwise, as phones do: the matrix of its track (ISO/IEC 14496-12, 8.3.2)."""
    one = 1 << 16
    across, turn = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    content = bytearray(path.read_bytes())
    matrix = content.find(b"tkhd") + 44
    values = (across, turn, 0, -turn, across, 0, 0, 0, 1 << 30)
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(bytes(content))


def sequential(path: Path) -> list[tuple[Fraction | None, int]]:
    """(time, number) of every picture that decoding from the start shows, upright."""
    with av.open(str(path)) as container:
        found = []
        for frame in container.decode(video=0):
            shown = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            found.append((frame.time, numbers(shown[None])[0]))
    return found


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one draw of a clip holds in ``sanity_check/`` of a run, and what it should."""

    start: int
    stride: int
    expected: list[int]
    found: list[int]


def validated(path: Path) -> VisualFacts:
    """What validation and plan know of a video."""
    facts = probe_many([(str(path), "visual")])[str(path), "visual"]
    assert isinstance(facts, VisualFacts), facts
    return facts


def shown(path: Path, rate: Fraction, *, variable: bool) -> list[int]:
    """The number of each frame of a video by sequential decoding; of an uneven one as the ``fps`` filter has it."""
    pictures = sequential(path)
    if not variable:
        return [number for _, number in pictures]
    times = [time for time, _ in pictures if time is not None]
    middles = [times[0] + (index + 0.5) / rate for index in range(len(pictures))]
    return [pictures[sum(time < middle for time in times) - 1][1] for middle in middles]


def held_after_training(path: Path, facts: VisualFacts, folder: Path, draws: int) -> list[Held]:
    """Random clips of a video on the way of a run: request, adapter, loader, ``sanity_check/``."""
    frames = shown(path, facts.fps, variable=facts.variable)
    rng = np.random.default_rng(len(path.name))
    found = []
    for draw in range(draws):
        stride = int(rng.integers(1, 6))
        count = int(rng.integers(1, (facts.frames - 1) // stride + 2))
        request = SampleRequest(
            key=SampleKey(seed=0, epoch=0, row=draw), record={"file_path": str(path), "text": ""}, kind="video",
            frames=count, height=HEIGHT, width=WIDTH, stride=stride, total_frames=facts.frames,
            fps=facts.fps.as_integer_ratio(),
        )  # fmt: skip
        options = AdapterOptions(
            model_dir=Path(), compute_dtype=torch.float32, device=torch.device("cpu"), train_mode="normal"
        )
        sample = load(CogVideoXFunAdapter, request, options)
        batch = MicroBatch(epoch=0, step=0, index=0, requests=(request,))
        write_first_batch(RunDir(folder), LoadedBatch(batch=batch, samples=[sample]))
        (film,) = [file for file in (folder / "sanity_check").iterdir() if file.suffix in (".mp4", ".png")]
        indices = frame_indices(request)
        expected = [frames[index] for index in indices]
        held = [number for _, number in sequential(film)]
        found.append(Held(start=indices[0], stride=stride, expected=expected, found=held))
        shutil.rmtree(folder / "sanity_check")
    return found


def show_parts(path: Path, parts: list[tuple[int, int]]) -> None:
    """Give an mp4 an edit list (ISO/IEC 14496-12, 8.6.6) of (milliseconds, first tick of the track)."""
    content = bytearray(path.read_bytes())
    at = content.find(b"elst") - 4
    length = int.from_bytes(content[at : at + 4], "big")
    payload = struct.pack(">II", 0, len(parts)) + b"".join(struct.pack(">IiI", *part, 1 << 16) for part in parts)
    content[at : at + length] = struct.pack(">I4s", 8 + len(payload), b"elst") + payload
    for name in (b"edts", b"trak", b"moov"):  # behind the pictures, which therefore stay where they are
        place = content.find(name) - 4
        grown = int.from_bytes(content[place : place + 4], "big") + 8 + len(payload) - length
        content[place : place + 4] = grown.to_bytes(4, "big")
    path.write_bytes(bytes(content))
