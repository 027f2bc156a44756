"""Builds `models/tiny`, the embedded base model, from nothing: 40 to 96 minutes on one core.

    python tiny.py

A 344k-parameter Llama that plays Countdown with three numbers. Supervised pretraining on made-up
conversations gives it everything that self-correction needs and nothing that uses it: it derives
honestly but plans badly; it can judge an answer when asked to; but when asked to fix one it says
`ok` or `bad` almost at random, then copies its answer or tries another. A short single-turn RL
phase sharpens the first attempt. The result stands where the papers start: a decent first attempt,
and a second one that is worse.

A word is a token. One turn of each kind:

    <user> 8 19 16 make 24 <assistant> 16 / 8 = 2 ; 19 + 2 = 21 <end>
    <user> fix <assistant> bad 19 - 16 = 3 ; 8 * 3 = 24 <end>
    <user> judge <assistant> no <end>
    <user> reflect <assistant> got 21 try 8 + 19 = 27 ; 27 - 16 = 11 no
                                      try 19 - 16 = 3 ; 8 * 3 = 24 yes <end>
    <user> retry <assistant> 19 - 16 = 3 ; 8 * 3 = 24 <end>
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import score
from tasks.tiny import enumerate_steps, tiny_splits
from training.checkpoint import save_model
from training.flags import exit_on_bad_input, flag, run_script
from training.progress import over
from training.run import require_writable

WORDS = "<pad> <end> <user> <assistant> make fix ok bad judge yes no reflect got try retry".split()
WORDS += "+ - * / = ;".split()
VOCABULARY = {word: i for i, word in enumerate(WORDS + [str(n) for n in range(100)])}
NUMBER = VOCABULARY["0"]  # id of the number 0; n is NUMBER + n
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<assistant> {{ m.content }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Config:
    output: str = flag("models/tiny", "where the model is saved; must not exist")
    work_dir: str = flag("runs/tiny", "the run's directory: the pretrained model, and the RL phase")
    steps: int = flag(4000, "pretraining steps")
    rows: int = flag(256, "conversations a pretraining step")
    lr: float = flag(3e-3, "peak AdamW learning rate of embeddings and norms")
    muon_lr: float = flag(0.02, "peak Muon learning rate of the layers' matrices")
    rl_steps: int = flag(240, "steps of single-turn RL")
    seed: int = flag(0, "seed of weights, data and RL")


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY["<end>"],
        pad_token_id=VOCABULARY["<pad>"],
    )
    return LlamaForCausalLM(config)


class Derivations:
    """Every honest derivation of every set of numbers, as arrays: a whole batch is drawn at once.

    tokens: (sets, E, 11), ids of `a op b = v ; c op d = w`
    value:  (sets, E), what it reaches; -1 where there is none
    first:  (sets, E), which first step it begins with
    """

    def __init__(self, problems: list[dict]):
        sets = sorted({tuple(sorted(p["nums"])) for p in problems})
        index = {numbers: i for i, numbers in enumerate(sets)}
        found = [enumerate_steps(numbers) for numbers in sets]
        widest = max(map(len, found))
        self.tokens = np.zeros((len(sets), widest, 11), dtype=np.int64)
        self.value = np.full((len(sets), widest), -1)
        self.first = np.zeros((len(sets), widest), dtype=np.int64)
        for i, derivations in enumerate(found):
            firsts = list(dict.fromkeys(first for first, _ in derivations))
            for j, (first, second) in enumerate(derivations):
                text = "{} {} {} = {} ; {} {} {} = {}".format(*first, *second)
                self.tokens[i, j] = [VOCABULARY[word] for word in text.split()]
                self.value[i, j] = second[3]
                self.first[i, j] = firsts.index(first)
        self.set = np.array([index[tuple(sorted(p["nums"]))] for p in problems])  # (problems,)
        self.target = np.array([p["target"] for p in problems])  # (problems,)
        self.nums = np.array([p["nums"] for p in problems])  # (problems, 3)

    def draw(self, problem: np.ndarray, solved: float, careless: float, rng) -> tuple:
        """One derivation for each of `problem` (B,): tokens (B, 11) and value (B,), two arrays.

        With probability `solved` a solution, with `careless` any derivation, else a random first
        step and the second step that comes closest to the target.
        """
        value, first = self.value[self.set[problem]], self.first[self.set[problem]]  # (B, E)
        noise = rng.random(value.shape)
        error = np.abs(value - self.target[problem][:, None]) + noise
        start = np.take_along_axis(rng.random((len(problem), first.max() + 1)), first, axis=1)
        start[value < 0] = -1
        nearest = error - 1000 * (start == start.max(axis=1, keepdims=True))
        kind = rng.random((len(problem), 1))
        cost = np.where(kind < solved, error, np.where(kind < solved + careless, noise, nearest))
        cost[value < 0] = np.inf
        choice = cost.argmin(axis=1)[:, None]
        tokens = self.tokens[self.set[problem]]  # (B, E, 11)
        tokens = np.take_along_axis(tokens, choice[:, :, None], axis=1)[:, 0]
        return tokens, np.take_along_axis(value, choice, axis=1)[:, 0]


class Conversations:
    """Draws batches of made-up conversations: ids and labels (B, T), -100 where the user speaks."""

    def __init__(self, rows: int, seed: int):
        self.derivations = Derivations(tiny_splits()["train"])
        self.rng = np.random.default_rng(seed)
        self.rows = rows

    def words(self, count: int, *words: str) -> np.ndarray:
        return np.tile([VOCABULARY[w] for w in words], (count, 1))

    def asks(self, count: int, word: str) -> np.ndarray:
        return self.words(count, "<user>", word, "<assistant>")

    def says(self, *parts: np.ndarray) -> np.ndarray:
        return np.concatenate([*parts, self.words(len(parts[0]), "<end>")], axis=1)

    def attempt(self, problem, solved=0.35, careless=0.0):
        tokens, value = self.derivations.draw(problem, solved, careless, self.rng)
        return tokens, value == self.derivations.target[problem], value

    def opening(self, count: int, wrong_only: bool = False):
        """`<user> a b c make t <assistant>`, and a first attempt at it."""
        drawn = count * (2 if wrong_only else 1)
        problem = self.rng.integers(len(self.derivations.set), size=drawn)
        tokens, right, value = self.attempt(problem)
        if wrong_only:
            keep = np.argsort(right, kind="stable")[:count]  # all wrong, nearly always
            problem, tokens, right, value = problem[keep], tokens[keep], right[keep], value[keep]
        order = self.rng.permuted(self.derivations.nums[problem], axis=1)
        target = self.derivations.target[problem][:, None]
        user, make, assistant = (self.words(count, w) for w in ("<user>", "make", "<assistant>"))
        prompt = [user, NUMBER + order, make, NUMBER + target, assistant]
        return problem, np.concatenate(prompt, axis=1), tokens, right, value

    def judged(self, right: np.ndarray) -> np.ndarray:
        return np.where(right, VOCABULARY["yes"], VOCABULARY["no"])[:, None]

    def assemble(self, parts: list) -> tuple[np.ndarray, np.ndarray]:
        """Parts are (B, n) ids, of the user and of the assistant in turn."""
        ids = np.concatenate(parts, axis=1)
        mine = np.concatenate([np.full(p.shape, i % 2 == 1) for i, p in enumerate(parts)], axis=1)
        return ids, np.where(mine, ids, -100)

    def corrections(self, count: int):
        """attempt, fix, second attempt, judge: 40 tokens."""
        problem, prompt, first, right, _ = self.opening(count)
        keep = self.rng.random(count) < np.where(right, 0.78, 0.67)
        second, second_right, _ = self.attempt(problem, 0.1, 0.4)
        second = np.where(keep[:, None], first, second)
        verdict = np.where(keep, VOCABULARY["ok"], VOCABULARY["bad"])[:, None]
        right = np.where(keep, right, second_right)
        return self.assemble([
            prompt, self.says(first),
            self.asks(count, "fix"), self.says(verdict, second),
            self.asks(count, "judge"), self.says(self.judged(right)),
        ])  # fmt: skip

    def judgements(self, count: int):
        """attempt, judge: 24 tokens."""
        _, prompt, first, right, _ = self.opening(count)
        judge = self.asks(count, "judge")
        return self.assemble([prompt, self.says(first), judge, self.says(self.judged(right))])

    def reflections(self, count: int, tries: int):
        """wrong attempt, reflect (value reached, plans judged), retry: 40 + 13 * tries tokens."""
        problem, prompt, first, _, value = self.opening(count, wrong_only=True)
        reflection = [self.words(count, "got"), NUMBER + value[:, None]]
        for _ in range(tries):
            plan, right, _ = self.attempt(problem)
            reflection += [self.words(count, "try"), plan, self.judged(right)]
        other, _, _ = self.attempt(problem)
        follow = self.rng.random((count, 1)) < 0.9  # the last plan
        return self.assemble([
            prompt, self.says(first),
            self.asks(count, "reflect"), self.says(*reflection),
            self.asks(count, "retry"), self.says(np.where(follow, plan, other)),
        ])  # fmt: skip

    def batch(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One step's conversations, a micro-batch for each length."""
        n = self.rows // 16  # 9 for corrections, 2 for judgements, 5 for reflections
        parts = [self.corrections(9 * n), self.judgements(2 * n)]
        parts += [self.reflections(n * (5 - tries) // 2, tries) for tries in (1, 2, 3, 4)]
        return [(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in parts]


def pretrain(model, config: Config) -> float:
    """Muon on the layers' matrices, AdamW on the rest, one cosine: the last loss, nats a token."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=config.muon_lr, weight_decay=0.01)
    adamw = torch.optim.AdamW(outer, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    conversations = Conversations(config.rows, config.seed)
    for step in over(range(config.steps), "pretraining"):
        scale = min(1, step / 100) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        muon.param_groups[0]["lr"] = config.muon_lr * scale
        adamw.param_groups[0]["lr"] = config.lr * scale
        parts = conversations.batch()
        spoken = sum(int((labels != -100).sum()) for _, labels in parts)
        total = 0.0
        for ids, labels in parts:
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / spoken
            loss.backward()
            total += float(loss.detach())
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    return total


def main(config: Config) -> None:
    work, output = Path(config.work_dir), Path(config.output)
    with exit_on_bad_input():
        for path in (work / "rl", output):
            if path.exists():
                way_out = "move it away, or name others with --work_dir and --output"
                raise ValueError(f"{path} exists: {way_out}")
        require_writable(work, "--work_dir")
        require_writable(output.parent, "the directory of --output")
    torch.set_num_threads(1)  # so that the same weights come out on any number of cores
    if not (work / "pretrained").exists():  # else an earlier run got that far
        torch.manual_seed(config.seed)
        tokenizer, model = build_tokenizer(), build_model()
        pretrain(model, config)
        work.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, work / "pretrained")
    flags = {"model": str(work / "pretrained"), "output_dir": str(work / "rl"), "seed": config.seed}
    flags |= {"single_turn": True, "stage1_steps": 0, "stage2_steps": config.rl_steps}
    flags |= {"dtype": "float32"}  # on a GPU too
    flags |= {"problems": 32, "group_size": 8, "beta1": 0.1, "eval_every": 0}
    score.main(score.Config(**flags))
    shutil.copytree(work / "rl" / "checkpoint", output)


if __name__ == "__main__":
    run_script(main, Config)
