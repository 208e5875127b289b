"""Videos: which frames are taken, what is refused, and that their frames' K/V are those of the same images."""

import hashlib
import io
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from models import GENERATED, VISION, llama, masked_eager, picture, pictures, stock_of, voco_llava
from PIL import Image
from test_two_stages import assert_equal_to_single_pass, embeddings, stored_alone
from voco_llama import stages
from voco_llama.processing import open_image
from voco_llama.video import VideoFrames, frames_of

import voco_kernels as vk
from voco_kernels import Text, VocoKV, VocoLayout

av = pytest.importorskip("av")

# Frame i of a test video is of grey level STEP * i, which every codec keeps to less than half a step.
STEP = 6
CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mjpeg", ".gif": "gif"}
PIXELS = {"mjpeg": "yuvj420p", "gif": "gray"}
MILLISECONDS = Fraction(1, 1000)
# Of a frame's segment: BOS, its vision tokens, and the newline, which is two tokens to this tokenizer.
PRIVATE = 1 + VISION + 2


def grey(index: int, size=(64, 48)) -> np.ndarray:
    """A frame with a few pixels of noise, so that videos have some bytes to lose."""
    frame = np.full((size[1], size[0], 3), STEP * index, dtype=np.uint8)
    frame[: size[1] // 3] = np.random.default_rng(index).integers(0, 256, (size[1] // 3, size[0], 3))
    return frame


def index_of(image: Image.Image) -> int:
    return round(float(np.asarray(image)[-10:].mean()) / STEP)


def write(path: Path, frames=40, *, rate=10, ticks=None, codec=None, **options) -> Path:
    """A video of frames (a number of grey ones, or arrays); timestamps in ms where `ticks` are given, else at a rate."""
    frames = [grey(i) for i in range(frames)] if isinstance(frames, int) else frames
    codec = codec or CODECS[path.suffix]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate if ticks is None else 1000)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        if ticks is not None:
            stream.codec_context.time_base = MILLISECONDS
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[i], MILLISECONDS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def indices(path: Path, **which) -> list[int]:
    frames = frames_of(path, **which)
    found = [index_of(image) for image in frames]
    assert len(found) == len(frames)
    return found


# ---- which frames ------------------------------------------------------------------------------------------------------


def shown_at(times, timestamps) -> list[int]:
    """By the rule itself: the last frame at or before each time."""
    return [max(i for i, timestamp in enumerate(timestamps) if timestamp <= time) for time in times]


def every(fps, end) -> list[Fraction]:
    fps, times = Fraction(str(fps)), []
    while len(times) / fps < end:
        times.append(len(times) / fps)
    return times


CONSTANT = [Fraction(i, 10) for i in range(40)]


@pytest.fixture(scope="module", params=[".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"])
def constant(request, tmp_path_factory):
    """40 frames, 10 a second."""
    return write(tmp_path_factory.mktemp("constant") / f"clip{request.param}")


def test_frames_by_rate(constant):
    for fps in (0.3, 1, 3, 4.5, 7, 10, 16, 25, np.float32(2.5), Fraction(30000, 1001)):
        assert indices(constant, fps=fps) == shown_at(every(fps, 4), CONSTANT), fps


def test_frames_by_number(constant):
    for count in (1, 2, 3, 7, 39, 40, 55):
        times = [Fraction(2 * k + 1, 2 * count) * 4 for k in range(count)]
        assert indices(constant, num_frames=count) == shown_at(times, CONSTANT), count


