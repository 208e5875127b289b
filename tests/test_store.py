"""The store: what it keeps, for how long, and every fault that files, disks and other processes can have."""

import contextlib
import copy
import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import random_kv

from voco_kernels import VocoKV, VocoStore, kv_file
from voco_kernels import store as store_module


def key_of(name) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


KEYS = [key_of(i) for i in range(8)]
NBYTES = random_kv().nbytes


def numbered(i: int, **options) -> VocoKV:
    x = torch.full((3, 5, 2, 16), float(i))
    return VocoKV(x, x + 0.5, segments=[(9, 5)], meta={"image": str(i)}, **options)


def number_of(kv: VocoKV | None) -> float | None:
    return None if kv is None else float(kv.k[0, 0, 0, 0])


def file_of(store: VocoStore, key: str) -> Path:
    return store.path / key[:2] / f"{key}.safetensors"


@pytest.fixture
def store(tmp_path):
    return VocoStore(tmp_path / "store")


# ---- what it keeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_what_is_put_is_got(tmp_path, memory_bytes):
    store = VocoStore(tmp_path / "a" / "store", memory_bytes=memory_bytes)
    assert store.get(KEYS[0]) is None and KEYS[0] not in store and len(store) == 0
    store.put(KEYS[0], numbered(1))
    store.put(KEYS[1], numbered(2))
    for reader in (store, VocoStore(store.path)):
        kv = reader.get(KEYS[0])
        assert number_of(kv) == 1 and float(kv.v[0, 0, 0, 0]) == 1.5
        assert kv.segments == [(9, 5)] and kv.meta == {"image": "1", "key": KEYS[0]}
        assert reader.keys() == sorted(KEYS[:2]) and KEYS[1] in reader
    store.put(KEYS[0], numbered(3))
    assert number_of(store.get(KEYS[0])) == number_of(VocoStore(store.path).get(KEYS[0])) == 3
    assert store.remove(KEYS[0]) and not store.remove(KEYS[0]) and store.get(KEYS[0]) is None
    assert len(store) == 1


def test_memory_holds_the_most_recent(tmp_path):
    store = VocoStore(tmp_path, memory_bytes=2 * numbered(0).nbytes)
    for i in range(3):
        store.put(KEYS[i], numbered(i))
    assert store.stats()["memory_entries"] == 2 and store.stats()["entries"] == 3
    for i in range(3):
        file_of(store, KEYS[i]).unlink()
    assert [number_of(store.get(KEYS[i])) for i in range(3)] == [None, 1, 2]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_entries_have_other_keys(tmp_path, dtype):
    plain, store = VocoStore(tmp_path), VocoStore(tmp_path, dtype=dtype)
    assert plain.key_of(KEYS[0]) == KEYS[0] != store.key_of(KEYS[0])
    store.put(KEYS[0], numbered(3))
    kv = VocoStore(tmp_path, dtype=dtype).get(KEYS[0])
    assert kv.k.dtype == dtype and kv.dequantised().k.allclose(numbered(3).k)
    assert {store.key_of(KEYS[0]), VocoStore(tmp_path, dtype=torch.int8).key_of(KEYS[0])} != {KEYS[0]}


class Model:
    """Compresses numbers."""

    def __init__(self):
        self.calls = []

    def store_keys(self, images, num_voco_tokens):
        return [key_of((image, num_voco_tokens)) for image in images]

    def compress(self, images, num_voco_tokens):
        self.calls.append(list(images))
        return [numbered(image) for image in images]


def test_the_same_image_is_compressed_once(store):
    model = Model()
    assert [number_of(kv) for kv in store.get_or_compress([1, 2, 1], model, 2)] == [1, 2, 1]
    assert [number_of(kv) for kv in store.get_or_compress([3, 2], model, 2)] == [3, 2]
    assert model.calls == [[1, 2], [3]]
    VocoStore(store.path).get_or_compress([3, 1], model, 2)
    assert model.calls == [[1, 2], [3]]
    store.get_or_compress([3], model, 4)  # other VoCo tokens
    assert model.calls == [[1, 2], [3], [3]] and store.get_or_compress([], model) == []
    assert store.stats()["made"] == 4
    with pytest.raises(ValueError, match="^make must be a function that returns 1 VocoKV, but was one that returned 0"):
        store.get_or_make([KEYS[0]], lambda missing: [])


