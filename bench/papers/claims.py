"""What is claimed of the methods, each claim one comparison; `tables.effects` says which stand."""

from plan import TABLE1

BUDGETS = (160, 320, 640)
BOTH = ("acc_t2", "delta")
PLAIN, PLAIN_40 = "multi-turn RL", "multi-turn RL, 40 problems"


def at_all(claim: str, one: str, other: str, steps=BUDGETS, keys=BOTH) -> list[tuple]:
    """The same claim of several figures and budgets; a {key} in it is the figure's name."""
    return [(claim.format(key=key), one, other, key, n) for key in keys for n in steps]


# written before any run; of the first against the second or None:
# (claim, method, method, figure, steps)
CLAIMS = [
    *((f"Delta is above 0: {m}", m, None, "delta", 320) for m in TABLE1),
    *((f"32 answers: half of them corrections beats all in parallel: {m}", m, None, "vote_gain",
       320) for m in ("base", PLAIN, "SCoRe")),
    *at_all("SCoRe's second attempts are better than multi-turn RL's", "SCoRe", PLAIN,
            keys=BOTH[:1]),
    *at_all("SCoRe's Delta is larger than multi-turn RL's", "SCoRe", PLAIN, keys=BOTH[1:]),
    *at_all("Stage I helps: {key}", "SCoRe", "no Stage I"),
    *at_all("Stage I helps without the bonus: {key}", "no bonus", PLAIN),
    *at_all("the bonus helps after Stage I: {key}", "SCoRe", "no bonus"),
    *at_all("a weight of 1 + alpha on turn 2 helps without Stage I: {key}", "no Stage I", PLAIN),
    *at_all("SCoRe beats multi-turn RL with batches of 40 problems: {key}", "SCoRe", PLAIN_40,
            BUDGETS[:2]),
    *at_all("with batches of 40 problems SCoRe beats multi-turn RL: {key}", "SCoRe, 40 problems",
            PLAIN_40, BUDGETS[:2]),
    *at_all("batches of 40 problems help multi-turn RL: {key}", PLAIN_40, PLAIN, BUDGETS[:2]),
    ("RL in Stage II beats STaR", "SCoRe", "Stage I, then STaR", "acc_t2", 320),
    *((f"SCoRe's Delta is larger than that of {m}", "SCoRe", m, "delta", 320) for m in TABLE1[:7]),
    *((f"SCoRe's second attempts are better than those of {m}", "SCoRe", m, "acc_t2", 320)
      for m in TABLE1[:7]),
    ("SCoRe raises first attempts", "SCoRe", "base", "acc_t1", 320),
    ("single-turn RL lowers Delta", "base", "single-turn RL", "delta", 320),
    ("right-to-right traces help STaR", "STaR, D+", "STaR", "delta", 320),
    ("right-to-right traces help Pair-SFT", "Pair-SFT, D+", "Pair-SFT", "delta", 320),
    ("gamma = 1 makes first attempts worse (sandbagging)", "SCoRe", "gamma 1", "acc_t1", 320),
    ("alpha 10 beats alpha 1", "SCoRe", "alpha 1", "delta", 320),
    ("alpha 10 beats alpha 3", "SCoRe", "alpha 3", "delta", 320),
    ("alpha 30 beats alpha 10", "alpha 30", "SCoRe", "delta", 320),
    ("joint normalisation beats per turn", "SCoRe", "normalised per turn", "delta", 320),
    ("nested second attempts beat flat ones", "SCoRe", "flat second attempts", "acc_t2", 320),
    ("the base as reference beats Stage I's result", "SCoRe", "reference Stage I", "acc_t2", 320),
    ("a larger beta1 keeps both attempts well-formed", "beta1 0.2", "SCoRe", "well_formed", 320),
    ("RL costs problems with both attempts well-formed", "base", "SCoRe", "well_formed", 320),
    # Asked after the runs:
    *at_all("SCoRe's second attempts are better than those of STaR, D+", "SCoRe", "STaR, D+",
            (160, 640), BOTH[:1]),
    *(claim for m in (PLAIN, PLAIN_40)
      for claim in at_all(f"second attempts of STaR, D+, are better than those of {m}", "STaR, D+",
                          m, BUDGETS[:2], BOTH[:1])),
    *at_all(f"second attempts of STaR, D+, are better than those of {PLAIN}", "STaR, D+", PLAIN,
            BUDGETS[2:], BOTH[:1]),
    ("STaR, D+, ends better after a Stage I", "Stage I, then STaR", "STaR, D+", "acc_t2", 320),
    ("gamma = 1 makes second attempts worse", "SCoRe", "gamma 1", "acc_t2", 320),
    ("beta1 / 4 raises first attempts", "beta1 0.0125", "SCoRe", "acc_t1", 320),
    *at_all("batches of 40 problems help SCoRe: {key}", "SCoRe, 40 problems", "SCoRe", BUDGETS[:2]),
]  # fmt: skip

BASE, TRAINED = "base, reflect_retry", "trained, reflect_retry"  # who reflects and retries
LOOSE = "RRR, loose"
RRR_CLAIMS = [  # (claim, (method, row), (method, row), figure)
    ("RRR raises what is right after one retry", ("RRR", ""), ("base, RRR", ""), "acc_t2"),
    ("RRR raises first attempts", ("RRR", ""), ("base, RRR", ""), "acc_t1"),
    ("trained reflections help the base's retries", ("RRR", "trained reflects, base retries"),
     ("base, RRR", BASE), "retry"),
    ("the trained model retries better after the base's reflections",
     ("RRR", "base reflects, trained retries"), ("base, RRR", BASE), "retry"),
    ("a retry after a reflection beats a fresh attempt", ("RRR", TRAINED),
     ("RRR", "trained, fresh_attempt"), "retry"),
    ("a retry after a reflection beats a blind one", ("RRR", TRAINED),
     ("RRR", "trained, blind_retry"), "retry"),
    ("the anchor keeps first attempts better", ("RRR", ""), (LOOSE, ""), "acc_t1"),
    ("the anchor costs retries after the base's failures", (LOOSE, TRAINED), ("RRR", TRAINED),
     "retry"),
    *((f"rewarding reflections alone beats rewarding {what}: {key}", (LOOSE, ""),
       (f"{LOOSE}, {what} rewarded", ""), key)
      for what in ("retry", "both") for key in ("acc_t1", "acc_t2")),
    *((f"rewarding reflections alone beats rewarding {what}: retries after the base's failures",
       (LOOSE, TRAINED), (f"{LOOSE}, {what} rewarded", TRAINED), "retry")
      for what in ("retry", "both")),
    # Asked after the runs:
    ("the anchor costs what is right after a retry", (LOOSE, ""), ("RRR", ""), "acc_t2"),
    ("the anchor costs fresh attempts after the base's failures", (LOOSE, "trained, fresh_attempt"),
     ("RRR", "trained, fresh_attempt"), "retry"),
    ("rewarding retries alone teaches retries after the base's failures",
     (f"{LOOSE}, retry rewarded", TRAINED), ("base, RRR", BASE), "retry"),
]  # fmt: skip
