"""Every kind of problem that validation can report, in one table."""

from dataclasses import dataclass
from typing import Literal

from vfun_cli.errors import ConfigError, did_you_mean

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Code:
    """One kind of problem."""

    name: str
    severity: Severity
    """Only an error keeps a row out of training and makes exit code 3."""
    explanation: str
    example: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding. ``row`` counts from 0 in file order; None means the metadata file as a whole."""

    row: int | None
    code: str
    message: str
    field: str | None = None
    path: str | None = None

    @property
    def severity(self) -> Severity:
        """That of its code."""
        return CODES[self.code].severity


def _code(name: str, severity: Severity, explanation: str, example: str, fix: str) -> Code:
    return Code(name=name, severity=severity, explanation=explanation, example=example, fix=fix)


_DROP = "Replace the file, or leave the row out: vfun validate-meta --fix OUT does that."
_REFILL = "vfun validate-meta --fix OUT writes a copy with the values of the files."

CODES: dict[str, Code] = {
    code.name: code
    for code in (
        # The metadata file as a whole
        _code(
            "unreadable-metadata",
            "error",
            "The metadata file or folder does not exist, is neither, or may not be read.",
            "--train-data-meta datasets/metdata.json, and the file is called metadata.json",
            "Correct the path or the permissions.",
        ),
        _code(
            "unparsable-metadata",
            "error",
            "The metadata is not a JSON list, JSON lines or CSV in UTF-8, or a damaged Parquet file; the message has "
            "the line and column.",
            'a comma after the last record, or the "....." of a published example left in',
            "Correct that line. Every record is an object with file_path, text and type.",
        ),
        _code(
            "empty-metadata",
            "error",
            "The metadata holds no record at all, or the folder no video and no picture.",
            "[], or the folder of a model",
            "Write at least one record, or put clips into the folder: 1.mp4 with its caption in 1.txt (docs/data.md).",
        ),
        _code(
            "foreign-layout",
            "error",
            "The rows are written for another program: under other keys, or in an object around the list.",
            '{"data": [{"video": "train/1.mp4", "caption": "A dog."}]}',
            "Rename the keys that the message names: vfun validate-meta --fix OUT writes the list with them renamed.",
        ),
        _code(
            "malformed-row",
            "error",
            "A row is not a record: not an object in JSON, not as many cells as the header in CSV, bytes in Parquet; "
            "in a folder, the caption or the sidecar of a clip cannot be read.",
            '["train/1.mp4", "A dog."] instead of {"file_path": "train/1.mp4", "text": "A dog."}',
            "Write the row as an object; in CSV put texts with commas in quotes. In a folder, mend the file it names.",
        ),
        _code(
            "orphan-file",
            "warning",
            "In a folder, a caption, sidecar, control clip or sound belongs to no clip, or its clip has one already.",
            "clips/2.txt, and the clip is called clips/02.mp4",
            "Give it the name of its clip, or put it elsewhere (docs/data.md says which names belong together).",
        ),
        _code(
            "shared-name",
            "warning",
            "In a folder, several clips have the same name but for the suffix, and share what lies beside them.",
            "1.mp4 and 1.png with one 1.txt",
            "Rename one of the clips.",
        ),
        _code(
            "nothing-to-train",
            "error",
            "Every good row would be left out of the plan; the rows say why.",
            "a set of 320x192 clips with --video-sample-size 640 alone",
            "Change the settings that the rows' messages name, or use other files.",
        ),
        # What a row says
        _code(
            "missing-field",
            "error",
            "The family needs a field that the row does not have, and that nothing stands in for.",
            "a wan-s2v row without audio_path whose video has no sound either",
            "Add the field (the message names a similar one if the row has it), or use a video with sound.",
        ),
        _code(
            "missing-control",
            "warning",
            "The row has no control clip. It trains with zeros for its latents, as videos are made without one.",
            "a wan-s2v row without control_file_path",
            "Add control_file_path if the clip should be controlled.",
        ),
        _code(
            "missing-type",
            "warning",
            "The row does not say whether it is a video or an image; it is taken from the file.",
            '{"file_path": "train/1.mp4", "text": "A dog."}',
            _REFILL,
        ),
        _code(
            "wrong-type",
            "error",
            "A value has the wrong kind: a path that is no string, a text that is neither one nor a list of them, a "
            "size that is not a positive number.",
            '"width": "640" or "text": null',
            "Correct the value. " + _REFILL,
        ),
        _code(
            "unknown-type",
            "error",
            'The field type is neither "video" nor "image".',
            '"type": "movie"',
            "Write video or image.",
        ),
        _code(
            "unsupported-type",
            "error",
            "The family cannot train on rows of this type.",
            '"type": "image" for wan-s2v, which needs sound',
            "Leave the row out, or train another family on it.",
        ),
        _code(
            "image-as-video",
            "error",
            "The row says video and the file is a single picture.",
            '"file_path": "train/1.jpg", "type": "video"',
            'Write "type": "image". ' + _REFILL,
        ),
        _code(
            "video-as-image",
            "error",
            "The row says image and the file is a video.",
            '"file_path": "train/1.mp4", "type": "image"',
            'Write "type": "video". ' + _REFILL,
        ),
        _code(
            "missing-caption",
            "warning",
            "Rows have no text: they train with an empty caption, or with --caption-prefix alone.",
            '{"file_path": "train/1.mp4", "type": "video"}',
            "Write captions, if the model should learn from them.",
        ),
        _code(
            "empty-caption",
            "warning",
            "The text, or one of its list, is empty or only blanks: the model would learn the clip as unconditional.",
            '"text": ""',
            "Write a caption.",
        ),
        _code(
            "long-caption",
            "warning",
            "Captions have more tokens than the family's text encoder reads (docs/families.md): their end is cut off.",
            "a caption of 400 words for cogvideox-fun, which reads 226 tokens",
            "Shorten them, or put what matters first.",
        ),
        _code(
            "garbled-caption",
            "warning",
            "The text holds characters that only a wrong decoding produces (U+FFFD, control characters).",
            '"text": "A caf\\ufffd."',
            "Write the metadata again in UTF-8.",
        ),
        _code(
            "duplicate-row",
            "warning",
            "Another row has the same files and the same text: the clip counts twice.",
            "two rows with train/1.mp4 and the same caption",
            "Remove one of them.",
        ),
        _code(
            "conflicting-row",
            "note",
            "Another row uses the same video with another text.",
            "train/1.mp4 with a short and with a long caption",
            "Nothing, if that is meant; several captions of one clip may be a list in one row.",
        ),
        _code(
            "invalid-path",
            "error",
            "The path is empty or cannot be a file name on this system.",
            '"file_path": "train/\\u0000.mp4"',
            "Correct the path.",
        ),
        _code(
            "path-outside-root",
            "warning",
            "The path leads out of the data root. It works here, and breaks when the data set moves.",
            '"file_path": "../other/1.mp4" or "/mnt/a/1.mp4"',
            "Move the file under the data root, or choose another --train-data-dir.",
        ),
        # The files
        _code(
            "missing-file",
            "error",
            "There is no file at this path (paths count from the data root).",
            "datasets/train/1.mp4 does not exist",
            "Correct the path, or the data root (--train-data-dir).",
        ),
        _code(
            "not-a-file",
            "error",
            "The path is a directory, a pipe or a device.",
            '"file_path": "train"',
            "Name a file.",
        ),
        _code("unreadable-file", "error", "The file may not be read.", "mode 000", "Correct the permissions."),
        _code(
            "lfs-pointer",
            "error",
            "The file is the few lines that a clone without git-lfs has in the place of the real one.",
            "a data set that was cloned before git lfs install",
            "Run git lfs pull in the repository that the file belongs to.",
        ),
        _code("empty-file", "error", "The file has no bytes.", "an interrupted download", _DROP),
        _code(
            "unreadable-media",
            "error",
            "The file is not media that FFmpeg (pictures: Pillow) understands.",
            "a text file named 1.mp4, or an mp4 whose end is missing",
            _DROP,
        ),
        _code(
            "unsupported-picture",
            "error",
            "The file is a picture of a kind that is not read, or of more than 268 million pixels.",
            "a HEIC photograph, an animated WebP, or a float TIFF, which does not say which value is white",
            "Convert it: magick in.heic out.png; an animation: magick in.webp out.mp4; "
            "floats, stretched from black to white: magick in.tif -auto-level -depth 16 out.png",
        ),
        _code(
            "truncated-media",
            "error",
            "The header promises more bytes than the file has.",
            "an mp4 cut off in the middle of its frames",
            _DROP,
        ),
        _code(
            "no-video-stream",
            "error",
            "A file that should be seen has no picture in it.",
            '"file_path": "wav/1.wav"',
            "Name the video file.",
        ),
        _code(
            "no-audio-stream",
            "error",
            "A file that should be heard has no sound in it.",
            '"audio_path" naming an mp4 without sound',
            "Name a file with sound.",
        ),
        _code(
            "unsupported-codec",
            "error",
            "Nothing here decodes the video: its codec is unknown to this build of FFmpeg, or no picture came out.",
            "a camera's raw format",
            "ffmpeg -i IN -c:v libx264 -crf 12 -c:a copy OUT.mp4",
        ),
        _code("no-frames", "error", "The video has no frames.", "a recording that stopped at once", _DROP),
        _code(
            "unknown-frame-rate",
            "error",
            "The video does not say how fast it runs, or says something impossible.",
            "a raw H.264 stream",
            "Put it into mp4 with a frame rate: ffmpeg -r 25 -i in.h264 -c copy out.mp4",
        ),
        _code(
            "variable-frame-rate",
            "warning",
            "Frames are unevenly spaced. They are read by time at the average rate: speed and lips stay right, and "
            "pictures repeat or are left out.",
            "a phone or screen recording",
            "Nothing; for another rate than the average: ffmpeg -i in.mp4 -fps_mode cfr -r 30 out.mp4",
        ),
        _code(
            "non-square-pixels",
            "warning",
            "The pixels are not square; the model sees the stored picture, squeezed.",
            "720x576 shown as 16:9",
            "ffmpeg -i in.mp4 -vf scale=iw*sar:ih,setsar=1 out.mp4",
        ),
        _code(
            "transparent-picture",
            "note",
            "The picture has an alpha channel. It is laid on white: what is transparent trains as white.",
            "a product cut out and saved as PNG",
            "Nothing, if white is meant. On black: magick in.png -background black -flatten out.png",
        ),
        _code(
            "extreme-aspect",
            "warning",
            "Longer than 4:1: outside the table of training shapes, so most of the picture is cropped away.",
            "a 1920x300 banner",
            "Crop the clip on purpose, or leave it out.",
        ),
        _code(
            "clip-too-short",
            "error",
            "The video has fewer frames than the shortest clip of the settings needs.",
            "20 frames with --video-sample-stride 8 and at least 4 frames a clip: 25 needed",
            "Lower --video-sample-stride, or leave the row out.",
        ),
        _code(
            "too-small",
            "warning",
            "The smallest training size would enlarge the clip by more than 1.25, so the plan leaves it out.",
            "a 320x192 clip with --video-sample-size 640 and no smaller size to fall back on",
            "Lower --video-sample-size (or --image-sample-size), or replace the file by a larger one.",
        ),
        _code(
            "wrong-size",
            "error",
            "The row states a width or height that its file does not have.",
            '"width": 1920 for a 1280x720 file',
            _REFILL,
        ),
        _code(
            "wrong-frames",
            "error",
            "The row states a number of frames that its file does not have.",
            '"frames": 240 for a file with 199',
            _REFILL,
        ),
        _code(
            "wrong-fps",
            "error",
            "The row states a frame rate that its file does not have.",
            '"fps": 30 for a file with 25',
            _REFILL,
        ),
        # Control clips
        _code(
            "control-type",
            "error",
            "The control of a video is a picture, or the control of an image is a video.",
            '"control_file_path": "control/1.jpg" for a video',
            "Name a control file of the row's own type.",
        ),
        _code(
            "control-is-video",
            "warning",
            "The control clip is the video itself: the model would learn to copy.",
            "the same path in file_path and control_file_path",
            "Name the control clip (pose, edges, depth).",
        ),
        _code(
            "control-too-short",
            "error",
            "The control clip has fewer frames than its video; frames are taken at the same numbers from both.",
            "control 120 frames, video 150",
            "Make the control clip again from the whole video.",
        ),
        _code(
            "control-aspect",
            "warning",
            "The control clip has another aspect than its video, so the two are cropped differently.",
            "a 512x512 pose clip for a 1280x720 video",
            "Make the control clip in the video's aspect.",
        ),
        _code(
            "control-frame-rate",
            "warning",
            "The control clip has another frame rate than its video: the same frame number is another moment.",
            "control 30 fps, video 25 fps",
            "Make the control clip at the video's frame rate.",
        ),
        # Sound
        _code(
            "audio-too-short",
            "error",
            "The sound ends before its video does (20 ms are forgiven).",
            "video 4.00 s, audio 3.20 s",
            "Cut both from the same source, or shorten the video.",
        ),
        _code(
            "audio-longer",
            "note",
            "The sound goes on for more than a second after its video; the rest is not used. Check the pair.",
            "video 4 s, audio 60 s",
            "Nothing, if the beginning is what belongs to the video.",
        ),
        _code(
            "audio-offset",
            "warning",
            "The sound starts later than its picture or file; it is aligned by time, and the gap is silence.",
            "an mp4 whose audio track starts 200 ms late",
            "Extract it aligned: ffmpeg -i in.mp4 -af aresample=async=1:first_pts=0 out.wav",
        ),
        _code(
            "silent-audio",
            "warning",
            "Nothing in the file is louder than -60 dB: speech-driven training learns nothing from it.",
            "a muted recording",
            "Replace the audio, or leave the row out.",
        ),
        _code(
            "many-channels",
            "note",
            "The sound has more than two channels. The centre, where films have their speech, counts fully, the front "
            "two half each, the others less, LFE not at all; channels that the file does not name are averaged.",
            "a 5.1 film sound",
            "Nothing, if speech is in front. Otherwise extract it: ffmpeg -i in.mp4 -af pan=mono|c0=FC out.wav",
        ),
        _code(
            "odd-sample-rate",
            "note",
            "An unusual sampling rate, or one below the 16 kHz that the audio encoder hears. It is resampled.",
            "11025 Hz",
            "Nothing; a higher-quality source if there is one.",
        ),
        # Rows of vfun generate
        _code(
            "unusable-setting",
            "error",
            "A row of vfun generate asks for what no video of this model can have: a size off its grid, a length that "
            "it cannot make, a number of steps that is none.",
            '"frames": 50 for wan-fun-control, which makes 49 or 53',
            "Use the value that the message names.",
        ),
        _code(
            "not-taken",
            "error",
            "A row of vfun generate names an input that the model is not given.",
            '"reference": "face.png" for cogvideox-fun',
            "Leave it out, or choose another family.",
        ),
        # Found by decoding everything (--deep)
        _code(
            "decode-error",
            "error",
            "A frame or a piece of sound in the file cannot be decoded.",
            "a damaged download",
            _DROP,
        ),
        _code(
            "decode-timeout",
            "error",
            "Decoding did not end in the time given; the decoder was stopped.",
            "a damaged file on which the decoder waits for ever",
            _DROP + " --deep-timeout gives slow files more time.",
        ),
        _code(
            "decode-crash",
            "error",
            "The decoder died on the file.",
            "a damaged file on which the decoder segfaults",
            _DROP,
        ),
        _code(
            "fewer-frames",
            "error",
            "Fewer frames can be decoded than the file has times for.",
            "header 240 frames, decoded 231",
            _DROP,
        ),
    )
}


def explain(name: str) -> Code:
    """The entry of one code.

    Raises:
        ConfigError: a name that does not exist.
    """
    if name not in CODES:
        raise ConfigError(
            f"there is no problem code {name!r}.{did_you_mean(name, CODES)}",
            hint="All codes: vfun validate-meta --explain all",
        )
    return CODES[name]
