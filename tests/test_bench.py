"""Every timing script at its smallest size: it runs, and ends in JSON with what it promises."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_growth
import bench_grpo
import bench_roofline
import bench_sampler
import bench_scaling
import bench_update
import common
import gpu
import helpers
import measure_memory
from gpu_parts import decode, update
from gpu_parts.lines import Part, allow_cudnn, wrong
from helpers import refusal, save_random_model
from sampler import Sampler
from sampling import attention
from sampling.attention import room_for
from sampling.steps import Graphs
from training import lora
from training.models import load_model
from training.scorer import Scorer

ALWAYS = {"bench", "hardware", "threads", "torch", "transformers", "commit", "flags"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("bench") / "model")


def last_line(script, capsys, **flags):
    """What `script.main` prints last, parsed, and everything that it prints."""
    script.main(script.Config(device="cpu", **flags))
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    assert set(figures) >= ALWAYS
    return figures, out


def test_sampler_against_generate(model, capsys):
    sizes = {"prompts": 2, "group_size": 2, "shortest_prompt": 3, "longest_prompt": 6}
    sizes |= {"median_tokens": 3, "max_new_tokens": 5, "instruction": 2, "try_compiled": False}
    figures, out = last_line(bench_sampler, capsys, model=model, repeats=1, **sizes)
    for mode in ("greedy", "sampled"):
        for turn in ("turn1", "turn2", "whole"):
            assert figures[f"speedup_{mode}_{turn}"] > 0
    assert figures["greedy_agreement"] == 1  # a random tiny model leaves no near ties
    assert "| greedy | ours |" in out


def test_roofline(model, capsys):
    small = {"batches": "1,2", "context": 24, "steps": 4, "probe_mib": 1, "probe_size": 64}
    figures, _ = last_line(bench_roofline, capsys, model=model, repeats=1, **small)
    for batch in (1, 2):
        assert {f"speedup_batch{batch}", f"roofline_share_batch{batch}"} <= set(figures)


def test_a_gpus_roofline_is_measured_with_large_probes_and_in_one_width(model, monkeypatch):
    config = bench_roofline.Config(device="cuda", model=model, dtype="float32")
    assert config.probe_mib == 2**13 and config.probe_size == config.probe_columns == 2**13
    config.device, config.repeats, seen = "cpu", 1, []

    def extending(sampler, rollout, count, config):
        first = int(rollout.lengths.max()) + 1  # tokens of a row when the first one is sampled
        seen.append((first, first + count))
        return 1.0

    for name in ("bandwidth", "arithmetic", "generate_step"):
        monkeypatch.setattr(bench_roofline, name, lambda *_: None)
    monkeypatch.setattr(bench_roofline, "extending", extending)
    loaded, tokenizer = common.load(model, config, 500)
    bench_roofline.at_batch(loaded, Sampler(loaded, tokenizer), 2, config)
    assert {-(-tokens // 128) for span in seen for tokens in span} == {4}  # a width of 512
    assert all(room_for(first, 1000) >= last for first, last in seen)  # the cache does not grow


def test_weights_are_cast_without_the_angles_of_positions(tiny):
    config = common.BenchConfig(device="cpu", dtype="bfloat16")
    model = common.ready(copy.deepcopy(tiny("llama")), config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = 10000.0 ** -(torch.arange(0, 8, 2) / 8)  # of heads of 8, as the paper has them
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_cost_of_a_step(tiny):
    model = tiny("llama")  # 2 layers, hidden 32, 4 heads and 2 KV heads of 8, untied
    weights = sum(p.numel() for p in model.parameters()) - model.config.vocab_size * 32
    needed, flops = bench_roofline.cost(model, batch=3, context=10)
    assert needed == 4 * (weights + 3 * 10 * 2 * 2 * 2 * 8)
    assert flops == 2 * weights * 3 + 4 * 3 * 10 * 2 * 4 * 8


@pytest.mark.slow
def test_grpo_step_without_trl(model, capsys):
    sizes = {"prompts": 2, "group_size": 2, "median_tokens": 2, "max_new_tokens": 4, "steps": 1}
    figures, out = last_line(bench_grpo, capsys, model=model, repeats=1, **sizes)
    assert "TRL left out" in out
    for kl in ("k3", "exact"):
        assert figures[f"speedup_{kl}_over_trl"] is None
        assert figures["sides"][f"ours, {kl}"]["peak_mib"][0] > 0


def test_update(capsys):
    small = {"tokens": "64", "vocabularies": "500", "hidden_size": 8}
    figures, _ = last_line(bench_update, capsys, repeats=1, **small)
    assert {"speedup_500_64", "memory_ratio_500_64"} <= set(figures)
    assert 0 <= figures["gradient_difference"] < 1e-5


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(bench_update, "PLAIN_COPIES", 10**9)
    config = bench_update.Config(device="cpu")
    assert not bench_update.fits("plain", 64, 500, config)
    assert bench_update.fits("chunked", 64, 500, config)
    run = {"seconds": [1.0], "grown_mib": [10.0]}
    assert "does not fit, about 128" in bench_update.row(64, 500, {"chunked": run}, scale=2.0)


def test_growth(tmp_path, capsys):
    sizes = {"hidden_size": 64, "layers": 1, "batches": "1,2", "lengths": "2,3"}
    sizes |= {"hidden_sizes": "32", "tokens": "64,128", "output": str(tmp_path / "growth")}
    figures, _ = last_line(bench_growth, capsys, repeats=1, **sizes)
    assert isinstance(figures["slope_batch"], float) and figures["slope_model"] is None
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert (tmp_path / "growth.csv").read_text().splitlines()[0] == "series,size,round,seconds"


@pytest.mark.slow
def test_scaling(capsys):
    small = {"hidden_size": 64, "layers": 1, "vocabulary": 200}
    small |= {"prompt": 4, "new_tokens": 2, "steps": 2}
    figures, _ = last_line(bench_scaling, capsys, repeats=1, sizes="1,2", **small)
    assert figures["speedup_2"] > 0
    ranks = figures["peak_mib"]["training"]
    assert [len(ranks[size]) for size in "12"] == [1, 2]


def test_results_do_not_depend_on_the_order_of_rows(model):
    """Rows are handed to generate sorted, in several calls, and come back in their own order."""
    sizes = {"prompts": 3, "group_size": 2, "shortest_prompt": 2, "longest_prompt": 9}
    sizes |= {"median_tokens": 3, "max_new_tokens": 6}
    config = bench_sampler.Config(model=model, device="cpu", **sizes)
    loaded, _ = common.load(model, config)
    work = bench_sampler.draw(config, loaded.config.vocab_size)

    def sampled(cache: str, rows: int) -> list:
        setting = bench_sampler.Setting(cache, rows)
        return bench_sampler.theirs(loaded, work, 0.0, config, setting)["ids"]

    one, two = sampled("dynamic", 6), sampled("static", 2)
    assert one == two
    assert [list(map(len, turn)) for turn in one] == list(map(list, work.lengths))


STEPS = [
    ("score", {}),
    ("score", {"checkpointing": True}),
    ("rrr", {"lora": 16}),
    ("rrr", {"lora": 16, "checkpointing": True}),
]


def right(phases: dict) -> bool:
    assert {*phases} == {"sampling", "updating"}
    return all(0.97 < row["ratio"] < 1.03 for row in phases.values())


@pytest.mark.parametrize("script, flags", STEPS)
def test_memory_by_the_formula_is_what_a_real_step_takes(script, flags):
    phases = measure_memory.measure(measure_memory.Config("5M", script, **flags))
    assert right(phases), phases


def measured(out):
    phases = measure_memory.measure(measure_memory.Config("5M", dtype="bfloat16"))
    out.with_suffix(f".{measure_memory.distributed.rank()}").write_text(json.dumps(phases))


def test_memory_by_the_formula_is_what_each_of_two_ranks_takes_in_bfloat16(tmp_path):
    assert helpers.finish(helpers.start(measured, tmp_path / "phases", world=2)) == [0, 0]
    for rank in range(2):
        phases = json.loads((tmp_path / f"phases.{rank}").read_text())
        assert right(phases), phases


def test_memory_counts_storages_once_and_while_they_live():
    with measure_memory.Live() as live:
        whole = torch.zeros(2**20)
        same = whole[1:].view(-1, 3).T.add_(1)
        assert live.now == 2**22
        more = whole + 1
        del more
        assert (live.now, live.peak) == (2**22, 2**23)
        whole.untyped_storage().resize_(0)
        assert live.now == 0 and len(same)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_memory_counts_the_parameters_of_adapters(lora_rank, tmp_path):
    shape = measure_memory.build("5M", tmp_path / "model")
    model, _ = load_model(str(tmp_path / "model"))
    assert shape.adapters(lora_rank) == lora.count(model, lora_rank)
    assert shape.blocks == sum(p.numel() for p in model.get_decoder().layers.parameters()) + 256


def test_memory_by_arithmetic_and_flags_from_any_directory(tmp_path):
    bench = Path(common.__file__).parent

    def says(*command: str) -> str:
        command = [sys.executable, bench / command[0], *command[1:]]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    assert "| Qwen2.5-7B | " in says("memory.py")
    assert "--shortest_prompt" in says("bench_sampler.py", "--help")
    assert "--hidden_size" in says("bench_scaling.py", "--help")


def fails(part):
    part.measure("fails", lambda: 1 / 0)
    part.measure("is wrong", lambda: {"off": 0.12345} | wrong(log_probs=False, tokens=True))
    part.measure("is fine", lambda: {"off": 0.12345} | wrong(log_probs=True))
    part.section("quiet", lambda: None)
    part.section("loud", lambda: [][0])


def raises(part):
    raise SystemExit("no more")


def hangs(part):
    process = subprocess.Popen(["sleep", "60"])
    part.write(name="started", pid=process.pid)
    part.measure("sleeps", process.wait)


def leaves(part):
    part.measure("leaves", os._exit, 0)


def dies(part):
    part.measure("crashes", os.kill, os.getpid(), signal.SIGSEGV)


def ends(part):
    part.skip("graphs", "they take a GPU")


FAKES = (fails, raises, hangs, leaves, dies, ends)


def run_fakes(out):
    gpu.PARTS = {function.__name__: (function, 0.5) for function in FAKES}
    gpu.LEAST = 0
    gpu.main(gpu.Config(out=str(out), parts=",".join(gpu.PARTS), small=True))


def test_whatever_becomes_of_a_part_on_a_gpu_is_a_line_and_the_next_one_goes_on(tmp_path):
    out = tmp_path / "gpu.jsonl"
    assert helpers.finish(helpers.start(run_fakes, out)) == [0]
    first, *lines = map(json.loads, out.read_text().splitlines())
    assert first["part"] == "about" and {"torch", "card", "date", "commit"} <= set(first)
    found = {(line["part"], line["name"]): line for line in lines}
    errors = {key: line.get("error") for key, line in found.items()}
    pid = found.pop(("hangs", "started"))["pid"]
    assert errors.pop(("hangs", "started")) is None
    assert errors == {
        ("fails", "fails"): "ZeroDivisionError: division by zero",
        ("fails", "is wrong"): "wrong: log probs",
        ("fails", "is fine"): None,
        ("fails", "loud"): "IndexError: list index out of range",
        ("fails", "all"): None,
        ("raises", "all"): None,
        ("hangs", "all"): "its 2 seconds were over",
        ("leaves", "all"): "it left with exit code 0",
        ("dies", "all"): "killed by SIGSEGV",
        ("ends", "graphs"): None,
        ("ends", "all"): None,
    }
    assert [line["error"] for line in lines if line["part"] == "raises" and "error" in line] == [
        "SystemExit: no more"
    ]
    assert found["hangs", "all"]["during"] == "sleeps" and found["hangs", "all"]["s"] < 10
    assert found["fails", "is fine"]["off"] == 0.1235 and found["ends", "graphs"]["skipped"]
    status = Path(f"/proc/{pid}/stat")  # of what the part had started
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_measurement_that_no_time_is_left_for_is_not_begun(tmp_path, capsys):
    part = Part("any", str(tmp_path / "lines"), 2.0)
    part.measure("long", lambda: 1 / 0, needs=3)
    part.measure("short", lambda: {"x": float("inf"), "y": (1, 2.0)})
    long, short = map(json.loads, capsys.readouterr().out.splitlines())
    assert "error" not in long and long["skipped"].startswith("2 s left")
    assert (short["x"], short["y"]) == ("inf", [1, 2.0])


def test_lines_of_a_gpu_that_cant_be_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = "--out", tmp_path / "lines"
    assert "no part 'speed'" in refusal(gpu, capsys, *out, "--small", "--parts", "env,speed")
    assert "--budget 0: must be above 0" in refusal(gpu, capsys, *out, "--budget", 0)
    assert "soon" in refusal(gpu, capsys, *out, "--budget", "soon")
    assert "can't be written" in refusal(gpu, capsys, "--out", tmp_path)
    assert "give --small" in refusal(gpu, capsys, *out)


def test_captures_are_counted_and_made_all_the_same_or_a_line_says_why_not(monkeypatch, tmp_path):
    def capture(self, step):
        if step is None:
            raise RuntimeError("there is no step")
        return step

    monkeypatch.setattr(Graphs, "capture", capture)
    out = tmp_path / "lines"
    seconds = decode.counted_captures(Part("decode", str(out), 9))
    assert Graphs().capture("a step") == "a step" and len(seconds) == 1
    with pytest.raises(RuntimeError, match="there is no step"):
        Graphs().capture(None)
    assert json.loads(out.read_text())["error"] == "RuntimeError: there is no step"


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnns_attention_is_on_where_it_is_to_be_measured(tiny, wanted, monkeypatch):
    monkeypatch.setattr(attention, "CUDNN", None)  # both as they were, afterwards
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        allow_cudnn(wanted)
        with attention.attention_is(tiny("llama"), "ragged"):
            assert torch.backends.cuda.cudnn_sdp_enabled() == wanted
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_an_updates_operations_are_of_nodes_and_of_scored_tokens(tiny):
    model, work = tiny("llama"), update.batch_of(16, 4, 5)
    head = model.get_output_embeddings().weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - head
    nodes, scored = 2 * 4 + 16 * 5, 16 * 5  # prompts are shared by 8 rows
    scorer = Scorer(copy.deepcopy(model), copy.deepcopy(model))
    assert update.flops_of(scorer, work) == 8 * (rest * nodes + head * scored)
    scorer = Scorer(scorer.model, scorer.model, lora.make(model, 2, 0))
    assert update.flops_of(scorer, work) == 6 * (rest * nodes + head * scored)


@pytest.mark.slow
def test_a_gpus_first_minutes_are_rehearsed_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "bench/gpu.py", "--small", "--out", out]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["part"] for line in lines} == {"about", *gpu.USUAL} and len(lines) >= 20
    assert not [line for line in lines if "error" in line]
