"""Pictures: a run's curves from its first step on, names that can be read, and no matplotlib."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from helpers import ROOT
from report import curves, style
from report.curves import plot_curves
from report.growth import draw_growth, slope


def write_rows(run, rows) -> None:
    lines = [json.dumps({"stage": 1, "step": i} | row) + "\n" for i, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(lines))


def share_of(path, color: str) -> float:
    """Of the picture's pixels, those about as coloured."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    near = np.abs(imread(path)[..., :3] - np.array(to_rgb(color))).max(axis=-1) < 0.1
    return float(near.mean())


def score_row(i):
    evaluated = {"eval_acc_t1": 0.4, "eval_acc_t2": 0.6} if i % 4 == 3 else {}
    return {"stage": 1 + (i > 3), "reward": 1.0, "acc_t1": i / 60, "acc_t2": i / 50} | evaluated


def rrr_row(i):
    evaluated = {"eval_acc_t1": 0.5, "eval_retry_given_failure": 0.3} if i % 4 == 3 else {}
    return {"reward": 0.2} | evaluated


def imitation_row(i):
    verdicts = {"acc_t1": 0.5, "acc_t2": 0.6} if i % 20 == 0 else {}
    evaluated = {"eval_acc_t1": 0.4, "eval_acc_t2": 0.6} if i % 4 == 3 else {}
    return {"stage": 1 + i // 20} | verdicts | evaluated


@pytest.mark.parametrize("make_row", [score_row, rrr_row, imitation_row])
@pytest.mark.parametrize("steps", [1, 2, 3, 45])
def test_curves_show_something_from_the_first_step_on(make_row, steps, tmp_path):
    write_rows(tmp_path, [make_row(i) for i in range(steps)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves(tmp_path)
    picture = tmp_path / "curves.png"
    assert share_of(picture, style.COLORS["second attempt"]) > 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}
    before = picture.read_bytes()
    plot_curves(tmp_path)
    assert picture.read_bytes() == before


@pytest.mark.parametrize("text", [None, "", '{"stage": 1, "step": 0, "acc'])
def test_without_a_whole_row_there_is_no_picture_and_no_error(text, tmp_path):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    plot_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_steps_without_any_verdict_are_drawn_empty(tmp_path):
    write_rows(tmp_path, [{"kl_t1": 0.1}] * 3)
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), style.picture(path, "", "") as axis:
        axis.plot([1, 2], [1, 1 / 0])
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_without_matplotlib_a_run_has_one_warning_and_no_picture(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    curves._warn_once.cache_clear()
    write_rows(tmp_path, [score_row(0)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        plot_curves(tmp_path)
        plot_curves(tmp_path)
    assert ["matplotlib is not installed" in str(w.message) for w in caught] == [True]
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_fails_is_a_warning_and_no_end(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no room for a cache")

    monkeypatch.setattr(curves, "_draw", fail)
    curves._warn_once.cache_clear()
    write_rows(tmp_path, [score_row(0)])
    with pytest.warns(UserWarning, match="goes on without curves.png: OSError: no room"):
        plot_curves(tmp_path)


def test_nothing_loads_matplotlib_before_something_is_drawn():
    names = "report.figures, report.tables, report.curves, report.growth, tables, pictures"
    code = f"import sys, {names}; sys.exit('matplotlib' in sys.modules)"
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/bench/papers"}
    subprocess.run([sys.executable, "-c", code], env=paths, check=True)


def test_names_are_set_apart_by_as_little_as_needed():
    assert style.spread([0.0, 10.0, 20.0], 5).tolist() == [0, 10, 20]
    assert style.spread([0.0, 1.0, 20.0], 5).tolist() == [-2, 3, 20]
    assert style.spread([0.0, 1.0, 4.0], 5) == pytest.approx(np.array([0, 5, 10]) + 5 / 3 - 5)
    rng = np.random.default_rng(0)
    for _ in range(100):
        at = np.sort(rng.uniform(0, 40, size=6))
        moved = style.spread(at, 7)
        assert (np.diff(moved) > 7 - 1e-9).all() and moved.sum() == pytest.approx(at.sum())


def test_names_of_lines_that_end_together_do_not_overlap(tmp_path):
    with style.picture(tmp_path / "a.png", "title", "subtitle") as axis:
        for number in range(5):
            style.curve(axis, [0, 1], [[0, number / 9], [0, 0.3]], "C0", f"line {number}")
    renderer = axis.figure._get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axis.texts]
    assert len(boxes) == 5
    boxes.sort(key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:]))
    assert max(box.x1 for box in boxes) <= axis.figure.bbox.x1 + 1


def test_every_colour_means_one_thing():
    same = {"retry after a failure": "second attempt"}  # a second attempt, too
    names = [name for name in style.COLORS if name not in same]
    assert len({style.COLORS[name] for name in names}) == len(names)
    assert all(style.COLORS[one] == style.COLORS[other] for one, other in same.items())


def test_time_in_proportion_to_size_has_slope_one(tmp_path):
    points = {size: [size / 8, size / 4, size / 2] for size in (1, 4, 16, 64)}
    assert slope(points) == pytest.approx(1) and slope({8: [1.0]}) is None
    draw_growth(tmp_path / "growth.png", {"rows": points, "one": {8: [1.0]}})
    assert share_of(tmp_path / "growth.png", "#4338ca") > 1e-3