# ---- size --------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_are_removed(tmp_path):
    size = VocoStore(tmp_path / "probe")
    size.put(KEYS[0], numbered(0))
    nbytes = size.entries()[0].nbytes
    store = VocoStore(tmp_path / "store", max_bytes=3 * nbytes, memory_bytes=0)
    for i in range(3):
        store.put(KEYS[i], numbered(i))
        os.utime(file_of(store, KEYS[i]), (i, i))
    store.get(KEYS[0])  # now the last used
    store.put(KEYS[3], numbered(3))
    assert store.keys() == sorted([KEYS[0], KEYS[2], KEYS[3]]) and store.stats()["evicted"] == 1
    for i in range(4, 8):
        store.put(KEYS[i], numbered(i))
        assert KEYS[i] in store and len(store) <= 3 and store.stats()["bytes"] <= 3 * nbytes
    with pytest.raises(ValueError, match="^kv must be at most"):
        VocoStore(tmp_path / "tiny", max_bytes=100).put(KEYS[0], numbered(0))
    # What is in use is a mapping of the file; the file may go.
    kv = VocoStore(store.path).get(KEYS[7])
    store.remove(KEYS[7])
    assert number_of(kv) == 7


@settings(max_examples=25)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["put", "get", "remove", "reopen"]), st.integers(0, 4)), min_size=1, max_size=20
    ),
    limit=st.sampled_from([None, 2, 4]),
)
def test_it_is_a_dict_that_forgets(tmp_path_factory, operations, limit):
    """Never another's value, and without a limit never a missing one."""
    folder = tmp_path_factory.mktemp("store")
    nbytes = 5000
    options = {"max_bytes": None if limit is None else limit * nbytes, "memory_bytes": 2 * numbered(0).nbytes}
    store, model = VocoStore(folder, **options), {}
    for step, (operation, i) in enumerate(operations):
        if operation == "put":
            store.put(KEYS[i], numbered(step))
            model[i] = step
            assert number_of(store.get(KEYS[i])) == step
        elif operation == "remove":
            assert store.remove(KEYS[i]) <= (model.pop(i, None) is not None)
        elif operation == "reopen":
            store = VocoStore(folder, **options)
        got = number_of(store.get(KEYS[i]))
        assert got == model.get(i) or (got is None and limit is not None)
        if limit is not None:
            assert store.stats()["bytes"] <= limit * nbytes


# ---- damaged and hostile files -----------------------------------------------------------------------------------------


