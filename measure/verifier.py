r"""`python bench.py reward --data FOLDER [--vs math-verify]`: how right, how fast and how safe the verifier is.

FOLDER holds labelled completions, one *.jsonl file a set, each line an object with output, gold and correct (true,
false, or null: not scored); with `pred`, the answer alone is also scored in a box. Times are CPU seconds of this process,
one completion at a time, the two verifiers in turns on the same completion; caches are emptied before each round.
The hostile inputs are made here (`hostile`), and test_reward.py holds the verifier to them. The result has no text
of the data in it.
"""

import json
import logging
import random
import statistics
import time
import tracemalloc
from pathlib import Path

from verifier import expression
from verifier import latex
import reward as ours

MEGABYTE = 1_000_000
SAMPLE = 1000        # completions timed beside a slow verifier

# ------------------------------------------------------------------------------------ hostile inputs

# {gold: contents of a box that must not be accepted for it}
WRONG = {
    "5": [  # hedges, ranges and lists
        r"5 \text{ or } 98765", "5 or 6", "5, 6", "5;6", "5/6", "5:6", "5|6", "(5)(6)", r"5 \cup 6", r"5\\6", "5 & 6", "5 6",
        "5 vs 6", r"5 \lor 6", r"5 \text{ and } 6", r"\{5, 98765\}", "1,2,3,4,5", r"\text{1 2 3 4 5}", r"\text{either 5 or 6}",
        r"x \in \{5, 6\}", r"x=5,y=6", r"x=5 \text{ or } x=6", "5-10", r"5\text{ to }10", "[1,10]", r"5\ldots 10", r"\pm 5",
        r"5 \pm 1", "4<5<6", "x<5", r"\geq 5", r"\text{at least }5", r"5 \text{ or more}", "5 and", "5?", "55", "5 5",
        # chains, equations left to solve, implications
        "98765 = 5", "5 = 98765", "5=5=6", r"5 \approx 7", r"5 \to 6", r"5 \Rightarrow 6", "2x+1=11", "x^2=25", "(x-5)(x-6)=0",
        "0=0", "x=x",
        # negations and what is hidden in text
        "not 5", r"\text{not } 5", r"\neq 5", r"x \ne 5", r"\lnot 5", r"\cancel{5}", r"5 \text{ is wrong}",
        r"5 \text{ is not the answer}", r"\text{anything but }5", r"\text{maybe }5", r"98765\text{5}", r"5\text{98765}",
        r"98765\phantom{5}", r"98765 \boxed{5}", r"5^{\text{6}}", r"5_{98765}", "5_6",
        # size, percent, currency, words that count
        "500", "0.05", r"500\%", "-5", "5.0001", "5.6.7", "5e5", "5^2", "5!", "5x", "5i", r"5\pi", "5k", r"5 \text{ million}",
        r"5 \text{ thousand}", "5 hundred", r"5\times 10^6", r"5 \text{ squared}", r"\sin 5", "f(5)", "12_5",
        # code and numbers that are none
        "__import__('os').system('echo 5')", "eval('5')", "().__class__", "5 if True else 6", "print(5)", "lambda: 5", "[5][0]",
        "0x5", "nan", "inf", r"-\infty", "1/0", r"\frac{5}{0}", "1e999", "True", "None", r"\frac{5}{}", r"\frac5",
        # digits of other scripts and signs around them
        "5\u200b6", "5\uff16", "\u0666", "5\u00b2", "\u2155", "5\u0338", "\u2085", "\u4e94"],
    "0": ["nan", r"\text{nan}", r"\infty-\infty", "0/0", "None", "()", "[]", "''", r"\emptyset", "10^{-400}", "e^{-1000}",
          r"\frac{1}{9^{9^{9}}}", "10^{-13}", "9^{9^{9^{9}}}", str(expression.PRIME), "x-x+1"],
    "1": [r"\frac{0}{0}", "True", r"\frac{9^{9^{9}}}{9^{9^{8}}}", "0.999999999999", r"\frac{\infty}{\infty}", "1^{\\infty}"],
    "56": ["5 6", r"5\ 6", "5,6", "{5}{6}", r"5\quad 6"],
    "12_5": ["12_6", "12", "7", "120_5", "1_25", "12_{56}", "12_{10}"],
    r"50\%": ["5000", r"5000\%", r"0.5\%", r"5\%", "0.005", r"500\%"],
    r"\$5.50": ["5.50 cents", r"\$550", r"\$5.5 \text{ million}"],
    r"\frac13": ["0.33", "0.333333333333", r"\frac13 \text{ or } \frac14", "3", "1:4", r"\frac{1}{3}x"],
    r"\sqrt2": ["1.41421356", r"\pm\sqrt2", r"\sqrt[3]{2}", r"\sqrt{2.0000001}"],
    r"\pi": ["3.14", "3.14159265358", r"\frac{22}{7}", "180", "p i"],
    "9^{9^{9^{9}}}": ["9^{9^{9^{8}}}", "0", r"\infty", "nan"],
    "(x+1)^{500}": ["(x+1)^{499}(x+1)+1", "(x+1)^{501}", "x^{500}+1"],
    "x": ["|x|", r"\sqrt{x^2}", "y", "x=1", r"\frac{x^2+1}{x}"],
    "x=5": ["2x+1=11", "x+7=12", "y=5", "x^2=25", r"x \in \{5,6\}", "x=5=6", r"x \neq 5", "x>5"],
    "x>5": ["x+7>12", "x<5", r"x \ge 5", "x>5, x<4", "(5,6)", "5>x"],
    "(1,2)": ["(2,1)", "[1,2]", "[1,2)", r"\{1,2\}", "1,2", "(1,2),(3,4)", "(1)", "1"],
    "1,2": ["1", "1,2,3", "1,2,2", "(1,2)", "1.2", "12"],
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"],
    r"\text{B}": ["A, B", r"\text{A or B}", "ABCDE", "A B C D E", "(A)(B)", r"\text{not B}"],
    r"\text{Monday}": [r"\text{not Monday}", r"\text{Monday or Tuesday}", r"\text{Monday Tuesday}", r"\text{no}"],
    "": ["", " ", "$", r"\text{}", r"\{\}", "0"],
}
RIGHT = {   # {gold: contents of a box that must be accepted for it}
    "5": ["5.0", "+5", "05", "{5}", r"\text{5}", r"\mathbf{5}", "((5))", r"\$5", r"5\text{ cm}^3", r"5^\circ", "5 dollars",
          "x = 5", "\uff15", "5\u200b", "\u200b5", "$5$", r"\(5\)", r"\sqrt{25}", r"\frac{10}{2}",
          r"5\,\text{m/s}", r"{\bf 5}", r"\boxed{5}"],
    "-5": ["\u22125", "- 5", r"-\frac{10}{2}", "{-5}"],
    "98765": ["98,765", r"98,\!765", "98{,}765", "9\u200b8765", "\uff19\uff18\uff17\uff16\uff15", "98 765", "98765.00"],
    r"\frac12": ["0.5", ".5", "1/2", "\u00bd", r"\frac{1}2", r"\dfrac{2}{4}", r"50\%", "1:2"],
    "9^{9^{9^{9}}}": ["9^{9^{9^{9}}}"],
    "(x+1)^{500}": ["(x+1)^{499}(x+1)", "(1+x)^{500}"],
    r"\{1,2\}": ["1, 2", "2,1", r"x \in \{1,2\}", r"x=1 \text{ or } x=2"],
    r"\text{B}": ["B", "(B)", r"\text{(B)}", r"\textbf{(B)}"],
    r"\infty": ["\u221e", r"+\infty"],
}
WRONG_TEXTS = [   # completions that must not be paid for 5
    r"\boxed{5} or \boxed{6}", r"\boxed{6}, \boxed{5}", r"\boxed{4} \boxed{5} \boxed{6}", "#### 5\n#### 6", "#### 1 2 3 4 5",
    "#### not 5",
    "<answer>5 or 6</answer>", "<answer>6</answer><answer>5</answer>", "<answer>5", "The answer is not 5.",
    "The answer is 5 or 6.",
    "The answer isn't 5.", "The answer is anything but 5.", "The answer is wrong: 5", "The answer is 6. The answer is 5.",
    r"\boxed{5} was a guess. The final answer is 6.", r"\boxed{5", r"\boxed{}5", r"\boxed{6\boxed{5}}", "5", "5 5 5 5 5",
    "1 2 3 4 5.", "It is not 5.", "1+4 = 5. It is not 5.", "1+4 = 5. It is 5 or 6.", "1+4 = 5. Is it 5?",
    "1+4 = 5. It is 5 thousand.",
    "1+4 = 5. It is 5k.", r"\boxed{6}<|im_end|>\boxed{5}", "".join(f"\\boxed{{{i}}}" for i in range(6))]
