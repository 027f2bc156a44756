r"""One writing for all the ways in which people and models write the same answer.

`alike` is applied to both sides before they are graded. It changes how an answer is written, never
what it says: nothing here knows the other side. What it writes is LaTeX that math-verify reads.
"""

import re
import unicodedata
from fractions import Fraction

LONGEST = 4_000  # characters; longer ones are no answers
PASSES = 20  # nor are those that are nested deeper; with it no text takes long
PLAIN = re.compile("-?[0-9]+")  # most answers, with nothing to be done


def alike(answer: str) -> str:
    """The answer in one writing. `alike(alike(x)) == alike(x)`.

    Every rule takes away something that no rule writes, so the loop ends. Where it ends too late
    the answer stays as it is.
    """
    answer = text = answer.strip()
    for _ in range(PASSES):
        if len(text) > LONGEST or PLAIN.fullmatch(text):
            break
        before = text
        if not text.isascii():
            text = _plain_signs(text)
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
        text = text.strip()
        if text == before:
            return text
    return text if PLAIN.fullmatch(text) else answer


SIGNS = {
    "−–—‒‐‑﹣－": "-", "×✕✖": r"\times ", "·⋅∙•": r"\cdot ", "∗": "*", "÷": r"\div ", "∕⁄": "/",
    "∶": ":", "∆": r"\Delta ", "∘": r"\circ ",
    "±": r"\pm ", "∓": r"\mp ", "≤⩽≦": r"\le ", "≥⩾≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ",
    "∅⌀": r"\emptyset ", "⊂": r"\subset ", "⊆": r"\subseteq ", "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℂ": r"\mathbb{C}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "°º˚": r"^\circ ", "∠": r"\angle ", "△": r"\triangle ", "→": r"\to ",
    "∣": "|", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "…⋯": r"\ldots ", "′’‘": "'", "“”": '"', "€£¥₹¢": "",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u2061\u2062\u2063": "",
    "∛": r"\sqrt[3]√", "∜": r"\sqrt[4]√",
}  # fmt: skip
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho"
    " varsigma sigma tau upsilon phi chi psi omega"
).split()
CHARACTERS = {ord(sign): latex for signs, latex in SIGNS.items() for sign in signs}
CHARACTERS |= {0x3B1 + place: rf"\{name} " for place, name in enumerate(GREEK)}
CHARACTERS |= {
    ord(letter): rf"\{unicodedata.name(letter).split()[-1].capitalize()} " for letter in "ΓΔΘΞΠΣΦΨΩ"
}
CHARACTERS[ord("Λ")] = r"\Lambda "  # LAMDA in Unicode
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ"
LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎"
PARTS = re.compile("[¼-¾⅐-⅞]|[⁰¹²³⁴-⁹]+[⁄/][₀-₉]+")
OVERLINED = re.compile("((?:[0-9][\u0304\u0305])+)")


def _plain_signs(text: str) -> str:
    """Mathematical characters become LaTeX; letters and digits of other fonts plain ones."""

    def folded(match: re.Match) -> str:
        return unicodedata.normalize("NFKC", match[0]).replace("−", "-")

    text = PARTS.sub(lambda m: "\\frac{{{}}}{{{}}}".format(*re.split("[⁄/]", folded(m))), text)
    text = re.sub(r"(?<![\w)}])⁻(?=[0-9])", "-", text)
    text = re.sub(f"[{RAISED}]+", lambda m: f"^{{{folded(m)}}}", text)
    text = re.sub(f"[{LOWERED}]+", lambda m: f"_{{{folded(m)}}}", text)
    text = OVERLINED.sub(lambda m: rf"\overline{{{m[1][::2]}}}", text)
    return unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS)


FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot csc ln log exp".split()
UNITS = set(
    "cm mm km dm nm ft in yd mi lb lbs oz kg mg hr hrs min mins sec secs mph kmh kph am pm usd eur"
    " gb mb kb kw kwh hz khz ml cl dl sq cu rs cc rpm pcs deg".split()
)
GLUED = UNITS - {"in", "am", "pm", "rs", "sq", "cu", "nm", "mi"}  # 12cm, but 3am may be a product
LETTERS = set("mshglLNVWAJKC")  # units too, where they stand upright or after a number and a space
SMALL_WORDS = {"of", "per", "to", "a", "an", "at", "by", "on", "squared", "cubed"}
NO_NOUNS = {*FUNCTIONS, *GREEK} | set(
    "and or mod plus minus over infinity squared cubed factorial choose undefined none sqrt base"
    " half halves".split()
)
PARTS_OF_ONE = re.compile(
    "(?:third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|"
    "[a-z]+(?:teen|tie|red|sand|llion))th)s?"
)
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MULTIPLES = {name: f"10^{{{power}}}" for name, power in MULTIPLES.items()} | {"dozen": "12"}
BASES = "two three four five six seven eight nine ten eleven twelve sixteen".split()
BASES = dict(zip(BASES, (*range(2, 13), 16), strict=True))
NO_NOUNS |= BASES.keys()


