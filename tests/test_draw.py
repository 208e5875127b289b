"""Pictures of layouts: their cells are the mask, and the file is a picture."""

import sys

import numpy as np
import pytest
from reference import kinds_of, mask_of_layout
from strategies import Pack

from voco_kernels import Image, Text, VocoLayout, draw
from voco_kernels.draw import KINDS, MAX_TOKENS, draw_on

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
