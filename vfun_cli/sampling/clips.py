"""A clip of the dataset as a video to be made: what the model is given of it in training, without the clip itself."""

from fractions import Fraction

from vfun_cli.families.spec import FamilySpec
from vfun_cli.modeling.adapter import SampleRequest, VideoRequest
from vfun_cli.modeling.clips import clip_of, clip_sound, frame_indices
from vfun_cli.modeling.inputs import ClipInput


def pixels_of(spec: FamilySpec, request: SampleRequest) -> ClipInput:
    """The clip itself, [F, 3, H, W]."""
    return clip_of(request, usable_span=spec.plan.usable_span)


def video_of(spec: FamilySpec, request: SampleRequest, *, guidance: float, negative_prompt: str) -> VideoRequest:
    """The request for a video that should look like the clip: of its caption, first frame, control clip and sound.

    A picture is made of the rest alone.
    """
    fields = {field.media: field.name for field in spec.fields}
    control, audio = fields.get("control"), fields.get("audio")
    fps, span = Fraction(*request.fps) / request.stride, spec.plan.usable_span
    controlled, is_video = control is not None and request.record.get(control), request.kind == "video"
    sound = clip_sound(request, audio, frame_indices(request, span)[0]) if audio is not None else None
    return VideoRequest(
        key=request.key,
        prompt=request.caption,
        negative_prompt=negative_prompt,
        frames=request.frames,
        height=request.height,
        width=request.width,
        fps=fps,
        guidance=guidance,
        image=pixels_of(spec, request).take([0]) if is_video else None,
        control=clip_of(request, str(control), span) if controlled else None,
        audio=sound,
        seconds=request.frames / fps if sound is not None else Fraction(0),
    )