VARIABLE = {
    "pauses": [0, 100, 150, 900, 2500, 2600, 2700, 4100],
    "a burst": [0, 1000, 1010, 1020, 1030, 1999, 2000, 2001, 3000],
    "begins late": [5000, 5200, 5999, 6000, 7000, 7250],
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("ticks", VARIABLE.values(), ids=VARIABLE)
def test_frames_of_a_variable_rate(tmp_path, suffix, ticks):
    path = write(tmp_path / f"clip{suffix}", len(ticks), ticks=ticks)
    timestamps = [Fraction(t - ticks[0], 1000) for t in ticks]
    for fps in (0.5, 1, 2, 10):
        # The last frame lasts a tick.
        assert indices(path, fps=fps) == shown_at(every(fps, timestamps[-1] + Fraction(1, 2000)), timestamps)
    assert indices(path, num_frames=2) == shown_at([timestamps[-1] / 4, timestamps[-1] * 3 / 4], timestamps)


def test_the_last_frame_counts_for_as_long_as_it_lasts(tmp_path):
    """Slides: the last one stands for three seconds, which only its packet says."""
    path = write(tmp_path / "clip.mp4", 2, rate=Fraction(1, 3))
    assert indices(path) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("rate", [30, 24, 60, Fraction(30000, 1001)])
def test_rounded_timestamps_lose_no_frame(tmp_path, rate):
    """Matroska rounds 66.67 ms to 67 ms, which is still the frame of the second multiple of 1/30 s."""
    path = write(tmp_path / "clip.mkv", rate=rate)
    assert indices(path, fps=rate) == list(range(40))


def test_one_frame_a_second_by_default(constant):
    assert indices(constant) == [0, 10, 20, 30]


def test_video_frames_can_be_walked_again(constant):
    frames = frames_of(constant, num_frames=3)
    assert isinstance(frames, VideoFrames) and frames_of(frames) is frames
    assert [index_of(x) for x in frames] == [index_of(x) for x in frames] == [6, 20, 33]
    assert all(image.mode == "RGB" and image.size == (64, 48) for image in frames)


def test_frames_that_an_edit_list_cuts_away(tmp_path):
    """As telephones do where a recording is trimmed: the first second is in the file, but no part of the video."""
    path = write(tmp_path / "clip.mp4")
    before, name, after = path.read_bytes().partition(b"elst")
    header, duration, begin, rest = after[:8], *struct.unpack(">Ii", after[8:16]), after[16:]
    assert duration == 4000
    path.write_bytes(before + name + header + struct.pack(">Ii", 3000, begin + 10240) + rest)
    assert indices(path, fps=10) == list(range(10, 40))
    assert indices(path, num_frames=3) == [15, 25, 35]


def test_a_still_picture_and_a_single_frame(tmp_path):
    picture(0).save(tmp_path / "still.gif")
    assert len(list(frames_of(tmp_path / "still.gif"))) == 1
    assert indices(write(tmp_path / "one.mp4", 1), fps=1) == [0]


def test_frames_may_change_their_size(tmp_path):
    sizes = [(64, 48), (64, 48), (32, 96), (120, 20)]
    path = tmp_path / "clip.mjpeg"
    with path.open("wb") as file:
        for i, size in enumerate(sizes):
            data = io.BytesIO()
            Image.fromarray(grey(i, size)).save(data, "JPEG", quality=95)
            file.write(data.getvalue())
    assert [image.size for image in frames_of(path, num_frames=4)] == sizes
    model = voco_llava()
    assert model.compress_video(path, num_frames=4).segments == [(PRIVATE, 2)] * 4


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_frames_are_turned_upright(tmp_path, turn):
    """The file's matrix says by how much, as a telephone writes it; its first row is (cos, sin)."""
    upright = np.zeros((48, 64, 3), dtype=np.uint8)
    upright[:16, :16] = 255
    path = write(tmp_path / "clip.mp4", [np.ascontiguousarray(np.rot90(upright, turn // 90))] * 3)
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    matrix = struct.pack(">9i", *(x << 16 for x in (cos, sin, 0, -sin, cos, 0, 0, 0)), 1 << 30)
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    before, header, after = path.read_bytes().partition(b"tkhd")
    path.write_bytes(before + header + after.replace(straight, matrix, 1))
    (image,) = frames_of(path)
    assert np.abs(np.asarray(image).astype(int) - upright).mean() < 8


def test_frames_at_hand(tmp_path):
    images = pictures(5)
    arrays = np.stack([np.asarray(image) for image in images])
    for frames in (images, tuple(images), arrays):
        assert frames_of(frames) is frames
        taken = frames_of(frames, num_frames=2)
        assert [np.array_equal(x, arrays[i]) for x, i in zip(taken, (1, 3), strict=True)] == [True, True]
    assert len(frames_of(images, num_frames=7)) == 7
    lazy = iter(images)
    assert frames_of(lazy) is lazy


# ---- what is refused ---------------------------------------------------------------------------------------------------


def read_all(path: Path) -> int:
    return len(list(frames_of(path, fps=10)))


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"video .*nowhere.mp4 does not exist"):
        frames_of(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="video .* is not a video file that can be read: Is a directory"):
        frames_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"this is no video, only its name says so\n" * 100])
def test_what_is_no_video(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"video .*clip.mp4 is not a video file that can be read"):
        frames_of(path)


@pytest.mark.parametrize("album", [False, True], ids=["sound", "sound and the album's picture"])
def test_sound_alone(tmp_path, album):
    path = tmp_path / "clip.mp3"
    with av.open(str(path), "w", options={"id3v2_version": "0", "write_xing": "0"}) as container:
        stream = container.add_stream("mp3", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if album:
        jpeg = io.BytesIO()
        picture(0).save(jpeg, "JPEG")
        content = b"\0image/jpeg\0\3\0" + jpeg.getvalue()
        frame = b"APIC" + struct.pack(">IH", len(content), 0) + content
        size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\3\0\0" + size + frame + path.read_bytes())
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 1
    with pytest.raises(ValueError, match="video .* must hold a video stream, but holds none"):
        frames_of(path)


def test_frames_without_timestamps(tmp_path):
    with pytest.raises(ValueError, match="video .* must hold frames with timestamps"):
        frames_of(write(tmp_path / "clip.h264", codec="libx264"))


def cut(path: Path, part: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


@pytest.mark.parametrize("part", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi", ".gif"])
def test_files_that_are_cut_off(tmp_path, suffix, part):
    path = cut(write(tmp_path / f"clip{suffix}"), part)
    with pytest.raises(ValueError, match=r"video .* must be whole, but is damaged or cut off at second [0-3]\.\d\d"):
        read_all(path)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".avi"])
def test_a_file_without_its_end_is_refused_or_whole(tmp_path, suffix):
    """What a table at the end has lost tells on it in many ways; but some files end with tags that nobody misses."""
    data = write(tmp_path / f"clip{suffix}").read_bytes()
    path, refused = tmp_path / f"cut{suffix}", 0
    for lost in range(1, 1000, 37):
        path.write_bytes(data[:-lost])
        try:
            found = indices(path, fps=10)
        except ValueError as error:
            assert str(error).startswith(f"video {path} ")
            refused += 1
        else:
            assert found == list(range(40)), lost
    assert refused > 5


@pytest.mark.parametrize("part", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}], ids=str)
def test_mp4_files_that_are_cut_off(tmp_path, options, part):
    """With its table of contents at the end, nothing of a cut file can be read; else what is left seems to be a video."""
    path = cut(write(tmp_path / "clip.mp4", **options), part)
    said = r"must be whole, but is damaged or cut off at second [0-3]\.\d\d" if options else "is not a video file"
    with pytest.raises(ValueError, match=f"video .* {said}"):
        read_all(path)


def test_a_pause_is_not_taken_for_a_cut(tmp_path):
    """Matroska says how long the whole is, and no packet says that the last slide stands for seconds."""
    path = write(tmp_path / "clip.mkv", 3, ticks=[0, 3000, 6000])
    data = path.read_bytes()
    declared = struct.pack(">d", 6001)
    assert data.count(declared) == 1
    for seconds, whole in ((8.5, True), (9.5, False)):
        path.write_bytes(data.replace(declared, struct.pack(">d", 1000 * seconds)))
        if whole:
            assert indices(path) == [0, 0, 0, 1, 1, 1, 2]
        else:
            with pytest.raises(ValueError, match=r"cut off at second 6\.00"):
                frames_of(path)


def test_damage_in_the_middle_names_the_second(tmp_path):
    """Frames before it can be had; then there is an error, not an end."""
    path = write(tmp_path / "clip.avi")
    data = bytearray(path.read_bytes())
    jpegs = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    data[jpegs[25] : jpegs[25] + 800] = bytes(800)
    path.write_bytes(data)
    frames = iter(frames_of(path, fps=10))
    assert [index_of(next(frames)) for _ in range(24)] == list(range(24))
    with pytest.raises(ValueError, match=r"video .* is damaged or cut off at second 2\.40"):
        list(frames)
    with pytest.raises(ValueError, match=r"second 2\.40"):
        voco_llava().compress_video(path, fps=10)


@pytest.mark.parametrize("part", [0, 0.5], ids=["from its beginning", "from its middle"])
@pytest.mark.parametrize("packet", [20, 39])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_damaged_packet_names_its_second(tmp_path, codec, packet, part):
    """Whether its frame is lost or only wrong, and at the end, too, where no later frame tells."""
    path = write(tmp_path / "clip.mp4", codec=codec)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, float(p.pts * p.time_base)) for p in container.demux(video=0) if p.size]
    begin, size, second = packets[packet]
    data = bytearray(path.read_bytes())
    damaged = range(begin + int(part * size), begin + size)
    data[damaged.start : damaged.stop] = bytes(i * 73 % 251 for i in damaged)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"video .* is damaged or cut off at second") as error:
        read_all(path)
    # The decoder has a few frames in hand.
    assert abs(float(str(error.value).split()[-1]) - second) < 0.5


