"""Controls: who attempts, who reflects, who retries, and what if nobody reflects.

RRR's gain may be the reflection's, the retry's, or any retry's: its final table tells them apart.
"""

from pathlib import Path

from report.figures import summarize
from report.page import pairs_of, write_run_page
from report.tables import format_reflections
from training import checkpoint
from training.distributed import on_first
from training.methods import AFTER_ANY, METHODS
from training.run import saving

BEFORE, AFTER = "base, reflect_retry", "trained, reflect_retry"  # of the `controls`
MODES = {"greedy": 0.0, "sampled": 1.0}


def models_of(config, run: Path) -> list[tuple[str, str]]:
    return [("base", config.model), ("trained", str(run / "checkpoint"))]


def controls(base, trained) -> dict[str, tuple]:
    """{name: (cast, method)}, all after the base model's failures.

    Who reflects, who retries, and what if nobody reflects.
    """
    casts = {"base": (base, base, base), "trained": (base, trained, trained)}
    blind = [method for method in METHODS if method not in AFTER_ANY]
    named = {f"{name}, {m}": (cast, m) for name, cast in casts.items() for m in blind}
    named["trained reflects, base retries"] = ((base, trained, base), "reflect_retry")
    named["base reflects, trained retries"] = ((base, base, trained), "reflect_retry")
    return named


def with_controls(exam, run: Path, problems, find) -> dict:
    """Figures of both models and, with --controls, of the `controls`.

    Reflections on the same failures stand in the run's reflections.txt, and on its page.

    What begins with the base model's first attempts goes on from the same ones: its own figures
    are those of one of the controls. find: a model's name -> its sampler. exam: an evaluate.Exam.
    """
    full, needed = exam.config.controls, {"greedy": [BEFORE], "sampled": [BEFORE, AFTER]}
    needed = dict.fromkeys(MODES, [*controls(None, None)]) if full else needed
    count = sum(len(names) + 1 for names in needed.values())  # and the trained model's own
    results, talks = {"base": {}, "trained": {}, "controls": {}}, {}
    with exam.final_table(run, problems, count) as try_all:
        paths = models_of(exam.config, run)
        base, trained = (find(path) for _, path in paths)
        after_base, own = controls(base, trained), ((trained, trained, trained), exam.method)
        for mode in MODES:
            ways = {name: after_base[name] for name in needed[mode]}
            talks[mode] = try_all("base", mode, ways)
            for name in ways:
                results["controls"].setdefault(name, {})[mode] = summarize(talks[mode][name])
            results["base"][mode] = results["controls"][BEFORE][mode]
            results["trained"][mode] = summarize(try_all("trained", mode, {"": own})[""])
    if not full:
        del results["controls"]
    text = format_reflections(talks["sampled"][BEFORE], talks["sampled"][AFTER])
    with saving(run):
        on_first(checkpoint.write_text, run / "reflections.txt", text)
        pairs = pairs_of(talks["sampled"][BEFORE], talks["sampled"][AFTER])
        on_first(write_run_page, run, exam.about, pairs)
    return results