def _is_value(word: str) -> bool:
    """6 fifths, 6 mod 5."""
    return word.lower() in NO_NOUNS or PARTS_OF_ONE.fullmatch(word.lower()) is not None


def _is_noun(word: str) -> bool:
    """Not a product of variables, which people write in the order of the alphabet: abc, xyz."""
    low = word.lower()
    if low in UNITS:
        return True
    if len(low) < 3 or _is_value(low) or word[1:] != low[1:] or not re.search("[aeiouy]", low):
        return False
    return len(low) > 3 or list(low) != sorted(set(low))


def _without_nouns(match: re.Match) -> str:
    r"""`18 eggs` is 18, `12\text{ m}^2` is 12; `18x`, `2 n` and `3 ab` are products."""
    before, nouns = match[1], match[2]
    first, *others = re.findall("[A-Za-z]+", re.sub(r"\\text|\\cdot|\b[A-Z]-\b", "", nouns))
    if r"\text" in nouns:
        bare = re.findall("[A-Za-z]+", re.sub(rf"\\text\{{{INNER}\}}|\\cdot", "", nouns))
        said = [first, *(word for word in others if word.lower() not in SMALL_WORDS)]
        is_unit = not any(map(_is_value, said)) and all(
            _is_noun(word) or word in LETTERS for word in bare
        )
    elif not nouns[0].isspace():
        is_unit = first in GLUED and not others
    elif first in LETTERS and not others:
        is_unit = re.fullmatch(r"[-+0-9.,]+", match.string[: match.end(1)]) is not None
    else:
        is_unit = (_is_noun(first) or first in LETTERS or first == "of") and all(
            _is_noun(word) or word in SMALL_WORDS or word in LETTERS for word in others
        )
    return before if is_unit else match[0]


def _without_font(match: re.Match) -> str:
    r"""`\mathrm{e}` is e, `\operatorname{sin}` a function, `\text{(C)}` (C), other words text."""
    before, font, content = match[1], match[2], re.sub(r"\s+", " ", match[3]).strip()
    if content in FUNCTIONS or font[:8] == "operator" and re.fullmatch("[A-Za-z]{2,}", content):
        return rf"{before}\{content} "
    letters = re.findall("[A-Za-z]+", re.sub(r"\\[A-Za-z]+", "", content))
    upright = "bf" not in font and "it" not in font and "bold" not in font
    after_number = upright and re.search(r"[0-9})]\s?\Z", before)
    if after_number and letters and content[0].isalpha() and LETTERS.issuperset(letters):
        return rf"{before}\text{{{content}}}"
    if any(len(word) > 1 for word in letters) and not content[0].isdecimal():
        return rf"{before}\text{{{content}}}"
    if before[-1:] in ("^", "_"):
        return f"{before}{{{content}}}"
    return before + " " * before[-1:].isalpha() + content  # not to lengthen a command


def _without_braces(match: re.Match) -> str:
    """`{5}`, but not `{1}+{2}`."""
    depth, inner = 0, match[1]
    for brace in re.findall(r"\\.|[{}]", inner):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return match[0]
    return inner if depth == 0 else match[0]


def _exact_fraction(match: re.Match) -> str:
    r"""0.1\overline{6} = (16 - 1) / 90."""
    fixed, period = (match[1] or "0") + match[2], re.sub("[^0-9]", "", match[3])
    value = Fraction(int(fixed + period) - int(fixed), 10 ** len(period) - 1)
    value /= 10 ** len(match[2])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _base(match: re.Match) -> str:
    base = next((group for group in match.groups()[1:] if group), None)
    return f"{match[1]}_{{{BASES.get(base.lower(), base)}}}" if base else match[0]


def _words(match: re.Match) -> str:
    """Else a word would be the product of its letters, and as good as one with them in disorder."""
    words = re.findall("[A-Za-z]+", match[0])
    return rf"\text{{{match[0]}}}" if any(map(_is_noun, words)) else match[0]


