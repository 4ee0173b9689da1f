r"""Specification of reward.py by example: what is extracted, what is equal, what is never paid."""

import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import extraction
import reward
from measure import verifier as bench_reward
from reward import (REWARDS, consistency, consistency_reward, correct, equal, extract_answer, form,
                    format_reward, right, verifies_itself, verify)
from verifier import answers, expression, latex
from verifier.expression import same_value, value
from verifier.latex import clean

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# --------------------------------------------------------------------------------------- extraction

@pytest.mark.parametrize("completion, answer", [
    # box: balanced braces, the last one, \fbox and the form without braces
    (r"so \boxed{18}", "18"),
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"first \boxed{3}, but after checking the sum again we get \boxed{4}", "4"),
    (r"\fbox{7}", "7"),
    (r"Thus $n = \boxed 2$.", "2"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"put it in \boxed{} like this: \boxed{5}", "5"),
    (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),                      # the outer box is the answer
    # tag
    ("<think>2+2</think><answer> 4 </answer>", "4"),
    (r"<answer>\boxed{4}</answer>", "4"),
    (r"I tried \boxed{3} first. <answer>4</answer>", "4"),              # the last mark wins
    # hashes
    ("She sold 9 * 2 = 18.\n#### 18", "18"),
    ("#### 1,234 dollars", "1,234 dollars"),
    ("#### Step 2: add\nSo it is \\boxed{5}\n#### Check", "5"),         # Markdown headings
    # statements, to the end of the sentence
    ("So the answer is 42. I hope it is correct.", "42"),
    ("The final answer is: $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
    ("The answer to the question is 3.5 miles.", "3.5 miles"),
    ("**Answer:** 12", "12"),
    ("**Final Answer:** 12", "12"),
    ("Final Answer: The final answer is $-3$. I hope it is correct.", "$-3$"),
    ("The answer is:\n\\[ x^2 \\]", "x^2"),
    ("9 * 2 = 18\nA: 18", "18"),
    ("The answer is 18.<|im_end|>", "18"),
    ("The answer is 18<|endoftext|>Question: next. The answer is 20.", "18"),
    # a statement after a mark of another kind only as a "final answer" with a value
    (r"\boxed{255}. With the deposit: Final Answer: the final answer is $10,455$.", "$10,455$"),
    (r"\boxed{8} is right. Is it odd that the answer is 24?", "8"),
    (r"\boxed{1625} The final answer is obvious.", "1625"),
    ("Final Answer: The area of $ABC$ is 12.", "12"),                   # a clause around the value
    ("ANSWER: 5", "5"),
    # several answers in the final place are one list
    (r"$\boxed{3}$ or $\boxed{4}$", "3, 4"),
    ("#### 5\n#### 6", "5, 6"),
    ("<answer>5</answer><answer>6</answer>", "5, 6"),
    (r"$\boxed{16/5}$ or $\boxed{\frac{16}{5}}$", r"\frac{16}{5}"),     # one value in two spellings
])
def test_extraction(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("completion", [
    "", "There are 5 apples.", "5", r"\boxed{5", r"\boxed{}", "#### Step 5", "<answer></answer>",
    "<answer>5", "The answers vary: 5", "Let me find the answer.",
])
def test_no_final_answer(completion):
    assert extract_answer(completion) is None
    assert not verify(completion, "5")


@pytest.mark.parametrize("completion, answer", [
    ("Ann has 12 tins and Bo has 5. 12 - 5 = 7. Ann has 7 more tins than Bo.", "7"),
    ("6 * 4 = 24 and 24 / 3 is 8. So each child gets 8 sweets.", "8"),
    ("There are 9 - 2 = 7 days left.", "7"),
    ("2 + 3 = 5\n\nSo she has 5.", "5"),
    ("The sum is 40 + 2.5 = $42.50. It costs $42.50.", "42.50"),
])
def test_a_text_without_a_mark_has_an_answer_as_a_worked_conclusion(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("completion", [
    "Ann has 7 more tins.", "5.", "7 = 7", "12 - 5 = 7. Ann has 7 more tins and Bo 5.",
    "12 - 5 = 7. Is it 7?", "12 - 5 = 7. It is not 7.", "12 - 5 = 7. It is 7 or 8.",
    "12 - 5 = 7. Ann has 7 thousand.", "12 - 5 = 7. Ann has 7%.",
    "12 - 5 = 7. She needs 7 more tins because", "12 - 5 = 7. Ann has 8.",
    "12 - 5 = 7. So $x \\le 7$.", "So it is <= 7.", "12 - 5 = 70. Ann has 7.",
    "12 - 5 = 7.5. Ann has 7.", "1 = 1. 2 = 2. 3 = 3. It is 1 2 3.",
])
def test_a_sentence_that_is_no_worked_conclusion_is_no_answer(completion):
    assert extract_answer(completion) is None


@pytest.mark.parametrize("completion, answer", [
    ("The grooming costs 70 dollars.", "70"),
    ("In total she earns $1,234.50 a year", "$1,234.50"),
    ("so x = -3", "-3"),
    ("10-3 is 7, minus 5 is 7-5", "5"),
    ("the rest, 3/4", "3/4"),
    ("no number", None),
    (r"it is 7, \boxed{8}, not 9", "8"),                                # a mark is still preferred
])
def test_lenient_falls_back_to_the_last_number(completion, answer):
    assert extract_answer(completion, lenient=True) == answer


# --------------------------------------------------------------------------- equality, form by form

EQUAL = {
    "numbers": [("1.5e-3", "0.0015"), ("2.5E3", "2500"), (r"{\bf 5}", "5"),
                (r"\textcolor{red}{5}", "5"), ('"5"', "5"), ("704", "704"), ("704.0", "704"),
                ("+704", "704"), (".5", "0.5"), ("0.5", ".5"), ("05", "5"), ("{704}", "704"),
                (r"\left(704\right)", "704"), ("704.", "704"), (r"\text{704}", "704"), ("−3", "-3"),
                ("5.0", "5"), (r"3 \times 10^2", "300")],
    "thousands": [("1,041", "1041"), (r"1,\!041", "1041"), ("1{,}041", "1041"), (r"1\,041", "1041"),
                  ("1 041", "1041"), ("7425000", "7,425,000"), ("1,234.50", "1234.5")],
    "fractions": [(r"\frac{2}{4}", "1/2"), (r"\dfrac12", r"\tfrac{1}{2}"),
                  (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("0.375", r"\frac38"), ("1408/2", "704"),
                  (r"\frac{29}4", "29/4"), (r"\frac 34", "0.75"),
                  (r"\\frac{1}{2}", r"\frac{1}{2}")],
    "mixed numbers": [(r"2\frac{3}{5}", r"\frac{13}{5}"), ("2 3/5", "2.6"),
                      (r"-15\frac{3}{5}", "-15.6"), ("3½", "3.5")],
    "percent": [("83", r"83\%"), (r"83\%", "83"), ("83 percent", r"83\%"),
                (r"83 \text{ percent}", r"83\%"), (r"50\%", "0.5"), ("0.5", r"50\%"),
                ("5/8", "62.5%")],
    "units": [(r"12\mathrm{~km}/\mathrm{h}", "12"), (r"3\mathrm{~m}\cdot\mathrm{s}^{-1}", "3"),
              ("the 4th day", "the 4th day"), ("4th", "4"),
              ("20 square units", r"20\text{ square units}"), (r"20\,\mathrm{cm}", "20"),
              ("10 cm^2", "10"), (r"96 \mbox{ inches}^2", "96"), ("10 miles per hour", "10"),
              (r"\frac{41}{12} \text{ km}", "41/12"), ("10cm", "10"),
              ("18 dollars every day at the farmers' market", "18")],
    "currency": [(r"\$5.50", "5.5"), (r"5.50 \text{ dollars}", r"\$5.50"),
                 (r"\text{\$5.50}", r"\$5.50"), ("$18", "18"), ("€7", "7")],
    "degrees": [("270°", r"270^\circ"), (r"270^{\circ}", "270"),
                (r"270 \text{ degrees}", r"270^\circ")],
    "names": [(r"\angle ABC = 40^\circ", "40"), (r"f^{-1}(x)=x-1", "x-1"), ("f(g(9)) = 2", "2"),
              ("AB:CD=2:3", "2:3"), (r"\text{Area} = 9", "9"),
               ("x = 5", "5"), ("5", "k=5"), ("f(x) = x+1", "x + 1"), ("y=x+1", "f(x)=1+x"),
              ("(p,q)=(3,2)", "(3,2)"), ("|AB|=1", "1"), (r"x \in [-2,7]", "[-2,7]"),
              ("x = 5+6 = 11", "11"), (r"x \approx 11", "11"),
              (r"2 + \frac{2}{3} = \frac{8}{3}", r"\frac83"),
              (r"\frac{\sqrt{3}}{3} \approx 0.577", r"\frac{\sqrt3}3")],
    "bases": [("12_5", "12_{5}"), ("12_{5}", "12_5"), ("012_5", "12_5")],
    "surds": [(r"2\sqrt{3}", r"\sqrt{12}"), (r"8\cdot\sqrt5", r"8\sqrt{5}"),
              (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
              (r"\sqrt[3]{-8}", "-2"), (r"5\cdot 2^{2/3}", r"5\sqrt[3]{4}"), ("2√3", r"\sqrt{12}")],
    "constants": [("3π", r"3\pi"), (r"\pi \cdot 3", r"3 \pi"), (r"i(2-i)", "1+2i"),
                  ("8i - 15", "-15+8i"), (r"\text{e}", "e"), (r"\ln e^2", "2")],
    "expressions": [("(x+1)^{500}", "(x+1)^{499}(x+1)"), (r"\sin^{-1} x", r"\arcsin x"),
                    (r"2\arcsin\sqrt{a}", r"\arccos(1-2a)"),
                    (r"\sum_{k=0}^{n} a_k b_{n-k}", r"\sum_{k=0}^{n} b_{n-k} a_k"),
                    ("2^{4950}", "4^{2475}"), (r"\frac{n!}{2(n-2)!}", r"\binom n2"),
                    ("\x0crac{1}{2}", "0.5"),
                     ("x^2-1", "(x-1)(x+1)"), ("77+341x+x^2", "x^2 + 341x + 77"),
                    (r"x^\frac{1}{2}", r"\sqrt{x}"), (r"\frac{1}{\cos x}", r"\sec x"),
                    (r"2\cos a\sin b", r"2 \sin b \cos a"), ("x²", "x^2"),
                    ("Asin(x) + Bcos 2", r"A\sin x + B\cos 2"), (r"K e^{-t}", "Kexp(-t)"), ("2^3^2", "512"),
                    ("2^3!", "40320"), ("x_1+x_2", "x_{2}+x_{1}"), (r"\binom{5}{2}", "10"), ("4!", "24"),
                    (r"\log_2 8", "3"), (r"\left\lceil \frac{7}{2} \right\rceil", "4"),
                    ("|-3|", "3"), (r"\sin^2 x + \cos^2 x", "1")],
    "equations": [ ("x^2/16 + y^2/12 = 1/4", "x^2/4 + y^2/3 = 1"), ("-x-y=2", "x+y+2=0"),
                  ("y = 2x+1", "y=1+2x")],
    "inequalities": [("-x > -4", "x < 4"), (r"x \ne 3", r"(-\infty,3)\cup(3,\infty)"),
                     (r"\mathbb{R} \setminus \{5, 2\}", r"(-\infty,2)\cup(2,5)\cup(5,\infty)"),
                     (r"\{x \mid x \le 4\} - \{-1\}", r"(-\infty,-1)\cup(-1,4]"),
                     (r"\mathbb{R}\setminus\{3\}", r"x \ne 3"),
                     (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"),
                     (r"\mathbb{R}", r"(-\infty,\infty)"),
                     (r"\text{all real numbers}", r"x \in \mathbb{R}"),
                      (r"5 \leq x", r"x \geq 5"), (r"x \ge 5", r"[5,\infty)"),
                     (r"-2 \le x < 7", r"x \in [-2,7)"), (r"0<f(x)<1", "(0,1)"),
                     (r"x \ne 3", "x != 3"), (r"\{x \mid 2 < x < 3\}", "(2,3)")],
    "tuples": [("x=4, y=7", "(4,7)"), ("a=1,b=2; a=3,b=4", "(1,2),(3,4)"),
               ("(1,2),(3,4),(1,2)", "(3,4),(1,2)"),
               (r"(\pm 1, \pm 2)", "(1,2),(1,-2),(-1,2),(-1,-2)"), ("(1;2),(3;4)", "(1,2),(3,4)"),
                (r"\left(1,\ 2\right)", "(1, 2)"), ("(0.5, 2)", r"(\frac12, 2)"),
                ("(100, 101)", "(100,101)")],
    "lists and sets": [("Least: 2, Greatest: 9", "2, 9"), (r"x \in \{1,2\}", "1,2"),
                       (r"\{\}", r"\emptyset"), (r"\text{no solution}", r"\varnothing"),
                        ("4, -4", "-4,4"), (r"-4 \text{ and } 4", "-4, 4"),
                       ("5,-2,7", r"7, -2, \text{ and } 5"),
                       (r"\{1,2\}", "1, 2"), (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
                       ("x=1000, y=10", "10^3, 10"), ("(9, 3), (6, 3)", "(6,3),(9,3)"),
                       ("330, 110", "330,110")],
    "intervals": [("[0,1)", r"\left[0, 1\right)"),
                  (r"(5,\infty) \cup (-\infty,5)", r"(-\infty,5)\cup(5,\infty)"),
                  ("(-∞, 3)", r"(-\infty,3)"), (r"[0.5,+\infty)", r"[\frac12,\infty)")],
    "matrices": [(r"(0.5, 3)", r"\begin{pmatrix} \frac12 \\ 3 \end{pmatrix}"),
                 (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
                  r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
                 (r"\begin{pmatrix} 0.5 \\ x+1 \\ \end{pmatrix}",
                 r"\begin{pmatrix} \frac12 \\ 1+x \end{pmatrix}")],
    "words": [(r"8:05 \text{ p.m.}", "20:05"), (r"9:40 \text{ a.m.}", "9:40 AM"),
               ("August", r"\text{August}"), (r"\textbf{august}", "August"), ("(B)", r"\text{B}"),
              ("E", r"\text{(E)}"),
              (r"4:30 \text{ p.m.}", r"\text{4:30 p.m.}"), ("June 20", r"\text{June 20}")],
    "angles and ratios": [(r"60^\circ", r"\frac{\pi}{3}"), ("3:1", "3"), ("4:6", r"\frac23"),
                          ("(a:(b:c)):2", r"\frac{ac}{2b}"),
                           (r"30^\circ", "30")],
    "letters": [("f(z)=2z+1", "f(x)=2x+1"), (r"\frac{\pi}{4}+n\pi", r"\frac{\pi}{4}+k\pi"),
                (r"2k\pi,\ k \in \mathbb{Z}", r"2n\pi"),
                (r"f(x)=x^2 \text{ for all } x \in \mathbb{R}", "f(x)=x^2"),
                (r"(3t,1-t) \text{ for some integer } t", "(3x,1-x)")],
}


@pytest.mark.parametrize("a, b", [pair for pairs in EQUAL.values() for pair in pairs])
def test_equal(a, b):
    assert equal(a, b)
    assert equal(b, a)


DIFFERENT = {
    "numbers": [("705", "704"), ("-704", "704"), ("7040", "704"), ("704.5", "704"),
                ("704.001", "704"), ("70400", "704"), ("7.04", "704"), ("704704", "704"),
                ("1,042", "1041"), ("704x", "704"), ("704i", "704"), (r"704\pi", "704"),
                ("704^2", "704"), (r"\sqrt{704}", "704"), ("5 6", "56"), (r"5 \quad 6", "56"),
                ("{5}{6}", "56"), ("31/2", "3½"), ("52", "5²"),
                ("100000000000000000001", "100000000000000000000")],
    "rounding": [("1.41421356", r"\sqrt2"), ("3.1415926536", r"\pi"),
                  ("0.33", r"\frac13"), ("0.333", r"\frac13"), ("9.42", r"3\pi"),
                  ("17.89", r"8\sqrt5")],
    "percent": [("8300", r"83\%"), ("0.5%", "0.5"), ("500%", "5"), (r"830\%", r"83\%")],
    "currency": [("5.50 cents", r"\$5.50"), (r"\$550", r"\$5.50")],
    "units": [(r"5 \text{ is wrong}", "5"), (r"5 \text{ is not it}", "5"), ("5k", "5"),
               ("1.8 billion", "1.8"), ("5 or more", "5"), (r"5\text{ million}", "5"),
               ("not 5", "5")],
    "bases": [("12_5", "12_6"), ("12_5", "12"), ("7", "12_5"), ("120_5", "12_5")],
    "names": [("x^2=25", "x=5"), ("x^2=25", "5"), ("3x+7>22", "x>5"),
              ("f(x)=2x", "f(x)=3x"), ("f(z)=2z", "f(x)=2"),
               ("x=5", "y=5"), ("98765 = 5", "5"), ("x = 5 = 6", "5"), (r"5 \approx 7", "5"),
              ("0", "a + 3z = 0"),
              (r"\cos(x)=\frac{42}{59}", r"\sin(x)=\frac{42}{59}"), ("x=3, y=4", "x=4, y=3")],
    "expressions": [("Asin(x)", r"\sin(x)"), ("Rln 2", r"\ln 2"), ("2^3^2", "64"), ("(x+1)^{500}", "(x+1)^{499}(x+1)+1"), ("2^{4950}", "1/8"),
                    ("x^{100}", "x^{101}"), ("|x|", r"\sqrt{x}"), ("10^{-400}", "0"),
                    ("10^{400}", "10^{401}"), (r"\infty-\infty", "0"), ("5!!", "15"), ("k", "n"),
                    ("2k", "2n"),
                     ("x^3+2x+1", "x^2+2x+1"), ("x^2+341x", "x^2+341x+77"),
                     (r"8\sqrt[3]{5}", r"8\sqrt{5}"),
                    ("|x|", "x"), ("8+15i", "15+8i"), ("x_1", "x_2"), ("AB", "BC")],
    "inequalities": [("x > 704", "704"), (r"x \le 5", "x < 5"), ("x < 5", "x > 5"),
                     (r"5 \ne 6", "5")],
    "tuples": [("(2,1)", "(1,2)"), ("1", "(1,2)"), ("(1)", "(1,2)"), ("(1,2,3)", "(1,2)"),
               ("1, 2", "(1, 2)")],
    "lists and sets": [("-4", "-4,4"), ("-4,4,99", "-4,4"), ("5,5", "5"), ("A,C,B", "A,B,C"),
                       (r"\pm 5", "5")],
    "intervals": [("[0,1)", "(0,1)"), (r"(-\infty,5)", r"(-\infty,5)\cup(5,\infty)"),
                  (r"(-\infty,5)\cap(5,\infty)", r"(-\infty,5)\cup(5,\infty)"),
                  (r"[704,\infty)", "704")],
    "matrices": [(r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
                 (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")],
    "words": [(r"\text{not August}", r"\text{August}"), ("B", "E"), ("A, B, C, D, E", "B"),
              ("1:00", "12:00")],
    "angles and ratios": [(r"60\pi", r"60^\circ"), (r"61^\circ", r"\frac{\pi}{3}"), ("3:1", "1:3"),
                          ("4:30", "2:15"), (r"8:05 \text{ a.m.}", "20:05")],
}


@pytest.mark.parametrize("a, b", [pair for pairs in DIFFERENT.values() for pair in pairs])
def test_different(a, b):
    assert not equal(a, b)
    assert not equal(b, a)


@pytest.mark.parametrize("given, gold", [
    # what is asked for stands left of the sign
    ("x+y=5", "5"), ("ab=12", "12"), ("a+b+c=2k", "2k"),
    ("-4x^2+4x-2", "y+1=-(2x-1)^2"), (r"\sqrt3\csc\theta", r"\rho\sin\theta=\sqrt3"),
])
def test_the_gold_answer_fixes_what_a_given_form_means_but_not_the_other_way_round(given, gold):
    assert equal(given, gold)
    assert not equal(gold, given)


@pytest.mark.parametrize("given, gold", [
    ("0", "x=y^2"), ("y", "y^2=x^2"), ("3", "x+y=3"), ("x", "y=x+1"), ("5", "0x=0")])
def test_an_expression_that_does_not_solve_the_gold_equation_is_not_equal_to_it(given, gold):
    assert not equal(given, gold)


@pytest.mark.parametrize("given, gold", [
    ("2x+1=11", "x=5"), ("x+7=12", "x=5"), ("2x=10", "5"), ("2x+1=11", "5"), ("x+7>12", "x>5")])
def test_an_equation_that_still_has_to_be_solved_is_not_its_solution(given, gold):
    assert not equal(given, gold)


# ------------------------------------------------------------------------------------- reward hacks

@pytest.mark.parametrize("boxed", [
    r"5 \text{ or } 98765", "98765 = 5", "5 = 98765", "5, 98765", r"\{5, 98765\}",
    r"5 \text{ and } 98765", "5 98765", "5 or 6", "5/6", "5:6", "5;6", "5|6", "(5)(6)", r"5 \cup 6",
    r"5\\6", "5 vs 6", "5 to 6", r"5 \lor 6", "4<5<6", r"x \in \{5, 6\}", r"5 \neq 6",
    r"5 \text{ (or 6)}", "4, 5, 6", "5 5", r"98765 \boxed{5}", "5 and", "=5=6", "5?",
    r"\text{August} \text{ or } \text{other}", "500", r"500\%",
])
def test_a_box_that_only_contains_the_answer_is_wrong(boxed):
    assert not verify(f"\\boxed{{{boxed}}}", "5")


@pytest.mark.parametrize("completion", [
    r"\boxed{5} or \boxed{6}", r"\boxed{5} \boxed{6} \boxed{7}", r"\boxed{6}, \boxed{5}",
    "#### 5\n#### 6", "<answer>5</answer> <answer>6</answer>", "The answer is 5. The answer is 6.",
    "The answer is 5 or 6.", "The final answer is $5$ or $6$.", "Answer: 5, 6",
    r"\boxed{5} was my guess. The final answer is 6.",
    "".join(f"\\boxed{{{i}}}" for i in range(100)), "The answer is not 5.", "5 5 5 5 5",
    r"\boxed{5",
])
def test_several_candidates_or_no_mark_are_wrong(completion):
    assert not verify(completion, "5")


def test_a_list_of_boxes_is_right_when_the_gold_answer_is_that_list():
    assert verify(r"$\boxed{1}, \boxed{2}$ and $\boxed{3}$", r"\{1,2,3\}")


@pytest.mark.parametrize("gold", ["", " ", "$", r"\text{}"])
def test_an_empty_gold_answer_is_never_verified(gold):
    for completion in ("", "#### 5", r"\boxed{}", r"\boxed{ }", r"\boxed{$}", "<answer> </answer>"):
        assert not verify(completion, gold)


def test_gsm8k_gold_answers():
    solution = ("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
                "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18")
    assert verify(solution, "18")
    assert not verify(solution, "1,800")
    assert verify("She has 2125 left.\n#### 2125", "2,125")
    assert verify("The answer is $2,125.00.", "2125")


# ----------------------------------------------------------------------------------- hostile inputs

MEGABYTE = 1_000_000


@pytest.mark.parametrize("completion", [
    r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9^{9^9}!}", r"\boxed{170!!!!}",
    r"\boxed{2^{4000} 2^{4000} x^{4000}}", r"\boxed{10^{-999999999}}", r"\boxed{\frac{1}{0}}",
    r"\boxed{\tan(\frac{\pi}{2}) \log 0}", r"\boxed{0^{-1}}", r"\boxed{nan}", r"\boxed{inf}",
    r"\boxed{-\infty}", r"\boxed{1e400}", r"\boxed{\sqrt[0]{5}}", "\\boxed{" + "9" * 5000 + "}",
    "\\boxed{" + "9" * MEGABYTE + "}", "9" * MEGABYTE, " " * MEGABYTE, "\n" * MEGABYTE,
    "{" * 20_000, "\\boxed" + "{" * 20_000, "\\boxed" + "{" * 9000 + "5" + "}" * 9000,
    "\\boxed{" * 20_000, "\\boxed{" + "(" * 299 + "5" + ")" * 299 + "}",
    "\\boxed{" + r"\sqrt" * 100 + "}", "\\boxed{" + r"\frac" * 110 + "}",
    "\\boxed{5" + "!" * 500 + "}", "\\boxed{" + "x^" * 290 + "x}", "\\boxed{" + "±" * 500 + "}",
    "\\boxed{" + "{6}," * 140 + "}", "<answer>" * 50_000, "####" * 50_000,
    "the answer to " * 50_000, "the answer is " * 50_000, "<answer>6</answer>" * 50_000,
    r"\boxed{10^{400}x\sqrt2=1}", r"\boxed{\sqrt{3}*10^{308}(1+i)\%}",
    "\\boxed{__import__('os').system('false')}", "\\boxed{exit()}", "\\boxed{().__class__}",
    "\\boxed{5\ud800_{\ud800}}", "\\boxed{٥}", "\\boxed{5\x00}", "\x00" * 1000,
    "\\boxed{" + "5<" * 250 + "6}",
    "\\boxed{" + "x=(" * 150 + "}",
], ids=lambda completion: repr(completion[:30]))
def test_hostile_text_is_never_an_error_and_never_right(completion):
    assert verify(completion, "5") is False
    assert verify(completion, "5", lenient=True) is False
    assert format_reward(completion) == 0.0
    assert consistency_reward(completion) in (0.0, 1.0)


def test_the_generated_hostile_inputs_pay_nothing_wrong_and_refuse_nothing_right():
    cases = bench_reward.hostile()
    assert sum(right for *_, right in cases) > 40 and len(cases) > 800
    assert max(len(text) for text, *_ in cases) >= MEGABYTE
    assert [case for case in cases if verify(*case[:2]) != case[2]] == []


def test_nothing_in_a_completion_is_executed(tmp_path):
    """Were a completion evaluated anywhere, one of these would leave a file."""
    path = tmp_path / "executed"
    codes = (f"__import__('pathlib').Path('{path}').touch()", f"open('{path}','w')",
             f"$(touch {path})", f"`touch {path}`", f"[x for x in [open('{path}','w')]]",
             f"\\immediate\\write18{{touch {path}}}", f"{{{{open('{path}','w')}}}}")
    for code in codes:
        for text in (f"\\boxed{{{code}}}", f"<answer>{code}</answer>", f"The answer is {code}.",
                     f"#### {code}", f"```python\n{code}\n```"):
            assert not verify(text, "5")
            equal(code, code)
    assert not path.exists()

    modules = (reward, extraction, answers, latex, expression)
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    forbidden = r"\b(?:eval|exec|compile|__import__|subprocess|signal|sympy|pickle)\b\s*[.(]"
    assert not re.search(forbidden, source.replace("re.compile", ""))


def test_verify_is_the_same_off_the_main_thread():
    """A timeout by signal would raise there, and "in doubt False" would hide it."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(verify(text, "5") for text in (r"\boxed{5}", r"\boxed{6}")))
    thread.start()
    thread.join()
    assert verdicts == [True, False]


def test_no_more_is_read_than_the_caps_allow(monkeypatch):
    """Bounded by construction: no completion makes it work on more text or more forms."""
    seen = {"clean": 0, "value": 0, "items": 0, "marks": 0}

    def count(module, name, key, size):
        original = getattr(module, name)

        def counted(*args):
            result = original(*args)
            seen[key] = max(seen[key], size(args, result))
            return result
        monkeypatch.setattr(module, name, counted)

    def longest_list(args, result):
        return max(map(len, args[:2])) if result else 0

    count(answers, "clean", "clean", lambda args, _: len(args[0]))
    count(answers, "value", "value", lambda args, result: len(args[0]) if result else 0)
    count(answers, "_same_items", "items", longest_list)
    count(extraction, "_announcements", "marks", lambda args, result: len(result))
    for completion, gold, _ in bench_reward.hostile():
        verify(completion, gold)
    assert 0 < seen["clean"] <= answers.MAX_ANSWER
    assert 0 < seen["value"] <= expression.MAX_TEXT
    assert 0 < seen["items"] <= answers.MAX_ITEMS
    assert len(extraction.tail("x" * MEGABYTE)) == extraction.TAIL


def test_many_long_boxes_side_by_side_are_joined_only_up_to_the_longest_answer():
    boxes = []
    for i in range(39):
        roots = [f"\\sqrt{{x+{i * 50 + j}}}" for j in range(30)]
        boxes.append("\\boxed{" + "+".join(roots) + "}")
    boxes = " ".join(boxes)
    assert len(extract_answer(boxes)) < 2 * answers.MAX_ANSWER


@pytest.mark.parametrize("text", [
    "(" * 61 + "x" + ")" * 61, "x^{" * 61 + "1" + "}" * 61, "1+" * 700 + "1", "9^{9^{9^9}}", "171!",
    "x x 2"])
def test_beyond_the_caps_there_is_no_value(text):
    assert value(text) is None


def test_the_exact_value_is_no_fixed_point_of_the_prime():
    """A rational number is compared by its size too: the prime itself is not 0."""
    for extra in (0, 5):
        assert not equal(str(expression.PRIME + extra), str(extra))
        assert not equal(f"x+{expression.PRIME + extra}", f"x+{extra}")
        assert not same_value(value(f"{expression.PRIME}+{extra}"), value(str(extra)))


def test_unicode_spellings_of_a_number_are_that_number():
    assert verify("\\boxed{9\u200b8765}", "98765")                      # zero-width space
    assert verify("\\boxed{\uff19\uff18\uff17\uff16\uff15}", "98765")   # full-width digits
    assert not verify("\\boxed{9\u200b8765}", "8765")


def test_a_tower_of_powers_is_equal_to_itself_as_a_string():
    assert equal("9^{9^{9^{9}}}", "9^{9^{9^9}}") is False
    assert equal("9^{9^{9^{9}}}", "9^{9^{9^{9}}}") is True


ALPHABET = list(r"0123456789+-*/^_=<>()[]{}|!,.;:%$&#~'xyzie ") + [
    "\\", "\\boxed{", "\\frac", "\\sqrt", "\\text{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\",
    "\\le", "\\pm", "\\cup", "\\{", "\\}", "\\infty", "\\pi", "\\sin", "\\log_", "\\binom",
    "\\left", "<answer>", "</answer>", "#### ", "The answer is ", "\n", " or ", " and ", "²", "₅",
    "½", "√", "∞", "π", "°", "⟦", "⟧", "⦃", "∪", "\u200b", "cm", "million"]
MATHS = st.lists(st.sampled_from(ALPHABET), max_size=25).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=80), MATHS), st.one_of(st.text(max_size=20), MATHS),
       st.booleans())
def test_never_raises_and_returns_a_bool(completion, gold, lenient):
    marks = ("{}", "\\boxed{{{}}}", "The answer is {}", "<answer>{}</answer>", "#### {}")
    for text in (mark.format(completion) for mark in marks):
        assert type(verify(text, gold, lenient)) is bool
        assert consistency_reward(text) in (0.0, 1.0)
    assert type(equal(completion, gold)) is bool


@settings(max_examples=200, deadline=None)
@given(MATHS)
def test_equality_is_reflexive_unless_empty(text):
    assert equal(text, text) == (clean(text.strip()) != "")


def test_a_verdict_is_a_bool_and_nothing_that_is_only_true_or_false():
    for a, b in (("n", r"k, k \in \mathbb{Z}"), (r"x\pi", r"y\pi"), (r"n\pi", r"k\pi"),
                 ("x=y", "x=5"), ("1,2", "(1,2)")):
        assert type(equal(a, b)) is bool and type(verify(f"\\boxed{{{a}}}", b)) is bool


@settings(max_examples=300, deadline=None)
@given(MATHS, MATHS)
def test_equality_of_plain_values_is_symmetric(a, b):
    """Of all forms but those where the gold answer explains the given one: relations."""
    if not re.search(r"[=<>≤≥≠∈≈]|\\\\(?:le|in)", a + b):
        assert equal(a, b) == equal(b, a)


def compound(terms):
    """Strategy of sums, differences, products, quotients and squares of terms."""
    return st.one_of(
        st.builds("({}+{})".format, terms, terms), st.builds("({}-{})".format, terms, terms),
        st.builds("{}*{}".format, terms, terms), st.builds("({})^{{2}}".format, terms),
        st.builds(r"\frac{{{}}}{{{}}}".format, terms, terms))


LEAVES = st.sampled_from(["x", "y", "2", "3", "7", "0.5", r"\pi", r"\sqrt{2}"])
TERMS = st.recursive(LEAVES, compound, max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(TERMS, TERMS, TERMS)
def test_rearranged_expressions_are_equal_and_changed_ones_are_not(a, b, c):
    left = f"({a}+{b})*({c})"
    right = f"{c}*({b})+({a})*({c})"
    found = value(clean(left))
    if found:
        assert equal(left, right)
        # beside larger floats 1 vanishes; residues always see it
        if found.residue is not None or any(x is not None and abs(x) < 1e8 for x in found.floats):
            assert not equal(left, f"{right}+1")


@pytest.mark.parametrize("zero", [
    r"2-(\sqrt{2})^{2}", r"\sqrt{2}\sqrt{3}-\sqrt{6}", r"((\sqrt{2})^{2})^{5}-32", r"\sin(\pi)",
    r"\cos(\frac{\pi}{2})", r"\tan(100\pi)", r"\cot(\frac{3\pi}{2})", r"e^{i\pi}+1",
    r"\sin(\pi)-\cos(\frac{\pi}{2})"])
def test_nothing_is_divided_by_what_only_rounding_keeps_from_zero(zero):
    """In floats 2 - sqrt(2)^2 is -4e-16, and beside x / -4e-16 nobody sees 1."""
    assert value(clean(zero)).floats[0] == 0 and equal(zero, "0")
    assert value(clean(rf"\frac{{x}}{{{zero}}}")) is None
    assert not equal(rf"\frac{{x}}{{{zero}}}", rf"\frac{{x}}{{{zero}}}+1")


@pytest.mark.parametrize("small", [
    "10^{-20}", r"\frac{1}{10^{20}}", r"\sqrt{2}-1.414213562", r"10^{15}+1-10^{15}",
    r"\sqrt{10^{14}+1}-10^{7}", r"\sin(10^{-15})", r"\sin(10^{15})", r"\cos(10^{17})"])
def test_a_small_number_is_not_zero(small):
    assert value(clean(small)).floats[0] != 0
    assert value(clean(rf"\frac{{x}}{{{small}}}")) is not None


def test_rounding_off_loses_nothing_else():
    assert equal("10^{15}+1-10^{15}", "1") and equal(r"\frac{\sin(10^{-15})}{10^{-15}}", "1")
    for given, gold in ((r"5+\sin(10^{15})", "5"), (r"x+\sin(10^{17}x)", "x"),
                        (r"\sqrt{10^{14}+1}-10^{7}", "0"), (r"5+\sqrt{2}(10^{15}+1-10^{15})", "5"),
                        (r"\frac{\sin(10^{-15})}{10^{-15}}", "0")):
        assert not equal(given, gold)


@settings(max_examples=200, deadline=None)
@given(st.integers(-10**6, 10**6), st.integers(-10**6, 10**6))
def test_different_integers_are_different(a, b):
    assert equal(str(a), str(b)) == (a == b)
    assert equal(f"{a:,}", str(b)) == (a == b)
    assert equal(f"\\frac{{{3 * a}}}{{3}}", str(b)) == (a == b)


@pytest.mark.parametrize("completion, answer", [
    (None, "5"), (5, "5"), (b"#### 5", "5"), ("#### 5", None)])
def test_what_is_not_text_is_not_verified(completion, answer):
    assert verify(completion, answer) is False


# ------------------------------------------------------------------- the last mark of any form wins

MARKS = {       # form -> a text in which it says {}
    "box": "so $\\boxed{{{}}}$.", "tag": "<answer>{}</answer>", "hashes": "\n#### {}\n",
    "says": "So the answer is {}.", "label": "\n\n**Answer: {}**\n", "final": "Final Answer: {}.",
    "heading": "\n### Final Answer\n{}\n", "bold": "\n**Final Answer**\n\n${}$\n", "a": "\nA: {}\n"}


@pytest.mark.parametrize("first", MARKS)
@pytest.mark.parametrize("last", MARKS)
@pytest.mark.parametrize("value", ["7", "D"])
def test_the_last_mark_wins_whatever_the_forms(first, last, value):
    text = f"{MARKS[first].format(5)} No, I made a mistake there. {MARKS[last].format(value)}"
    assert verify(text, value)
    assert not verify(text, "5")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(MARKS)), st.integers(10, 99)), min_size=1,
                max_size=6))
def test_the_last_of_many_marks_wins(marks):
    text = " Hmm, let me see once more. ".join(MARKS[form].format(n) for form, n in marks)
    assert verify(text, str(marks[-1][1]))


@pytest.mark.parametrize("completion, gold, right", [
    (r"The mean is \boxed{\langle H \rangle}. Hence" + "\n\n**Answer: D**", "D", True),
    (r"\boxed{5}" + "\n#### D", "D", True),
    (r"\boxed{5} The correct answer is option (D).", "D", True),
    (r"\boxed{5} The answer is therefore $7$.", "7", True),
    (r"\boxed{5}" + "\nFinal answer: Friday", "Friday", True),
    (r"\boxed{5}" + "\nAnswer: yes", "yes", True),
    (r"\boxed{5} <answer>" + "x " * 700 + "</answer>", "5", False),     # too long, and the last
    # what says no value is no mark behind another one
    (r"\boxed{7}, and the answer is correct.", "7", True),
    (r"\boxed{7}. The answer is a positive integer.", "7", True),
    (r"\boxed{7}. Is it odd that the answer is 24?", "7", True),
    (r"\boxed{7}" + "\nOptions:\nA: 12\nB: 13", "7", True),
    # a sentence that repeats the answer, or that has another one
    (r"\boxed{7}" + "\n\n**Answer:** She has 7 apples.", "7", True),
    (r"\boxed{5}" + "\n\n**Answer:** She has 7 apples.", "5", False),
    # marks in marks
    ("<answer>The answer is 70.</answer>", "70", True), ("<answer>A: 70</answer>", "70", True),
    (r"\boxed{\text{Final answer: } 70}", "70", True), (r"\boxed{#### 70}", "70", True),
    (r"#### \boxed{70}", "70", True), (r"<answer>\boxed{70}</answer>", "70", True),
    (r"\boxed{<answer>70</answer>}", "70", True), ("<answer>#### 70</answer>", "70", True),
    ("<answer><answer>70</answer></answer>", "70", True),
])
def test_what_counts_as_the_last_mark(completion, gold, right):
    assert verify(completion, gold) == right


# ----------------------------------------------------------------------------------- denied answers

DENIALS = ["The answer is not", "The answer isn't", "It isn’t", "It cannot be", "It can't be",
           "It can never be", "It is never", "x ≠", r"$x \neq$", r"$x \ne", "x !=", r"\lnot", "Not",
           "It does not equal", "It is not equal to", "The answer won't be", "It is neither 4 nor",
           "It is not true that the answer is", "I don't think that the answer is",
           "It is no longer",
           "There is no way that it is", "The answer is anything but", "The answer is hardly",
           "It is impossible that the answer is", "It's wrong to say that it is",
           "It is not exactly", "The answer is NOT", "It CANNOT BE", "It ISN'T", "NEVER",
           "FALSE that it is", "Rather than", "Instead of", "Hardly", "Unlikely that it is",
           "Impossible to be", "Far from", "Not:", "It is (not)", "not,", "not —", "x <>",
           "There is no way it's", "not even close to", "not at all", "anything except",
           "any number other than", "Everything but", "Wrong answer:", "A common mistake is",
           "The wrong answer is", "The answer is definitely not", "It is different from", "not:",
           "I doubt that it is"]


@pytest.mark.parametrize("denial", DENIALS)
@pytest.mark.parametrize("mark", [r"\boxed{5}", r"$\boxed{5}$.", "<answer>5</answer>", "#### 5",
                                  r"**\boxed{5}**", r"\(\boxed{5}\)", "\n\\[\\boxed{5}\\]"])
def test_a_denied_mark_is_no_answer(denial, mark):
    assert not verify(f"{denial} {mark}", "5")
    assert not verify(f"{denial} {mark}", "5", lenient=True)
    assert verify(f"The answer is 7. {denial} {mark}", "7")


@pytest.mark.parametrize("text", [
    "The answer is not 5.", "The answer isn't 5.", "The answer is never 5",
    "The answer can't be 5.",
    "The final answer is certainly not 5.", "The answer cannot be 5.", "Answer: not 5",
    "The answer is ≠ 5", r"The answer is $\neq 5$", "The answer is not: 5",
    "The answer is not 5 but 7."])
def test_a_denial_takes_back_an_earlier_answer_and_leaves_others(text):
    assert not verify(text, "5")
    assert not verify(rf"\boxed{{5}}. Wait. {text}", "5")
    if "7" not in text:
        assert verify(rf"\boxed{{7}}. Wait. {text}", "7")


@pytest.mark.parametrize("behind", [
    " is not the answer.", "$ is wrong.", ". That is incorrect.", "? No.", " isn't right.",
    " cannot be the answer.", ", which is not correct.", " can't be right.",
    ". But that is a mistake.", " (this is wrong).", " doesn't work.", " is invalid.",
    " must be wrong.", "? Not quite.", ". Hmm, that is not correct.", ". 5 is wrong.", " (wrong)"])
def test_a_mark_may_be_denied_behind_it(behind):
    assert not verify(r"\boxed{5}" + behind, "5")
    assert verify(r"The answer is 7. \boxed{5}" + behind, "7")


@pytest.mark.parametrize("completion", [
    r"Since 4 is not prime, the answer is \boxed{5}.", r"They do not meet. \boxed{5}",
    r"The number of those that are not ready is \boxed{5}.", "3 more on it than not\n#### 5",
    r"The number of people who do not is \boxed{5}", r"We can't have $x=0$, so $x=\boxed{5}$.",
    r"She won't be able to place $\boxed{5}$ eggs.", r"$4!+1-5\cdot 2^2=\boxed{5}$",
    r"The statements that are false: two. So \boxed{5}", r"It is not 7, it is \boxed{5}.",
    r"not \boxed{7} but \boxed{5}", r"Sam did not work for $\boxed{5}$ days.",
    "The answer is 5, not 7.", "The answer is 5 and not 7", r"\boxed{5} is not divisible by 3.",
    r"There is no doubt that the answer is \boxed{5}.", r"Without doubt the answer is \boxed{5}",
    r"Beyond any doubt it is \boxed{5}", r"Why not \boxed{5}? Indeed it is.",
    r"It is none other than \boxed{5}.", r"No number other than \boxed{5} can work.",
    r"I can't deny that it is \boxed{5}", r"Is it \boxed{5}? Yes.", r"n! = \boxed{5}",
    r"The domain is all $x$ except $\boxed{5}$.", r"The percent error is \boxed{5} percent.",
    r"If not, it is 6. Whether odd or not, \boxed{5}"])
def test_a_negation_of_something_else_denies_nothing(completion):
    assert verify(completion, "5")


@pytest.mark.parametrize("text", [
    r"~~\boxed{5}~~", r"\sout{\boxed{5}}", r"<del>\boxed{5}</del>", r"\cancel{\boxed{5}}",
    "**Answer:** ~~5~~", "#### ~~5~~", "<answer>~~5~~</answer>", r"Is it \boxed{5}?",
    r"Could it be $\boxed{5}$?", r"x!=\boxed{5}", 'It is not "\\boxed{5}"', r"not _\boxed{5}_",
    r"not <b>\boxed{5}</b>"])
def test_an_answer_that_is_struck_out_or_asked_is_none(text):
    assert not verify(text, "5") and verify("The answer is 7. But " + text, "7")


# ------------------------------------------------------------- what stands directly around a mark

@pytest.mark.parametrize("text, gold", [
    (r"$x = -\boxed{5}$", "-5"), (r"x = - $\boxed{5}$", "-5"), (r"1/\boxed{5}", None),
    (r"\frac{1}{\boxed{5}}", "1/5"), (r"\sqrt{\boxed{5}}", r"\sqrt5"), (r"2\pm\boxed{5}", None),
    (r"\boxed{5} million", "5 million"), (r"$\boxed{5}$ million", "5 million"),
    (r"\boxed{5} dozen", "5 dozen"), (r"\boxed{5}\text{ thousand}", "5 thousand"),
    (r"$\boxed{5}^2$", "25"), (r"\boxed{5}\pi", r"5\pi"), (r"$\boxed{5} \times 10^3$", "5000"),
    (r"$\boxed{5}!$", "120"), ("<answer>5</answer> million", "5 million"), (r"\boxed{5}/6", "5/6"),
    (r"\boxed{5} or more", None), (r"It is less than \boxed{5}", None), (r"$x > \boxed{5}$", None),
    (r"$x \lt \boxed{5}$", None), (r"\ln \boxed{5}", r"\ln 5"),
    (r"<answer>I think \boxed{5} hmm 7</answer>", None)])
def test_what_is_attached_to_a_mark_is_part_of_the_answer(text, gold):
    assert not verify(text, "5")
    assert gold is None or verify(text, gold)


@pytest.mark.parametrize("text", [
    r"\boxed{5} cm", r"$\boxed{5}\%$", r"\boxed{5} because 2 + 3 = 5", r"\boxed{5}!",
    r"- \boxed{5}",
    r"* \boxed{5}", r"the result - \boxed{5}", r"$2 + \boxed{5} = 7$", r"**\boxed{5}** (units)",
    r"She needs at least $\boxed{5}$ points.", r"$s \ge \boxed{5}$", r"\boxed{5} dozens of eggs",
    r"\boxed{5} quarters", r"$\boxed{5}_7$", r"$25 = 5 \cdot \boxed{5}$", r"<b>\boxed{5}</b>",
    r"<p> \boxed{5}", r"A -> \boxed{5}", r"\boxed{5} times", r"\boxed{5} pieces of pie"])
def test_ordinary_words_and_signs_around_a_mark_change_nothing(text):
    assert verify(text, "5")


@pytest.mark.parametrize("text", [
    "The final answer should be {}.", "The final answer would be {}.", "The answer must be {}",
    "Therefore, the answer equals {}.", "The answer is actually {}.", "The answer is exactly {}.",
    "The answer is in fact {}.", "The answer is the number {}.", "\nFinal answer — {}", "\nAns: {}",
    "\n\n**Final Answer** {}", "\n- Answer: {}", "\n__Answer__: {}", "\nAnswer — {}",
    "The correct option is {}.", "The answer turns out to be {}."])
def test_a_statement_in_other_words_is_a_mark_and_wins_behind_a_box(text):
    assert verify(text.format("B"), "B") and verify(text.format("7"), "7")
    for before in ("\\boxed{5} ", "#### 5\n", "<answer>5</answer> "):
        assert verify(before + text.format("7"), "7") and not verify(before + text.format("7"), "5")


def test_words_that_begin_with_a_negation_may_be_the_answer():
    text = "The answer is not enough information"
    assert verify(text, "not enough information")
    assert verify(text + ".", r"\text{Not enough information}")


# ------------------------------------------------------------------------------------------- ratios

@pytest.mark.parametrize("given, gold, right", [
    ("1:3:2", "1:2:3", False), ("2:4:6", "1:2:3", True), ("3:5:4", "3:4:5", False),
    ("3:20", "3:4:5", False), ("(2:4:6)", "1:2:3", True), ("1 : 2 : 3", "1:2:3", True),
    (r"\frac12:1:\frac32", "1:2:3", True), ("1.5:3:4.5", "1:2:3", True),
    ("2:4:6:8", "1:2:3:4", True),
    ("1:2:3:4", "1:2:3", False), ("1:2", "1:2:3", False), (r"\frac16", "1:2:3", False),
    ("1/2/3", "1:2:3", False), ("1,2,3", "1:2:3", False), ("0:0:0", "1:2:3", False),
    ("1:0:2", "1:0:3", False), ("2:0:4", "1:0:2", True), ("x:2x:3x", "1:2:3", True),
    (r"\sqrt2:2:\sqrt6", r"1:\sqrt2:\sqrt3", True), ("a:b:c=1:2:3", "2:4:6", True),
    ("AB:BC:CA=3:4:5", "6:8:10", True), (r"1\colon2\colon3", "1:2:3", True),
    ("1∶2∶3", "1:2:3", True),
    ("1:(2:3)", "1:2:3", False), ("50.0%", "1 : 2", True), ("6:8", "3:4", True),
    ("4:3", "3:4", False),
    (r"\frac34", "3:4", True),
    (r"1:2:3 \text{ or } 3:2:1", "1:2:3", False), ("(3:4:5)+1", "3:4:5", False)])
def test_ratios_are_equal_up_to_a_factor_and_no_divisions(given, gold, right):
    assert equal(given, gold) == right
    assert equal(gold, given) == right


RATIOS = st.lists(st.integers(1, 60), min_size=3, max_size=6)


@settings(max_examples=100, deadline=None)
@given(RATIOS, st.integers(1, 30), st.randoms(use_true_random=False))
def test_a_ratio_keeps_its_value_under_a_factor_and_not_under_another_order(terms, factor, random):
    def text(numbers):
        return ":".join(map(str, numbers))

    other = random.sample(terms, len(terms))
    assert equal(text(factor * x for x in terms), text(terms))
    assert equal(text(other), text(terms)) == (other == terms)
    assert not equal(text(terms + [1]), text(terms))


# -------------------------------------------------------------------------------- words and letters

COUNTING = """
    tenths lakh lakhs crore maybe untrue halves score hundredths thirds dozen gross pairs
    thousandths perhaps wrong no less more fewer squared cubed percentile fold off twice
    hundreds tens teen quarters couple grand myriad plus minus below above times factorial not
    only nor""".split()


@pytest.mark.parametrize("words", COUNTING + [
    "below zero", "or so", "million dollars", "hundred dollars", "meters below sea level",
    "degrees below zero", "out of ten", "dollars less", "for all practical purposes",
    "feet or more", "long", "old", "of", "per", "square",
    "maybe dollars", "years ago", "in thousands"])
def test_a_word_that_is_no_known_unit_makes_a_number_wrong(words):
    for text in (f"5 {words}", rf"5 \text{{ {words}}}", rf"5\ \mathrm{{{words}}}", f"5~{words}"):
        assert not equal(text, "5") and not equal("5", text)
        assert equal(text, f"5 {words}")                    # right where the gold answer has it too
        assert not equal(text, f"6 {words}")
    for text in (f"#### 5 {words}", f"The answer is 5 {words}.", f"<answer>5 {words}</answer>"):
        assert not verify(text, "5")


def test_the_number_before_an_unknown_word_is_compared_by_its_value():
    assert equal("5.0 lakh", "5 lakh") and equal("1,000 lakh", "1000 lakh")
    assert not equal("5 lakh", "5 crore") and not equal("5 tenths", "5 hundredths")


UNITS = ["feet long", "units squared", "meters per second squared", "US dollars", "m", "sq ft",
    "sq. ft.", "ft^2", "cm", "km/h", "m/s", "m/s^2", "kg", "g", "L", "hours",
         "apples", "square feet", "cubic meters", "dollars per day", "miles per hour",
         "two-digit numbers",
         "light-years", "years old", "in total", "boxes", "children", "slices of pizza", "m²"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_known_unit_is_ignored(unit):
    assert equal(f"5 {unit}", "5")
    assert equal(f"5 {unit}", rf"5\text{{ {unit}}}".replace("^2}", "}^2"))


@pytest.mark.parametrize("text", [
    r"5\,\mathrm{m/s^2}", r"5\,\mathrm{m/s^{2}}", r"5\,\mathrm{m\,s^{-2}}",
    r"5\ \mathrm{m\cdot s^{-2}}",
    r"5 \mathrm{~m} / \mathrm{s}^{2}", r"5\,\frac{\mathrm{m}}{\mathrm{s}^2}", r"5\text{ m}^2",
    r"5~g",
    r"5\, m", r"5 \text{ sq. ft.}", r"5\,\mathrm{kg\,m^2}", "5 kg m/s^2"])
def test_a_unit_in_latex_is_ignored(text):
    assert equal(text, "5") and not equal(text, "6")


def test_a_letter_is_a_unit_behind_a_space_and_beside_a_plain_number_only():
    assert equal("5 m", "5") and equal(r"5\text{ m}", "5 m") and equal("5 m", "5m")
    for given, gold in (("5m", "5"), ("5", "5 m"), ("5", "5m"), ("5 m", "5x"), ("5 k", "5"),
                        ("5 M", "5"), ("5 x", "5"), ("5 K", "5")):
        assert not equal(given, gold)


# ---------------------------------------------------------------------------------- wrapped answers

@pytest.mark.parametrize("completion", [
    "The answer is `73`.", "Final Answer:\n```\n73\n```", "Final Answer:\n```text\n73\n```",
    "### Final Answer\n73", "## Answer\n\n**73**", "**Final Answer**\n\n\\[73\\]",
    "# Final Answer:\n73",
    "### Final Answer ###\n73", "### **Final Answer**\n73", "Final Answer\n73",
    "### The answer\n73",
    "### Final Answer\n\nThe final answer is 73.",
    "### Final Answer\n\n```latex\n\\frac{146}{2}\n```",
    "Final Answer:\n> 73", "**Answer:** `73`", "**Final Answer**: `x = 73`",
    "<answer>`73`</answer>",
    "<answer>\n```\n73\n```\n</answer>", "#### `73`", "#### **73**", r"\boxed{`73`}",
    r"**\boxed{73}**",
    "```\n\\boxed{73}\n```", "<answer>**73**</answer>", "<answer>\n#### 73\n</answer>",
    "### Answer: 73",
    "The answer is **73** apples.", "The answer is '73'.", "The answer is “73”.",
    "The answer is: \n\n73"])
def test_an_answer_may_be_wrapped(completion):
    assert verify(completion, "73") and not verify(completion, "37")


@pytest.mark.parametrize("given", [
    r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"[\begin{matrix}1&2\\3&4\end{matrix}]",
    r"(\begin{pmatrix}1&2\\3&4\\\end{pmatrix})",
    r"\left( \begin{array}{c|c}1&2\\3&4\end{array} \right)",
    r"\begin{array}{cc}1&2\\3&4\end{array}", r"\bigl[\begin{array}{rr}1&2\\3&4\end{array}\bigr]",
    r"\left[\begin{smallmatrix}1&2\\3&4\end{smallmatrix}\right]"])
def test_a_matrix_may_have_brackets_around_it(given):
    assert equal(given, r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")
    assert equal(r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", given)
    assert not equal(given, r"\begin{pmatrix}1&2\\4&3\end{pmatrix}")


def test_two_matrices_in_brackets_are_two_and_a_determinant_is_no_matrix():
    two = r"(\begin{pmatrix}1\\2\end{pmatrix},\begin{pmatrix}3\\4\end{pmatrix})"
    assert equal(two, two.replace("pmatrix", "bmatrix"))
    assert not equal(two, r"\begin{pmatrix}1\\2\end{pmatrix}")
    assert not equal(r"\left|\begin{array}{cc}1&2\\3&4\end{array}\right|",
                     r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")


# ------------------------------------------------------------------------- letters, left-hand sides

@pytest.mark.parametrize("given", [
    r"\textbf{(C)}\ 12", r"\text{C: the third}", "(C) the third", "C) 12", "C. the third",
    r"\text{(C)}~12",
    r"\mathrm{(C)}\ \frac12", r"\textbf{(C)}\ -12", r"\text{Option C}", r"\textbf{C}", "(C)",
    "Choice (C)",
    r"\textbf{(C) }12"])
def test_a_letter_with_its_value_is_the_letter(given):
    assert equal(given, "C") and equal(given, "(C)") and equal(given, r"\text{C}")
    assert not equal(given, "D") and not equal(given, "A")


@pytest.mark.parametrize("given", [
    "(C) or (D)", "D: not C", "C, D", r"\text{C is wrong}", "C?", "not C", "(C)+(D)", "BC",
    "C: maybe",
    "C) 5 D) 6", "(C)(D)", r"\text{C: D}", "C: not that", "(C) is incorrect"])
def test_a_hedged_letter_is_wrong(given):
    assert not equal(given, "C")


LETTERED = {    # gold answer with a letter: what is right beside the letter
    r"\textbf{(C)}\ 12": ["12", "12.0", r"\textbf{(C)}\ 12", "(C) 12", "C: 12"],
    r"\textbf{(C)}\ \$12": ["12", r"\$12"], r"\textbf{(C)}\ 12\text{ cm}": ["12"],
    r"\textbf{(C)}\ -\frac{1}{2}": ["-0.5"], r"\text{(C)}~2:3:4": ["4:6:8"],
    r"\textbf{(C) }.5": ["0.5"],
    r"\mathrm{(C)}\ \text{Friday}": ["friday"], r"\textbf{(C)}\ (1,2)": ["(1,2)"], "(C) 5": ["5"],
    r"\textbf{(C)}\ x=2": ["2", "x=2"], r"\textbf{(C)}\ \{1,2\}": ["2,1"],
    r"\textbf{C)}\ \pi": [r"\pi"],
    r"\textbf{(C)}\hspace{2mm}\infty": [r"\infty"], r"$\textbf{(C)}$ 1,000": ["1000"]}


@pytest.mark.parametrize("gold, given",
    [(gold, given) for gold in LETTERED for given in LETTERED[gold]])
def test_of_a_gold_letter_with_its_value_either_is_right(gold, given):
    for answer in (given, "C", "(C)", r"\text{C}", r"\textbf{(C)}", gold):
        assert equal(answer, gold)
    for answer in ("D", "(D)", "13", "12C", "C, D", "C or D", "(D) " + given, "(C) 99", "AC", "",
        "3:2"):
        assert not equal(answer, gold)


@pytest.mark.parametrize("value, gold", [
    ("n^2-n-1", r"m_{\max}=n^2-n-1"), (r"\frac{\sqrt6}{6}", r"\frac{NO}{BO}=\frac1{\sqrt6}"),
    ("12", r"S_{\triangle ABC}=12"), ("2", r"\tan\alpha=2"),
    (r"\frac12", r"\cos \angle BAC = \frac12"),
    ("3", r"k_{\min}=3"), ("3", r"k_{\text{min}} = 3"), ("5050", "a_{100}=5050"), ("5", "AB^2=5"),
    ("0.3", "P(X=2)=0.3"), ("5", "|PQ|=5"), ("5", r"\overline{AB}=5"), ("-p", "x_1+x_2=-p"),
    ("60^\\circ", r"\angle ABC=60^\circ"), ("5", "f(2)+f(3)=5"), ("4", r"n(A \cup B)=4"),
    ("6", r"\max(a,b)=6"), (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n} k = \frac{n(n+1)}{2}"),
    ("1:2:3", "a:b:c=1:2:3"), (r"\sqrt2", r"AB+BC=\sqrt2"), (r"\frac23", r"\frac{x}{y}=\frac23")])
def test_right_hand_sides_are_compared_where_the_gold_answer_has_a_left_one(value, gold):
    assert equal(value, gold) and equal(gold, gold)
    assert not equal(value + "+1", gold) and not equal("77", gold)


@pytest.mark.parametrize("given, gold", [
    ("3", "x+y=3"), ("25", "x^2=25"), ("0", "a+3z=0"), ("10", "2x=10"), ("2x+1=5", "x=2"),
    ("5", "x=5=6"),
    (r"\sin(x)=\frac12", r"\cos(x)=\frac12"),
    (r"\frac{AB}{BO}=7", r"\frac{NO}{BO}=\frac1{\sqrt6}")])
def test_the_right_side_of_an_equation_to_be_solved_is_no_answer(given, gold):
    assert not equal(given, gold)


@pytest.mark.parametrize("answer, right", [
    ("5", True), (r"\textbf{(C)}\ 12", True), ("(-1, 2]", True), ("9" * 4000, True),
    ("5 lakh", True),
    ("x = \\boxed{5}", True), ("", False), ("$", False), (r"\text{}", False),
    (r"\frac{1}{2", False),
    ("1}, {2", False), ("</think>", False), ("<|im_end|> 5", False)])
def test_a_gold_answer_that_no_completion_can_give_is_found(answer, right):
    assert verifies_itself(answer) is right


# ------------------------------------------------------------------ what stands around equal values

@pytest.mark.parametrize("given, gold", [
    (r"\pi x^2", r"\pi r^2"), (r"\pi r^2 k", r"\pi r^2 h"), (r"\pi k^2", r"\pi n^2"),
    ("x_1=6, x_2=5", "x_1=5, x_2=6"), ("Tom: 6, Ann: 5", "Tom: 5, Ann: 6"),
    ("6 boys and 5 girls", "5 boys and 6 girls"), ("5 cents", "5 dollars"),
    ("5 hours", "5 minutes"),
    ("not=5", "5"), ("wrong=5", "5"), ("5=never", "5"), (r"\text{wrong}=5", "5"),
    ("Except: 5", "5"),
    ("Opposite: 5", "5"), ("Rejected: 5", "5"), ("Guess: 5", "5"), ("C: rejected", "C"),
    ("C) eliminated", "C"), ("C. ruled out", "C"), ("C: cannot be", "C"), ("A: none", "A"),
    ("5 for every 3", "5"), ("5 for each x", "5"), ("f^{-1}(x)=2x", "f(x)=2x"),
    ("g(x)=2x", "f(x)=2x"), ("f(2)=5", "f(1)=5"), ("y=5", "y'=5"), ("y'=5", "y=5"),
    ("AB=5", "BC=5"), ("x_2=5", "x_1=5"), ("1/3", "10:30"), ("0", "0:30"),
    (r"i\sum_{i=1}^n i", r"\sum_{i=1}^n i^2")])
def test_other_names_labels_and_coins_make_equal_values_different(given, gold):
    assert not equal(given, gold) and equal(gold, gold)


@pytest.mark.parametrize("given, gold", [
    ("x_2=6, x_1=5", "x_1=5, x_2=6"), ("Ann: 6, Tom: 5", "Tom: 5, Ann: 6"), ("BA=5", "AB=5"),
    ("6 girls and 5 boys", "5 boys and 6 girls"), ("5 minutes", "5 min"), ("Total: 5", "5"),
    ("Area = 9", "9"), ("xyz=6", "6"), ("y=2x", "f(x)=2x"), ("f(z)=2z", "f(x)=2x"),
    ("C. Friday", "C"), (r"\frac{(2k+1)\pi}{3}", r"\frac{(2n+1)\pi}{3}"),
    (r"k\pi, k\pi+1", r"n\pi, n\pi+1"),
    (r"{1 \over 2}", "1/2"), (r"1 \over 2", "1/2"), (r"\nicefrac12", "1/2"), (r"\SI{5}{cm}", "5"),
    (r"\num{5}", "5"), (r"\underline{5}", "5"), (r"US\$5", "5"), ("Rs. 5", "5"), ("₹5", "5"),
    ("minus 3", "-3"), (r"\text{negative }3", "-3"), ("a_{37}=19, a_3=2", "a_3=2, a_{37}=19")])
def test_the_same_names_and_other_spellings_are_equal(given, gold):
    assert equal(given, gold) and not equal(given, gold + "1")


# ------------------------------------------------------------------------------------- chained sets

@pytest.mark.parametrize("given, right", [
    (r"\mathbb{R}\setminus\{1\}", True), (r"\mathbb{R}\setminus\{1\}\setminus\{1\}", True),
    (r"\mathbb{R}\setminus\{1\}\setminus\{2\}", False), (r"\mathbb{R}-\{1\}-\{2\}", False),
    (r"\mathbb{R}\setminus\{1\}\cup\{1\}", False),
    (r"\mathbb{R}\setminus\{1\}\setminus[2,3]", False),
    (r"\mathbb{R}\setminus(\{1\}\cup\{2\})", False), (r"\mathbb{R}\setminus\{1\}\cap[0,5]", False),
    (r"x \ne 1 \ne 2", False), (r"x \ne 1, x \ne 2", False),
    (r"(-\infty,1)\cup(1,\infty)\setminus\{2\}", False)])
def test_every_link_of_a_chain_of_set_operations_counts(given, right):
    assert equal(given, r"(-\infty,1)\cup(1,\infty)") == right


def test_points_are_taken_out_one_after_the_other():
    assert equal(r"[0,5]\setminus\{3\}\setminus\{1,2\}", r"[0,1)\cup(1,2)\cup(2,3)\cup(3,5]")
    assert equal(r"\mathbb{R}\setminus\{1\}\setminus\{2\}", r"(-\infty,1)\cup(1,2)\cup(2,\infty)")


# -------------------------------------------------------------------------------------- linear work

REPEATED = ["<answer>", "</answer>", "<answer>6</answer>", "<answer>\n", "\\boxed{", "\\boxed{6} ",
"#### ",
            "#### 6\n", "#### 6 <", "answer is ", "the answer is ", "the answer is 6. ",
            "Answer:\n", "A:\n",
            "not \\boxed{6} ", "the answer is not 6. ", "`", "```a\n", "<think>", "</think>",
            "[THINK]",
            "### Final Answer\n", "\\boxed{6} is wrong. ", "**a", "answer\n", "not a=", "The a ",
            "\\[", "$$", "~~\\boxed{6}~~ ", "-\\boxed{6} ", "\\boxed{6} million ", "Ans: ", "not ",
            "\\sqrt{", "option is ", "\\boxed{6}? ", "<|channel|>", "◁think▷", "<reasoning>"]


@pytest.mark.parametrize("unit", REPEATED)
def test_the_work_grows_with_the_text_at_most(unit, monkeypatch):
    """Counted are marks that are built, and looks at one; twice the text, twice the count."""
    counts = []

    def count(name):
        original = getattr(extraction, name)

        def counted(*args):
            counts.append(name)
            return original(*args)
        monkeypatch.setattr(extraction, name, counted)

    for name in ("Mark", "_is_denied", "_is_joined", "_bare", "equal", "_disagrees"):
        count(name)

    for before in ("", "\\boxed{5} "):
        numbers = []
        for size in (4_000, 8_000, 16_000):
            counts.clear()
            verify(before + unit * (size // len(unit)), "5")
            numbers.append(len(counts))
        assert numbers[1] <= 2 * numbers[0] + 100 and numbers[2] <= 2 * numbers[1] + 100


def test_a_tag_is_read_once(monkeypatch):
    """2,500 opened tags took 36 ms while each of them looked ahead for its end."""
    assert [mark.content for mark in extraction._tags("<answer>" * 2500 + "5</answer>")] == ["5"]
    assert list(extraction._tags("<answer>" * 2500)) == []


# ------------------------------------------------------------------------------------------ rewards

@pytest.mark.parametrize("completion, value", [
    ("<reasoning>2+2=4</reasoning><answer>4</answer>", 1.0),
    ("\n<reasoning>\n2+2=4\n</reasoning>\n<answer>\n4\n</answer>\n", 1.0),
    ("<reasoning>2+2=4</reasoning><answer> </answer>", 0.0),
    ("<reasoning></reasoning><answer>4</answer>", 0.0),
    ("Sure! <reasoning>2+2=4</reasoning><answer>4</answer>", 0.0),
    ("<reasoning>2+2=4</reasoning><answer>4</answer> Done.", 0.0),
    ("<reasoning>2+2=4</reasoning> so <answer>4</answer>", 0.0),
    ("<reasoning>a</reasoning><reasoning>b</reasoning><answer>4</answer>", 0.0),
    ("<answer>4</answer><reasoning>2+2=4</reasoning>", 0.0),
    ("<reasoning>2+2=4<answer>4</answer></reasoning>", 0.0),
    ("<answer>4</answer>", 0.0), ("4", 0.0), ("", 0.0),
])
def test_format_reward(completion, value):
    assert format_reward(completion) == value


@pytest.mark.parametrize("completion, value", [
    ("9 * 2 = 18\n#### 18", 1.0),
    ("9 * 2 = 18\n#### 20", 0.0),
    (r"we get $\frac{2}{4}$, that is \boxed{\frac12}", 1.0),
    ("<reasoning>10 - 3 = 7.0</reasoning><answer>7</answer>", 1.0),
    ("It costs $1,250 in all. The answer is 1250.", 1.0),
    (r"Then x = -3. \boxed{-3}", 1.0),
    (r"\boxed{18}", 0.0),                                               # no number before it
    ("9 * 2 = 18", 0.0),                                                # no final answer
])
def test_consistency_reward(completion, value):
    assert consistency_reward(completion) == value


GOOD = "<reasoning>2+2 = 4</reasoning><answer>4</answer>"
WRONG = "<reasoning>2+2 = 5</reasoning><answer>5</answer>"
PLAIN = "#### 4"
SUM = {"problem": "What is 2+2?", "answer": "4"}


def test_a_completion_is_right_by_the_gold_answer_of_its_problem():
    assert right(SUM, GOOD) is True and right(SUM, PLAIN) is True
    assert right(SUM, WRONG) is False
    assert right({**SUM, "answer": "5"}, WRONG) is True
    assert right({**SUM, "check": None}, PLAIN) is True


def test_a_problem_may_bring_its_own_checker_which_alone_decides():
    seen = []

    def check(completion):
        seen.append(completion)
        return completion == "four"

    problem = {**SUM, "check": check}
    assert right(problem, "four") is True
    assert right(problem, PLAIN) is False
    assert seen == ["four", PLAIN]
    assert right({**SUM, "check": lambda completion: 1}, WRONG) is True


def test_each_reward_is_a_list_of_floats_by_problem_and_completion():
    problems = [SUM, {"problem": "What is 3+2?", "answer": "5"}]
    groups = [[GOOD, WRONG, PLAIN], [PLAIN, WRONG, "5"]]
    assert correct(problems, groups) == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert form(problems, groups) == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert consistency(problems, groups) == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]

    mixed = [{**SUM, "check": lambda completion: completion == "four"}, SUM]
    assert correct(mixed, [["four", PLAIN], ["four", PLAIN]]) == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("name", ["correct", "format", "consistency"])
def test_each_reward_of_the_table_has_one_signature(name):
    rewards = REWARDS[name]([SUM, SUM], [[GOOD, WRONG], [PLAIN, ""]])
    assert all(len(group) == 2 for group in rewards) and len(rewards) == 2
    assert {type(reward) for group in rewards for reward in group} == {float}
    assert REWARDS[name]([], []) == []
    with pytest.raises(ValueError, match="1 problems but 2 groups of completions"):
        REWARDS[name]([SUM], [[GOOD], [GOOD]])
    with pytest.raises(ValueError, match="2 problems but 1 groups of completions"):
        REWARDS[name]([SUM, SUM], [[GOOD]])


# ------------------------------------------------------------------------------------ labelled data

def rows(pattern):
    files = sorted(DATA.glob(pattern))
    if not files:
        pytest.skip("no labelled data beside this repository")
    return [json.loads(line) for file in files for line in file.open(encoding="utf-8")]


@pytest.mark.parametrize("pattern, share", [
    ("problems/gsm8k*.jsonl", 1.0), ("problems/math*.jsonl", 0.998)])
def test_solutions_verify_against_their_own_answers(pattern, share):
    verified = [verify(row["solution"], row["answer"]) for row in rows(pattern)]
    assert sum(verified) >= share * len(verified)


def test_labelled_outputs():
    labelled = [row for row in rows("verifier/*_dev.jsonl") if row["correct"] is not None]
    verdicts = [(verify(row["output"], row["gold"]), row["correct"]) for row in labelled]
    assert verdicts.count((True, False)) <= 0.0002 * len(labelled)
    assert verdicts.count((False, True)) <= 0.003 * len(labelled)


def test_gsm8k_solutions_are_consistent():
    values = [consistency_reward(row["solution"]) for row in rows("problems/gsm8k_test.jsonl")]
    assert sum(values) > 0.8 * len(values)


# --------------------------------------------------------------------------- python bench.py reward

def test_the_bench_counts_false_positives_and_negatives_and_keeps_no_text(tmp_path, monkeypatch):
    outputs = [("#### 5", "5", True), ("#### 5", "5", False), ("five", "5", True),
               ("#### 6", "5", False), ("?", "5", None)]
    (tmp_path / "small.jsonl").write_text("".join(
        json.dumps({"output": output, "gold": gold, "correct": correct, "dataset": "gsm8k"}) + "\n"
        for output, gold, correct in outputs))
    cases = [(r"\boxed{5}", "5", True), (r"\boxed{5 or 6}", "5", False)]
    monkeypatch.setattr(bench_reward, "hostile", lambda: cases)

    result = bench_reward.reward(SimpleNamespace(data=tmp_path, vs="", rounds=1), None)
    counts = {"n": 4, "accuracy": 0.5, "fp": 1, "fn": 1}
    assert result["accuracy"] == {"small gsm8k completion": {"ours": counts}}
    assert result["throughput"]["gsm8k"]["n"] == 4
    hostile = result["hostile"]["ours"]
    assert hostile["wrong_accepted"] == hostile["right_refused"] == 0
    assert "five" not in json.dumps(result)


def test_the_bench_says_in_one_line_what_it_needs(tmp_path, monkeypatch):
    args = SimpleNamespace(data="", vs="", rounds=1)
    with pytest.raises(ValueError, match="reward needs --data FOLDER"):
        bench_reward.reward(args, None)
    good = '{"output": "5", "gold": "5", "correct": true}\n'
    (tmp_path / "bad.jsonl").write_text(good + '{"output": "5"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 2"):
        bench_reward.labelled(tmp_path)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        bench_reward.verifiers("math-verify")


# ----------------------------------------------------------------------------------------- thoughts

THOUGHT = [     # (completion, gold, right): what is inside a thought is not the answer
    ("<think>It is \\boxed{5}.</think> The answer is 6.", "5", False),
    ("<think>It is \\boxed{5}.</think> The answer is 6.", "6", True),
    ("<think>It is \\boxed{5}.</think> I do not know.", "5", False),
    ("<think>Is it \\boxed{5}? Wait", "5", False),
    ("<think>\n2 + 3 = 5. It is 5.", "5", False),
    ("the template opened the thought: #### 4</think>#### 5", "5", True),
    ("the template opened the thought: #### 4</think>", "4", False),
    ("<think>a</think> #### 5 <think> or is it", "5", False),
    ("<think>#### 1</think><think>#### 2</think> #### 5", "5", True),
    ("<THINK>#### 4</THINK>#### 5", "5", True), ("<thinking>#### 4</thinking>#### 5", "5", True),
    ("[THINK]#### 4[/THINK]#### 5", "5", True), ("[THINK]#### 5", "5", False),
    ("<|begin_of_thought|>#### 4<|end_of_thought|>#### 5", "5", True),
    ("<|begin_of_thought|>#### 5", "5", False),
    ("<think>#### 4<|im_end|></think>#### 5", "5", False),
    ("I think the answer is 5.", "5", True), ("A thought: #### 5", "5", True),
    # a template's own reasoning is read as before, and what follows the end of a turn is not
    ("<reasoning>a</reasoning><answer>5</answer>", "5", True),
    ("<reasoning>a <answer>5</answer>", "5", True),
    ("<|channel|>analysis<|message|>#### 5", "5", False),
    ("<|channel|>analysis<|message|>#### 7<|end|><|start|>assistant<|channel|>final<|message|>"
     "#### 5<|return|>", "5", True)]
THOUGHT += [(f"<{name}>#### 5", "5", False) for name in ("think ", "think\n", "|think|",
            "seed:think", "thoughts", "reasoning", 'think mode="a"')]
THOUGHT += [(f"<{name}>#### 5</{name}>", "5", False) for name in ("think ", "seed:think",
            "thoughts", "reasoning")]
THOUGHT += [(f"<{name}>#### 7</{name}> #### 5", "5", True) for name in ("think ", "seed:think",
            "thoughts", "reasoning")]
THOUGHT += [("◁think▷#### 5", "5", False), ("◁think▷#### 7◁/think▷ #### 5", "5", True)]
THOUGHT += [("#### 7" + end + " #### 5", "7", True) for end in ("<|eot|>", "<|end|>",
            "<|end_of_text|>", "<end_of_turn>", "<|start_header_id|>user", "\n\nUser:", "</s>")]


@pytest.mark.parametrize("completion, gold, right", THOUGHT)
def test_what_is_inside_a_thought_is_not_the_answer(completion, gold, right):
    assert reward.verify(completion, gold) == right


def test_an_open_thought_has_no_answer_leniently_either():
    assert reward.extract_answer("<think> 1 + 1 = 2", lenient=True) is None
    assert reward.extract_answer("</think> it must be 7", lenient=True) == "7"


def test_consistency_may_look_into_the_thought():
    """The answer repeats the thought's last number, or it does not."""
    assert reward.consistency_reward("<think>2 + 3 = 5</think> #### 5") == 1
    assert reward.consistency_reward("<think>2 + 3 = 5</think> #### 6") == 0
    assert reward.consistency_reward("<think>2 + 3 = 5") == 0


def test_many_marks_of_thoughts_are_read():
    for text in ("<think>" * 150_000, "</think>" * 130_000, "<think" * 170_000, "hink" * 250_000):
        assert not reward.verify(text, "5")
        assert reward.verify(text + "</think> #### 5", "5")


def test_correctness_of_weight_0_is_still_computed():
    """The log's pass@G and rewards/correct are read from it; any other function of weight 0 is left out."""
    kept = [(name, weight) for name, weight, _ in reward.weighted("correct=0,format=0,consistency=2")]
    assert kept == [("correct", 0.0), ("consistency", 2.0)]


def test_only_what_stands_before_the_first_end_of_text_is_read():
    """Whichever of the marks it is: behind the end of a turn the model goes on by itself, until it ends the text."""
    for ends in (("<|im_end|>", "<|endoftext|>"), ("<|endoftext|>", "<|im_end|>"), ("</s>", "<|eot_id|>")):
        completion = "The answer is 18.{}\nThe answer is 20.{}".format(*ends)
        assert extract_answer(completion) == "18" and not reward.verify(completion, "20")


@pytest.mark.parametrize("size", [0, 1, 3_990, 3_999, 4_000, 4_001, 7_995, 8_000, 20_000])
def test_a_mark_of_a_thought_is_found_wherever_it_stands(size):
    assert not reward.verify("x" * size + "<think>#### 5", "5")
    assert reward.verify("<think>#### 7" + "x" * size + "</think>\n#### 5", "5")
    assert not reward.verify("#### 5\n</think>" + "x" * size, "5")


@pytest.mark.parametrize("completion, value", [
    ("<think>2+2</think><answer>4</answer>", 1.0), (" <think>\n2+2\n</think>\n<answer> 4 </answer>", 1.0), ("<think></think><answer>4</answer>", 0.0),
    ("<think>2+2</think>4", 0.0), ("<think>a</think><think>b</think><answer>4</answer>", 0.0), ("<reasoning>2+2</reasoning><answer>4</answer>", 0.0)])
def test_the_form_of_r1(completion, value):
    """By the table's name; the answer within is read as any other, and what stands in the thought is not."""
    assert reward.REWARDS["think"]([{"answer": "4"}], [[completion]]) == [[value]]
    assert verify(completion, "4") == (value == 1.0 or "<answer>4" in completion)
