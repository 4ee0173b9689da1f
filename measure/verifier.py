r"""How right, how fast and how safe the verifier is: `python bench.py reward --data FOLDER`.

FOLDER holds labelled completions, one *.jsonl file a set. Each line is an object with output, gold
and correct (true, false, or null, which is not scored). Where it has `pred`, the answer alone is
also scored in a box. With --vs math-verify the library of this name is measured beside ours.

Times are CPU seconds of this process, one completion at a time, the two verifiers in turns on the
same completion. Caches are emptied before each round. The hostile inputs are made here (`hostile`),
and test_reward.py holds the verifier to them. The result has no text of the data in it.
"""

import json
import logging
import random
import statistics
import time
import tracemalloc
from pathlib import Path

import reward as ours
from verifier import expression, latex

MEGABYTE = 1_000_000
SAMPLE = 1000        # completions timed beside a slow verifier

# ---------------------------------------------------------------------------------- hostile inputs

# {gold: contents of a box that must not be accepted for it}
WRONG = {
    "5": [  # hedges, ranges and lists
        r"5 \text{ or } 98765", "5 or 6", "5, 6", "5;6", "5/6", "5:6", "5|6", "(5)(6)", r"5 \cup 6",
        r"5\\6", "5 & 6", "5 6", "5 vs 6", r"5 \lor 6", r"5 \text{ and } 6", r"\{5, 98765\}",
        "1,2,3,4,5", r"\text{1 2 3 4 5}", r"\text{either 5 or 6}", r"x \in \{5, 6\}", r"x=5,y=6",
        r"x=5 \text{ or } x=6", "5-10", r"5\text{ to }10", "[1,10]", r"5\ldots 10", r"\pm 5",
        r"5 \pm 1", "4<5<6", "x<5", r"\geq 5", r"\text{at least }5", r"5 \text{ or more}", "5 and",
        "5?", "55", "5 5",
        # chains, equations left to solve, implications
        "98765 = 5", "5 = 98765", "5=5=6", r"5 \approx 7", r"5 \to 6", r"5 \Rightarrow 6",
        "2x+1=11", "x^2=25", "(x-5)(x-6)=0", "0=0", "x=x",
        # negations and what is hidden in text
        "not 5", r"\text{not } 5", r"\neq 5", r"x \ne 5", r"\lnot 5", r"\cancel{5}",
        r"5 \text{ is wrong}", r"5 \text{ is not the answer}", r"\text{anything but }5",
        r"\text{maybe }5", r"98765\text{5}", r"5\text{98765}", r"98765\phantom{5}",
        r"98765 \boxed{5}", r"5^{\text{6}}", r"5_{98765}", "5_6",
        # size, percent, currency, words that count
        "500", "0.05", r"500\%", "-5", "5.0001", "5.6.7", "5e5", "5^2", "5!", "5x", "5i", r"5\pi",
        "5k", r"5 \text{ million}", r"5 \text{ thousand}", "5 hundred", r"5\times 10^6",
        r"5 \text{ squared}", r"\sin 5", "f(5)", "12_5",
        # code and numbers that are none
        "__import__('os').system('echo 5')", "eval('5')", "().__class__", "5 if True else 6",
        "print(5)", "lambda: 5", "[5][0]", "0x5", "nan", "inf", r"-\infty", "1/0", r"\frac{5}{0}",
        "1e999", "True", "None", r"\frac{5}{}", r"\frac5",
        # digits of other scripts and signs around them
        "5\u200b6", "5\uff16", "\u0666", "5\u00b2", "\u2155", "5\u0338", "\u2085", "\u4e94"],
    "0": ["nan", r"\text{nan}", r"\infty-\infty", "0/0", "None", "()", "[]", "''", r"\emptyset",
          "10^{-400}", "e^{-1000}", r"\frac{1}{9^{9^{9}}}", "10^{-13}", "9^{9^{9^{9}}}",
          str(expression.PRIME), "x-x+1"],
    "1": [r"\frac{0}{0}", "True", r"\frac{9^{9^{9}}}{9^{9^{8}}}", "0.999999999999",
          r"\frac{\infty}{\infty}", "1^{\\infty}"],
    "56": ["5 6", r"5\ 6", "5,6", "{5}{6}", r"5\quad 6"],
    "12_5": ["12_6", "12", "7", "120_5", "1_25", "12_{56}", "12_{10}"],
    r"50\%": ["5000", r"5000\%", r"0.5\%", r"5\%", "0.005", r"500\%"],
    r"\$5.50": ["5.50 cents", r"\$550", r"\$5.5 \text{ million}"],
    r"\frac13": ["0.33", "0.333333333333", r"\frac13 \text{ or } \frac14", "3", "1:4",
                 r"\frac{1}{3}x"],
    r"\sqrt2": ["1.41421356", r"\pm\sqrt2", r"\sqrt[3]{2}", r"\sqrt{2.0000001}"],
    r"\pi": ["3.14", "3.14159265358", r"\frac{22}{7}", "180", "p i"],
    "9^{9^{9^{9}}}": ["9^{9^{9^{8}}}", "0", r"\infty", "nan"],
    "(x+1)^{500}": ["(x+1)^{499}(x+1)+1", "(x+1)^{501}", "x^{500}+1"],
    "x": ["|x|", r"\sqrt{x^2}", "y", "x=1", r"\frac{x^2+1}{x}"],
    "x=5": ["2x+1=11", "x+7=12", "y=5", "x^2=25", r"x \in \{5,6\}", "x=5=6", r"x \neq 5", "x>5"],
    "x>5": ["x+7>12", "x<5", r"x \ge 5", "x>5, x<4", "(5,6)", "5>x"],
    "(1,2)": ["(2,1)", "[1,2]", "[1,2)", r"\{1,2\}", "1,2", "(1,2),(3,4)", "(1)", "1"],
    "1,2": ["1", "1,2,3", "1,2,2", "(1,2)", "1.2", "12"],
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": [
        r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"],
    r"\text{B}": ["A, B", r"\text{A or B}", "ABCDE", "A B C D E", "(A)(B)", r"\text{not B}"],
    r"\text{Monday}": [r"\text{not Monday}", r"\text{Monday or Tuesday}", r"\text{Monday Tuesday}",
                       r"\text{no}"],
    "": ["", " ", "$", r"\text{}", r"\{\}", "0"],
}
RIGHT = {   # {gold: contents of a box that must be accepted for it}
    "5": ["5.0", "+5", "05", "{5}", r"\text{5}", r"\mathbf{5}", "((5))", r"\$5", r"5\text{ cm}^3",
          r"5^\circ", "5 dollars", "x = 5", "\uff15", "5\u200b", "\u200b5", "$5$", r"\(5\)",
          r"\sqrt{25}", r"\frac{10}{2}", r"5\,\text{m/s}", r"{\bf 5}", r"\boxed{5}"],
    "-5": ["\u22125", "- 5", r"-\frac{10}{2}", "{-5}"],
    "98765": ["98,765", r"98,\!765", "98{,}765", "9\u200b8765", "\uff19\uff18\uff17\uff16\uff15",
              "98 765", "98765.00"],
    r"\frac12": ["0.5", ".5", "1/2", "\u00bd", r"\frac{1}2", r"\dfrac{2}{4}", r"50\%", "1:2"],
    "9^{9^{9^{9}}}": ["9^{9^{9^{9}}}"],
    "(x+1)^{500}": ["(x+1)^{499}(x+1)", "(1+x)^{500}"],
    r"\{1,2\}": ["1, 2", "2,1", r"x \in \{1,2\}", r"x=1 \text{ or } x=2"],
    r"\text{B}": ["B", "(B)", r"\text{(B)}", r"\textbf{(B)}"],
    r"\infty": ["\u221e", r"+\infty"],
}
WRONG_TEXTS = [   # completions that must not be paid for 5
    r"\boxed{5} or \boxed{6}", r"\boxed{6}, \boxed{5}", r"\boxed{4} \boxed{5} \boxed{6}",
    "#### 5\n#### 6", "#### 1 2 3 4 5", "#### not 5", "<answer>5 or 6</answer>",
    "<answer>6</answer><answer>5</answer>", "<answer>5", "The answer is not 5.",
    "The answer is 5 or 6.", "The answer isn't 5.", "The answer is anything but 5.",
    "The answer is wrong: 5", "The answer is 6. The answer is 5.",
    r"\boxed{5} was a guess. The final answer is 6.", r"\boxed{5", r"\boxed{}5",
    r"\boxed{6\boxed{5}}", "5", "5 5 5 5 5", "1 2 3 4 5.", "It is not 5.", "1+4 = 5. It is not 5.",
    "1+4 = 5. It is 5 or 6.", "1+4 = 5. Is it 5?", "1+4 = 5. It is 5 thousand.",
    "1+4 = 5. It is 5k.", r"\boxed{6}<|im_end|>\boxed{5}",
    "".join(f"\\boxed{{{i}}}" for i in range(6))]
