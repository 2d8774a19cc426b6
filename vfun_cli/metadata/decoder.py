"""The process that decodes whole files for ``--deep``: a line in, a line out, killed from outside when it hangs.

In: ``["path", "visual" | "audio"]``. Out: the number of frames or samples, or ``code|why``.
"""

import json
import sys


def decode_visual(path: str) -> str:
    """Decode every frame with PyAV, then open with decord as training does and read the last frame."""
    import av
    import decord

    from vfun_cli.metadata.pictures import PICTURES

    if path.lower().endswith(tuple(PICTURES)):
        from PIL import Image

        with Image.open(path) as image:
            image.load()
        return "1"
    frames, damaged = 0, 0
    with av.open(path) as container:
        for frame in container.decode(video=0):
            frames += 1
            damaged += bool(frame.is_corrupt)
    if damaged:
        return f"decode-error|{damaged} of {frames} frames are damaged"
    reader = decord.VideoReader(path, width=64, height=64, num_threads=1)
    reader[len(reader) - 1]
    return str(min(frames, len(reader)))


def decode_audio(path: str) -> str:
    """Decode the whole first audio stream."""
    import av

    with av.open(path) as container:
        return str(sum(frame.samples for frame in container.decode(audio=0)))


def main() -> None:
    """Answer until the input ends."""
    import av  # noqa: F401 - before the first file's clock starts
    import decord  # noqa: F401

    out = sys.stdout
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
