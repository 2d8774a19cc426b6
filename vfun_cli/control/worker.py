"""The process that makes control clips: a line in, a line out, killed from outside when it hangs.

In, once: the settings. Then for each clip ``[source, target, partial, comment]``, absolute. Out: ``{"frame": n}`` while
it works, and at the end ``{"frames": n}``, ``{"broken": why}`` where the file cannot be used, or ``{"failed": ...}``
where nothing more can be made.
"""

import json
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vfun_cli.control.clips import COMMENT
from vfun_cli.control.kinds import KINDS, Settings
from vfun_cli.errors import CheckpointError, MetadataError, VfunError
from vfun_cli.files import PICTURE
from vfun_cli.imports import named

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Draw = Callable[["NDArray[np.uint8]"], "NDArray[np.uint8]"]

BEAT = 1.0
"""Seconds between two words that it still works."""
LARGEST_TERM = 1 << 20
"""Of a frame rate as a fraction; an encoder's clock has no more."""


def make_video(source: Path, partial: Path, comment: str, draw: "Draw", beat: Callable[[int], None]) -> int:
    """A video's control clip: as many frames, of the same size, at the same rate. Returns how many.

    Of a video whose pictures are unevenly apart, frame i shows what training takes for frame i of the video.

    Raises:
        MetadataError: the video cannot be decoded, has no rate, or changes its size.
        OSError: the clip cannot be written.
    """
    import av

    from vfun_cli.metadata.opening import open_media
    from vfun_cli.metadata.timeline import read_timeline
    from vfun_cli.modeling.media.encoder import PLAYED_AT_ONCE, add_video
    from vfun_cli.modeling.media.frames import every_frame

    with open_media(source) as read:
        timeline = read_timeline(read, by_packets=True)
    if not timeline.rate:
        raise MetadataError(f"{source} says no frame rate.", hint="Encode it again.")
    rate, frames = Fraction(timeline.rate).limit_denominator(LARGEST_TERM), 0
    with av.open(str(partial), "w", format="mp4", options=PLAYED_AT_ONCE) as written:
        written.metadata[COMMENT] = comment
        stream: Any = None
        for frame in every_frame(source, timeline):
            if stream is None:
                stream = add_video(written, height=frame.shape[0], width=frame.shape[1], fps=rate)
                stream.codec_context.thread_count = 1  # more of them write other bytes
            if frame.shape[:2] != (stream.height, stream.width):
                raise MetadataError(f"{source} changes its size at frame {frames}.", hint="Encode it again.")
            written.mux(stream.encode(av.VideoFrame.from_ndarray(draw(frame), format="rgb24")))
            frames += 1
            beat(frames)
        written.mux(stream.encode())
    return frames


def make_picture(source: Path, partial: Path, comment: str, draw: "Draw") -> int:
    """A picture's control picture, of its size. Returns 1.

    Raises:
        Exception: of any kind, where the picture cannot be read.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from vfun_cli.metadata.upright import upright_rgb

    said = PngInfo()
    said.add_text(COMMENT, comment)
    Image.fromarray(draw(upright_rgb(source))).save(partial, format="PNG", pnginfo=said)
    return 1


def _made(request: list[str], draw: "Draw", beat: Callable[[int], None]) -> dict[str, Any]:
    source, target, partial, comment = (Path(request[0]), Path(request[1]), Path(request[2]), request[3])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == PICTURE:
            frames = make_picture(source, partial, comment, draw)
        else:
            frames = make_video(source, partial, comment, draw, beat)
        partial.replace(target)
        return {"frames": frames}
    except CheckpointError as error:
        return _failed(error)
    except OSError as error:
        if error.errno is not None and error.filename != str(source):  # of the disk that is written to
            return {"failed": error.strerror or str(error), "errno": error.errno, "path": str(target)}
        return {"broken": str(error)}
    except Exception as error:  # decoders raise whatever their C code threw
        said = getattr(error, "message", None) or str(error).strip() or type(error).__name__
        return {"broken": said.splitlines()[-1][:300]}
    finally:
        partial.unlink(missing_ok=True)


def _failed(error: VfunError) -> dict[str, Any]:
    return {"failed": error.message, "hint": error.hint, "exit_code": error.exit_code}


def main() -> None:
    """Answer until the input ends."""
    out = sys.stdout
    out.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = sys.stderr  # nothing else may write into the answers
    settings = Settings.from_json(json.loads(sys.stdin.readline()))
    try:
        draw: Draw = named(KINDS[settings.kind].drawing)(settings)
    except VfunError as error:
        _say(out, _failed(error))
        return
    _say(out, {"ready": True})
    last = 0.0

    def beat(frame: int) -> None:
        nonlocal last
        if time.monotonic() - last > BEAT:
            last = time.monotonic()
            _say(out, {"frame": frame})

    for line in sys.stdin:
        _say(out, _made(json.loads(line), draw, beat))


def _say(out: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
