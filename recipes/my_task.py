"""A task of one's own, to be copied: python score.py --task recipes/my_task.py --model DIR

Words to be written backwards. It imports nothing of the project; tasks/own.py says what else a file
may define.
"""

WORDS = "bread lemon candle winter garden pencil window orange silver market".split()
WORDS += "yellow basket bridge copper danger engine farmer guitar hammer island".split()


def problems(split):
    """train, validation or test: dicts of what a prompt and a verdict need."""
    start = ("train", "validation", "test").index(split)
    pairs = [f"{a}{b}" for a in WORDS for b in WORDS if a != b]
    return [{"word": word} for word in pairs[start::3]]


def prompt(problem):
    return f"Write the word {problem['word']!r} backwards. Answer with that alone."


def verify(response, problem):
    """1.0 is right; a share of the letters at their places, half of it, is a reward, too."""
    said, wanted = response.strip().strip("'\"").lower(), problem["word"][::-1]
    if said == wanted:
        return 1.0
    return sum(a == b for a, b in zip(said, wanted)) / len(wanted) / 2


max_new_tokens = 32