def hostile(header: dict | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(begin: int, end: int, shape=(1, 1, 1, 2), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def pair(**changes) -> dict:
    return {"k": tensor(0, 8), "v": tensor(8, 16)} | changes


DAMAGE = {
    "empty": lambda whole: b"",
    "truncated in the header": lambda whole: whole[:100],
    "truncated in the tensors": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"x",
    "a flipped bit of a tensor": lambda whole: whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
    "a flipped bit of the metadata": lambda whole: whole.replace(b'"image', b'"imagf', 1),
    "text": lambda whole: b"this is not a file of tensors, but it is long enough to be read as one",
    "a huge header": lambda whole: hostile(pair(), b"\0" * 16, size=2**40),
    "a negative header": lambda whole: hostile(pair(), b"\0" * 16, size=2**64 - 1),
    "a huge tensor": lambda whole: hostile(pair(k=tensor(0, 2**60, (2**20, 2**19, 2**9, 2**10))), b"\0" * 16),
    "sizes that overflow": lambda whole: hostile(pair(k=tensor(0, 8, (2**40, 2**40, 2**40, 2**40))), b"\0" * 16),
    "negative offsets": lambda whole: hostile(pair(k=tensor(-8, 0)), b"\0" * 16),
    "overlapping tensors": lambda whole: hostile(pair(v=tensor(0, 8)), b"\0" * 8),
    "names like paths": lambda whole: hostile({"../../outside": tensor(0, 8), "/etc/x": tensor(8, 16)}, b"\0" * 16),
    "very many tensors": lambda whole: hostile({f"t{i}": tensor(8 * i, 8 * i + 8) for i in range(9999)}, b"\0" * 79992),
    "deep nesting": lambda whole: hostile(b'{"k":' + b"[" * 100000, b""),
    "no checksum": lambda whole: hostile(pair(), b"\0" * 16),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_entries_are_moved_aside_and_made_again(store, name, tmp_path):
    outside = {path for path in tmp_path.rglob("*") if store.path not in path.parents}
    model = Model()
    store.get_or_compress([1], model)
    [key] = store.keys()
    path = file_of(store, key)
    damaged = DAMAGE[name](path.read_bytes())
    path.write_bytes(damaged)
    fresh = VocoStore(store.path)
    with pytest.warns(UserWarning, match="damaged entry of .*moved to"):
        assert number_of(fresh.get_or_compress([1], model)[0]) == 1
    assert model.calls == [[1], [1]]
    [aside] = (store.path / "damaged").iterdir()
    assert aside.read_bytes() == damaged and aside.name.startswith(key)
    assert number_of(VocoStore(store.path).get(key)) == 1
    assert {path for path in tmp_path.rglob("*") if store.path not in path.parents} == outside


def test_an_entry_under_the_name_of_another_is_damaged(store):
    store.put(KEYS[0], numbered(1))
    file_of(store, KEYS[1]).parent.mkdir(exist_ok=True)
    file_of(store, KEYS[0]).rename(file_of(store, KEYS[1]))
    fresh = VocoStore(store.path)
    with pytest.warns(UserWarning, match="holds the entry of another key"):
        assert fresh.get(KEYS[1]) is None
    assert fresh.stats()["damaged"] == 1


def test_verify_finds_what_is_damaged(store):
    for i in range(4):
        store.put(KEYS[i], numbered(i))
    for i in (1, 2):
        path = file_of(store, KEYS[i])
        path.write_bytes(path.read_bytes()[:-1])
    seen = []
    with pytest.warns(UserWarning, match="damaged entry"):
        # What is still in memory is read again, too.
        assert sorted(store.verify(lambda done, total: seen.append((done, total)))) == sorted(KEYS[1:3])
    assert seen == [(i + 1, 4) for i in range(4)] and store.verify() == [] and len(store) == 2


def test_an_unreadable_entry_is_reported(store, monkeypatch):
    store.put(KEYS[0], numbered(1))

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    fresh = VocoStore(store.path)
    monkeypatch.setattr(kv_file, "load", unreadable)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert fresh.get(KEYS[0]) is None


@pytest.mark.parametrize("key", ["", "ab", "../" + "a" * 61, "A" * 64, "g" * 64, "a" * 63 + "/", "a" * 64 + "\n", 5, None])
def test_keys_that_are_not_digests(store, key):
    before = sorted(store.path.rglob("*"))
    for use in (store.get, lambda k: store.put(k, numbered(1)), store.remove, lambda k: k in store,
                lambda k: store.get_or_make([k], lambda missing: [numbered(1)])):  # fmt: skip
        with pytest.raises(ValueError, match="^key must be 64 hexadecimal digits, but was"):
            use(key)
    assert sorted(store.path.rglob("*")) == before


def test_links_are_not_followed(store, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.path / KEYS[0][:2]).symlink_to(outside)
    with pytest.raises(OSError, match="is a link"):
        store.put(KEYS[0], numbered(1))
    assert list(outside.iterdir()) == [] and store.keys() == []
    store.put(KEYS[1], numbered(1))
    file_of(store, KEYS[1]).rename(outside / "entry")
    file_of(store, KEYS[1]).symlink_to(outside / "entry")
    with pytest.warns(UserWarning, match="is a link"):
        assert VocoStore(store.path).get(KEYS[1]) is None
    assert (outside / "entry").is_file()


@pytest.mark.parametrize("content", ["{}", "nonsense", '{"format_version": 2}', "[]"])
def test_stores_of_other_versions(tmp_path, content):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ValueError, match="format version 2|is not the description of a store"):
        VocoStore(tmp_path)


def test_folders_that_are_no_stores(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="^path must be a store, an empty folder or a new one"):
        VocoStore(tmp_path)
    with pytest.raises(ValueError, match="^path must be a folder"):
        VocoStore(tmp_path / "precious.txt")
    for options in ({"max_bytes": 0}, {"memory_bytes": -1}, {"dtype": torch.half}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
            VocoStore(tmp_path / "new", **options)
    assert os.listdir(tmp_path) == ["precious.txt"]


# ---- disks that are full or only read ----------------------------------------------------------------------------------


def refuse(monkeypatch, number: int) -> None:
    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses(store, monkeypatch, number):
    store.put(KEYS[0], numbered(1))
    before = file_of(store, KEYS[0]).read_bytes()
    with monkeypatch.context() as patch:
        refuse(patch, number)
        for key in KEYS[:2]:
            with pytest.raises(OSError, match=os.strerror(number)):
                store.put(key, numbered(2))
        with pytest.warns(UserWarning, match=f"could not be kept in .*{os.strerror(number)}"):
            assert number_of(store.get_or_compress([5], Model())[0]) == 5
    assert file_of(store, KEYS[0]).read_bytes() == before
    assert {path.name for path in store.path.rglob("*") if path.is_file()} >= {file_of(store, KEYS[0]).name}
    assert not list(store.path.rglob("*.partial")) and VocoStore(store.path).keys() == [KEYS[0]]


def test_a_full_disk(tmp_path):
    """The real limit of a process: files above a size cannot be written."""
    code = """
        import resource, signal, sys, warnings
        from test_store import *
        store = VocoStore(sys.argv[1])
        store.put(KEYS[0], numbered(1))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for key in KEYS[:2]:
            try:
                store.put(key, numbered(2))
            except OSError as error:
                print(error.errno)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(number_of(store.get_or_compress([5], Model())[0]), len(caught))
    """
    assert run_python(code, tmp_path / "s").split() == [str(errno.EFBIG)] * 2 + ["5.0", "1"]
    store = VocoStore(tmp_path / "s")
    assert store.keys() == [KEYS[0]] and number_of(store.get(KEYS[0])) == 1


def test_a_folder_that_is_only_read(store, monkeypatch):
    store.put(KEYS[0], numbered(1))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "replace", "utime", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(store_module.kv_file, "write_atomically", read_only)
    monkeypatch.setattr(VocoStore, "_locked", read_only)
    fresh = VocoStore(store.path)
    assert number_of(fresh.get(KEYS[0])) == 1
    with pytest.raises(OSError, match="Read-only"):
        fresh.put(KEYS[1], numbered(2))
    with pytest.warns(UserWarning, match="Read-only"):
        assert number_of(fresh.get_or_compress([5], Model())[0]) == 5


# ---- other processes ---------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments) -> str:
    done = subprocess.run(_python(code, *arguments), capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def _python(code: str, *arguments) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


@contextlib.contextmanager
def processes(code: str, *arguments: tuple, **options) -> Iterator[list[subprocess.Popen]]:
    """Run `code` at once with each of the arguments; none outlives the test, be it that they wait for each other."""
    started = [subprocess.Popen(_python(code, *each), env=_environment(), **options) for each in arguments]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


def test_two_processes_compress_an_image_once(tmp_path):
    """Both want overlapping sets in opposite orders, at the same moment."""
    code = """
        import sys, time
        from test_store import *
        folder, order = sys.argv[1], [int(i) for i in sys.argv[2].split(",")]
        class Slow(Model):
            def compress(self, images, n):
                time.sleep(0.3)
                with open(folder + ".log", "a") as log:
                    log.write("".join(f"{image} " for image in images))
                return super().compress(images, n)
        store = VocoStore(folder)
        open(f"{folder}.{order[0]}", "w").close()
        while len([f for f in os.listdir(os.path.dirname(folder)) if f.startswith("s.") and f[2:].isdigit()]) < 2:
            time.sleep(0.005)
        print([number_of(kv) for kv in store.get_or_compress(order, Slow())])
    """
    folder = tmp_path / "s"
    orders = ("1,2,3,4", "9,4,3,2")
    with processes(code, *((folder, order) for order in orders), stdout=subprocess.PIPE, text=True) as both:
        said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert said == ["[1.0, 2.0, 3.0, 4.0]", "[9.0, 4.0, 3.0, 2.0]"]
    assert sorted((tmp_path / "s.log").read_text().split()) == ["1", "2", "3", "4", "9"]


def test_threads_share_a_store(store):
    model = Model()

    def work():
        for i in range(20):
            assert number_of(store.get_or_compress([i % 7], model)[0]) == i % 7

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(image for call in model.calls for image in call) == list(range(7))


def test_readers_writers_and_eviction_at_once(tmp_path):
    """Entries come and go under those who read them: always the right ones, without a warning."""
    code = """
        import random, sys
        from test_store import *
        warnings.simplefilter("error")
        chance = random.Random(int(sys.argv[2]))
        store = VocoStore(sys.argv[1], max_bytes=20_000, memory_bytes=0)
        for _ in range(60):
            some = chance.sample(range(8), 3)
            got = store.get_or_make([KEYS[i] for i in some], lambda missing: [numbered(some[i]) for i in missing])
            assert [number_of(kv) for kv in got] == some
            store.remove(KEYS[some[0]])
    """
    with processes(code, *((tmp_path / "s", i) for i in range(3))) as three:
        assert [process.wait(60) for process in three] == [0, 0, 0]
    store = VocoStore(tmp_path / "s")
    assert store.verify() == [] and not (store.path / "damaged").exists()
    assert not list(store.path.rglob("*.partial")) and not list((store.path / "locks").iterdir())


def test_two_writers_of_one_key(tmp_path):
    code = """
        import sys
        from test_store import *
        store = VocoStore(sys.argv[1], memory_bytes=0)
        for i in range(60):
            store.put(KEYS[0], numbered(int(sys.argv[2])))
            assert number_of(store.get(KEYS[0])) in (1, 2)
    """
    with processes(code, *((tmp_path / "s", i) for i in (1, 2))) as both:
        assert [process.wait(60) for process in both] == [0, 0]
    store = VocoStore(tmp_path / "s")
    assert number_of(store.get(KEYS[0])) in (1, 2) and store.verify() == []


WRITER = """
    import sys
    from test_store import *
    store = VocoStore(sys.argv[1])
    print("ready", flush=True)
    i = 0
    while True:
        i += 1
        store.put(KEYS[i % 2], numbered(i))
"""


def test_a_writer_that_is_killed_leaves_whole_entries(tmp_path):
    """kill -9 at moments of a put that nobody chose; the old entry or the new one is there, and no lock is left."""
    folder = tmp_path / "s"
    for pause in (0.0, 0.003, 0.011, 0.03):
        process = subprocess.Popen(_python(WRITER, folder), env=_environment(), stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = VocoStore(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [store.get(entry.key) for entry in store.entries()]
            assert found and all(float(kv.v[0, 0, 0, 0]) == number_of(kv) + 0.5 for kv in found)
            assert store.verify() == []
            store.put(KEYS[0], numbered(1))
            store.put(KEYS[1], numbered(1))


@pytest.mark.parametrize("old", [True, False], ids=["with an old entry", "without"])
@pytest.mark.parametrize("moment", [*(pytest.param(m, marks=pytest.mark.full) for m in ("write", "fsync")), "replace"])
def test_a_writer_that_dies_at_a_given_moment(tmp_path, moment, old):
    """Killed just before the bytes, before they are on the disk, and before they get their name."""
    folder = tmp_path / "s"
    if old:
        VocoStore(folder).put(KEYS[0], numbered(1))
    code = """
        import sys
        from test_store import *
        store, moment = VocoStore(sys.argv[1]), sys.argv[2]
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "write":
            kv_file.open = lambda *how: (open(*how), die())
        else:
            setattr(os, moment, die)
        store.put(KEYS[0], numbered(2))
    """
    done = subprocess.run(_python(code, folder, moment), env=_environment())
    assert done.returncode == -signal.SIGKILL
    store = VocoStore(folder, max_bytes=10**6)
    assert number_of(store.get(KEYS[0])) == (1 if old else None) and store.verify() == []
    [left] = store.path.rglob("*.partial")
    store.put(KEYS[0], numbered(3))
    assert left.exists()  # it may be another writer's who is at work
    os.utime(left, (0, 0))
    VocoStore(folder, max_bytes=10**6).put(KEYS[0], numbered(3))
    assert not left.exists() and number_of(VocoStore(folder).get(KEYS[0])) == 3


# ---- what other processes do meanwhile ---------------------------------------------------------------------------------


def before_the_tensors(monkeypatch, action) -> None:
    """Run `action` once, when an entry has been found and its bytes are not read yet."""
    open_file, done = kv_file.safe_open, []

    def opened(path, **options):
        if not done:
            done.append(action())
        return open_file(path, **options)

    monkeypatch.setattr(kv_file, "safe_open", opened)


def test_an_entry_that_is_removed_while_it_is_read_is_missing_not_damaged(store, monkeypatch):
    store.put(KEYS[0], numbered(1))
    fresh = VocoStore(store.path)
    before_the_tensors(monkeypatch, file_of(store, KEYS[0]).unlink)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh.get(KEYS[0]) is None
    assert fresh.stats()["damaged"] == 0 and not (store.path / "damaged").exists()


def test_an_entry_that_is_repaired_while_it_is_read_is_not_moved_aside(store, monkeypatch):
    store.put(KEYS[0], numbered(1))
    path = file_of(store, KEYS[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fresh = VocoStore(store.path)
    load, seen = kv_file.load, []

    def repaired_behind_it(path):
        try:
            return load(path)
        finally:
            if not seen:
                seen.append(kv_file.write_atomically(path, whole))

    monkeypatch.setattr(kv_file, "load", repaired_behind_it)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert number_of(fresh.get(KEYS[0])) == 1
    assert seen and path.read_bytes() == whole


def test_verify_does_not_count_what_was_removed_meanwhile(store, monkeypatch):
    store.put(KEYS[0], numbered(1))
    before_the_tensors(monkeypatch, file_of(store, KEYS[0]).unlink)
    assert store.verify() == []


def test_verify_reports_damage_that_it_cannot_move(store, monkeypatch):
    store.put(KEYS[0], numbered(1))
    file_of(store, KEYS[0]).write_bytes(b"damaged")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    with pytest.warns(UserWarning, match="could not be moved aside"):
        assert store.verify() == [KEYS[0]]


def test_a_process_that_is_out_of_files_does_not_call_entries_damaged(store, monkeypatch):
    store.put(KEYS[0], numbered(1))
    fresh = VocoStore(store.path)

    def exhausted(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(kv_file, "load", exhausted)
        for use in (lambda: fresh.get(KEYS[0]), fresh.verify):
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                use()
    assert number_of(fresh.get(KEYS[0])) == 1


def test_at_no_number_of_open_files_is_an_entry_damaged(tmp_path):
    """It is opened several times, by torch too, and each time may be the one too many."""
    code = """
        import resource, sys
        from test_store import *
        warnings.simplefilter("error")
        VocoStore(sys.argv[1]).put(KEYS[0], numbered(1))
        stores, taken = [VocoStore(sys.argv[1]) for _ in range(5)], []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for store in stores:
            try:
                print(number_of(store.get(KEYS[0])))
            except OSError as error:
                print(error.errno)
            os.close(taken.pop())
    """
    said = run_python(code, tmp_path / "s").split()
    assert said[0] == str(errno.EMFILE) and said[-1] == "1.0" and set(said) == {said[0], said[-1]}


# ---- links, sizes, leftovers -------------------------------------------------------------------------------------------


def test_a_linked_folder_is_left_alone(store, tmp_path):
    """Neither read nor moved aside nor removed nor touched: what is behind the link is not the store's."""
    store.put(KEYS[0], numbered(1))
    outside = tmp_path / "outside"
    file_of(store, KEYS[0]).parent.rename(outside)
    (store.path / KEYS[0][:2]).symlink_to(outside)
    [theirs] = outside.iterdir()
    os.utime(theirs, (1, 1))
    for reader in (store, VocoStore(store.path)):  # one remembers the entry, one does not
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            reader.get(KEYS[0])
        with pytest.raises(OSError, match="is a link"):
            reader.remove(KEYS[0])
        assert KEYS[0] not in reader
    with pytest.warns(UserWarning, match="is a link"):
        assert number_of(VocoStore(store.path).get_or_make([KEYS[0]], lambda _: [numbered(2)])[0]) == 2
    assert list(outside.iterdir()) == [theirs] and theirs.stat().st_mtime == 1
    assert number_of(VocoKV.load(theirs)) == 1


def test_the_file_counts_not_the_tensors(tmp_path):
    kv = numbered(1)
    with pytest.raises(ValueError, match="^kv must be at most"):
        VocoStore(tmp_path, max_bytes=kv.nbytes).put(KEYS[0], kv)
    assert len(VocoStore(tmp_path)) == 0


def test_an_entry_larger_than_the_memory_drops_no_other(tmp_path):
    store = VocoStore(tmp_path, memory_bytes=numbered(0).nbytes)
    store.put(KEYS[0], numbered(0))
    store.put(KEYS[1], VocoKV.cat([numbered(1), numbered(1)]))
    assert store.stats()["memory_entries"] == 1 and store.stats()["memory_bytes"] == numbered(0).nbytes
    for key in KEYS[:2]:
        file_of(store, key).unlink()
    assert number_of(store.get(KEYS[0])) == 0 and store.get(KEYS[1]) is None


def test_memory_counts_what_it_holds(tmp_path):
    """A part of something large is kept without the rest."""
    store, large = VocoStore(tmp_path), random_kv(tokens=1000)
    store.put(KEYS[0], large[3:5])
    kv = store.get(KEYS[0])
    assert torch.equal(kv.k, large.k[:, 3:5]) and torch.equal(kv.v, large.v[:, 3:5])
    held = sum(x.untyped_storage().nbytes() for x in (kv.k, kv.v))
    assert held == store.stats()["memory_bytes"] == large[3:5].nbytes


def test_one_warning_for_all_that_cannot_be_kept(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.kv_file, "write_atomically", full)
    with pytest.warns(UserWarning, match="K/V of 3 keys") as caught:
        assert [number_of(kv) for kv in store.get_or_compress([1, 2, 3], Model())] == [1, 2, 3]
    assert len(caught) == 1


def test_what_is_made_was_missed_once(store):
    store.get_or_compress([1, 2], Model())
    store.get_or_compress([2, 3], Model())
    assert {name: store.stats()[name] for name in ("hits", "misses", "made")} == {"hits": 1, "misses": 3, "made": 3}


def test_old_temporary_files_go_when_a_store_is_opened(store):
    """Also without `max_bytes`, and those of a writer that died over the description of the store."""
    store.put(KEYS[0], numbered(1))
    folder = file_of(store, KEYS[0]).parent
    old, new, marker = folder / ".a.partial", folder / ".b.partial", store.path / ".store.json.c.partial"
    for path in (old, new, marker):
        path.write_bytes(b"half")
    for path in (old, marker):
        os.utime(path, (1, 1))
    VocoStore(store.path)
    assert not old.exists() and not marker.exists() and new.exists() and store.keys() == [KEYS[0]]


# ---- locks -------------------------------------------------------------------------------------------------------------


def test_other_keys_need_not_wait(store):
    """Keys of one folder too: two videos that are compressed at once have hundreds."""
    one, other = "ab" + "0" * 62, "ab" + "1" * 62
    done = []

    def make(missing):
        thread = threading.Thread(target=lambda: done.append(store.get_or_make([other], lambda _: [numbered(2)])))
        thread.start()
        thread.join(10)
        assert done, "the other key waits for this one"
        return [numbered(1)]

    assert number_of(store.get_or_make([one], make)[0]) == 1 and number_of(done[0][0]) == 2


def test_a_key_is_locked_by_one_at_a_time(store):
    """Also where one waits for a file that the one before removes, while a third makes another of its name."""
    inside, most = [], []

    def work():
        for _ in range(40):
            with store._locked([KEYS[0]]):
                inside.append(1)
                most.append(len(inside))
                time.sleep(1e-4)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 240 and max(most) == 1


def test_a_system_without_file_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "fcntl", None)
    with pytest.raises(OSError, match="VocoStore needs POSIX file locks"):
        VocoStore(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_locks_leave_no_files(store):
    store.put(KEYS[0], numbered(1))
    with pytest.raises(ZeroDivisionError):
        store.get_or_make(KEYS, lambda missing: [1 / 0])
    assert list((store.path / "locks").iterdir()) == []
    # As a process leaves it that was killed, or another program with something in it.
    (store.path / "locks" / KEYS[1]).write_text("left")
    store.put(KEYS[1], numbered(1))
    assert number_of(store.get(KEYS[1])) == 1


def test_many_keys_need_few_open_files(store, monkeypatch):
    keys, calls = [key_of(i) for i in range(10)], []
    monkeypatch.setattr(store_module, "LOCKS", 4)

    def make(missing):
        calls.append(list(missing))
        assert len(list((store.path / "locks").iterdir())) <= 4
        return [numbered(i) for i in missing]

    got = store.get_or_make([*keys, keys[0]], make)
    assert [number_of(kv) for kv in got] == [*range(10), 0] and calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# ---- a real model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def models():
    """Tiny models and images. Imported here, since the processes above import this file and should start soon."""
    import models

    return models


def changed(model, what: str):
    """A copy of a model and its processor that differs in one thing."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        match what:
            case "a weight of the LLaMA":
                other.model.language_model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
            case "a weight of the vision tower":
                next(other.model.vision_tower.parameters()).view(-1)[0] += 1e-3
            case "its configuration":
                other.config.hide_prefix = not other.config.hide_prefix
            case "its dtype":
                other = other.to(torch.bfloat16)
            case "the processor's settings":
                other.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    return other


CHANGES = (
    "a weight of the LLaMA",
    "a weight of the vision tower",
    "its configuration",
    "its dtype",
    "the processor's settings",
)


def test_keys_say_all_that_k_and_v_depend_on(models):
    model, (a, b) = models.voco_llava(), models.pictures(2)
    keys = model.store_keys([a, b])
    assert all(store_module.KEY.fullmatch(key) for key in keys) and model.store_keys([]) == []
    # Copies, in another order, with the default number written out.
    same = changed(model, "nothing")
    assert same.store_keys([b.copy(), a.copy()], model.processor.num_voco_tokens) == keys[::-1]
    touched = a.copy()
    touched.putpixel((0, 0), tuple(255 - x for x in a.getpixel((0, 0))))
    others = [*keys, *model.store_keys([touched]), *model.store_keys([a], 1)]
    others += [changed(model, what).store_keys([a])[0] for what in CHANGES]
    assert len(set(others)) == len(others) == 4 + len(CHANGES)


def test_what_a_store_gives_is_what_the_model_compresses(store, models):
    model, images = models.voco_llava(), models.pictures(3)
    fresh = model.compress(images)
    for reader in (store, VocoStore(store.path)):
        for kv, expected in zip(reader.get_or_compress(images, model), fresh, strict=True):
            assert torch.equal(kv.k, expected.k) and torch.equal(kv.v, expected.v) and kv.segments == expected.segments
            assert {**expected.meta, "key": kv.meta["key"]} == kv.meta
    assert reader.stats()["hits"] == 3 and reader.stats()["made"] == 0
    prompts = [model.processor.prompt("how many?")] * 3
    inputs = model.processor(None, prompts)
    options = {"max_new_tokens": 4, "do_sample": False}
    kept = model.generate(**inputs, voco_kv=reader.get_or_compress(images, model), **options)
    assert torch.equal(kept, model.generate(**inputs, voco_kv=fresh, **options))


def test_the_cache_of_another_model_is_not_taken(store, models):
    """Under its own key it is never asked for; under ours it is damaged."""
    model, images = models.voco_llava(), models.pictures(1)
    other = changed(model, "a weight of the LLaMA")
    store.get_or_compress(images, other)
    [theirs] = store.keys()
    [ours] = model.store_keys(images)
    file_of(store, ours).parent.mkdir(exist_ok=True)
    file_of(store, ours).write_bytes(file_of(store, theirs).read_bytes())
    with pytest.warns(UserWarning, match="holds the entry of another key"):
        [kv] = VocoStore(store.path).get_or_compress(images, model)
    assert torch.equal(kv.k, model.compress(images)[0].k) and kv.meta["model"] == model.fingerprint()
    assert store.keys() == sorted([ours, theirs])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_store_serves_a_model(tmp_path, dtype, models):
    model, images = models.voco_llava(), models.pictures(2)
    kept = VocoStore(tmp_path, dtype=dtype).get_or_compress(images, model)
    inputs = model.processor(None, [model.processor.prompt("how many?")] * 2)
    options = {"max_new_tokens": 3, "do_sample": False}
    answers = [
        model.generate(**inputs, voco_kv=kv, **options) for kv in (kept, [x.dequantised(torch.float32) for x in kept])
    ]
    assert kept[0].k.dtype == dtype and torch.equal(*answers)
    assert not set(VocoStore(tmp_path).keys()) & set(model.store_keys(images))
