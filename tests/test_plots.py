"""Plots of reports show the numbers of files of results."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from test_report import ATTENTION, CPU, GPU, row, scaling, shown, write
from voco_llama.bench import plots, report
from voco_llama.bench.measure import OURS
from voco_llama.bench.sources import open_sources

ROOT = Path(__file__).parent.parent


def test_plots_are_pictures_of_the_data(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [write(tmp_path / "cpu.json", [*ATTENTION, *scaling()]), write(tmp_path / "gpu.json", [], GPU)]
    first = report.build(paths, tmp_path / "out")
    names = ["report.md", "attention-amd-epyc-1-thread.png", "scaling-amd-epyc-1-thread.png"]
    assert [path.name for path in first] == names and {path.parent for path in first} == {tmp_path / "out"}
    document, *pictures = first.values()
    assert all(picture.startswith(b"\x89PNG\r\n") and len(picture) > 10_000 for picture in pictures)
    assert all(f"]({name})".encode() in document for name in names[1:])
    changed = [*ATTENTION[:2], ATTENTION[2] | {"ratio": 2.0}, *ATTENTION[3:]]
    write(paths[0], [*changed, *scaling()])
    second = list(report.build(paths, tmp_path / "out").values())
    assert second[1] != pictures[0] and second[2] == pictures[1]


def test_bars_end_and_lines_go_where_the_numbers_are(tmp_path):
    pytest.importorskip("matplotlib")
    (source,) = open_sources([write(tmp_path / "x.json", [*ATTENTION, *scaling()])])
    figure = plots._ratios(source.select(["attention"]), "title")
    ends = {round(bar.get_x() + bar.get_width(), 4) for panel in figure.axes for bar in panel.patches}
    assert ends == {row["ratio"] for row in ATTENTION if row["ratio"] is not None}
    ticks = [line.get_xdata()[0] for panel in figure.axes for line in panel.lines if line.get_color() == "black"]
    assert ticks == [11.0]  # that of an implementation that was not timed has no place
    times, memory = plots._scaling(source.select(["scaling"]), plots._styles([source], "scaling"), "title").axes
    lines = {tuple(zip(*line.get_data())) for line in times.lines}
    assert ((4, 2.0), (64, 32.0), (512, 256.0), (2048, 1024.0)) in lines and ((4, 2.0), (64, 500.0)) in lines
    assert ((64, 500.0),) in lines  # the mark where it ends
    assert ((4, 4.0), (64, 64.0), (512, 512.0), (2048, 2048.0)) in {tuple(zip(*line.get_data())) for line in memory.lines}


MEASURED = ROOT / "bench" / "results" / "cpu-amd-epyc-1-thread.json"
# What documents show, and of which tables of that file.
SHOWN = {
    "attention": ["attention"], "kv": ["kv"], "training": ["training"], "plan-costs": ["plan"], "scaling-all": ["scaling"],
    "scaling": ["scaling/frames: attention forward", "scaling/frames: first token"],
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_in_documents_are_of_their_file(name):
    (source,) = open_sources([MEASURED])
    picture = Image.open(ROOT / "bench" / "pictures" / f"{name}.png")
    rows = source.restricted(SHOWN[name]).comparisons().values()
    assert picture.text["Rows"] == plots.digest(rows), "draw it anew with `voco bench report --out`"


@pytest.fixture
def titles(monkeypatch):
    """The titles of all pictures that are made, by the first word."""
    pytest.importorskip("matplotlib")
    found, png = {}, plots._png

    def kept(figure, rows):
        text = figure.get_suptitle()
        found[text.split(",")[0]] = text
        return png(figure, rows)

    monkeypatch.setattr(plots, "_png", kept)
    return found


def test_pictures_of_several_commits_say_so(titles, tmp_path):
    later = CPU | {"date": "2026-11-26T10:00:00+00:00", "commit": "fedcba987654", "uncommitted_changes": True}
    kv = ("kv", "out of a cache", "image")
    new = [row("voco", 1.0, key=kv, ratio=1.0), row("loop", 2.0, key=kv, ratio=2.0)]
    old = [one | {"task": "into a cache"} for one in new]
    paths = [write(tmp_path / "old.json", [*ATTENTION, *scaling(), *old])]
    first = report.build(paths, tmp_path)
    assert len(titles) == 3 and not any("commit" in title for title in titles.values())
    # All of one suite is measured anew, half of another, and nothing of the third.
    paths.append(write(tmp_path / "new.json", [*ATTENTION, *new], later))
    second = report.build(paths, tmp_path)
    assert first.keys() == second.keys()
    assert titles.pop("kv").endswith("\nof several commits: 0123456789ab, fedcba987654+")
    assert len(titles) == 2 and not any("commit" in title for title in titles.values())


def test_plans_are_drawn_as_bars_by_shape(titles, tmp_path):
    keys = [("plan", "what is made once per batch", shape) for shape in ("video", "gqa")]
    ratios = {"tiles": 1.0, "dense mask": 9.0}
    rows = [row(name, 2.0 * ratio, key=key, ratio=ratio) for key in keys for name, ratio in ratios.items()]
    path = write(tmp_path / "x.json", rows)
    (source,) = open_sources([path])
    assert list(source.comparisons()) == keys
    assert [line for line in shown(path) if line.startswith("**plan")] == [f"**{' / '.join(key)}**" for key in keys]
    names = [panel.get_title(loc="left") for panel in plots._ratios(source.select(["plan"]), "title").axes]
    assert names == [f"{task}, {shape}" for _, task, shape in keys]
    report.build([path], tmp_path)
    assert "time relative to ours" in titles["plan"]


def test_a_report_on_chosen_tables(tmp_path):
    pytest.importorskip("matplotlib")
    key = ("kv", "into a cache", "video")
    ours, loop = row("voco", 1.0, key=key, role=OURS), row("loop", 2.0, key=key, ratio=2.0)
    path = write(tmp_path / "x.json", [*ATTENTION, ours, loop])
    written = {path.name: data for path, data in report.build([path], tmp_path, ("kv/into a cache",)).items()}
    text = written.pop("report.md").decode()
    assert "loop" in text and "SDPA" not in text and "What no file has" not in text
    assert list(written) == ["kv-amd-epyc-1-thread.png"]
    with pytest.raises(ValueError, match="--table .*kv/into a cache, but was 'kv/out of it'"):
        report.build([path], tmp_path, ("kv/out of it",))


def test_without_matplotlib_there_is_still_a_report(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "x.json", ATTENTION)
    assert "### attention" in shown(path)
    with pytest.raises(ImportError, match="matplotlib"):
        report.build([path], tmp_path)
