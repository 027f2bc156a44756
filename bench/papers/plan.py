"""What `reproduce.py` compares: methods, learning rates to try, experiments; and their runs."""

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
LADDER = (1.5e-6, 5e-6, *GRID, 1.5e-3, 5e-3)  # the next ones, where the best is at the edge
MAIN = ("SCoRe", "multi-turn RL", "single-turn RL", "Pair-SFT", "Pair-SFT, D+", "STaR", "STaR, D+")
TUNED = (*MAIN, "no Stage I", "no bonus", "RRR")
LIKE = {"Stage I, then STaR": "STaR, D+", "multi-turn RL, 40 problems": "multi-turn RL"}
LIKE |= {name: "RRR" for name in METHODS if name.startswith("RRR, ")}
TUNING_SEED = 100  # of no final run


class Experiment(NamedTuple):
    methods: tuple
    steps: tuple = (320,)
    seeds: int = 5
    base: str = "tiny"
    more: bool = False  # also the curves that take longer


EXPERIMENTS = {  # in order of value
    "main": Experiment(("base", "Self-Refine", *MAIN), more=True),
    "ablations": Experiment(("no Stage I", "no bonus", "Stage I, then STaR")),
    "long": Experiment((*MAIN[:2], "no Stage I", "no bonus"), (640,)),
    "rrr": Experiment(("base, RRR", "RRR"), (250,)),
    "ours": Experiment(("gamma 1", "alpha 1", "alpha 3", "alpha 30", "normalised per turn",
                        "flat second attempts", "reference Stage I", "SCoRe, 40 problems",
                        "multi-turn RL, 40 problems")),
    "beta1": Experiment(("beta1 0.0125", "beta1 0.2", "beta1 0.8")),
    "short": Experiment((*MAIN[:3], "STaR, D+", "no Stage I", "no bonus", "SCoRe, 40 problems",
                         "multi-turn RL, 40 problems"), (160,)),
    "long_others": Experiment(("single-turn RL", "STaR, D+"), (640,)),
    "rewarded": Experiment(("RRR, loose", "RRR, loose, retry rewarded",
                            "RRR, loose, both rewarded"), (250,)),
    "before_rl": Experiment(("base", *MAIN[:3], "no Stage I"), base="pretrained"),
}  # fmt: skip
QUICK = {
    "main": Experiment(("base", "Self-Refine", *MAIN[:2], "Pair-SFT, D+", "STaR, D+"), (160,), 2),
    "rrr": Experiment(("base, RRR", "RRR"), (100,), 1),
}
# about, in steps of score.py, of 0.3 s
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
        name = f"{self.method}-{self.steps}-{self.lr:g}-{self.seed}"
        return config.runs / self.base / name.replace(", ", ",").replace(" ", "_")

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


# what the tables show, in their order
TABLE1 = ("base", "Self-Refine", "STaR", "STaR, D+", "Pair-SFT", "Pair-SFT, D+", "single-turn RL",
          "multi-turn RL", "SCoRe")  # fmt: skip
TABLE2 = ("SCoRe", "single-turn RL", "no Stage I", "no bonus", "multi-turn RL",
          "Stage I, then STaR", "gamma 1", "alpha 1", "alpha 3", "alpha 30", "normalised per turn",
          "flat second attempts", "reference Stage I", "SCoRe, 40 problems",
          "multi-turn RL, 40 problems", "beta1 0.0125", "beta1 0.2", "beta1 0.8")  # fmt: skip
