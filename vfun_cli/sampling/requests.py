"""A wanted video as the adapters take it: its inputs unread, of its size and at its frame rate."""

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from vfun_cli.families.spec import SamplingInput
from vfun_cli.metadata.facts import AudioFacts, VisualFacts
from vfun_cli.modeling.adapter import VideoRequest
from vfun_cli.modeling.clips import SAMPLE_RATE
from vfun_cli.modeling.inputs import AudioSegment, ClipInput, Decoder, ImageFrame, MediaFile, VideoFrames
from vfun_cli.modeling.randomness import SampleKey
from vfun_cli.sampling.rows import Media, Video

WHITE = 240
"""Of 255, from which on the released scripts take a pixel of a mask for white."""


def request_of(video: Video) -> VideoRequest:
    """Nothing is decoded; the noise is of the video's seed and row."""
    return VideoRequest(
        key=SampleKey(seed=video.seed, epoch=0, row=video.row),
        prompt=video.prompt,
        negative_prompt=video.negative_prompt,
        frames=video.frames,
        height=video.height,
        width=video.width,
        fps=video.fps,
        guidance=video.guidance,
        image=_pixels(video, "image"),
        end_image=_pixels(video, "end_image"),
        reference=_pixels(video, "reference"),
        control=_pixels(video, "control", video.indices),
        edit=_pixels(video, "edit", video.indices),
        edit_mask=_mask(video),
        strength=video.strength,
        start_from_ref=video.start_from_ref,
        audio=_sound(video.media["audio"]) if "audio" in video.media else None,
        seconds=video.seconds,
    )


def _pixels(video: Video, name: SamplingInput, indices: tuple[int, ...] = (0,)) -> ClipInput | None:
    """Frames of a file, by default the first; None where the video has no such file."""
    media = video.media.get(name)
    if media is None:
        return None
    file, size = MediaFile(media.path), (video.height, video.width)
    is_picture = isinstance(media.facts, VisualFacts) and media.facts.kind == "image"
    return ImageFrame(file, size) if is_picture else VideoFrames(file, indices, size)


@dataclass(frozen=True)
class WhiteOf:
    """Where a picture is white, bool [frames, 1, H, W]: the same in every frame."""

    picture: ImageFrame
    frames: int

    def load(self, decoder: Decoder) -> Tensor:
        """See :class:`~vfun_cli.modeling.inputs.LazyInput`."""
        return (self.picture.load(decoder) >= WHITE).all(1, keepdim=True).expand(self.frames, -1, -1, -1)


def _mask(video: Video) -> WhiteOf | None:
    mask = video.media.get("edit_mask")
    return (
        None if mask is None else WhiteOf(ImageFrame(MediaFile(mask.path), (video.height, video.width)), video.frames)
    )


def _sound(media: Media) -> AudioSegment:
    """All of it, from the first picture on where the file has pictures."""
    assert isinstance(media.facts, AudioFacts)
    end = media.facts.end
    return AudioSegment(MediaFile(media.path), Fraction(0), end, SAMPLE_RATE, round(end * SAMPLE_RATE))
