"""verify_math on text: which answer a response gives, and which writings of it are the same."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import verifiers
from answers.mathematics import extract_math
from answers.writing import alike
from tasks.math import TASK
from verifiers import verify_math


@pytest.mark.parametrize("response, answer", [
    (r"\boxed{1} and \boxed{42}", "42"),
    (r"\boxed{\frac{1}{2}} then \boxed{3", r"\frac{1}{2}"),  # the last that is balanced
    (r"\boxed{7}</think> \boxed{8}", "8"),
    (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),  # an escaped brace is a character
    (r"\boxed {5}", "5"), (r"\boxed{1 + \boxed{2}}", "2"), (r"\fbox{5}", "5"),
    (r"\boxed{5} and \boxed{}", "5"), (r"\boxed{5} \boxed{\,}", "5"), (r"\framebox{5}", "5"),
    (r"\boxed{ }", None), (r"\boxed{5}, so \fbox{6}", "6"),
    (r"\boxed{6} the final answer is 5", "6"), (r"\boxed 5 and then \boxed{6}", "6"),
    (r"so $\boxed 5$", "5"), (r"so $\boxed5$", "5"), (r"\boxed{6}, no, $\boxed 25$.", "25"),
    (r"$x = \boxed\frac{1}{2}$", r"\frac{1}{2}"), (r"$\boxed-5$.", "-5"),
    (r"{\boxed 5}", "5"), ("\\boxed 5\nDone", "5"), (r"$\boxed\$32$", r"\$32"),
    (r"$\boxed \begin{pmatrix} 1 & 2 \end{pmatrix}$", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"\boxed 5 because 5 > 3", "5"), (r"\boxedtext{5}", None), (r"\boxed", None),
    (r"\boxed{5}</think> so 5", None), ("42", None),
])  # fmt: skip
def test_the_last_balanced_box_is_the_answer(response, answer):
    assert extract_math(response) == answer


@pytest.mark.parametrize("response, answer", [
    ("The final answer is 4. Final Answer is: 5. I hope it is correct.", "5"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    ("final answer is \\[3.5\\] and more", "3.5"), ("final answer is 3.5\nDone", "3.5"),
    ("**final answer is** **1,234**.", "1,234"), ("**Final Answer:** $5$ or so", "5"),
    ("### Final Answer\n\n\\( 5 \\)", "5"), ("Final Answer\n\nThe answer is 5.", "5"),
    (r"final answer is \boxed{42", None), ("final answer is 42}", None),
    ("The final answer is 18 eggs.", "18 eggs"), ("The final answer is therefore 18.", "18"),
    ("The final answer is 18, as shown above.", "18"), ("so it is\n#### 18", "18"),
    ("The answer is 18, since 3 * 6 = 18.", "18"), ("Final answer: 3, 5, and 7.", "3, 5, and 7"),
    ("The final answer is 18. The answer is easy to check.", "18"),
    ("The final answer is $18.", "$18"), ("The final answer is $18, so she saves $3.", "$18"),
    ("The final answer is $18. That is $5 more than before.", "$18"),
    ("The final answer is $18 and she keeps $3.", "$18"), ("final answer is $18 for $3", "$18"),
    ("The final answer is $18. Here $x = 3$ pens.", "$18"),
    ("The final answer is $3, 5$.", "3, 5"), ("The answer is $18 x$, not $18$.", "18 x"),
    ("The answer is $5$ or $6$.", "$5$ or $6$"), ("The answers are 3 and 5.", "3 and 5"),
    (r"The answer is $2\sqrt3$ and not $3$", "2\\sqrt3"),
    ("The answer is about 18 (eighteen)", "18"),
    (r"The answer is $5 \text{ and } 6$.", r"5 \text{ and } 6"),
    ("The answer is (B) because of that", "(B)"), ("The answer is not known", "not known"),
    ("The final answer is $18, and she saves $3.", "$18"), ("The answer is, therefore, 5.", "5"),
    ("The final answer is $18 rather than $19.", "$18"), ("#### 5\n#### Explanation\nIt", "5"),
    ("The answer is $5$. This answer is correct.", "5"), ("The answer is 5. Answer: (C)", "(C)"),
    ("The answer is 5. No, the answer is $x+y$.", "x+y"), ("final answer: 5. Answer: 6", "5"),
    ("Answer: $p - q$. My answer is right.", "p - q"),
    ("The answer is 5. The answer is not 6.", "not 6"), ('The final answer is "18".', '"18"'),
])  # fmt: skip
def test_without_a_box_the_final_answer_is_taken_from_its_sentence(response, answer):
    assert extract_math(response) == answer


@pytest.mark.parametrize("gold, answer", [
    ("1,234", "1234"), ("1234", r"1{,}234"), ("1234", r"\$1,234.00"), ("72", "72.0"),
    ("18", "18."), ("-5", "- 5"), ("0.5", r"\frac12"), ("1/2", ".5"), (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"), ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{1}{3}x", "x/3"), ("5", "x=5"), (r"\{1,2\}", "2, 1"), (r"1.5 \cdot 10^3", "1500"),
    (r"[\frac12,1)", "[0.5,1)"), (r"\text{Evelyn}", "Evelyn"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, 0.5\pi)"),
    (r"\begin{pmatrix}1/2\\1\end{pmatrix}", r"\begin{pmatrix}0.5\\1\end{pmatrix}"),
    ("10^{20}", "1" + "0" * 20), ("1<x<2.5", "1<x<2.5"),
])  # fmt: skip
def test_other_ways_to_write_the_answer_are_right(gold, answer):
    assert verify_math(rf"\boxed{{{answer}}}", gold) is True


@pytest.mark.parametrize("gold, answer", [
    ("1/3", "0.3333"), (r"\frac{1}{3}", "0." + "3" * 40), (r"\pi", "3.14159"),
    (r"\pi", "3.14159265358979323846"), (r"\pi", r"\frac{314159265358979323846}{10^{20}}"),
    (r"\sqrt{2}", "1.41421356237"), ("0.1234567", "0.1234568"),
    ("12345678901234567890123", "12345678901234567890124"), ("10^{20}", "10^{20}+1"),
    ("10^{-20}", "10^{-21}"), ("10^{-200}", "10^{-201}"), ("1", "0." + "9" * 30),
    ("0", "10^{-30}"), ("1" + "0" * 20 + ".5", "1" + "0" * 20),
    (r"\frac{\sqrt{2}}{10^{30}}", r"\frac{\sqrt{3}}{10^{30}}"), ("x/3", "0.3333333x"),
    ("(1/3,1)", "(0.3333333,1)"), (r"\{1/3,1\}", r"\{0.3333333,1\}"), ("x=1/3", "x=0.3333333"),
    ("x>1/3", "x>0.3333333"),
    (r"\begin{pmatrix}1/3\\1\end{pmatrix}", r"\begin{pmatrix}0.3333333\\1\end{pmatrix}"),
    ("10^{20}x", "(10^{20}+1)x"), ("5", "5, 6"), ("5", ""), ("5", " "), ("x", "y"),
    (r"\text{(A)}", r"\text{(B)}"),
])  # fmt: skip
def test_values_that_only_round_alike_are_different(gold, answer):
    assert verify_math(rf"\boxed{{{answer}}}", gold) is False


WRITINGS = {  # kind: (gold, right answers, wrong ones)
    "degrees": [
        (r"90^\circ", r"90° | 90^{\circ} | 90 ° | 90\degree | 90\text{°} | 90 degrees | 90 | "
         r"90 deg | 90∘ | 90^∘ | 90^\degree", "91° | -90° | 90' | 90'' | 90^\\prime"),
        ("25", "25°C | 25^\\circ F", "26°C"), ("90.5", "90.5°", "90° | 905°"),
        (r"30^\circ 15'", "30°15' | 30^{\\circ}\\,15'", "3015 | 30 | 45 | 15°30' | 30°16'"),
        (r"30^\circ15'20''", "30°15'20\"", "30°20'15\""), ("6'2\"", "6' 2''", "62 | 2'6\" | 6'"),
        ("5'10''", "5'10\"", "510"), ("1234", "1'234", "1'23"), (r"3\circ 4", "3∘4", "34"),
    ],
    "spaces": [
        ("12", r"12~\text{cm} | 12~cm | 12~\mathrm{m}^2 | ~12~ | 12\ \text{cm} | 12\  | 12\;",
         "1~2 | 12~x"),
        (r"\frac{5}{4}", r"1~\frac{1}{4} | 1 1/4", r"1\cdot\frac14"), ("(1,2)", "(1,~2)", "(1,~3)"),
        ("1234", r"x=1,234 | 1,234\text{ cm}", "(1,234) | 1, 234 | 1,234,5"),
        ("10080", r"10\,080 | 10 080 | 10{,}080", r"10\,081 | 10\,08"),
    ],
    "signs": [
        (r"3\sqrt{13}", "3√13 | 3√{13} | 3√(13) | 3sqrt(13) | 3 · √13", "√13·2 | 3√1·3 | 3√14"),
        (r"\frac{1}{2}", "½ | 1÷2 | 1⁄2 | ２⁻¹", "1½ | ⅓"),
        ("x^2", "x² | 𝑥^2 | x · x", "x³ | x₂ | 2x"),
        (r"(-\infty,2]", "(−∞,2] | (–∞,2]", "(∞,2] | (−∞,2)"),
        (r"2\pi", "2π | 2·π | 2×pi", "π² | 2p"),
        (r"x\le 3", "x≤3 | x⩽3 | 3 ≥ x", "x≥3 | x<3"),
        (r"1\pm\sqrt5", "1±√5 | 1∓√5", "1+√5 | 1±√6"),
        (r"(1,2)\cup(3,4)", "(1,2)∪(3,4)", "(1,2)∩(3,4)"), (r"\emptyset", r"∅ | \varnothing", "0"),
        (r"x\to\infty", r"x→∞ | x \to \infty", "x→0"), ("3:4", "3∶4", "4∶3"), (r"\Delta", "∆", "∇"),
        (r"1,2,\ldots,n", r"1,2,...,n | 1, 2, … , n | 1,2,\cdots,n", "1,2,n | 1,2,...,m"),
        (r"1+2+\dots+n", r"1+2+...+n | 1+2+\cdots+n", "1+2+n"), ("-5", "⁻5", "5"),
        (r"\frac12", "¹⁄₂ | ¹/₂", "²⁄₁ | 12"), ("x^{-5}", "x⁻⁵", "x^5"), ("18", '"18"', '"19"'),
        (r"\alpha+\beta", "α+β", "α+γ"), ("10^{-12}", "10⁻¹²", "10¹² | 10⁻¹"),
    ],
    "nouns": [
        ("18", r"18 eggs | 18 dollars | $18 dollars | 18\text{ eggs} | 18 Eggs | "
         "18 miles per hour | 18 km/h | 18 m | 18cm | 18 square feet | 18 pieces of cake | "
         "18\\text{ m}^2 | 18\\text{ (eggs)} | 18 (eggs) | 18{\\text{ eggs}} | 18 T-shirts | "
         "18¢ | USD 18 | Rs. 18 | 18 times | 18 months",
         r"18x | 18 x | 18ab | 18 ab | 18m | 18 abc | 19 eggs | 18.5 eggs | 18 million | "
         r"18 \cos x | 18 sin x | 18 theta | 18 pi | 18 squared | 18 halves | "
         r"18\text{ or }19 | [18 eggs | 18 dozen | 18(x) | 18 (ab) | 18 (m) | 18 times ten | "
         r"18 times x | 18 (five) | 18 fifths | 18\text{ fifths} | 18 sixths | 18 tenths | "
         r"18 hundredths | 18 thirteenths | 18\text{ million eggs}"),
        (r"6\text{ p.m.}", r"6\ \text{p.m.}", r"6\text{ a.m.} | 6 a.m."),
        ("60", r"60\ \mathrm{km\,h^{-1}} | 60\frac{\text{m}}{\text{s}}",
         r"60\frac{\text{x}}{\text{y}}"),
        ("216", r"18 dozen | 18 dozen eggs | 18\text{ dozen eggs}", "18 | 216 dozen"),
        ("7", r"7\text{ kg}\cdot\text{m/s}^2 | 7\text{ feet squared}", r"7\text{ cm}\cdot x"),
        ("2m", "2m | 2 \\cdot m | m2", "2 | 2n | 2 eggs"), ("3ab", "3ab | 3 b a", "3 | 3 apples"),
        ("5000000", "5 million | 5 million dollars | 5\\text{ million}", "5 | 5 billion"),
        ("(1,2)", "(1,2) | (1 cm, 2 cm)", "1 cm | (1,2x)"),
        ("2x+3", "2x+3", "2x | 2x+3y | 3 eggs"),
    ],
    "letters": [
        (r"2-\frac{1}{e}",
         r"2-\frac{1}{\mathrm{e}} | 2-{\rm e}^{-1} | 2-\text{e}^{-1} | 2-\frac{1}{\bf e}",
         r"2+\frac{1}{\mathrm{e}} | 2-\frac{1}{\mathrm{x}}"),
        ("3+4i", r"3+4\mathrm{i} | 4\mathrm i+3 | 3+4\imath", r"3-4\mathrm{i} | 3+4\mathrm{j} | 7"),
        ("5", r"\color{red}5 | \textcolor{red}{5} | \large 5",
         r"\color{red}6 | \textcolor{red}{x}"),
        (r"\ln 2", r"\mathrm{ln}2 | \operatorname{ln} 2 | ln 2", r"\ln 3 | \log_2 2"),
        (r"\text{(C)}", r"C | \textbf{(C)} | (C) | \mathrm{C}", r"(B) | \text{C, D}"),
        (r"\text{(ii)}", r"(ii) | ii | \textbf{(ii)}", "(iii) | -1 | i"),
        (r"\text{Evelyn}", "Evelyn | \\mathrm{Evelyn} | \\text{evelyn}", "Evan | Evelny | nylevE"),
        (r"\text{no solution}", "no solution | \\text{No solution}", "solution | no"),
        ("E=(0,3)", "(0,3) | E=(0,3)", "(0,4) | D=(0,3) | 3"), ("I=3", "3 | I=3", "4 | i | J=3"),
        ("DE=5", "5", "6"), ("i=3", "3", "-1 | 4"), ("e=0.5", r"\frac12 | e=\frac12", "e | 2"),
    ],
    "periods": [
        (r"\frac{1}{3}", r"0.\overline{3} | 0.\bar{3} | .\overline3 | 0.\dot{3} | 0.(3) | 0.3̅ | "
         r"33.\overline{3}\%", r"0.\overline{4} | 0.333 | 0.3 | 0.0\overline{3} | 33.3\%"),
        (r"\frac{1}{7}", r"0.\overline{142857}\ldots", r"0.142857\ldots | 0.142857..."),
        (r"\frac{1}{6}", r"0.1\overline{6} | 0.1(6)", r"0.\overline{16} | 0.16"),
        (r"-\frac{3}{11}", r"-0.\overline{27} | -0.\dot2\dot7", r"0.\overline{27} | -0.27"),
        ("1", r"0.\overline{9}", "0.9999999"), (r"0.\overline{12}", r"\frac{4}{33}", "0.12"),
        ("250", "2.5(10)^2 | 250", "2.5(10)"),
    ],
    "bases": [
        ("52_8", r"52_{8} | 52_{\text{eight}} | (52)_8 | 52 base 8 | 52\text{ (base 8)} | "
         r"52_{\text{base }8} | 52₈ | 052_8", r"52_9 | 52 | 42 | 53_8 | 52_{10} | 52_{80}"),
        ("101", "101 | 101_{10}", "101_2 | 5"),
        (r"\frac{52_8}{2}", r"\frac{52_{8}}{2}", r"\frac{52_9}2"),
        ("1A_{16}", "1A_{16} | 1a_{16}", "1B_{16} | 26 | 1A_{12} | 1b_{16}"),
        ("A4_{16}", "(A4)_{16}", "(A5)_{16} | 4A_{16}"), ("ABC_{16}", "(ABC)_{16}", "(ABD)_{16}"),
        ("1101_2", r"1101\ (\text{base }2) | 1101\text{ (base-2)} | (1101 base 2)",
         r"1101\ (\text{base }3) | 1101 | 1101\text{ base 40}"),
        ("3A_1", r"3A_{1} | 3\cdot A_1", "3A_2 | 3"), ("3A_2", r"3A_{2} | A_2\cdot 3", "3A_3"),
        ("52_b", "52_{b}", "52_c | 52"), ("52", "52_{10}", "52_1 | 52_0 | 52_{37} | 52_b"),
        ("x_2", "x_{2}", "x_3 | x"),
        ("0.1_2", "0.10_2", "0.1_3 | 0.5"), ("52_2", "52_2", "52 | 52_3"),
    ],
    "percent": [
        (r"28\%", r"28 | 0.28 | 28% | 28 percent | 28\text{ percent} | \frac{7}{25}",
         r"2800 | 0.28\% | 29\% | 28x"),
        (r"28\%", r"28{\%} | 128\%-100\% | 1-72\%", r"1-28\%"), (r"1-80\%", r"20\%", r"-79\%"),
        ("0.5", r"0.5\% | 50\% | \frac12\%", r"5\% | 0.05\%"), ("0.005", r"0.5\%", r"50\%"),
        (r"\frac{1}{3}", r"33\frac13\%", r"33.3\% | 33\%"), ("20", "20 %", "2% | 21%"),
        (r"0.2, 0.8", r"20\%, 80\%", r"20\%, 0.8\% | 20\%, 81\%"),
    ],
    "i": [
        ("-3+4i", "(1+2i)^2 | 4i-3", "(2+i)^2 | -3-4i"),
        (r"\frac{1+i}{2}", r"\frac{1}{1-i}", "1+i"),
        ("-i", r"\frac{1}{i} | i^3", "i | -1"), ("5", "|3+4i| | (2+i)(2-i)", "3+4i | |3+5i|"),
        (r"2i", r"\sqrt{-4}", "-2 | 2"), ("-1", r"e^{i\pi} | i^2", "i"), ("z=1+i", "1+i", "1-i"),
        (r"\sum_{i=1}^n i^2", r"\sum_{i=1}^{n} i^2", r"\sum_{i=1}^n i | -n"), ("x_i", "x_i", "x_j"),
        ("a+bi", "bi+a", "a-bi"),
        ("x^2+2x+5=0", "2x+x^2=-5 | 5+x^2+2x=0", "x^2+2x+6=0 | x^2-2x+5=0"),
    ],
    "roots": [
        (r"\sqrt{\frac{1}{m}}", r"\frac{1}{\sqrt m} | \frac{\sqrt{m}}{m} | m^{-1/2}",
         r"\frac{2}{\sqrt m} | \sqrt m | \frac{1}{\sqrt n}"),
        (r"\sqrt{\frac{a}{b}}", r"\frac{\sqrt a}{\sqrt b} | \frac{\sqrt{ab}}{b}", r"\sqrt{ab}"),
        (r"2\sqrt m", r"\sqrt{4m}", r"\sqrt{2m} | -\sqrt{4m} | 4\sqrt m"),
        (r"|x|\sqrt y", r"\sqrt{x^2y}", r"\sqrt{xy} | x\sqrt y"),
        (r"\sqrt{a^2}", "|a|", "a | -a"), ("x", r"\sqrt x\sqrt x", r"(x^2)^{1/2} | \sqrt{x^2}"),
        (r"\sqrt{(x+1)^2}", "|x+1| | |-x-1|", "x+1"), (r"\sqrt[4]{m^4}", "|m|", "m"),
        ("1", "1", r"\frac{\sqrt{x^2}}{x} | \frac{|x|}{x}"),
        (r"\sqrt{x^2}=3", r"3=\sqrt{x^2}", "x=3"),
        (r"\sqrt{x^2+1}+|x|", r"|x|+\sqrt{1+x^2}", r"\sqrt{x^2+1}+x"),
        (r"\sqrt{\frac{1}{m^2}}", r"\frac{1}{|m|}", r"\frac1m"),
        (r"\sqrt x\ge 0", r"0 \le \sqrt x", r"\sqrt x\ge -1"),
        (r"\sqrt{x+1}", r"(x+1)^{1/2}", r"\sqrt x+1 | \sqrt{x}"), ("x", "x", "|x| | -x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind, gold, right, wrong", [
    (kind, *case) for kind, cases in WRITINGS.items() for case in cases
])  # fmt: skip
def test_every_writing_of_a_kind_is_right_and_what_looks_like_it_is_wrong(kind, gold, right, wrong):
    answers = {answer: True for answer in right.split(" | ")}
    answers |= {answer: False for answer in wrong.split(" | ")}
    verdicts = {answer: verify_math(rf"\boxed{{{answer}}}", gold) for answer in answers}
    assert verdicts == answers


def test_the_gold_answer_stands_first():
    """An equation asked for is not answered by its right side, but may answer it."""
    assert not verify_math(r"\boxed{10}", "2x=10")
    assert verify_math(r"\boxed{2x=10}", "10")


def test_the_limit_on_length_is_that_of_the_other_verifiers():
    assert verify_math(r"\boxed{" + "0" * (verifiers.MAX_ANSWER_CHARS - 1) + "5}", "5")
    assert not verify_math(r"\boxed{" + "0" * verifiers.MAX_ANSWER_CHARS + "5}", "5")


@pytest.mark.parametrize("response", [
    r"\boxed{" * 100_000, "}" * 1_000_000, "\\" * 1_000_000, r"\boxed " * 100_000,
    r"\boxed{" + "{" * 10**6 + "}" * 10**6 + "}", "final answer is " * 50_000,
    "final answer is $" * 50_000, "the answer is so " * 50_000, "final " * 200_000,
    r"\boxed{" + "9" * 900 + "!}", r"\boxed{" + "9" * 2000 + "}", r"\boxed{\ud800}",
    "\\boxed{\ud800}", "\\boxed{4\x002}", "\\boxed{٤٢}",
    r"\boxed{" + r"\sqrt{" * 140 + "42" + "}" * 141, r"\boxed{[0]*10**10}",
    r"\boxed{__import__('os').abort()}", r"\boxed{\boxed}", "\\boxed{$4\n2$}", r"\boxed{#1}",
])  # fmt: skip
def test_odd_responses_are_wrong_and_do_no_harm(response):
    start = time.process_time()
    assert verify_math(response, "42", timeout=0.5) is False
    assert time.process_time() - start < 10  # of this process: reading it takes no longer


@pytest.mark.parametrize("text", [
    "√(" * 500, "5 a" * 300, "5 " + "egg " * 240, r"\text{" * 160, "{" * 500 + "}" * 500,
    r"0.\dot1" + "1" * 990, "1 " * 500, "1 000" * 200, " " * 999 + "5", "5_" * 500, "5 base " * 140,
    r"\mathrm " * 110, r"\mathrm{" * 60 + "e" + "}" * 60, "~" * 1000, r"\!" * 500, "²" * 1000,
    "½" * 1000, "3\u0305" * 500, "." * 1000, "**" * 500, r"\left" * 160, "%" * 1000,
    "√" * 1000, "√(" * 300 + "5" + ")" * 300, "{" * 1990 + "5" + "}" * 1990,
    "5\\text{ a}" * 100 + "^",
    *(mark * length + end for mark in ",.*=`'\\ √²" for length in (4000, 19_999) for end in "5,"),
])  # fmt: skip
def test_no_answer_takes_long_to_be_written_alike(text):
    start = time.process_time()
    once = alike(text)
    assert alike(once) == once
    assert time.process_time() - start < 2


LATEX = st.sampled_from([
    "\\boxed{", "\\boxed ", "\\fbox", "\\frac", "\\sqrt", "\\text{", "\\left(", "\\right)", "\\%",
    "\\\\", "12", "\ud800", "\\begin{pmatrix}", "\\end{pmatrix}", "final answer is ", "</think>",
    "\\mathrm{", "\\overline{", "\\dot", "\\circ", "^\\circ", "{\\rm ", "\\operatorname",
    "sqrt", "sin", "\\text{ cm}", " eggs", " base ", "_{", "eight", " percent", " million", "0.",
    "\\,", "\\!", "~", "i", "e", "E=", "m", "½", "²", "₈", "√", "∛", "°", "−", "×", "π", "∞",
    "\u0305", "\u200b", "…", "％", *"{}()[]^_$=,&x.!/* \n-|0123:",
])  # fmt: skip
TEXTS = st.lists(LATEX | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TEXTS, st.booleans())
def test_no_text_makes_verify_math_raise(text, boxed):
    response = rf"\boxed{{{text}}}" if boxed else text
    assert verify_math(response, r"\frac{1}{2}", timeout=0.1) in (True, False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS)
def test_writing_alike_twice_changes_nothing(text):
    once = alike(text)
    assert alike(once) == once
    assert isinstance(extract_math(text), str | None)


@pytest.mark.parametrize("end, answer", [
    (r"$\boxed{2}$.", "2"), (r"$\boxed 2$.", "2"), (r"$\boxed2$.", "2"), (r"$\fbox{2}$.", "2"),
    (r"$x = \boxed\frac{4}{2}$.", r"\frac{4}{2}"), (r"$\boxed 4\sqrt{2}$", r"4\sqrt{2}"),
])  # fmt: skip
def test_a_row_of_math_may_end_in_a_box_without_braces(end, answer):
    assert TASK.parse({"problem": "1 + 1?", "solution": f"It is {end}"})["answer"] == answer


def test_a_row_of_math_without_a_box_gives_no_answer_by_its_sentences():
    with pytest.raises(ValueError, match="no answer: wanted is"):
        TASK.parse({"problem": "1 + 1?", "solution": "The answer is 2."})