def _root(match: re.Match) -> str:
    radicand = next((group for group in match.groups()[1:] if group), "")
    return (match[1] or r"\sqrt") + f"{{{radicand}}}"


END = "(?![A-Za-z])"  # of a command
SPACE = rf"\\(?:[,;:> ]|(?:quad|qquad|enspace|space|thinspace|medspace|thickspace){END})"
FONTS = (
    r"text(?:rm|bf|it|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal|up)|mbox|hbox|"
    r"operatorname\*?|boldsymbol|bold|bm|emph|underline"
)
DIGITS = "[0-9]{1,99}"
DOTTED = r"\\dot\s*(?:\{[0-9]\}|[0-9])"
PERIOD = (
    rf"\\(?:overline|bar)\s*(?:\{{\s*{DIGITS}\s*\}}|[0-9])|"
    rf"{DOTTED}(?:[0-9]{{0,99}}{DOTTED})?|\({DIGITS}\)(?!\s*\^)"
)
INNER = r"(?:[^{}]|\{-?[0-9]\})*"  # of a font's braces: m^{2}
NOUN = (
    r"(?:\\text\{[A-Za-z](?:[A-Za-z0-9^ .'/-]|\{-?[0-9]\})*\}|[A-Za-z]+\.?)"
    r"(?:\^(?:-?[0-9]|\{-?[0-9]\}))?"
)
BASE = rf"([2-9]|[1-3][0-9]|{'|'.join(BASES)})"
IN_BASE = rf"\(?\s*(?:base\s*)?{BASE}\s*\)?\s*"
SAID_BASE = rf"\\text\{{\(?(?:in )?base[\s-]*{BASE}?\)?\}}\s*{BASE}?|(?:in )?base[ -]*{BASE}"
CURRENCY = r"\A(?:USD|EUR|Rs\.?)\s*(?=[0-9])"
DEGREE = rf"\\(?:circ|(?:text)?degrees?){END}"
RULES = [
    # spaces, dollar signs, brackets around a formula, sizes, what ends a sentence
    (r"(?<=[0-9])(?:\\,|\\!|\{,\}|')(?=[0-9]{3}(?![0-9]))", ""),
    (rf"(\\\\)|(?:{SPACE}|~|\s)+", lambda m: m[1] or " "),
    (r"(?<=,)\\!\s*", ""),
    (rf"(\\\\)|\\[!()$\[\]]|\\(?:pounds|euro){END}|\$|{CURRENCY}", lambda m: m[1] or ""),
    (r"^\*{2,}|(?<!\*)\*{2,}$|^`+|(?<!`)`+$", ""),
    (r"\A([\"'])([^\"']*)\1\Z", r"\2"),
    (rf"\\(?:display|text|script)style{END}|\\[bB]igg?[lrm]?{END}|"
     rf"\\(?:tiny|small|[lL]arge|LARGE|[hH]uge){END}|\\(?:text)?color\{{[a-z]*\}}", ""),
    (rf"\\(?:left|right){END}(?!\s*\.)", ""),
    (r"(?<![\s=:.,;\\])[\s=:.,;]+\Z|\A[\s=]+|(?<!\\)\\+\Z", ""),
    (rf"(?<=[0-9])\s*\{{(\\%|\\text\{{{INNER}\}})\}}", r"\1"),
    # commands with several names
    (rf"\\(?:[dtc]|nice|s)frac{END}", r"\\frac"),
    (rf"\\varnothing{END}", r"\\emptyset"),
    (rf"\\(?:cdots|dots[bcmio]?){END}", r"\\ldots"),
    (r"(?<![0-9A-Za-z.])\.{3}(?!\.)", r"\\ldots "),
    (r"(?<=[0-9}]) ?\\ldots\Z", ""),  # 0.333…
    (rf"\^\s*(?:\\prime{END}|\{{\s*\\prime\s*\}})", "'"),
    (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"),
    (r" (?=\\[A-Za-z])", ""),
    (rf"\\imath{END}", "i"),
    (rf"\\var(phi|epsilon|theta|rho|sigma){END}", r"\\\1"),
    (rf"(\\sqrt|\\frac\s*(?:\{{[^{{}}]*\}}|[0-9])?)\s*(\\(?:{'|'.join(GREEK)}){END})", r"\1{\2}"),
    (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)}|pi|theta){END}", r"\\\1 "),
    # fonts
    (rf"\{{\\(rm|bf|it){END}\s*([^{{}}]*)\}}", r"{\\math\1{\2}}"),
    (rf"(?<=[0-9])\s*\\frac\s*\{{\\(?:{FONTS})\{{([^{{}}]*)\}}\}}\s*"
     rf"\{{\\(?:{FONTS})\{{([^{{}}]*)\}}\}}", r"\\text{\1/\2}"),
    (r"\A\{(.*)\}\Z", _without_braces),
    (rf"\\({FONTS})\s+([A-Za-z0-9])(?![A-Za-z0-9])", r"\\\1{\2}"),
    (rf"(.?.?)\\({FONTS})\s*\{{({INNER})\}}", _without_font),
    # roots of characters and of programs
    (rf"(?<![\\A-Za-z])sqrt{END}", "√"),
    (r"(\\sqrt\[[34]\])?√\s*(?:\{([^{}]*)\}|\(((?:[^()√]|\([^()√]*\))*)\)|"
     rf"([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\(?:{'|'.join(GREEK)}){END}))", _root),
    (r"√\s*(?=\\[A-Za-z]|√)", r"\\sqrt "),
    (r"\*\*(?=[0-9A-Za-z({-])", "^"),
    # degrees, but for those with minutes; percentages
    (rf"\s*(?:\{{\}})?(?:\^\s*(?:{DEGREE}|\{{\s*\^?\s*{DEGREE}\s*\}})|"
     rf"\\(?:text)?degrees?{END}|(?<=[0-9])\s*(?:\\circ{END}|\^\s*(?:o{END}|\{{o\}})))"
     r"(?:\s*(?:[CF]|\\text\{[CF]\})\Z)?(?!\s*[0-9])", ""),
    (r"\s*(?:(?<!\\)%|(?<=\s)\\%|\\text\{per ?cent(?:age)?\}|"
     rf"(?<=[0-9}}) ])(?:per ?cent(?:age)?|pct){END})", r"\\%"),
    # repeating decimals, numbers with a base, with spaces, in words
    (rf"(?<![0-9.,])({DIGITS})?\.\s?([0-9]{{0,99}})({PERIOD})(?!\s*_)", _exact_fraction),
    (r"\(([0-9A-F][0-9A-Z.]*)\)\s*_", r"\1_"),
    (rf"([0-9][A-F]*)\s*(?:\(\s*(?:{SAID_BASE})\s*\)|(?:{SAID_BASE}))(?![0-9A-Za-z])", _base),
    (rf"([0-9][A-F]*)\s*_\s*(?:{BASE}(?![0-9A-Za-z])|\{{\s*{IN_BASE}\}}|"
     rf"\{{\s*\\text\{{(?:base\s*\}}\s*{BASE}|{IN_BASE}\}})\s*\}}|\\text\{{{IN_BASE}\}})", _base),
    (r"(?<![0-9.,/])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9/])", r"\1\\frac{\2}{\3}"),
    (r"(?<![0-9.,])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9])", lambda m: m[1].replace(" ", "")),
    (r"\A([^,(\[{]*(?<![0-9.]))([0-9]{1,3}(?:,[0-9]{3})+)(?=[^0-9,][^,]*\Z|\Z)",
     lambda m: m[1] + m[2].replace(",", "")),
    (rf"(?<=[0-9])\s*(\\text\{{)?({'|'.join(MULTIPLES)})s?{END}",
     lambda m: rf"\cdot {MULTIPLES[m[2]]}" + (m[1] or "")),
    # nouns after a number, and words alone
    (r"(?<=[0-9}])(\s*(?:\\text\{)?)\(([A-Za-z]{3,}[A-Za-z ]*)\)(?=\}?\Z)", r"\1 \2"),
    (rf"([0-9}})%]|\\pi)(\s*{NOUN}(?:(?:\s*/\s*|-|\s*\\cdot\s*|\s+|(?=\\text)){NOUN}){{0,9}})"
     r"\s*(?=[,;)\]]|\Z)",
     _without_nouns),
    (r"\A[A-Za-z]{2,}(?:[ -][A-Za-z]+)*\Z", _words),
    (r"\A(?:\\text\{)?\(?(ii|iii|iv|vi|vii|viii|ix)\)?\}?\Z", r"\\text{\1}"),  # not i times i
]  # fmt: skip
RULES = [(re.compile(pattern), replacement) for pattern, replacement in RULES]
