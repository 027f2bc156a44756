r"""Gold answers as people and models write them, and what only looks like them.

Of mathematics `other_writings(gold)` are responses that are right, `changed_writings(gold)` ones
that are not; `program_writings(program, call)` are responses that stand by the program.
verifier_checks.py runs them over MATH-500, GSM8K and MBPP.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

PARTS = {  # what stands in a gold answer, and how else that is written
    r"^\circ": ("", "°", r"^{\circ}", r"\degree", " degrees", "~°", r"\text{°}"),
    " ": ("~", r"\ ", r"\,", "  ", r"\;", "\N{NO-BREAK SPACE}", "\N{THIN SPACE}"),
    r"\left": ("", r"\Big"),
    r"\right": ("", r"\Big"),
    r"\frac": (r"\dfrac", r"\tfrac", r"\cfrac"),
    r"\dfrac": (r"\frac", r"\tfrac"),
    r"\$": ("$", ""),
    r"\text": (r"\textbf", r"\mathrm", r"\mbox", r"\text "),
    r"\mbox": (r"\text", r"\mathrm", r"~\text"),
    r"\sqrt{": ("√{",),
    r"\frac{1}{2}": ("½", "1/2"),
    r"\frac{3}{4}": ("¾", "3/4"),
    "_8": ("_{8}", r"_{\text{eight}}", r"_{\text{base }8}", r" \text{ (base 8)}", "₈"),
    "_9": ("_{9}", r"_{\text{nine}}", r"_{\text{base }9}", r" \text{ (base 9)}", "₉"),
    **{r"\pi": "π", r"\infty": "∞", r"\cup": "∪", r"\pm": "±", r"\in ": "∈", "-": "−"},
    **{"^2": "²", "^3": "³", "^5": "⁵"},
}  # fmt: skip
WHOLE = {
    r"\frac{1}{2}": ("0.5", ".5", r"50\%"),
    r"\frac{1}{3}": ("⅓", r"0.\overline{3}", r"0.\bar3", r"0.\dot{3}", r"33.\overline{3}\%"),
    r"\frac{2}{3}": ("⅔", r"0.\overline{6}", r"66\frac{2}{3}\%"),
}
NUMBER = (
    "{} eggs", r"{}\text{{ eggs}}", r"{}~\text{{cm}}", r"{}\ \mathrm{{m}}^2", "{} dollars", r"\${}",
    r"{}^\circ", "{}°", "{}%", r"{}\%", "{} percent", r"\text{{{}}}", r"\mathbf{{{}}}", "x={}",
    r"{} \text{{ miles per hour}}", "{} km/h", r"{}{{\text{{ eggs}}}}", "{} (eggs)", "{} deg",
    "{}∘",
)  # fmt: skip
ANY = ("{}.", "~{}~", r"\ {}\ ", r"{}\;", "${}$", r"\displaystyle {}", r"\( {} \)", "{{{}}}",
       r"\color{{red}} {}", r"\textcolor{{red}}{{{}}}", r"\large {}")  # fmt: skip
RESPONSES = (
    r"So $\boxed {}$.", r"\fbox{{{}}}", r"\framebox{{{}}}", r"\boxed{{{}}}, not \boxed{{}}",
    r"Thus $\boxed{{{}}}$.",
    "The final answer is ${}$. I hope it is correct.", r"**Final Answer**: \({}\)",
    "The answer is therefore ${}$.", "The answer is ${}$. This answer is right.",
    r"\boxed{{{}}} \boxed{{\,}}",
)  # fmt: skip
SENTENCES = (
    "The answer is {}, as shown.", "Final Answer: {}", "#### {}", "The answer is {} eggs.",
    "The answer is, therefore, ${}, and she saves $3.", "The answer is ${} rather than $3.",
    "#### {}\n#### Explanation",
)  # fmt: skip
OTHER_VALUES = ("{} dozen", "{}'", "{}''", "{} fifths", "{}_b", "{}_1", r"{}\text{{ million eggs}}")


def other_writings(gold: str) -> list[str]:
    texts = [gold.replace(old, new) for old, news in PARTS.items() for new in news if old in gold]
    texts += [form.format(gold) for form in ANY] + list(WHOLE.get(gold, ()))
    texts.append(re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", r"\\mathrm{i}", gold))
    if words := re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold):
        texts += [words[1], rf"\textbf{{{words[1]}}}"]
    responses = [form.format(gold) for form in RESPONSES]
    number = re.sub(r",(?=\d{3})|\\!|\\\$| ", "", gold)
    if re.fullmatch(r"-?\d*\.?\d+", number):
        texts += [form.format(number) for form in NUMBER] + [rf"{Fraction(number) * 100}\%"]
        if Fraction(number).denominator == 1:
            separators = (",", "{,}", r",\!", r"\,", " ", "~")
            texts += [f"{int(number):,}".replace(",", mark) for mark in separators] + [
                f"{number}.0"
            ]
        responses += [form.format(number) for form in SENTENCES]
    return [rf"\boxed{{{text}}}" for text in texts] + responses


def changed_writings(gold: str) -> Iterator[str]:
    """Each number plus one; each number but 0 with the other sign; each letter another.

    A whole number in dozens, minutes, fifths and bases too.
    """
    gold = gold.replace(r"\!", "")
    if re.fullmatch("[1-9][0-9]*", gold):
        yield from (rf"\boxed{{{form.format(gold)}}}" for form in OTHER_VALUES)
    for number in re.finditer(r"\d+(?!\}*\Z)|(?<!\^)\d+(?=\}*\Z)", gold):  # units are not compared
        before, after = gold[: number.start()], gold[number.end() :]
        yield rf"\boxed{{{before}{int(number[0]) + 1:0{len(number[0])}}{after}}}"
        if int(number[0]) and re.search(r"(?:\A|[{(\[,=+-])\s*\Z", before):
            bare = before.rstrip()
            signed = bare[:-1] + "+" if bare.endswith("-") else before + "-"
            yield rf"\boxed{{{signed}{number[0]}{after}}}"
    for letter in re.finditer(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|(?<=\\text\{)[A-Za-z]", gold):
        other = "q" if letter[0] != "q" else "r"
        yield rf"\boxed{{{gold[: letter.start()]}{other}{gold[letter.end() :]}}}"


FENCE = "```"


def program_writings(program: str, call: str) -> list[str]:
    """call: an example of its use, an expression."""
    program = program.strip()
    fenced = f"{FENCE}python\n{program}\n{FENCE}"
    draft = fenced.replace("return", "return None #")
    usage = f"Use it so:\n{FENCE}python\nfrom solution import *\nprint({call})\n{FENCE}"
    lifted = f"from __future__ import annotations\n{program}"
    output = f"This prints:\n{FENCE}\n8\n{FENCE}\n{FENCE}bash\npython solution.py\n{FENCE}"
    return [
        program,
        f"{fenced}\n{usage}\n{output}\n{FENCE}text\nO(n)\n{FENCE}",
        f"{draft}\nThat was wrong.\n~~~\n{program}\n~~~",
        f"{FENCE}python\nimport re\n{FENCE}\n{FENCE}py\n{lifted}{FENCE}",
        f"Here is the program:\n\n{program}\n\nIt's as short as that.",
        f"{program}\n{FENCE}",
        f"[PYTHON]\n{program}\n[/PYTHON]",
    ]