UNITS = [
    "9", "0", "{", "}", "(", "[", "|", "^", "_", "-", "!", "'", ",", ";", "\xb1", "=", "<", "%", "&", " ", "\n", "\x00",
    "\\", "\\\\", "$", "\xbd", "\xb2", "\u200b", "\uff15", "\ud800", "9^{", "x^", r"\frac{", r"\frac", r"\sqrt",
    r"\sqrt{", r"\left(", r"\text{", r"\text{a}", r"\text{ and }", r"\boxed{", r"\boxed{6}", r"\boxed ",
    r"\begin{pmatrix}", r"\sin ", r"\binom", "1,000,", "1 000 ", "6 cm ", "{6},", "(6,7),", "6 ", "6<", "x=", "x=(",
    r"6\approx ", "6:", "word ", "<answer>", "<answer>6</answer>", "####", "#### 6\n", "the answer is ",
    "the final answer is ", "the answer to ", "Answer:", "A:\n", "6. ", "6 = 6. ", "for all ", "Tom: 6,", "a(a)",
    "(a(a),", "\u2983", "\u27e6"]


def hostile():
    """[(completion, gold, right)]: hedges, hidden and negated answers, code, and texts of up to a megabyte."""
    cases = [(f"The final answer is $\\boxed{{{c}}}$.", gold, False) for gold, contents in WRONG.items() for c in contents]
    cases += [(f"The final answer is $\\boxed{{{c}}}$.", gold, True) for gold, contents in RIGHT.items() for c in contents]
    cases += [(text, "5", False) for text in WRONG_TEXTS]
    for unit in UNITS:
        for size in (290, 590, 20_000, MEGABYTE):
            body = (unit * (size // len(unit) + 1))[:size]
            marks = ("{}", "\\boxed{{{}}}", "The answer is {}") if size < MEGABYTE else ("{}",)
            cases += [(mark.format(body), "5", False) for mark in marks]
    pairs = (("{", "}"), ("(", ")"), (r"\sqrt{", "}"))
    nested = [opener * n + "5" + closer * n + "6" for opener, closer in pairs for n in (50, 10_000)]
    return cases + [(f"\\boxed{{{text}}}", "5", False) for text in nested]


# ------------------------------------------------------------------------------------ measurement

def verifiers(vs):
    """{name: (verify(completion, gold), function that empties its caches)}."""
    def forget():
        for cached in (latex.clean, expression.value):
            cached.cache_clear()
    found = {"ours": (ours.verify, forget)}
    if vs:
        try:
            import math_verify
            from sympy.core.cache import clear_cache
        except ImportError:
            raise ValueError("--vs math-verify needs it in this environment: pip install math-verify") from None
        logging.disable(logging.ERROR)
        found[vs] = (lambda completion, gold: math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(completion)),
                     clear_cache)
    return found


def labelled(folder):
    """{set: [(completion, gold, correct)]} of the *.jsonl files of a folder."""
    files = sorted(Path(folder).glob("*.jsonl")) if folder else []
    if not files:
        raise ValueError("reward needs --data FOLDER, a folder of labelled *.jsonl (fields output, gold, correct)")
    sets = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if row["correct"] is None:
                    continue
                name, kind = f"{file.stem} {row.get('dataset', '')}", row.get("kind", "completion")
                sets.setdefault(f"{name} {kind}", []).append((row["output"], row["gold"], row["correct"]))
                if row.get("pred") is not None and kind == "completion":
                    boxed = f"The final answer is $\\boxed{{{row['pred']}}}$."
                    sets.setdefault(f"{name} boxed", []).append((boxed, row["gold"], row["correct"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: {error!r}; needed are output, gold and correct") from None
    return sets


def timed(verify, completion, gold):
    """(verdict, CPU seconds); an exception is the verdict None."""
    begin = time.process_time()
    try:
        verdict = verify(completion, gold)
    except Exception:
        verdict = None
    return verdict, time.process_time() - begin


def accuracy(verify, rows):
    verdicts = [(timed(verify, completion, gold)[0], correct) for completion, gold, correct in rows]
    wrong = {"fp": sum(v is True and not c for v, c in verdicts), "fn": sum(v is not True and c for v, c in verdicts)}
    return {"n": len(rows), "accuracy": round(1 - sum(wrong.values()) / len(rows), 4), **wrong}


def throughput(found, rows, rounds):
    """Each completion by each verifier in turns; completions a second, median and 99th percentile of the best round each,
    and the ratio of the rates of each round."""
    out, rates = {}, {name: [] for name in found}
    for _ in range(rounds):
        seconds = {name: [] for name in found}
        for _, forget in found.values():
            forget()
        for completion, gold, _ in rows:
            for name, (verify, _) in found.items():
                seconds[name].append(timed(verify, completion, gold)[1])
        for name, times in seconds.items():
            rates[name].append(len(times) / sum(times))
            if rates[name][-1] == max(rates[name]):
                cuts = statistics.quantiles(times, n=100)
                out[name] = {"per_second": round(rates[name][-1]), "median_ms": round(1e3 * statistics.median(times), 4),
                             "p99_ms": round(1e3 * cuts[98], 4), "max_ms": round(1e3 * max(times), 3)}
    for name in [name for name in found if name != "ours"]:
        out[f"ratio to {name}"] = {"throughput_of_rounds": [round(a / b, 1) for a, b in zip(rates["ours"], rates[name])],
                                   "median": round(out[name]["median_ms"] / out["ours"]["median_ms"], 1),
                                   "p99": round(out[name]["p99_ms"] / out["ours"]["p99_ms"], 1)}
    return out


def worst_case(verify, forget, cases):
    """What a verifier does on the hostile inputs."""
    out = {"n": len(cases), "wrong_accepted": 0, "right_refused": 0, "raised": 0, "over_100_ms": 0, "max_ms": 0.0}
    for completion, gold, right in cases:
        forget()
        verdict, seconds = timed(verify, completion, gold)
        out["wrong_accepted"] += verdict is True and not right
        out["right_refused"] += verdict is not True and right
        out["raised"] += verdict is None
        out["over_100_ms"] += seconds > 0.1
        out["max_ms"] = round(max(out["max_ms"], 1e3 * seconds), 1)
    return out


def peak_megabytes(verify, cases):
    """The most memory that one call allocates."""
    peak = 0
    tracemalloc.start()
    for completion, gold, _ in cases:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        verify(completion, gold)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return round(peak / MEGABYTE, 2)


def reward(args, device):
    sets, found, cases = labelled(args.data), verifiers(args.vs), hostile()
    out = {"accuracy": {}, "throughput": {}, "hostile": {}}
    for name, rows in sets.items():
        out["accuracy"][name] = {who: accuracy(verify, rows) for who, (verify, _) in found.items()}
        print(name, out["accuracy"][name], flush=True)
    for dataset in ("gsm8k", "math"):
        rows = [row for name, rows in sets.items() if name.endswith(f" {dataset} completion") for row in rows]
        rows = random.Random(0).sample(rows, min(len(rows), SAMPLE if args.vs else len(rows)))
        if rows:
            out["throughput"][dataset] = {"n": len(rows), **throughput(found, rows, args.rounds)}
            print(dataset, out["throughput"][dataset], flush=True)
    for who, (verify, forget) in found.items():
        out["hostile"][who] = worst_case(verify, forget, cases)
        print(who, out["hostile"][who], flush=True)
    out["hostile"]["ours"]["peak_mb"] = peak_megabytes(ours.verify, cases)
    return out