BAD_CHOICES = {
    "fps zero": ({"fps": 0}, "fps must be a positive number, but was 0"),
    "fps negative": ({"fps": -1.5}, "fps must be a positive number, but was -1.5"),
    "fps not finite": ({"fps": float("nan")}, "fps must be a positive number, but was nan"),
    "fps infinite": ({"fps": float("inf")}, "fps must be a positive number, but was inf"),
    "fps a word": ({"fps": "1"}, "fps must be a positive number, but was '1'"),
    "count zero": ({"num_frames": 0}, "num_frames must be a positive integer, but was 0"),
    "count negative": ({"num_frames": -3}, "num_frames must be a positive integer, but was -3"),
    "count broken": ({"num_frames": 2.5}, "num_frames must be a positive integer, but was 2.5"),
    "both": ({"num_frames": 2, "fps": 1}, "num_frames must be None where fps is given, but was 2"),
}


@pytest.mark.parametrize(("which", "said"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_bad_choices(which, said):
    for source in ("nowhere.mp4", pictures(2)):
        with pytest.raises(ValueError, match=said):
            frames_of(source, **which)


def test_bad_frames_at_hand():
    with pytest.raises(ValueError, match="fps must be None for frames without timestamps, but was 2"):
        frames_of(pictures(2), fps=2)
    for frames in (iter(pictures(2)), []):
        with pytest.raises(ValueError, match="num_frames must be None for frames that are no sequence or an empty one"):
            frames_of(frames, num_frames=2)
    with pytest.raises(ValueError, match="video must be a path or an iterable of frames, but was Image"):
        frames_of(picture(0))
    with pytest.raises(ValueError, match=r"video must be frames \[T, H, W, 3\] where it is an array, but was of shape"):
        frames_of(np.asarray(picture(0)))


def test_without_the_decoder(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'voco-kernels\[video\]'"):
        frames_of(path)


# ---- compressed videos -------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return voco_llava()


def assert_same(got: VocoKV, expected: VocoKV) -> None:
    """Another size of batch rounds otherwise."""
    assert got.segments == expected.segments
    for x, y in ((got.k, expected.k), (got.v, expected.v)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_video_is_compressed_as_its_frames_are(model, tmp_path):
    path = write(tmp_path / "clip.mp4")
    expected = model.compress(list(frames_of(path, fps=2)), 3)
    seen = []
    kv = model.compress_video(path, 3, fps=2, batch_size=3, progress=lambda *x: seen.append(x))
    assert seen == [(3, 8), (6, 8), (8, 8)]
    assert kv.segments == [(PRIVATE, 3)] * 8
    assert_same(kv, VocoKV.cat(expected))
    assert not torch.allclose(kv.k[:, :3], kv.k[:, 3:6], atol=0.1)
    # What is the same for all frames is still known of them together.
    assert kv.meta == {name: expected[0].meta[name] for name in ("model", "processor", "prompt")}


def test_frames_of_every_kind_compress_alike(model, tmp_path):
    images = pictures(4)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    expected = VocoKV.cat(model.compress(images))
    totals = []
    for frames in (
        images,
        (image for image in images),
        np.stack([np.asarray(image) for image in images]),
        [tmp_path / f"{i}.png" for i in range(4)],
    ):
        assert_same(model.compress_video(frames, batch_size=3, progress=lambda _, n: totals.append(n)), expected)
    assert totals == [4, 4, None, None, 4, 4, 4, 4]


def test_a_saved_video_comes_back(model, tmp_path):
    kv = model.compress_video(pictures(5))
    kv.save(tmp_path / "clip.safetensors")
    loaded = VocoKV.load(tmp_path / "clip.safetensors")
    assert loaded.segments == kv.segments and loaded.meta == kv.meta
    assert model.ask("how many?", voco_kv=loaded, **GENERATED) == model.ask("how many?", voco_kv=[kv], **GENERATED)


@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_a_video_gives_the_logits_of_one_masked_pass(positions):
    model = voco_llava(positions=positions)
    images = pictures(6)
    # A video of four frames between two images; and a second row of a video alone.
    prompts = ["<image>\n<image><image><image><image>\n<image>what?", "<image><image>which came first?"]
    first, video, last, other = (
        model.compress(images[:1])[0],
        model.compress_video(images[1:5]),
        model.compress(images[5:])[0],
        model.compress_video(images[2:4]),
    )
    x = model.processor(images + images[2:4], prompts)
    given = {name: value for name, value in x.items() if name != "pixel_values"}
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    one = model.generate(**x, **wanted, **GENERATED)
    two = model.generate(**given, voco_kv=[first, video, last, other], **wanted, **GENERATED)
    stock = masked_eager(stock_of(model), model.layout_of)
    expected = stock(x["input_ids"], x["pixel_values"], attention_mask=x["attention_mask"])
    assert torch.equal(one.sequences, expected) and torch.equal(two.sequences, expected)
    for a, b in zip(one.logits, two.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    swapped = model.generate(**given, voco_kv=[other, video, last, first], **wanted, **GENERATED)
    assert not torch.allclose(swapped.logits[0], one.logits[0], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_the_logits_behind_a_video_obey_the_error_rule(positions, dtype):
    """Frames that were made at position 0, joined, and cut again; against float64, with eager attention for comparison."""
    spans = [Text(2), vk.Image(6, 2), vk.Image(6, 2), vk.Image(6, 2), Text(1), vk.Image(9, 3), vk.Image(9, 3), Text(5)]
    layout = VocoLayout.from_spans([spans], isolated=True, positions=positions)
    llama_model = llama().to(dtype)
    runs = stages.runs_of(layout, 0, layout.num_tokens)
    x = embeddings(llama_model, layout)
    video = VocoKV.cat([stored_alone(llama_model, x, run) for run in runs if run.segment])
    video = VocoKV(video.k, video.v, segments=[(6, 2)] * 3 + [(9, 3)] * 2)
    for shift in (0, stages.shift_of(runs)):
        assert_equal_to_single_pass(llama_model, layout, shift, iter(stages.per_segment(video)))


def test_the_frames_of_a_video_stand_side_by_side(model):
    """The template has a text of its own (a newline) behind each image; a video is one image to it."""
    one = model.processor.prompt("how many?", 3)
    assert one == model.processor.prompt("how many?", [1, 1, 1]) and "<image><image>" not in one
    mixed = model.processor.prompt("how many?", [1, 3, 1])
    assert mixed.replace("<image><image><image>", "<image>") == one
    assert model.processor.prompt("an <image>?", 1).count("<image>") == 2


@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_asking_about_videos_and_images(positions):
    model = voco_llava(positions=positions)
    images = pictures(4)
    video, image = model.compress_video(images[:3]), model.compress(images[3:])[0]
    prompt = model.processor.prompt("which came first?", [3, 1])
    x = model.processor(images, prompt)
    expected = model.generate(**x, **GENERATED)[0, x["input_ids"].shape[1] :]
    expected = model.processor.decode(expected, skip_special_tokens=True).strip()
    assert model.ask("which came first?", voco_kv=[video, image], **GENERATED) == expected
    assert model.ask("which came first?", voco_kv=[image, video], **GENERATED) != expected


@pytest.mark.parametrize("two_stage", [False, True], ids=["stored", "compressed first"])
def test_segments_side_by_side_are_injected_at_once(model, monkeypatch, two_stage):
    """Frame by frame the cache would be copied for every frame."""
    calls = []
    inject = stages.inject_kv
    monkeypatch.setattr(stages, "inject_kv", lambda kv, *rest: (calls.append(kv.num_tokens), inject(kv, *rest)))
    images = pictures(9)
    x = model.processor(images, "<image>" * 6 + " and " + "<image>" * 3 + "?")
    if not two_stage:
        x = {name: value for name, value in x.items() if name != "pixel_values"}
        x["voco_kv"] = [*model.compress(images[:1]), model.compress_video(images[1:])]
    model.generate(**x, two_stage=two_stage, **GENERATED)
    assert calls == [12, 6]


def quantised(kv: VocoKV) -> VocoKV:
    scales = [x.abs().amax(-1) / 127 for x in (kv.k, kv.v)]
    levels = [(x / scale[..., None]).round().to(torch.int8) for x, scale in zip((kv.k, kv.v), scales, strict=True)]
    return VocoKV(*levels, *scales, kv.segments, kv.meta)


@pytest.mark.parametrize("change", [lambda kv: kv.to(torch.float64), quantised], ids=["float64", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_segments_of_another_dtype_between_others(model, dtype, change):
    """They cannot be joined with their neighbours, but stand at their places, in the dtype of the model."""
    x = model.processor(None, "<image><image><image>how many?")
    first, second, third, other = model.compress(pictures(4))
    model.to(dtype)
    wanted = {"return_dict_in_generate": True, "output_logits": True, **GENERATED}
    logits = []
    for kv in ([first, second, third], [first, change(second), third], [first, other, third]):
        # They do not say which model's they are: its weights are others since they were rounded.
        kv = [VocoKV(part.k, part.v, part.k_scale, part.v_scale, part.segments) for part in kv]
        logits.append(model.generate(**x, voco_kv=kv, **wanted).logits[0])
    expected, got, another = logits
    assert (got - expected).abs().max() < (another - expected).abs().max() / 2


def test_parts_of_a_video(model):
    images = pictures(4)
    kv = model.compress_video(images)
    parts = stages.per_segment(kv)
    for part, expected in zip(parts, model.compress(images), strict=True):
        assert_same(part, expected)
        assert part.k.data_ptr() in range(kv.k.data_ptr(), kv.k.data_ptr() + kv.k.nbytes)
    assert_same(VocoKV.cat(parts), kv)
    unknown = VocoKV(kv.k, kv.v)
    assert stages.per_segment(unknown) == [unknown]
    levels = torch.randint(-9, 9, kv.k.shape, dtype=torch.int8)
    scales = torch.rand(kv.k.shape[:3])
    parts = stages.per_segment(VocoKV(levels, levels, scales, scales, kv.segments))
    assert torch.equal(parts[2].k_scale, scales[:, 4:6]) and torch.equal(parts[2].v, levels[:, 4:6])


# ---- a store -----------------------------------------------------------------------------------------------------------


class Shelf:
    """What `compress_video` asks of a store: K/V by the image itself."""

    def __init__(self):
        self.kept, self.compressed = {}, 0

    def get_or_compress(self, images, model, num_voco_tokens=None) -> list[VocoKV]:
        keys = [(hashlib.sha256(open_image(x).tobytes()).hexdigest(), num_voco_tokens) for x in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self.kept}
        self.compressed += len(new)
        self.kept.update(zip(new, model.compress(list(new.values()), num_voco_tokens), strict=True))
        return [self.kept[key] for key in keys]


@pytest.mark.parametrize("positions", ["continuous", "compact"])
def test_a_frame_of_another_video_is_not_compressed_again(positions):
    model, shelf = voco_llava(positions=positions), Shelf()
    a, b, c, d = pictures(4)
    model.compress_video([a, b, c], store=shelf)
    assert shelf.compressed == 3
    stored = model.compress_video([d, c, d, a], store=shelf)
    assert shelf.compressed == 4
    fresh = model.compress_video([d, c, d, a])
    assert_same(stored, fresh)
    x = model.processor(None, model.processor.prompt("which came first?", [4]))
    wanted = {"return_dict_in_generate": True, "output_logits": True, **GENERATED}
    one, two = (model.generate(**x, voco_kv=kv, **wanted) for kv in (stored, fresh))
    for got, expected in zip(one.logits, two.logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_the_store_is_asked_in_batches(model):
    asked = []

    class Counting(Shelf):
        def get_or_compress(self, images, *rest):
            asked.append(len(images))
            return super().get_or_compress(images, *rest)

    kv = model.compress_video(pictures(7), 1, store=Counting(), batch_size=3)
    assert asked == [3, 3, 1] and kv.segments == [(PRIVATE, 1)] * 7


# ---- what compressed videos refuse -------------------------------------------------------------------------------------


def test_frames_that_would_see_each_other():
    model = voco_llava(isolated=False)
    with pytest.raises(ValueError, match=r"isolated must be True .* but was False; generate\(two_stage=True\)"):
        model.compress_video(pictures(2))


def test_no_frames(model):
    for frames in ([], iter(())):
        with pytest.raises(ValueError, match="video must hold at least one frame, but holds none"):
            model.compress_video(frames)
    with pytest.raises(ValueError, match="batch_size must be at least 1, but was 0"):
        model.compress_video(pictures(1), batch_size=0)
    with pytest.raises(ValueError, match=r"image .*nowhere.png does not exist"):
        model.compress_video(["nowhere.png"])


def test_videos_that_do_not_fit_the_prompt(model):
    video = model.compress_video(pictures(3))
    x = model.processor(None, "<image>" * 4 + "how many?")
    with pytest.raises(ValueError, match=r"one VocoKV per image of the prompts \(4\), but holds 3"):
        model.generate(**x, voco_kv=video, **GENERATED)
    mixed = VocoKV.cat([*model.compress(pictures(1)), *model.compress(pictures(1), 3), *model.compress(pictures(2))])
    with pytest.raises(ValueError, match=r"voco_kv\[0\], segment 1, must be of 12 private and 2 VoCo tokens"):
        model.generate(**x, voco_kv=mixed, **GENERATED)
    other = VocoKV(video.k, video.v, None, None, video.segments, {**video.meta, "prompt": "0" * 64})
    with pytest.raises(ValueError, match=r"voco_kv\[1\], segment 0, must be made of its segment's tokens"):
        model.generate(**x, voco_kv=[*model.compress(pictures(1)), other], **GENERATED)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    x = model.processor(None, "<image>" * 3 + "how many?")
    with pytest.raises(ValueError, match=r"voco_kv\[0\], segment 0, must be made by this model"):
        model.generate(**x, voco_kv=video, **GENERATED)


# ---- long videos -------------------------------------------------------------------------------------------------------


def test_a_thousand_frames_fit_a_context_of_four_thousand():
    frames = 1000
    sizes = {"max_position_embeddings": 4096}
    compact = voco_llava(positions="compact", text=sizes)
    kv = compact.compress_video((picture(i % 50) for i in range(frames)), 2)
    assert kv.segments == [(PRIVATE, 2)] * frames and kv.k.device == compact.device
    x = compact.processor(None, compact.processor.prompt("which digit came first?", [frames]), 2)
    assert x["input_ids"].shape[1] > 3 * 4096
    out = compact.generate(**x, voco_kv=kv, **GENERATED)
    assert out.shape[1] == x["input_ids"].shape[1] + GENERATED["max_new_tokens"]
    assert isinstance(compact.ask("which digit came first?", voco_kv=kv, **GENERATED), str)
    continuous = voco_llava(text=sizes)
    with pytest.raises(ValueError, match="input_ids must fit the context of 4096 positions"):
        continuous.ask("which digit came first?", voco_kv=kv)


MEMORY = """
import os, sys
import torch
import voco_llama
assert "av" not in sys.modules, "the decoder is for those who use it"
from models import voco_llava
from voco_llama.video import frames_of

def resident(*progress):
    pages = int(open("/proc/self/statm").read().split()[1])
    seen.append(pages * os.sysconf("SC_PAGE_SIZE"))

torch.set_num_threads(1)
model, most = voco_llava(), []
for frames in (100, 400):
    seen = []
    kv = model.compress_video(sys.argv[1], fps=frames / 40, batch_size=16, progress=resident)
    assert len(kv.segments) == frames
    most.append(max(seen))
held = list(frames_of(sys.argv[1], num_frames=300))
resident()
print(*most, seen[-1], kv.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    """In a new process: most memory of 100 frames and of 400, and, to see that it would show, with 300 frames held."""
    path = write(tmp_path / "clip.avi", [grey(i % 40, (320, 240)) for i in range(400)])
    roots = [Path(__file__).parent, Path(__file__).parent.parent, Path(__file__).parent.parent / "python"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    short, long, held, result = map(int, done.stdout.split())
    all_frames = 300 * 320 * 240 * 3
    assert held - long > all_frames / 2
    # The result, and what an allocator keeps.
    assert long - short < result + all_frames / 8
