"""`voco cache`: what it prints about a store, what it removes, and what it refuses."""

import json
import os
from datetime import datetime

import pytest
import torch
from rich.console import Console
from test_cli import voco_here
from voco_llama import cache_cli

from voco_kernels import VocoKV, VocoStore

# The first two begin alike.
KEYS = ["abc1" + "0" * 60, "abc2" + "0" * 60, "f" * 64]


def kv_of(i: int) -> VocoKV:
    x = torch.full((3, i + 1, 2, 16), float(i))
    meta = {"model": f"model{i}" + "0" * 58, "image": f"image{i}" + "0" * 58}
    return VocoKV(x, x.clone(), segments=[(9, i + 1)], meta=meta)


@pytest.fixture
def store(tmp_path) -> VocoStore:
    """Three entries, the last used first."""
    store = VocoStore(tmp_path / "store")
    for i, key in enumerate(KEYS):
        store.put(key, kv_of(i) if i else kv_of(i).quantised(torch.int8))
        os.utime(file_of(store, key), (1000 - i, 1000 - i))
    return store


@pytest.fixture
def run(store, monkeypatch, capsys):
    """Run `voco cache ...`; its exit status, output and messages."""
    monkeypatch.setattr(cache_cli, "output", Console(width=200))

    def run(*arguments):
        status = voco_here(["cache", *arguments], store.path.parent, monkeypatch)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def file_of(store, key):
    return store.path / key[:2] / f"{key}.safetensors"


def flip(path) -> None:
    """One bit of the last number."""
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)


def test_ls_json(store, run):
    status, out, _ = run("ls", "store", "--json")
    rows = json.loads(out)
    assert status == 0 and [row["key"] for row in rows] == KEYS[::-1]
    assert [row["used"] for row in rows] == [datetime.fromtimestamp(998 + i).isoformat(" ") for i in range(3)]
    for i, row in enumerate(reversed(rows)):
        assert (row["voco"], row["layers"], row["dtype"]) == (i + 1, 3, "float32" if i else "int8")
        assert row["bytes"] == file_of(store, KEYS[i]).stat().st_size
        assert (row["model"], row["image"]) == (kv_of(i).meta["model"], kv_of(i).meta["image"])


def test_ls_table(store, run):
    status, out, _ = run("ls", "store")
    lines = [line for line in out.splitlines() if "│" in line]
    assert status == 0 and len(lines) == 3
    for i, line in enumerate(reversed(lines)):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[0] == KEYS[i][: cache_cli.SHOWN] and cells[1:4] == [str(i + 1), "3", "float32" if i else "int8"]
        assert cells[4] == f"{file_of(store, KEYS[i]).stat().st_size:,}"
        assert cells[6] == kv_of(i).meta["model"][: cache_cli.SHOWN]
        assert cells[7] == kv_of(i).meta["image"][: cache_cli.SHOWN]


def test_ls_uses_no_entry_and_moves_none(store, run):
    """It is no use that would keep an entry from being removed, and it shows what it cannot read."""
    file_of(store, KEYS[0]).write_bytes(b"damaged")
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*.safetensors")}
    _, out, _ = run("ls", "store", "--json")
    assert {row["key"]: "damaged" in row for row in json.loads(out)} == dict(zip(KEYS, (True, False, False)))
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*.safetensors")} == before
    assert run("ls", "store")[1].count("damaged") == 1


def test_verify(store, run):
    assert run("verify", "store")[:2] == (0, "3 whole entries, 0 damaged\n")
    flip(file_of(store, KEYS[1]))
    with pytest.warns(UserWarning, match="damaged entry"):
        status, out, _ = run("verify", "store", "--json")
    assert status == 1 and json.loads(out) == {"entries": 2, "damaged": [KEYS[1]]}
    assert not file_of(store, KEYS[1]).exists() and len(list((store.path / "damaged").iterdir())) == 1
    assert json.loads(run("verify", "store", "--json")[1]) == {"entries": 2, "damaged": []}
    flip(file_of(store, KEYS[2]))
    with pytest.warns(UserWarning, match="damaged entry"):
        assert run("verify", "store")[:2] == (1, f"1 whole entries, 1 damaged\n{KEYS[2]}\n")


def test_rm(store, run):
    status, out, _ = run("rm", "store", "abc1", "f", "--json")
    assert status == 0 and json.loads(out) == [KEYS[0], KEYS[2]] and store.keys() == [KEYS[1]]
    assert run("rm", "store", KEYS[1])[:2] == (0, f"removed 1 entries\n{KEYS[1]}\n") and store.keys() == []


def test_rm_all(store, run):
    assert json.loads(run("rm", "store", "--all", "--json")[1]) == KEYS
    assert store.keys() == [] and (store.path / "store.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rm", "store"), "keys must be given, or --all"),
        (("rm", "store", "abc1", "--all"), "keys must be given, or --all"),
        (("rm", "store", "f", "abc"), "'abc' is that of 2"),
        (("rm", "store", "f", "0"), "'0' is that of 0"),
        (("rm", "store", "../f"), "'../f' is that of 0"),
        (("ls", "elsewhere"), "store must be the folder of a VocoStore, but was elsewhere"),
        (("verify", "elsewhere"), "store must be the folder of a VocoStore"),
        (("rm", "elsewhere", "--all"), "store must be the folder of a VocoStore"),
        (("stats", "elsewhere"), "store must be the folder of a VocoStore"),
    ],
)
def test_bad_input_removes_and_makes_nothing(store, run, arguments, said):
    status, out, err = run(*arguments)
    assert status == 1 and out == "" and said in err and store.keys() == KEYS
    assert os.listdir(store.path.parent) == ["store"]


def test_a_store_of_another_version(store, run):
    (store.path / "store.json").write_text('{"format_version": 2}')
    status, _, err = run("rm", "store", "--all")
    assert status == 1 and "format version 2" in err and file_of(store, KEYS[0]).is_file()


def test_stats(store, run):
    flip(file_of(store, KEYS[1]))
    with pytest.warns(UserWarning, match="damaged entry"):
        store.verify()
    size = sum(file_of(store, key).stat().st_size for key in (KEYS[0], KEYS[2]))
    status, out, _ = run("stats", "store", "--json")
    assert status == 0 and json.loads(out) == {"entries": 2, "bytes": size, "moved aside": 1}
    assert f"{size:,}" in run("stats", "store")[1]