UNITS = [
    "9", "0", "{", "}", "(", "[", "|", "^", "_", "-", "!", "'", ",", ";", "\xb1", "=", "<", "%",
    "&", " ", "\n", "\x00", "\\", "\\\\", "$", "\xbd", "\xb2", "\u200b", "\uff15", "\ud800", "9^{",
    "x^", r"\frac{", r"\frac", r"\sqrt", r"\sqrt{", r"\left(", r"\text{", r"\text{a}",
    r"\text{ and }", r"\boxed{", r"\boxed{6}", r"\boxed ", r"\begin{pmatrix}", r"\sin ", r"\binom",
    "1,000,", "1 000 ", "6 cm ", "{6},", "(6,7),", "6 ", "6<", "x=", "x=(", r"6\approx ", "6:",
    "word ", "<answer>", "<answer>6</answer>", "<think>", "</think>",
    "####", "#### 6\n", "the answer is ",
    "the final answer is ", "the answer to ", "Answer:", "A:\n", "6. ", "6 = 6. ", "for all ",
    "Tom: 6,", "a(a)", "(a(a),", "\u2983", "\u27e6"]


def boxed(content):
    """Return a completion that ends in this answer."""
    return f"The final answer is $\\boxed{{{content}}}$."


def hostile():
    """Return [(completion, gold, right)]: hedges, hidden answers, code, texts up to a megabyte."""
    cases = []
    for table, right in ((WRONG, False), (RIGHT, True)):
        for gold, contents in table.items():
            cases += [(boxed(content), gold, right) for content in contents]
    cases += [(text, "5", False) for text in WRONG_TEXTS]

    # a piece of text over and over, around the caps of an answer and of a completion
    for unit in UNITS:
        for size in (290, 590, 20_000, MEGABYTE):
            body = (unit * (size // len(unit) + 1))[:size]
            marks = ("{}", "\\boxed{{{}}}", "The answer is {}") if size < MEGABYTE else ("{}",)
            cases += [(mark.format(body), "5", False) for mark in marks]

    # brackets in brackets
    for opener, closer in (("{", "}"), ("(", ")"), (r"\sqrt{", "}")):
        for depth in (50, 10_000):
            nested = opener * depth + "5" + closer * depth + "6"
            cases.append((f"\\boxed{{{nested}}}", "5", False))
    return cases


# -------------------------------------------------------------------------------------- measurement

def verifiers(vs):
    """Return {name: (verify(completion, gold), function that empties its caches)}."""
    def forget():
        latex.clean.cache_clear()
        expression.value.cache_clear()

    found = {"ours": (ours.verify, forget)}
    if not vs:
        return found

    try:
        import math_verify
        from sympy.core.cache import clear_cache
    except ImportError:
        message = "--vs math-verify needs it in this environment: pip install math-verify"
        raise ValueError(message) from None
    logging.disable(logging.ERROR)

    def theirs(completion, gold):
        return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(completion))

    found[vs] = (theirs, clear_cache)
    return found


def labelled(folder):
    """Return {set: [(completion, gold, correct)]} of the *.jsonl files of a folder.

    Raises ValueError without such a file, and with its name and line for a malformed line.
    """
    files = sorted(Path(folder).glob("*.jsonl")) if folder else []
    if not files:
        raise ValueError("reward needs --data FOLDER, a folder of labelled *.jsonl "
                         "(fields output, gold, correct)")

    sets = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")   # not at U+2028
        for number, line in enumerate(lines, 1):
            try:
                add(sets, file.stem, json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: {error!r}; "
                                 "needed are output, gold and correct") from None
    return sets


def add(sets, source, row):
    """Add a labelled row to the sets: the completion to one, its answer in a box to another."""
    correct = row["correct"]
    if correct is None:
        return
    name = f"{source} {row.get('dataset', '')}"
    kind = row.get("kind", "completion")
    sets.setdefault(f"{name} {kind}", []).append((row["output"], row["gold"], correct))
    if row.get("pred") is not None and kind == "completion":
        sets.setdefault(f"{name} boxed", []).append((boxed(row["pred"]), row["gold"], correct))


def timed(verify, completion, gold):
    """Return (verdict, CPU seconds); the verdict is None where verify raises."""
    begin = time.process_time()
    try:
        verdict = verify(completion, gold)
    except Exception:
        verdict = None
    return verdict, time.process_time() - begin


def accuracy(verify, rows):
    """Return how often a verifier agrees with the labels, and its false positives and negatives."""
    false_positives = 0
    false_negatives = 0
    for completion, gold, correct in rows:
        verdict, _ = timed(verify, completion, gold)
        false_positives += verdict is True and not correct
        false_negatives += verdict is not True and correct

    share = 1 - (false_positives + false_negatives) / len(rows)
    return {
        "n": len(rows),
        "accuracy": round(share, 4),
        "fp": false_positives,
        "fn": false_negatives,
    }


def times_of_a_round(found, rows):
    """Return {name: CPU seconds of each completion}, the verifiers in turns on each completion."""
    seconds = {name: [] for name in found}
    for _, forget in found.values():
        forget()
    for completion, gold, _ in rows:
        for name, (verify, _) in found.items():
            _, duration = timed(verify, completion, gold)
            seconds[name].append(duration)
    return seconds


def throughput(found, rows, rounds):
    """Return completions a second, and median and 99th percentile, of each verifier's best round.

    Beside another verifier also the ratio of the two rates of each round.
    """
    result = {}
    rates = {name: [] for name in found}
    for _ in range(rounds):
        for name, times in times_of_a_round(found, rows).items():
            rates[name].append(len(times) / sum(times))
            if rates[name][-1] < max(rates[name]):
                continue
            p99 = statistics.quantiles(times, n=100)[98]
            result[name] = {
                "per_second": round(rates[name][-1]),
                "median_ms": round(1e3 * statistics.median(times), 4),
                "p99_ms": round(1e3 * p99, 4),
                "max_ms": round(1e3 * max(times), 3),
            }

    for name in found:
        if name == "ours":
            continue
        ratios = [round(a / b, 1) for a, b in zip(rates["ours"], rates[name])]
        result[f"ratio to {name}"] = {
            "throughput_of_rounds": ratios,
            "median": round(result[name]["median_ms"] / result["ours"]["median_ms"], 1),
            "p99": round(result[name]["p99_ms"] / result["ours"]["p99_ms"], 1),
        }
    return result


def worst_case(verify, forget, cases):
    """Return what a verifier does on the hostile inputs: wrong verdicts, errors and times."""
    counts = {"n": len(cases), "wrong_accepted": 0, "right_refused": 0, "raised": 0,
              "over_100_ms": 0, "max_ms": 0.0}

    for completion, gold, right in cases:
        forget()
        verdict, seconds = timed(verify, completion, gold)
        counts["wrong_accepted"] += verdict is True and not right
        counts["right_refused"] += verdict is not True and right
        counts["raised"] += verdict is None
        counts["over_100_ms"] += seconds > 0.1
        counts["max_ms"] = round(max(counts["max_ms"], 1e3 * seconds), 1)
    return counts


def peak_megabytes(verify, cases):
    """Return the megabytes that one call allocates at most."""
    peak = 0
    tracemalloc.start()
    for completion, gold, _ in cases:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        verify(completion, gold)
        _, highest = tracemalloc.get_traced_memory()
        peak = max(peak, highest - before)
    tracemalloc.stop()
    return round(peak / MEGABYTE, 2)


def reward(args, device):
    """Return accuracy on each labelled set, throughput on GSM8K and MATH, and the worst case.

    The device is not used: a verifier runs on the CPU.
    """
    sets = labelled(args.data)
    found = verifiers(args.vs)
    cases = hostile()
    result = {"accuracy": {}, "throughput": {}, "hostile": {}}

    for name, rows in sets.items():
        counts = {who: accuracy(verify, rows) for who, (verify, _) in found.items()}
        result["accuracy"][name] = counts
        print(name, counts, flush=True)

    for dataset in ("gsm8k", "math"):
        names = [name for name in sets if name.endswith(f" {dataset} completion")]
        rows = [row for name in names for row in sets[name]]
        rows = random.Random(0).sample(rows, min(len(rows), SAMPLE if args.vs else len(rows)))
        if rows:
            rates = {"n": len(rows), **throughput(found, rows, args.rounds)}
            result["throughput"][dataset] = rates
            print(dataset, rates, flush=True)

    for who, (verify, forget) in found.items():
        result["hostile"][who] = worst_case(verify, forget, cases)
        print(who, result["hostile"][who], flush=True)
    result["hostile"]["ours"]["peak_mb"] = peak_megabytes(ours.verify, cases)
    return result
