"""Reports say what files of results say, mark what was not run, and documents show nothing else."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from voco_llama.bench import report, report_cli, results
from voco_llama.bench.blocks import blocks, differences, rewritten, updates, view_of
from voco_llama.bench.markdown import number
from voco_llama.bench.measure import LEAST_ROUNDS, LIMIT, OURS, PART, PEER
from voco_llama.bench.report import View, render
from voco_llama.bench.sources import missing, open_sources

ROOT = Path(__file__).parent.parent
CPU = {
    "device": "AMD EPYC", "kind": "cpu", "threads": 1, "python": "3.11.7", "torch": "2.13.0", "triton": None,
    "transformers": "5.24.0", "voco_kernels": "0.1.0", "commit": "0123456789ab", "uncommitted_changes": False,
    "date": "2026-11-25T10:00:00+00:00", "load_average": 0.7,
}  # fmt: skip
GPU = CPU | {
    "device": "NVIDIA H200", "kind": "cuda", "cuda": "13.0", "driver": "580.65.06", "uncommitted_changes": True,
    "date": "2026-11-26T10:00:00+00:00",
}  # fmt: skip


def row(name, ms=None, *, key=("attention", "forward", "image"), status="ok", **values):
    """A row as files have it; `ms` is its median."""
    assert (ms is None) == (status != "ok")
    suite, task, shape = key
    empty = dict.fromkeys(("x", "dtype", "ratio", "target", "flops", "bytes", "roof", "peak_bytes"))
    times = {"p20_ms": ms and 0.9 * ms, "p50_ms": ms, "p80_ms": ms and 1.1 * ms, "rounds": 9 * bool(ms)}
    found = {"suite": suite, "task": task, "shape": shape, "name": name, "role": PEER, "status": status, "facts": {}}
    return found | times | empty | values


ATTENTION = [
    row("voco torch", 36.3022, role=OURS, ratio=1.0, flops=1.1e9, roof=0.5, dtype="float32"),
    row("SDPA, causal", 40.0, role=LIMIT, ratio=1.1019, dtype="float32"),
    row("SDPA, dense mask", 1245.5569, ratio=34.3108, target=11.0, flops=1.1e9, roof=0.00061, dtype="float32"),
    row("dense mask", 2.0, role=PART, ratio=0.0551, flops=1.1e9, roof=0.9),
    row("varlen split", status="not run: no GPU"),
    row("FlexAttention", status="cannot run: a |\nb", target=1.4),
    row("Flex, H=None", status="wrong: out"),
]


def write(path, rows, machine=CPU, **values):
    content = {"format_version": results.FORMAT_VERSION, **machine, "ceilings": {}, "rows": rows, **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def shown(path, *tables, **options):
    return render(View((path,), tables, **options), Path(), path.parent).split("\n")


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# ---- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(1245.5569, "1250"), (36.3022, "36.3"), (9.996, "10.0"), (0.0551, "0.0551"), (0.0, "0"), (1.0, "1.00"), (576, "576")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_comparison(tmp_path):
    path = write(tmp_path / "x.json", ATTENTION)
    assert shown(path, "attention/forward/image") == [
        "**attention / forward / image**, float32",
        "",
        "|                      | p50 ms [p20 to p80] | ratio [target] | GFLOP/s | % of roof | status |",
        "| -------------------- | ------------------: | -------------: | ------: | --------: | --- |",
        "| voco torch           | 36.3 [32.7 to 39.9] |           1.00 |    30.3 |      50.0 | ok |",
        "| varlen split         |                     |                |         |           | not run: no GPU |",
        "| FlexAttention        |                     |         [1.40] |         |           | cannot run: a \\| b |",
        "| Flex, H=None         |                     |                |         |           | wrong: out |",
        "| SDPA, dense mask     | 1250 [1120 to 1370] |    34.3 [11.0] |   0.883 |      0.06 | ok |",
        "| dense mask (part)    | 2.00 [1.80 to 2.20] |         0.0551 |         |           | ok |",
        "| SDPA, causal (limit) | 40.0 [36.0 to 44.0] |           1.10 |         |           | ok |",
        "",
        "AMD EPYC, 1 thread, float32, torch 2.13.0, commit `0123456789ab`, 2026-11-25, load 0.7 ([x.json](x.json))",
    ]  # fmt: skip


def test_few_rounds_are_told(tmp_path):
    assert f"fewer than {LEAST_ROUNDS} rounds" in report.HOW_TO_READ
    rows = [row("voco", 1.0, rounds=LEAST_ROUNDS), row("dense", 9.0, rounds=LEAST_ROUNDS - 1), row("loop", 9.0, rounds=1)]
    path = write(tmp_path / "x.json", rows)
    status = {cells(line)[0]: cells(line)[-1] for line in shown(path, "attention")[2:7]}
    assert status == {"": "status", "-----": "---", "voco": "ok", "dense": "ok, 4 rounds", "loop": "ok, 1 round"}
    rows = [one | {"rounds": 3} if one["x"] == 64 else one for one in scaling()]
    path = write(tmp_path / "x.json", rows)
    assert "- SDPA, dense mask (64): ok, 3 rounds" in shown(path) and "- voco (64): ok, 3 rounds" in shown(path)


def test_columns_and_facts_can_be_chosen(tmp_path):
    rows = [row("voco", 1.0, ratio=1.0, facts={"requests": 32}), row("loop", 2.0, ratio=2.0)]
    path = write(tmp_path / "x.json", rows)
    assert cells(shown(path, "attention")[2]) == ["", "p50 ms [p20 to p80]", "ratio"]  # nothing else has a value
    lines = shown(path, "attention", columns=("ratio as times", "requests"))[2:6]
    assert [cells(line) for line in lines] == [
        ["", "times", "requests"], ["----", "----:", "-------:"], ["voco", "1.00", "32"], ["loop", "2.00", ""],
    ]  # fmt: skip


def test_numbers_are_those_of_the_file(tmp_path):
    """Read back from a whole report, without the code that wrote it."""
    rows = [row(f"peer {i}", 0.013 * 7**i, ratio=1.3**i, bytes=2e6, peak_bytes=30_000 * 5**i) for i in range(7)]
    lines = shown(write(tmp_path / "x.json", rows))
    head = next(cells(line) for line in lines if "p50 ms" in line)
    assert head == ["", "p50 ms [p20 to p80]", "ratio", "GB/s", "peak MB"]
    found = {cells(line)[0]: cells(line)[1:] for line in lines if line.startswith("| peer")}
    assert len(found) == 7
    for one in rows:
        times, ratio, rate, memory = found[one["name"]]
        read = [float(x) for x in re.fullmatch(r"(\S+) \[(\S+) to (\S+)\]", times).groups()]
        true = [
            one["p50_ms"],
            one["p20_ms"],
            one["p80_ms"],
            one["ratio"],
            2e6 / one["p50_ms"] / 1e6,
            one["peak_bytes"] / 1e6,
        ]
        assert [*read, float(ratio), float(rate), float(memory)] == pytest.approx(true, rel=5e-3), one["name"]


def test_order_is_ours_then_families_then_parts_and_limits(tmp_path):
    names = ["loop", "SDPA (flash)", "cuDNN flex", "FlexAttention", "something", "varlen split"]
    rows = [row("ours", 1.0), row("limit", 1.0, role=LIMIT), row("part", 1.0, role=PART), *(row(n, 1.0) for n in names)]
    rows.insert(4, row("ours, built", 1.0, role=OURS))
    lines = shown(write(tmp_path / "x.json", rows), "attention")[4:-2]
    assert [cells(line)[0] for line in lines] == [
        "ours", "ours, built", "varlen split", "FlexAttention", "cuDNN flex", "SDPA (flash)", "loop", "something",
        "part (part)", "limit (limit)",
    ]  # fmt: skip


def test_training_has_tokens_and_mfu(tmp_path):
    facts = {"useful_tokens": 16384, "model_flops": 4e13, "peak_flops": 989e12}
    key = ("training", "step", "pool")
    path = write(tmp_path / "x.json", [row("voco", 180.0, key=key, facts=facts)], GPU)
    head, _, line = shown(path, "training")[2:5]
    assert dict(zip(cells(head), cells(line)))["tokens/s"] == "91000"  # 16384 / 0.180
    assert dict(zip(cells(head), cells(line)))["MFU %"] == "22.5"  # 4e13 / 0.180 / 989e12


def scaling():
    key = ("scaling", "frames: attention forward")
    rows = []
    for x, dense in ((4, 2.0), (64, 500.0), (512, None), (2048, None)):
        at = {"key": (*key, f"{x} frames"), "x": x}
        rows.append(row("voco", 0.5 * x, role=OURS, peak_bytes=1_000_000 * x, **at))
        status = "ok" if dense else f"not run: a mask would take {x / 100} GiB"
        rows.append(row("SDPA, dense mask", dense, status=status, peak_bytes=dense and 9_000_000 * x, **at))
    return [*rows[4:], *rows[:4]]  # a report sorts them


def test_scaling_is_one_table_of_times_and_one_of_memory(tmp_path):
    lines = shown(write(tmp_path / "x.json", scaling()))
    begin = lines.index("**scaling / frames: attention forward**")
    assert lines[begin + 2 : begin + 13] == [
        "| p50 ms           |    4 |   64 |     512 |    2048 |",
        "| ---------------- | ---: | ---: | ------: | ------: |",
        "| voco             | 2.00 | 32.0 |     256 |    1020 |",
        "| SDPA, dense mask | 2.00 |  500 | not run | not run |",
        "",
        "| peak MB          |    4 |   64 |     512 |    2048 |",
        "| ---------------- | ---: | ---: | ------: | ------: |",
        "| voco             | 4.00 | 64.0 |     512 |    2050 |",
        "| SDPA, dense mask | 36.0 |  576 | not run | not run |",
        "",
        "- SDPA, dense mask (512, 2048): not run: a mask would take 5.12 GiB",
    ]
    assert shown(tmp_path / "x.json", "scaling", columns=("memory",))[2:6] == lines[begin + 7 : begin + 11]


def test_table_7_and_the_paper(tmp_path):
    def system(name, length, flops, **times):
        facts = {"kv_length": length, "kv_bytes": 500_000 * length, "flops_to_first": {"32": flops, "64": 2 * flops}}
        return [row(name, ms, key=("table7", task, "7B"), facts=facts, role=OURS) for task, ms in times.items()]

    first, decode = "time to first token", "decode"
    rows = [
        *system("voco 2", 2, 5e11, **{first: 3.0, decode: 4.0}),
        *system("full caching", 576, 1e12, **{first: 6.0, decode: 6.0}),
        *system("no cache", 0, 1e13, **{first: 12.0}),
    ]
    rows[0]["facts"]["targets"] = {"kv_change": -0.998, "flops_change": -0.948}
    next(r for r in rows if r["name"] == "no cache").update(ratio=4.0, target=3.5)
    path = write(tmp_path / "x.json", rows, GPU)
    assert shown(path, "table7")[2:-2] == [
        "|                                              |    no cache | full caching |        voco 2 |",
        "| -------------------------------------------- | ----------: | -----------: | ------------: |",
        "| K/V length                                   |           0 |          576 |             2 |",
        "| K/V, MB                                      |           0 |          288 |          1.00 |",
        "| - against full caching, %                    |             |              | -99.7 [-99.8] |",
        "| TFLOPs to the first token, 32 tokens of text |        10.0 |         1.00 |         0.500 |",
        "| - against no cache, %                        |             |        -90.0 | -95.0 [-94.8] |",
        "| TFLOPs to the first token, 64 tokens of text |        20.0 |         2.00 |          1.00 |",
        "| - against no cache, %                        |             |        -90.0 |         -95.0 |",
        "| time to first token, ms                      |        12.0 |         6.00 |          3.00 |",
        "| - against no cache, %                        |             |        -50.0 |         -75.0 |",
        "| ratio [target]                               | 4.00 [3.50] |              |               |",
        "| decode, ms                                   |             |         6.00 |          4.00 |",
    ]
    paper = {cells(line)[0]: cells(line)[1:] for line in shown(path, "paper")[4:]}
    assert paper["K/V, MB"] == ["", "302", "0.525"] and paper["time, ms"] == ["440.5", "154.9", "134.0"]
    assert "arXiv 2406.12275" in "\n".join(shown(path))  # the whole report shows it too, in a table of its own


def test_a_summary(tmp_path):
    back = ("attention", "forward + backward", "image")
    rows = [*ATTENTION, row("voco torch", 90.0, key=back, ratio=1.0), row("SDPA, dense mask", 180.0, key=back, ratio=2.0)]
    rows.append(row("voco torch", 5.0, key=("attention", "forward", "frames"), ratio=1.0))
    path = write(tmp_path / "x.json", rows)
    chosen = {"rows": ("SDPA, dense mask as dense", "varlen split"), "columns": ("frames", "image as one image")}
    assert shown(path, "attention", summary="ratio", **chosen)[:-2] == [
        "| ratio [target]            |   one image |",
        "| ------------------------- | ----------: |",
        "| varlen split, forward     |     not run |",
        "| dense, forward            | 34.3 [11.0] |",
        "| dense, forward + backward |        2.00 |",
        "",
        "- varlen split, forward: not run: no GPU",
    ]
    lines = shown(path, "attention/forward", summary="p50", rows=("voco torch",))
    assert lines[:3:2] == ["| p50 ms     | image | frames |", "| voco torch |  36.3 |   5.00 |"]


# ---- whole reports -----------------------------------------------------------------------------------------------------


def test_several_devices(tmp_path):
    ceilings = {"bfloat16": {"matmul_tflops": 780.123, "copy_gb_per_s": 4300.0}}
    kv = row("voco cuda", 0.1, key=("kv", "injection", "image"))
    paths = [
        write(tmp_path / "gpu-new.json", [kv], GPU | {"date": "2026-11-27T10:00:00+00:00"}),
        write(tmp_path / "cpu.json", ATTENTION),
        write(tmp_path / "gpu.json", [kv, row("voco", 1.0, key=("new suite", "a", "b"))], GPU, ceilings=ceilings, tests={}),
    ]
    lines = render(View(tuple(paths)), Path(), tmp_path).split("\n")
    files = lines[lines.index("## Files") : lines.index("## NVIDIA H200")]
    table = {cells(line)[0]: cells(line)[1:] for line in files if line.startswith("|")}
    assert table["device"] == ["NVIDIA H200", "NVIDIA H200", "AMD EPYC"]
    assert table[""][:3] == ["[gpu.json](gpu.json)", "[gpu-new.json](gpu-new.json)", "[cpu.json](cpu.json)"]
    assert table["commit (+: changed)"] == ["`0123456789ab+`", "`0123456789ab+`", "`0123456789ab`"]
    assert table["matmul, bfloat16, TFLOP/s"] == ["780", "", ""] and table["copy, bfloat16, GB/s"] == ["4300", "", ""]
    assert "triton" not in table and table["load at the beginning"] == ["0.7"] * 3
    headings = [line for line in lines if line.startswith("##")]
    assert headings == [
        "## Files", "## NVIDIA H200", "### kv", "### new suite", "## AMD EPYC, 1 thread", "### attention",
        "## What no file has",
    ]  # fmt: skip
    assert lines[-2:] == [
        "- not run: plan, kv, two_stage, table7, scaling and training on a CPU",
        "- not run: attention, plan, two_stage, table7, scaling and training on a GPU",
    ]


def test_tables_stand_under_the_heading_of_their_suite(tmp_path):
    rows = [row(f"{suite} {task}", 1.0, key=(suite, task, "s")) for suite in ("kv", "plan") for task in ("a", "b")]
    lines = shown(write(tmp_path / "x.json", rows))
    order = [line.split("|")[1].strip() for line in lines if re.match(r"\| (kv|plan) ", line)]
    assert order == ["plan a", "plan b", "kv a", "kv b"]
    assert lines.index("### plan") < lines.index("**plan / a / s**") < lines.index("### kv") < lines.index("**kv / a / s**")


def test_what_was_not_reached_is_said(tmp_path):
    path = write(tmp_path / "x.json", ATTENTION, GPU, unfinished={"attention": 3})
    assert shown(path)[-1] == "- not reached in time: 3 of attention on NVIDIA H200"


def test_a_file_without_rows(tmp_path):
    path = write(tmp_path / "x.json", [])
    assert missing(open_sources([path]))[0] == (
        "not run: attention, plan, kv, two_stage, table7, scaling and training on a CPU"
    )
    assert shown(path)[-1].endswith("on a GPU")
    with pytest.raises(ValueError, match="--table"):
        shown(path, "attention")


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ({"tables": ("attention/forwards",)}, "--table .*attention/forward, but was 'attention/forwards'"),
        ({"summary": "speed"}, "--summary .*ratio.*'speed'"),
        ({"rows": ("nobody",)}, "--row .*voco torch.*'nobody'"),
        ({"summary": "ratio", "columns": ("p50",)}, "--column .*image.*'p50'"),
        ({"columns": ("image",)}, "--column .*p50.*'image'"),
        ({"rows": ("voco torch as SDPA", "SDPA, causal as SDPA")}, "--row .*different"),
    ],
)
def test_unknown_names(tmp_path, view, said):
    path = write(tmp_path / "x.json", ATTENTION)
    with pytest.raises(ValueError, match=said):
        render(View((path,), **view), Path(), tmp_path)


@pytest.mark.parametrize("text", ["{}", "none", '{"format_version": 1}'])
def test_no_file_of_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is no file of results"):
        shown(tmp_path / "x.json")


# ---- documents ---------------------------------------------------------------------------------------------------------

BLOCK = "<!-- begin: voco bench report {} -->\n{}<!-- end -->\n"


@pytest.fixture
def document(tmp_path):
    """A document in a folder of a repository, with two blocks that hold nothing yet."""
    write(tmp_path / "results" / "x.json", ATTENTION)
    (tmp_path / "pyproject.toml").touch()
    path = tmp_path / "docs" / "doc.md"
    path.parent.mkdir()
    summary = "--summary ratio --row 'SDPA, dense mask'\n  --table attention results/x.json"
    fenced = f"```\n{BLOCK.format('nothing', '')}```\n"
    path.write_text(
        f"# A\n{BLOCK.format(summary, '')}text\n{fenced}{BLOCK.format('--table files results/x.json', 'old' + chr(10))}end"
    )
    return path


def test_update_and_check(document):
    before = document.read_text()
    assert differences([document]) == [f"{document}:2", f"{document}:10"]
    assert document.read_text() == before
    for path, data in updates([document]).items():
        path.write_bytes(data)
    after = document.read_text()
    assert differences([document]) == [] and updates([document]) == {}
    assert "| SDPA, dense mask | 34.3 [11.0] |" in after and "([x.json](../results/x.json))" in after
    assert "old" not in after and after.count("| device ") == 1 and after.endswith("<!-- end -->\nend")
    kept = re.sub(r"(<!-- begin[^>]*-->\n).*?(<!-- end)", r"\1\2", after, flags=re.DOTALL)
    assert kept == before.replace("old\n", "")  # nothing changed but what is between
    document.write_text(after.replace("34.3", "34.4"))
    assert differences([document]) == [f"{document}:2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x\n<!-- begin: voco bench report a.json -->\n", "line 2 .*must end"),
        (f"<!-- begin: voco bench report a.json -->\n{BLOCK.format('a.json', '')}", "line 1 .*before line 2"),
        ("\n\n<!-- end -->\n", "line 3 must end a block"),
        ("<!-- begin: voco bench report a.json\n", "line 1 .*closed"),
        (BLOCK.format("", ""), "doc.md:1: files must"),
        (BLOCK.format("--nothing results/x.json", ""), "doc.md:1: .*--nothing"),
        (BLOCK.format("results/absent.json", ""), "doc.md:1: .*absent.json is no file of results"),
        (BLOCK.format("--table kv results/x.json", ""), "doc.md:1: --table"),
    ],
)
def test_a_wrong_block_stops_everything(document, text, said):
    good = document.with_name("good.md")
    good.write_bytes(document.read_bytes())
    document.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        updates([good, document])
    assert str(document) in str(error.value)
    done = run("--update", str(good), str(document))
    assert isinstance(done.exception, ValueError) and good.read_text().count("34.3") == 0


def run(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(report_cli.report)
    return CliRunner().invoke(app, list(arguments))


def test_the_command(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--summary", "ratio", "--row", "SDPA, dense mask", "--table", "attention", "results/x.json")
    assert done.exit_code == 0 and "| SDPA, dense mask | 34.3 [11.0] |\n" in done.stdout
    assert run("--check", "docs/doc.md").exit_code == 1
    assert run("--update", "docs/doc.md").exit_code == 0
    assert run("--check", "docs/doc.md").exit_code == 0
    # What a block says is the command that prints it.
    assert done.stdout.split("\n")[:3] == document.read_text().split("\n")[3:6]
    assert run("results/x.json", "--out", "out").exit_code == 0
    assert {path.name for path in Path("out").iterdir()} == {"report.md", "attention-amd-epyc-1-thread.png"}
    assert "[x.json](../results/x.json)" in Path("out/report.md").read_text()
    for wrong in ([], ["docs/doc.md"], ["--update"], ["--check", "--update", "docs/doc.md"], ["--out", "out"]):
        assert isinstance(run(*wrong).exception, ValueError), wrong
    assert isinstance(run("results/x.json", "--out", "other", "--summary", "ratio").exception, ValueError)
    assert run("--help").exit_code == 0 and not Path("other").exists()


def documents():
    done = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in done.stdout.split()] or sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_show_what_files_say(path):
    text, changed = rewritten(path)
    places = [f"{path.name}:{line}" for line in changed]
    assert not changed, f"`voco bench report --update {path.relative_to(ROOT)}` writes {', '.join(places)}"
    for block in blocks(text):
        shown = "\n".join(text.split("\n")[block.first : block.last])
        linked = {(path.parent / link).resolve() for link in re.findall(r"\]\(([^)]+\.json)\)", shown)}
        named = {(ROOT / file).resolve() for file in view_of(block.arguments).files}
        # Every number has its file, which belongs to the repository, and a reader finds it.
        assert linked <= named and all(file.is_relative_to(ROOT) for file in named)
        assert linked or not re.search(r"\d", shown)
