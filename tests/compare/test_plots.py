"""The pictures show what they should, read off the figures before they are saved."""

from __future__ import annotations

import itertools

import pytest
from compare_helpers import records

from selective.compare import build, plots, summarise
from selective.compare.plots import spread, varies, write_plots

LOSSES = {0: [2.0, 2.1, 2.2], 1: [1.9, 2.0, 2.05], 2: [2.0, 2.1, 2.2]}


def figure_of(monkeypatch, folder, seeds=3, policy="Cautious", share=None):
    """The figures of a comparison of one policy and its control, by file name."""
    config = build({"policies": [policy], "lr": [1.0], "seeds": seeds, "steps": 100})
    made = records(config, {(i, 1.0): losses[:seeds] for i, losses in LOSSES.items()})
    for record in made:
        if record["contender"] and share is not None:
            record["share"] = {"step": [0, 50], "by_parameter": {"embedding.weight": share, "head.weight": [0.5, 0.5]}}
    kept = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.update({path.name: figure}) or path)
    write_plots(config, summarise(config, made), made, folder)
    return kept


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_dot_for_each_seed_and_an_interval_where_there_is_one(seeds, monkeypatch, tmp_path) -> None:
    curves, ends = figure_of(monkeypatch, tmp_path, seeds)["loss.png"].axes
    dots = [line for line in ends.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [seeds, seeds]
    assert list(dots[0].get_xdata()) == pytest.approx([-0.1, -0.1, -0.15][:seeds])
    bars = [line for line in ends.lines if line.get_marker() == "None" and line.get_color() != "black"]
    assert len(bars) == (2 if seeds > 1 else 0)
    assert ("no evidence" in ends.get_title()) == (seeds == 1)
    assert [text.get_text() for text in ends.get_yticklabels()] == ["Cautious()", "its random control"]
    for line in curves.lines:
        if line.get_clip_on():  # lines to the labels are outside of the axes
            assert max(line.get_xdata()) <= 100  # nothing at a step that is not there
    assert len(curves.texts) == 3
    assert curves.get_legend() is None


LONG = {"kind": "MGUP", "alpha": 1.125, "gamma": 0.0625, "tau": 0.375, "score": "nesterov", "quantile": "sampled"}


def cut_off(figure) -> list[str]:
    """Texts that are not wholly inside of the picture."""
    figure.canvas.draw()
    width, height = figure.bbox.size
    texts = [figure._suptitle]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *axes.get_yticklabels()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    # Half a pixel: glyphs are anti-aliased beyond the box that they are measured by.
    return [said for said, box in boxes if min(box.x0, box.y0) < -0.5 or box.x1 > width + 0.5 or box.y1 > height + 0.5]


@pytest.mark.parametrize("policy", ["Cautious", LONG], ids=["short", "long"])
def test_no_text_is_cut_off(policy, monkeypatch, tmp_path) -> None:
    figure = figure_of(monkeypatch, tmp_path, policy=policy)["loss.png"]
    assert cut_off(figure) == []
    assert all(axes.bbox.width > 0.3 * figure.bbox.width for axes in figure.axes)


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # matplotlib's own word for it
def test_a_picture_too_narrow_for_its_labels_is_noticed(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(plots, "_width", lambda labels: 6.2)
    assert cut_off(figure_of(monkeypatch, tmp_path, policy=LONG)["loss.png"]) != []


def test_a_panel_of_one_colour_is_left_out(monkeypatch, tmp_path) -> None:
    assert "share.png" in figure_of(monkeypatch, tmp_path, share=[0.1, 0.6])
    assert "share.png" not in figure_of(monkeypatch, tmp_path, policy="MGUP", share=[0.49, 0.5])
    assert "share.png" not in figure_of(monkeypatch, tmp_path)


def test_what_varies() -> None:
    def record(*shares):
        return {"share": {"by_parameter": {str(i): [share] for i, share in enumerate(shares)}}}

    assert varies([record(0.3, 0.5)])
    assert varies([record(0.3), record(0.4)])
    assert not varies([record(0.2969, 0.3)])  # top-K of 128 elements, and of many


def test_labels_do_not_overlap_and_keep_their_order() -> None:
    for heights in ([2.0, 2.001, 2.002, 1.0], [1.0] * 6, [3.0, 1.0, 2.0], [5.0]):
        placed = spread(heights, 0.1)
        in_order = [placed[i] for i in sorted(range(len(heights)), key=lambda i: heights[i])]
        assert all(b - a >= 0.0999 for a, b in itertools.pairwise(in_order))
        assert sum(placed) == pytest.approx(sum(heights))
    assert spread([3.0, 1.0, 2.0], 0.1) == [3.0, 1.0, 2.0]
