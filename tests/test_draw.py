"""Pictures of layouts: their cells are the mask, and the file is a picture."""

import sys

import numpy as np
import pytest
from reference import kinds_of, mask_of_layout
from strategies import Pack

from voco_kernels import Image, Text, VocoLayout, draw, draw_plan
from voco_kernels.draw import KINDS, MAX_TOKENS, computed_boxes, draw_on, draw_plan_on
from voco_kernels.tiles import Geometry, build_tiles, executed_pairs, useful_pairs

LAYOUTS = {
    "two documents": VocoLayout.from_spans([[Text(2), Image(4, 2), Text(4)], [Image(3, 1), Text(2)]], isolated=False),
    "isolated": VocoLayout.from_spans([[Text(30), *[Image(9, 2)] * 3, Text(8)]], isolated=True),
    "padding": Pack([-1, 1, 1, 0, -1], [False, False, True, True, False], [0, 5]).layout(False),
    "one token": VocoLayout.from_spans([[Text(1)]], isolated=True),
}


@pytest.fixture
def axes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    return figure.add_subplot()


@pytest.mark.parametrize("name", LAYOUTS)
def test_cells_are_the_mask(name, axes):
    layout = LAYOUTS[name]
    draw_on(axes, layout)
    cells, above, beside = (np.asarray(image.get_array()) for image in axes.images)
    segment = layout.segment_ids.numpy()
    own = (segment[:, None] == segment[None, :]) & (segment[:, None] > 0)
    np.testing.assert_array_equal(cells, np.where(mask_of_layout(layout), np.where(own, 1, 2), 0))
    names = {"private": "vision", "voco": "VoCo", "open": "text", "padding": "padding"}
    kinds = [list(KINDS).index(names[kind]) for kind in kinds_of(layout)]
    assert above.tolist() == [kinds] and beside[:, 0].tolist() == kinds
    # y grows downwards: the first query is the top row.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_the_legend_names_what_is_there(axes):
    draw_on(axes, LAYOUTS["isolated"])
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"token: vision", "token: VoCo", "token: text"} <= labels and "token: padding" not in labels
    assert "isolated" in axes.get_title()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_png_is_written(name, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = draw(LAYOUTS[name], tmp_path / "mask.png")
    assert path == tmp_path / "mask.png"
    pixels = image.imread(path)
    assert pixels.shape[0] > 300 and pixels.std() > 0


def test_the_path_may_be_a_string(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(LAYOUTS["padding"], str(tmp_path / "mask.png")).is_file()


@pytest.mark.parametrize("tokens", [0, MAX_TOKENS + 1])
def test_too_few_or_too_many_tokens(tokens, tmp_path):
    layout = VocoLayout.from_spans([[Text(tokens)]], isolated=True)
    with pytest.raises(ValueError, match=rf"^layout must be of 1 to {MAX_TOKENS} tokens to be drawn, but was of {tokens}$"):
        draw(layout, tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib"):
        draw(LAYOUTS["padding"], tmp_path / "mask.png")


# ---- the plan ----------------------------------------------------------------------------------------------------------

SMALL = Geometry(rows=8, small_rows=2, keys=4)
STEPS = (4, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_boxes_hold_every_visible_pair_and_no_other_twice(name):
    layout = LAYOUTS[name]
    plan = build_tiles(layout, SMALL)
    rows, keys = plan.row_index.numpy(), plan.key_index.numpy()
    drawn = np.zeros((layout.num_tokens,) * 2, int)
    masked = np.zeros_like(drawn)
    for top, height, left, width, is_edge in computed_boxes(plan, STEPS):
        drawn[top : top + height, left : left + width] += 1
        masked[top : top + height, left : left + width] += is_edge
    mask = mask_of_layout(layout)[rows][:, keys]
    assert drawn.max() <= 1 and drawn[mask].all()
    # What is computed without a mask is visible.
    assert mask[(drawn == 1) & (masked == 0)].all()


def test_the_plan_says_how_much_is_useful(axes):
    layout = LAYOUTS["isolated"]
    draw_plan_on(axes, layout, SMALL, STEPS)
    useful, computed = useful_pairs(layout), executed_pairs(build_tiles(layout, SMALL), "forward", *STEPS)
    assert f"{useful:,} of {computed:,} computed pairs are useful" in axes.get_title()
    cells = np.asarray(axes.images[0].get_array())
    assert (cells > 0).sum() == useful


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_png_of_a_plan_is_written(name, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = draw_plan(LAYOUTS[name], tmp_path / "plan.png")
    assert image.imread(path).std() > 0


def test_a_plan_of_too_many_tokens(tmp_path):
    layout = VocoLayout.from_spans([[Text(MAX_TOKENS + 1)]], isolated=True)
    with pytest.raises(ValueError, match=rf"^layout must be of 1 to {MAX_TOKENS} tokens to be drawn, but was of"):
        draw_plan(layout, tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())
