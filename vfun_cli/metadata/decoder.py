"""The process that decodes whole files for ``--deep``: a line in, a line out, killed from outside when it hangs.

In: ``["path", "visual" | "audio"]``. Out: the number of frames or samples, or ``code|why``.
"""

import json
import sys


def decode_visual(path: str) -> str:
    """Decode every picture, and hold its time against the one that training will ask for."""
    from vfun_cli.metadata.opening import open_media
    from vfun_cli.metadata.probe import probe_visual
    from vfun_cli.metadata.timeline import read_timeline, video_stream
    from vfun_cli.metadata.upright import upright_rgb

    if probe_visual(path).kind == "image":
        upright_rgb(path)
        return "1"
    with open_media(path) as container:
        timeline = read_timeline(container, by_packets=True)
    with open_media(path) as container:
        frames = [(frame.pts, frame.is_corrupt) for frame in container.decode(video_stream(container))]
    if damaged := sum(corrupt for _, corrupt in frames):
        return f"decode-error|{damaged} of {len(frames)} frames are damaged"
    times = {pts for pts, _ in frames if pts is not None}
    if timeline.timed and len(times) >= len(timeline.times) and (odd := times ^ set(timeline.times)):
        first = float(min(odd) * timeline.tick)
        return f"decode-error|at {first:.3f} s its pictures come at other times than the file states"
    return str(min(len(frames), len(timeline.times)))


def decode_audio(path: str) -> str:
    """Decode the whole first audio stream."""
    from vfun_cli.metadata.sounds import open_sound

    with open_sound(path) as container:
        return str(sum(frame.samples for frame in container.decode(audio=0)))


def main() -> None:
    """Answer until the input ends."""
    import av  # noqa: F401 - before the first file's clock starts

    out = sys.stdout
    out.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = sys.stderr  # nothing else may write into the answers
    print(file=out, flush=True)
    for line in sys.stdin:
        path, kind = json.loads(line)
        try:
            answer = decode_visual(path) if kind == "visual" else decode_audio(path)
        except Exception as error:  # decoders raise whatever their C code threw
            said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
            why = said.splitlines()[-1][:200]
            answer = f"decode-error|{why}"
        print(answer, file=out, flush=True)


if __name__ == "__main__":
    main()
