"""What `reproduce.py` compares: methods, learning rates, experiments; and what is claimed of
them."""

from pathlib import Path
from typing import NamedTuple

TWO = "score.py --stage1_steps {stage1} --stage2_steps {stage2}"
ONE = "score.py --stage1_steps 0 --stage2_steps {steps}"
METHODS = {  # {stage1}: 3/16 of the {steps}, as 60 of 320
    "SCoRe": TWO,
    "multi-turn RL": f"{ONE} --alpha 0",
    "single-turn RL": f"{ONE} --single_turn --group_size 20",
    "Pair-SFT": "baselines.py --method pair_sft --steps {steps}",
    "Pair-SFT, D+": "baselines.py --method pair_sft --plus --steps {steps}",
    "STaR": "baselines.py --method star --steps {steps}",
    "STaR, D+": "baselines.py --method star --plus --steps {steps}",
    "no Stage I": ONE,
    "no bonus": f"{TWO} --alpha 0",
    "Stage I": "score.py --stage1_steps {stage1} --stage2_steps 0 --save_every {stage1}",
    "Stage I, then STaR": "baselines.py --method star --plus --steps {stage2}",
    "gamma 1": f"{TWO} --gamma 1",
    "alpha 1": f"{TWO} --alpha 1",
    "alpha 3": f"{TWO} --alpha 3",
    "alpha 30": f"{TWO} --alpha 30",
    "normalised per turn": f"{TWO} --normalise per_turn",
    "flat second attempts": f"{TWO} --group_size 10 --second_attempts 1",
    "reference Stage I": f"{TWO} --reference stage1",
    "SCoRe, 40 problems": f"{TWO} --problems 40 --second_attempts 1",  # 320 attempts as well
    "multi-turn RL, 40 problems": f"{ONE} --alpha 0 --problems 40 --second_attempts 1",
    "beta1 0.0125": f"{TWO} --beta1 0.0125",
    "beta1 0.2": f"{TWO} --beta1 0.2",
    "beta1 0.8": f"{TWO} --beta1 0.8",
    "RRR": "rrr.py --steps {steps}",
    "RRR, loose": "rrr.py --steps {steps} --anchor 0.2",
    "RRR, loose, retry rewarded": "rrr.py --steps {steps} --anchor 0.2 --reward_on retry",
    "RRR, loose, both rewarded": "rrr.py --steps {steps} --anchor 0.2 --reward_on both",
}
UNTRAINED = {"base": "self_correct", "Self-Refine": "self_refine", "base, RRR": "reflect_retry"}
AFTER = {"Stage I, then STaR": "Stage I"}  # which method's result is this one's base
GRID = (1.5e-5, 5e-5, 1.5e-4, 5e-4)
# where the best rate is the lowest or highest tried, the next one is too
LADDER = (1.5e-6, 5e-6, *GRID, 1.5e-3, 5e-3)
TUNED = ("SCoRe", "multi-turn RL", "single-turn RL", "Pair-SFT", "Pair-SFT, D+", "STaR", "STaR, D+", "no Stage I",
         "no bonus", "RRR")  # fmt: skip
LIKE = {"Stage I, then STaR": "STaR, D+", "multi-turn RL, 40 problems": "multi-turn RL"}
LIKE |= {name: "RRR" for name in METHODS if name.startswith("RRR, ")}
TUNING_SEED = 100  # of no final run


class Experiment(NamedTuple):
    methods: tuple
    steps: tuple = (320,)
    seeds: int = 5
    base: str = "tiny"
    more: bool = False  # also the curves that take longer


