import json, os, sys, threading, time
from functools import partial
import gpu, torch, common
from gpu_parts import update, decode, tune, runs, correct
from gpu_parts.models import make_sampler, random_model, prompts_of
from gpu_parts.lines import gpu as on_gpu, once
import training.scorer as scorer_module
import sampling.draws
SMALL = "--small" in sys.argv
OUT = sys.argv[1]
CHOICE = OUT + ".choice"
ENDS = time.monotonic() + float(sys.argv[2])

def kernels():
    from fast import cuda_kernels
    return cuda_kernels
OLD = (128, 4, 3, 1024)

def set_cut(cut):
    k = kernels(); k.BLOCK, k.WARPS, k.STAGES, k.PROGRAMS = cut

CUTS = [(keys, warps, 3) for keys in (32, 64, 128) for warps in (2, 4)]
PROGRAMS = (64, 128, 256, 512, 1024)
LOADS = ((64, 448), (256, 448), (16, 448), (1, 448), (64, 2048))

def compile_tune(part):
    tune.CUTS = CUTS
    tune.compile_all([(s, p) for p in tune.PARTS for s in tune.SHAPES], kernels())

def tuned(part):
    k, item = kernels(), 2 if on_gpu() else 4
    table = {}
    for shape in tune.SHAPES:
        for rows, tokens in LOADS if on_gpu() else ((2, 70),):
            def one():
                found, done = [], {}
                for cut in CUTS if on_gpu() else CUTS[:1]:
                    for programs in PROGRAMS if on_gpu() else (64, 1024):
                        if part.left() < 2: return {"cut": "time"}
                        k.PROGRAMS = programs
                        parts = k.parts_of(rows * 2)
                        key = (*cut, parts)
                        if key not in done:
                            call, cache = tune.attempt(k, shape, rows, tokens, parts, cut, 28 if on_gpu() else 1)
                            done[key] = tune.micros(call, 28 if on_gpu() else 1)
                            del call, cache
                        found.append((done[key], cut, programs, parts))
                        table.setdefault((cut, programs), {})[(shape, rows, tokens)] = done[key]
                size = rows * tokens * 2 * tune.SHAPES[shape][2] * 4
                best = sorted(found)[:6]
                default = [f for f in found if f[1] == (64, 4, 3) and f[2] == 1024]
                return {"best": best, "default": default, "TB_s": size / best[0][0] / 1e6, "all": sorted(found)}
            part.measure(f"{shape} {rows} rows of {tokens}", one)
    loads = set.intersection(*(set(v) for v in table.values())) if table else set()
    table = {c: {l: v[l] for l in loads} for c, v in table.items()}
    least = {l: min(v[l] for v in table.values() if l in v) for l in loads}
    score = {c: sum(v[l] / least[l] for l in v) / len(v) for c, v in table.items() if len(v) == len(loads)}
    ranked = sorted(score.items(), key=lambda x: x[1])
    (cut, programs), _ = ranked[0]
    choice = (cut[0] * item, cut[1], cut[2], programs)
    json.dump(choice, open(CHOICE, "w"))
    part.write(name="choice", choice=choice, ranked=[[str(a), b] for a, b in ranked[:8]])

class Plain:
    """As it was: torch's own sampling, old cuts."""

def with_sampling(step_of, plain):
    def made(*a):
        step = step_of(*a)
        return step._replace(sample=sampling.draws.sample) if plain else step
    return made

def decoding(part):
    from sampler import fast
    captures = decode.counted_captures(part)
    new = json.load(open(CHOICE)) if os.path.exists(CHOICE) else OLD
    own = fast.step_of
    decode.timed = partial(decode.timed)
    for name in ("1.5B", "0.5B"):
        model = random_model(part, name)
        if name == "0.5B" and part.left() > 14: pass
        for batch in ((64, 256, 1, 16) if name == "1.5B" else (64, 1, 256)) if on_gpu() else (2,):
            for label, cut, plain in (("before", OLD, True), ("new draws", OLD, False), ("all new", new, False)):
                if (batch in (256, 16) or name == '0.5B') and label == "new draws": continue
                set_cut(cut); fast.step_of = with_sampling(own, plain)
                part.measure(f"{name} batch {batch} {label}", decode.one_way, part, model, batch, "as it is", False, captures, needs=5 if batch == 256 else 2)
        set_cut(new); fast.step_of = own
        if name == "1.5B": part.measure("ragged new", decode.ragged, part, model, captures, needs=7)
        if name == "1.5B": part.measure("profile new", decode.launches, part, model, "as it is", needs=5)
        del model

def updating(part):
    update.distributed.start(update.Config(dtype="bfloat16"))
    work = update.batch_of(*((4, 8, 8) if part.small else (32, 256, 256)))
    own = scorer_module.fast
    for label, fast in (("before", None), ("new", own)):
        scorer_module.fast = fast
        part.measure("gradients " + label, update.sharded_gradients, part, "0.5B", work, needs=8)
    def both(name, make, profile, checkpointing):
        scorer = make(part, name)
        opt = update.optimizer_of(scorer)
        for label, fast in (("before", None), ("new", own)):
            scorer_module.fast = fast
            part.measure(f"{name} {make.__name__} {label}", update.updates, scorer, opt, work, {}, needs=3)
        if checkpointing: part.measure(f"{name} {make.__name__} checkpointing", update.updates, scorer, opt, work, {"checkpointing": True}, needs=3)
        if profile: part.measure(f"{name} {make.__name__} profile", update.launches, scorer, work, needs=6)
    part.section("a", both, "1.5B", update.whole_scorer, True, True)
    part.section("b", both, "0.5B", update.whole_scorer, False, False)
    part.section("c", both, "1.5B", update.lora_scorer, False, True)
    part.section("d", both, "0.5B", update.lora_scorer, False, False)
    update.distributed.leave()

def comp(part):
    update.distributed.start(update.Config(dtype="bfloat16"))
    work = update.batch_of(*((4, 8, 8) if part.small else (32, 256, 256)))
    scorer = update.lora_scorer(part, "0.5B", compiled=True)
    part.measure("0.5B LoRA compiled", update.updates, scorer, update.optimizer_of(scorer), work, {})
    update.distributed.leave()

def go(name, function, seconds):
    seconds = min(seconds * (4 if SMALL else 1), ENDS - time.monotonic())
    part = gpu.Part(name, OUT, seconds, SMALL)
    if seconds < 5: return part.skip("all", "no time")
    gpu.watch(part, function, seconds)

def together(jobs):
    threads = [threading.Thread(target=go, args=job) for job in jobs]
    for t in threads: t.start(); time.sleep(.2)
    for t in threads: t.join()

if SMALL: os.environ["CUDA_VISIBLE_DEVICES"] = ""
print("imports done", flush=True)
gpu.Part("about", OUT, 9).write(**gpu.about(gpu.Config(small=SMALL)))
if not SMALL or os.environ.get("TRITON_INTERPRET"):
    together([("resume", runs.resume, 50), ("correct", correct.correct, 45), ("compile_tune", compile_tune, 40)])
    go("tune", tuned, 25)
go("update", updating, 55)
go("decode", decoding, 62)
