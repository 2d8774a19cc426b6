"""Texts that FFmpeg and Pillow follow to other files and addresses, and all that reads the media of a row."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

from vfun_cli.metadata import decoder
from vfun_cli.metadata.facts import Failure
from vfun_cli.metadata.probe import probe_many
from vfun_cli.modeling.media.frames import read_frames
from vfun_cli.modeling.media.pictures import read_image
from vfun_cli.modeling.media.sound import read_audio

HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:5.0,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{}'\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><image href="{}"/></svg>'
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({}) run showpage\n"
DASH = (
    '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT3S"><Period><AdaptationSet>'
    '<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL><SegmentBase/></Representation></AdaptationSet></Period>'
    "</MPD>"
)
SMOOTH = '<SmoothStreamingMedia MajorVersion="2" Duration="1"><StreamIndex Url="{}"/></SmoothStreamingMedia>'
RTSP = "RTSPtext{}\n"
ASX = '<asx version="3.0"><entry><ref href="{}"/></entry></asx>'
PLAYLISTS: Mapping[str, str] = {
    "hls.m3u8": HLS, "hls.mp4": HLS, "hls.wav": HLS, "list.ffconcat": CONCAT, "list.mp4": CONCAT, "list.wav": CONCAT,
    "list.png": CONCAT, "drawn.png": SVG, "drawn.mp4": SVG, "script.png": POSTSCRIPT, "script.jpg": POSTSCRIPT,
    "dash.mpd": DASH, "dash.mp4": DASH, "smooth.mp4": SMOOTH, "stream.mp4": RTSP, "list.asx": ASX, "list.wmv": ASX,
}  # fmt: skip
"""By the name of the file: its text, with a gap for what it names."""

SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
"""For a port."""

READERS: Mapping[str, Callable[[str], object]] = {
    "deep, picture": decoder.decode_visual,
    "deep, sound": decoder.decode_audio,
    "training, frames": lambda path: read_frames(path, [0, 1], 32, 32),
    "training, sound": lambda path: read_audio(path, Fraction(0), Fraction(1, 2)),
    "training, picture": lambda path: read_image(path, 32, 32),
}


def accepted(path: Path | str) -> list[str]:
    """What takes a file for media: validation, --deep, training."""
    headers = probe_many([(str(path), "visual"), (str(path), "audio")], threads=1)
    found = [f"header, {kind}" for (_, kind), facts in headers.items() if not isinstance(facts, Failure)]
    for name, read in READERS.items():
        try:
            read(str(path))
        except Exception:  # decoders raise many kinds
            continue
        found.append(name)
    return found