MAIN = ("SCoRe", "multi-turn RL", "single-turn RL", "Pair-SFT", "Pair-SFT, D+", "STaR", "STaR, D+")
EXPERIMENTS = {  # in order of value
    "main": Experiment(("base", "Self-Refine", *MAIN), more=True),
    "ablations": Experiment(("no Stage I", "no bonus", "Stage I, then STaR")),
    "long": Experiment((*MAIN[:2], "no Stage I", "no bonus"), (640,)),
    "rrr": Experiment(("base, RRR", "RRR"), (250,)),
    "ours": Experiment(("gamma 1", "alpha 1", "alpha 3", "alpha 30", "normalised per turn", "flat second attempts",
                        "reference Stage I", "SCoRe, 40 problems", "multi-turn RL, 40 problems")),
    "beta1": Experiment(("beta1 0.0125", "beta1 0.2", "beta1 0.8")),
    "short": Experiment((*MAIN[:3], "STaR, D+", "no Stage I", "no bonus", "SCoRe, 40 problems",
                         "multi-turn RL, 40 problems"), (160,)),
    "long_others": Experiment(("single-turn RL", "STaR, D+"), (640,)),
    "rewarded": Experiment(("RRR, loose", "RRR, loose, retry rewarded", "RRR, loose, both rewarded"), (250,)),
    "before_rl": Experiment(("base", *MAIN[:3], "no Stage I"), base="pretrained"),
}  # fmt: skip
QUICK = {
    "main": Experiment(
        ("base", "Self-Refine", "SCoRe", "multi-turn RL", "Pair-SFT, D+", "STaR, D+"), (160,), 2
    ),
    "rrr": Experiment(("base, RRR", "RRR"), (100,), 1),
}
# about, in steps of score.py: 0.3 s
STEP_COST = {"score.py": 1.0, "baselines.py": 2.2, "rrr.py": 3.0}
COST = {"run": 110, "more": 150, "rrr.py": 200}  # the rest of a run, in the same


class Run(NamedTuple):
    base: str
    method: str
    steps: int
    seed: int
    lr: float
    more: bool = False
    tuning: bool = False  # judged on validation, not on test

    def directory(self, config) -> Path:
        name = f"{self.method}-{self.steps}-{self.lr:g}-{self.seed}".replace(", ", ",").replace(
            " ", "_"
        )
        return config.runs / self.base / name

    @property
    def script(self) -> str:
        return METHODS[self.method].split()[0] if self.method in METHODS else ""

    @property
    def done(self) -> str:
        """The file that says that nothing is left to do."""
        return "results.json" if self.tuning else "test.json"

    @property
    def cost(self) -> float:
        extra = COST["more"] * self.more + (0 if self.tuning else COST.get(self.script, 0))
        return self.steps * STEP_COST.get(self.script, 0) + COST["run"] + extra


TABLE1 = ("base", "Self-Refine", "STaR", "STaR, D+", "Pair-SFT", "Pair-SFT, D+", "single-turn RL", "multi-turn RL",
          "SCoRe")  # fmt: skip
TABLE2 = ("SCoRe", "single-turn RL", "no Stage I", "no bonus", "multi-turn RL", "Stage I, then STaR", "gamma 1",
          "alpha 1", "alpha 3", "alpha 30", "normalised per turn", "flat second attempts", "reference Stage I",
          "SCoRe, 40 problems", "multi-turn RL, 40 problems", "beta1 0.0125", "beta1 0.2", "beta1 0.8")  # fmt: skip
