"""--log: loggers get what metrics.jsonl has, and no run ends for one of them."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

import helpers
import score
from helpers import SMALL, refusal
from training import loggers

RUN = "--stage1_steps 1 --stage2_steps 2 --problems 2 --group_size 2".split()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return helpers.save_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def services(monkeypatch):
    """wandb and trackio, as far as we use them: what each chart was told, in turn."""
    told = {}

    def service(name):
        def init(**options):
            chart = told.setdefault((name, options["name"]), [])
            log = lambda numbers, step: chart.append({"step": step} | numbers)  # noqa: E731
            told.setdefault("options", []).append(options)
            return SimpleNamespace(log=log)

        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, __spec__=object()))

    service("wandb")
    service("trackio")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in sys.modules or None)
    return told


def numbers(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in rows]


def test_loggers_get_every_line_and_a_resumed_run_the_same_chart(model_dir, tmp_path, services):
    out = tmp_path / "run"
    flags = [*RUN, "--log", "wandb,trackio"]
    rows = helpers.train_here(score, model_dir, out, *flags)
    (out / "results.json").unlink()
    more = [*RUN[:2], "--stage2_steps", "3", *RUN[4:], "--log", "wandb,trackio", "--resume"]
    again = helpers.train_here(score, model_dir, out, *more)
    charts = {name: chart for name, chart in services.items() if name != "options"}
    assert len(charts) == 2 and len(again) == len(rows) + 1
    assert all(chart == numbers(again) for chart in charts.values())
    assert {options.get("resume") for options in services["options"]} == {"allow"}
    helpers.train_here(score, model_dir, tmp_path / "other", *flags)
    assert len(services) == 5  # another run, other charts


def test_a_logger_that_fails_is_a_warning_and_the_others_go_on():
    seen = []
    told = [("wandb", lambda *_: 1 / 0), ("trackio", lambda step, row: seen.append((step, row)))]
    with pytest.warns(UserWarning, match="--log wandb ends: ZeroDivisionError"):
        loggers.tell(told, {"step": 3, "reward": 0.5, "not_finite": "x"})
    loggers.tell(told, {"step": 4, "reward": 1.0})
    assert seen == [(3, {"reward": 0.5}), (4, {"reward": 1.0})]


def test_what_can_not_be_had_is_said_before_any_work(capsys, monkeypatch, model_dir, tmp_path):
    flags = ("--model", model_dir, "--output_dir", tmp_path / "run", *SMALL, *RUN, "--log")
    assert "choose from tensorboard" in refusal(score, capsys, *flags, "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refusal(score, capsys, *flags, "wandb")
    assert "--log wandb: it is not installed: pip install wandb" in said
    assert not (tmp_path / "run").exists()


def test_one_that_can_not_be_opened_is_one_line(capsys, model_dir, tmp_path, services):
    sys.modules["wandb"].init = lambda **_: 1 / 0
    flags = ("--model", model_dir, "--output_dir", tmp_path / "run", *SMALL, *RUN)
    said = refusal(score, capsys, *flags, "--log", "wandb")
    assert said.endswith("error: --log wandb: ZeroDivisionError: division by zero\n")


def test_tensorboard_has_the_lines_of_a_run(model_dir, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = helpers.train_here(score, model_dir, tmp_path / "run", *RUN, "--log", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in found.Scalars("reward")]
    assert values == [(row["step"], pytest.approx(row["reward"])) for row in rows]
