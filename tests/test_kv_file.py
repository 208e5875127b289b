"""Files of compressed K/V: what was saved is loaded, and nothing else ever is."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save as serialise

from voco_kernels import VocoKV, kv_file

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUANTISED = (torch.int8, torch.float8_e4m3fn)


def make(dtype=torch.float32, tokens=3, **options) -> VocoKV:
    k, v = (torch.randn(2, tokens, 2, 4).mul(20).to(dtype) for _ in "kv")
    scales = {f"{name}_scale": torch.rand(2, tokens, 2) for name in "kv"} if dtype in QUANTISED else {}
    return VocoKV(k, v, **scales, **options)


def bits(x):
    return None if x is None else (x.dtype, x.shape, x.contiguous().view(torch.uint8).tolist())


def assert_same(x: VocoKV, y: VocoKV) -> None:
    for name in ("k", "v", "k_scale", "v_scale"):
        assert bits(getattr(x, name)) == bits(getattr(y, name)), name
    assert x.segments == y.segments and x.meta == y.meta


@pytest.mark.parametrize("dtype", FLOATS + QUANTISED, ids=str)
def test_round_trip(dtype, tmp_path):
    kv = make(dtype, segments=[(9, 2), (576, 1)], meta={"model": "abc", "ümlaut": 'quote " and \n newline'})
    kv.save(tmp_path / "a.safetensors")
    assert_same(VocoKV.load(tmp_path / "a.safetensors"), kv)
    kv.save(str(tmp_path / "b"))
    assert_same(VocoKV.load(str(tmp_path / "b")), kv)


@pytest.mark.parametrize(
    "kv",
    [
        make(),
        make(segments=[(1, 3)]),
        make(tokens=0, segments=[]),
        make(tokens=9)[2:5],
        VocoKV(*torch.randn(2, 2, 2, 3, 4).transpose(2, 3)),
        VocoKV(torch.full((1, 1, 1, 2), float("nan")), torch.tensor([[[[float("inf"), -0.0]]]])),
        VocoKV(*torch.randn(2, 1, 2, 1, 4, requires_grad=True)),
    ],
    ids=["plain", "segments", "no tokens", "slice", "strided", "not finite", "with gradients"],
)
def test_round_trip_of(kv, tmp_path):
    kv.save(tmp_path / "kv")
    assert_same(VocoKV.load(tmp_path / "kv"), kv)


def test_one_tensor_for_both(tmp_path):
    x = torch.randn(2, 3, 2, 4)
    VocoKV(x, x).save(tmp_path / "kv")
    assert_same(VocoKV.load(tmp_path / "kv"), VocoKV(x, x))


def test_the_same_kv_gives_the_same_bytes(tmp_path):
    kv = make()
    for name, meta in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        VocoKV(kv.k, kv.v, meta=meta).save(tmp_path / name)
    assert kv_file._checksum({"k": kv.k}, {"a": "1"}) == kv_file._checksum({"k": kv.k.clone()}, {"a": "1"})
    assert_same(VocoKV.load(tmp_path / "a"), VocoKV.load(tmp_path / "b"))


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "kv"
    torch.manual_seed(0)
    make(torch.int8, segments=[(9, 3)], meta={"model": "abc"}).save(path)
    return path.read_bytes()


def test_truncated_at_every_length(whole, tmp_path):
    path = tmp_path / "kv"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="kv"):
            VocoKV.load(path)


@pytest.mark.parametrize("bit", [0, 3, 5, 7])
def test_every_byte_flipped(bit, whole, tmp_path):
    path = tmp_path / "kv"
    path.write_bytes(whole)
    VocoKV.load(path)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="kv"):
            VocoKV.load(path)
            pytest.fail(f"byte {at} of {len(whole)}, bit {bit}: loaded")


@pytest.mark.parametrize("extra", [b"\0", b"more" * 20])
def test_longer_than_it_was(extra, whole, tmp_path):
    path = tmp_path / "kv"
    path.write_bytes(whole + extra)
    with pytest.raises(ValueError, match="kv"):
        VocoKV.load(path)


def test_bytes_exchanged(whole, tmp_path):
    """A swap keeps every sum over bytes; the checksum is none."""
    path = tmp_path / "kv"
    payload = len(whole) - 40
    for at in range(payload, len(whole) - 1):
        if whole[at] == whole[at + 1]:
            continue
        damaged = bytearray(whole)
        damaged[at], damaged[at + 1] = whole[at + 1], whole[at]
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum"):
            VocoKV.load(path)


# ---- files of others ---------------------------------------------------------------------------------------------------


def signed(tensors, **changes):
    """A file with a right checksum, whatever it says."""
    header = {"format": "voco-kv", "format_version": "1", "segments": "null", "meta": "{}"} | changes
    header = {name: value for name, value in header.items() if value is not None}
    return serialise(tensors, metadata=header | {"sha256": kv_file._checksum(tensors, header)})


KV = {"k": torch.ones(1, 2, 1, 4), "v": torch.ones(1, 2, 1, 4)}
STRANGE = {
    "nothing": (b"", "not a whole"),
    "text": (b"not a safetensors file at all, but long enough", "not a whole"),
    "a pickle": (b"\x80\x04\x95" + b"." * 60, "not a whole"),
    "no metadata": (serialise(KV), "its format is None"),
    "another format": (signed(KV, format="pt"), "its format is 'pt'"),
    "a later version": (signed(KV, format_version="2"), "format version 2, and this library reads version 1"),
    "no version": (signed(KV, format_version=None), "format version None"),
    "no values": (signed({"k": KV["k"]}), "holds tensors"),
    "another tensor": (signed(KV | {"q": torch.ones(2)}), "holds tensors"),
    "shapes that differ": (signed(KV | {"v": torch.ones(1, 3, 1, 4)}), "does not hold a valid VocoKV: v must be"),
    "scales of floats": (signed(KV | {"k_scale": torch.ones(1, 2, 1)}), "does not hold a valid VocoKV: k_scale must be"),
    "segments that do not add up": (signed(KV, segments="[[9, 3]]"), "does not hold a valid VocoKV: segments must be"),
    "segments that are none": (signed(KV, segments="7"), "does not hold a valid VocoKV"),
    "segments that are no JSON": (signed(KV, segments="[["), "does not hold a valid VocoKV"),
    "no segments": (signed(KV, segments=None), "does not hold a valid VocoKV"),
    "meta of numbers": (signed(KV, meta='{"x": 1}'), "does not hold a valid VocoKV: meta must be"),
    "meta is a list": (signed(KV, meta="[]"), "does not hold a valid VocoKV: meta must be"),
    "no checksum": (serialise(KV, metadata={"format": "voco-kv", "format_version": "1"}), "checksum"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files(name, tmp_path):
    content, reason = STRANGE[name]
    path = tmp_path / "strange"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as raised:
        VocoKV.load(path)
    assert str(path) in str(raised.value)


def test_a_signed_file_is_read(tmp_path):
    """The cases above fail for what they say, and not because `signed` makes bad files."""
    (tmp_path / "kv").write_bytes(signed(KV, segments="[[9, 2]]", meta='{"x": "1"}'))
    assert_same(VocoKV.load(tmp_path / "kv"), VocoKV(**KV, segments=[(9, 2)], meta={"x": "1"}))


def test_the_header_can_be_read_by_others(whole):
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    assert header["__metadata__"]["format_version"] == "1"
    assert len(header["__metadata__"]["sha256"]) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("path", ["missing", "folder/missing", "."])
def test_missing_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no K/V cache file at"):
        VocoKV.load(tmp_path / path)


# ---- writing -----------------------------------------------------------------------------------------------------------


def test_folders_are_made(tmp_path):
    make().save(tmp_path / "a" / "b" / "kv")
    assert VocoKV.load(tmp_path / "a" / "b" / "kv").num_tokens == 3


def test_an_old_file_is_replaced(tmp_path):
    old, new = make(tokens=40), make(tokens=2)
    old.save(tmp_path / "kv")
    new.save(tmp_path / "kv")
    assert_same(VocoKV.load(tmp_path / "kv"), new)
    assert os.listdir(tmp_path) == ["kv"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(step, error, tmp_path, monkeypatch):
    old = make()
    old.save(tmp_path / "kv")

    def fail(*arguments, **options):
        raise error("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(kv_file.os, step, fail)
        with pytest.raises(error, match="the disk is full"):
            make(tokens=7).save(tmp_path / "kv")
        with pytest.raises(error):
            make(tokens=7).save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["kv"]
    assert_same(VocoKV.load(tmp_path / "kv"), old)


def test_the_old_file_is_whole_until_it_is_replaced(tmp_path, monkeypatch):
    old, new = make(), make(tokens=7)
    old.save(tmp_path / "kv")
    replace, seen = os.replace, []

    def look(source, target):
        assert_same(VocoKV.load(target), old)
        assert_same(VocoKV.load(source), new)
        assert os.path.dirname(source) == str(tmp_path), "a rename between file systems is not atomic"
        seen.append(source)
        replace(source, target)

    monkeypatch.setattr(kv_file.os, "replace", look)
    new.save(tmp_path / "kv")
    assert len(seen) == 1
    assert_same(VocoKV.load(tmp_path / "kv"), new)


def test_a_file_is_readable_by_others(tmp_path, monkeypatch):
    mask = os.umask(0o022)
    try:
        with monkeypatch.context() as patch:
            # Whoever sets it, be it for a moment, sets it for files that other threads make.
            patch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
            make().save(tmp_path / "kv")
        assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_deep_nesting_is_an_error_of_the_file(tmp_path):
    for name in ("meta", "segments"):
        (tmp_path / "kv").write_bytes(signed(KV, **{name: "[" * 1_000_000}))
        with pytest.raises(ValueError, match="does not hold a valid VocoKV"):
            VocoKV.load(tmp_path / "kv")


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I64", "U64", "F8_E5M2", "F8_E8M0", "C64", "F4", "F6_E2M3", "XX"])
def test_tensors_of_other_dtypes(dtype, tmp_path):
    """Whole files of safetensors, with the metadata of ours, whose tensors are nothing that K/V can be."""
    size = {"I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6}.get(dtype, 8)  # bytes of 8 numbers
    tensors = {
        name: {"dtype": dtype, "shape": [1, 2, 1, 4], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate("kv")
    }
    metadata = {"format": "voco-kv", "format_version": "1", "segments": "null", "meta": "{}", "sha256": "0" * 64}
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    (tmp_path / "kv").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * size))
    with pytest.raises(ValueError, match="kv is not a whole|kv is damaged"):
        VocoKV.load(tmp_path / "kv")


@pytest.mark.parametrize("step", ["safe_open", "_check_header_size"])
def test_a_file_that_goes_while_it_is_read(step, tmp_path, monkeypatch):
    make().save(tmp_path / "kv")
    work = getattr(kv_file, step)

    def removed_before(path, **options):
        path.unlink()
        return work(path, **options)

    monkeypatch.setattr(kv_file, step, removed_before)
    with pytest.raises(FileNotFoundError):
        VocoKV.load(tmp_path / "kv")


def test_a_glance_reads_the_header_alone(tmp_path):
    kv = make(torch.int8, segments=[(9, 3)], meta={"model": "abc"})
    kv.save(tmp_path / "kv")
    assert_same(kv_file.glance(tmp_path / "kv"), kv)
    whole = bytearray((tmp_path / "kv").read_bytes())
    whole[-1] ^= 1
    (tmp_path / "kv").write_bytes(whole)
    assert kv_file.glance(tmp_path / "kv").meta == {"model": "abc"}
    with pytest.raises(ValueError, match="checksum"):
        VocoKV.load(tmp_path / "kv")
    (tmp_path / "kv").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a whole"):
        kv_file.glance(tmp_path / "kv")