# before any run, of the first against the second or None: (claim, method, method, figure, steps)
CLAIMS = [
    *((f"Delta is above 0: {m}", m, None, "delta", 320) for m in TABLE1),
    *((f"32 answers: half of them corrections beats all in parallel: {m}", m, None, "vote_gain", 320)
      for m in ("base", "multi-turn RL", "SCoRe")),
    *(("SCoRe's second attempts are better than multi-turn RL's", "SCoRe", "multi-turn RL", "acc_t2", n)
      for n in (160, 320, 640)),
    *(("SCoRe's Delta is larger than multi-turn RL's", "SCoRe", "multi-turn RL", "delta", n) for n in (160, 320, 640)),
    *((f"Stage I helps: {key}", "SCoRe", "no Stage I", key, n) for key in ("acc_t2", "delta") for n in (160, 320, 640)),
    *((f"Stage I helps without the bonus: {key}", "no bonus", "multi-turn RL", key, n)
      for key in ("acc_t2", "delta") for n in (160, 320, 640)),
    *((f"the bonus helps after Stage I: {key}", "SCoRe", "no bonus", key, n)
      for key in ("acc_t2", "delta") for n in (160, 320, 640)),
    *((f"a weight of 1 + alpha on turn 2 helps without Stage I: {key}", "no Stage I", "multi-turn RL", key, n)
      for key in ("acc_t2", "delta") for n in (160, 320, 640)),
    *((f"SCoRe beats multi-turn RL with batches of 40 problems: {key}", "SCoRe", "multi-turn RL, 40 problems", key, n)
      for key in ("acc_t2", "delta") for n in (160, 320)),
    *((f"with batches of 40 problems SCoRe beats multi-turn RL: {key}", "SCoRe, 40 problems",
       "multi-turn RL, 40 problems", key, n) for key in ("acc_t2", "delta") for n in (160, 320)),
    *((f"batches of 40 problems help multi-turn RL: {key}", "multi-turn RL, 40 problems", "multi-turn RL", key, n)
      for key in ("acc_t2", "delta") for n in (160, 320)),
    ("RL in Stage II beats STaR", "SCoRe", "Stage I, then STaR", "acc_t2", 320),
    *((f"SCoRe's Delta is larger than that of {m}", "SCoRe", m, "delta", 320) for m in TABLE1[:7]),
    *((f"SCoRe's second attempts are better than those of {m}", "SCoRe", m, "acc_t2", 320) for m in TABLE1[:7]),
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
    *(("SCoRe's second attempts are better than those of STaR, D+", "SCoRe", "STaR, D+", "acc_t2", n)
      for n in (160, 640)),
    *((f"second attempts of STaR, D+, are better than those of {m}", "STaR, D+", m, "acc_t2", n)
      for m in ("multi-turn RL", "multi-turn RL, 40 problems") for n in (160, 320)),
    ("second attempts of STaR, D+, are better than those of multi-turn RL", "STaR, D+", "multi-turn RL", "acc_t2", 640),
    ("STaR, D+, ends better after a Stage I", "Stage I, then STaR", "STaR, D+", "acc_t2", 320),
    ("gamma = 1 makes second attempts worse", "SCoRe", "gamma 1", "acc_t2", 320),
    ("beta1 / 4 raises first attempts", "beta1 0.0125", "SCoRe", "acc_t1", 320),
    *((f"batches of 40 problems help SCoRe: {key}", "SCoRe, 40 problems", "SCoRe", key, n)
      for key in ("acc_t2", "delta") for n in (160, 320)),
]  # fmt: skip
RRR_CLAIMS = [  # (claim, (method, row), (method, row), figure)
    ("RRR raises what is right after one retry", ("RRR", ""), ("base, RRR", ""), "acc_t2"),
    ("RRR raises first attempts", ("RRR", ""), ("base, RRR", ""), "acc_t1"),
    ("trained reflections help the base's retries", ("RRR", "trained reflects, base retries"),
     ("base, RRR", "base, reflect_retry"), "retry"),
    ("the trained model retries better after the base's reflections", ("RRR", "base reflects, trained retries"),
     ("base, RRR", "base, reflect_retry"), "retry"),
    ("a retry after a reflection beats a fresh attempt", ("RRR", "trained, reflect_retry"),
     ("RRR", "trained, fresh_attempt"), "retry"),
    ("a retry after a reflection beats a blind one", ("RRR", "trained, reflect_retry"),
     ("RRR", "trained, blind_retry"), "retry"),
    ("the anchor keeps first attempts better", ("RRR", ""), ("RRR, loose", ""), "acc_t1"),
    ("the anchor costs retries after the base's failures", ("RRR, loose", "trained, reflect_retry"),
     ("RRR", "trained, reflect_retry"), "retry"),
    *((f"rewarding reflections alone beats rewarding {what}: {key}", ("RRR, loose", ""),
       (f"RRR, loose, {what} rewarded", ""), key) for what in ("retry", "both") for key in ("acc_t1", "acc_t2")),
    *((f"rewarding reflections alone beats rewarding {what}: retries after the base's failures",
       ("RRR, loose", "trained, reflect_retry"), (f"RRR, loose, {what} rewarded", "trained, reflect_retry"), "retry")
      for what in ("retry", "both")),
    # Asked after the runs:
    ("the anchor costs what is right after a retry", ("RRR, loose", ""), ("RRR", ""), "acc_t2"),
    ("the anchor costs fresh attempts after the base's failures", ("RRR, loose", "trained, fresh_attempt"),
     ("RRR", "trained, fresh_attempt"), "retry"),
    ("rewarding retries alone teaches retries after the base's failures",
     ("RRR, loose, retry rewarded", "trained, reflect_retry"), ("base, RRR", "base, reflect_retry"), "retry"),
]  # fmt: skip
