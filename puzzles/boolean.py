"""Boolean: the truth value of a formula in words.

    True or false? (true and (not false)) implies (false or false)

The level is the number of operators: not, and, or, implies. Every operand that has an operator of
its own is in brackets, so no rule of precedence is needed. There is exactly one answer because a
formula has exactly one value. "A implies B" is false if A is true and B is false, else true.

The value is drawn first and formulas are drawn until one has it, so half of the answers are true at
every level. The shape of a formula is random: "not" is as frequent as each of the other operators,
and the operators below are divided uniformly between the left and the right side.

The worked solution writes the whole formula that is left, after each reduction of the leftmost
bracket without inner brackets:

    (true and true) implies (false or false)
    true implies (false or false)
    true implies false
    false

So a line follows from the line above it alone, by one entry of a truth table, and it is one
operator shorter. Writing only "true and true = true" needs a third of the tokens at level 12, but
then a reader has to remember which bracket each value belongs to. At the usual levels, 2 to 4, the
whole formulas take less than 40 tokens.

Left out: variables, and "if A then B" or "either A or B", whose everyday meanings differ.
Needs common.py.
"""
from puzzles.common import final_answer, puzzle

# A formula is "true", "false", ("not", formula) or (operator, formula, formula).
CONSTANTS = ("false", "true")
BINARY = ("and", "or", "implies")
WORDINGS = (
    "True or false? {formula}", "Is this formula true or false? {formula}",
    "What is the truth value, true or false, of this formula? {formula}")


def draw(rng, level):
    """Returns a random formula of `level` operators that is true with probability 1/2."""
    value = rng.choice(CONSTANTS)
    formula = draw_formula(rng, level)
    while evaluate(formula) != value:
        formula = draw_formula(rng, level)
    return formula


def draw_formula(rng, operators):
    """Returns a formula of so many operators; its shape, operators and constants are random."""
    if operators == 0:
        return rng.choice(CONSTANTS)
    operator = rng.choice(("not", *BINARY))
    if operator == "not":
        return ("not", draw_formula(rng, operators - 1))

    left = rng.randrange(operators)         # this one is not below itself
    return (operator, draw_formula(rng, left), draw_formula(rng, operators - 1 - left))


def evaluate(formula):
    """Returns the value of a formula, "true" or "false"."""
    if formula in CONSTANTS:
        return formula
    operator, *operands = formula
    values = [evaluate(operand) == "true" for operand in operands]

    if operator == "not":
        value = not values[0]
    elif operator == "and":
        value = all(values)
    elif operator == "or":
        value = any(values)
    else:
        value = values[1] or not values[0]
    return "true" if value else "false"


def solutions(formula):
    """Returns [answer]: evaluating a formula gives exactly one."""
    return [evaluate(formula)]


def in_words(formula):
    """Returns the formula as text, with brackets around operands that are no constants."""
    if formula in CONSTANTS:
        return formula

    operator, *operands = formula
    texts = []
    for operand in operands:
        text = in_words(operand)
        texts.append(text if operand in CONSTANTS else f"({text})")
    if operator == "not":
        return f"not {texts[0]}"
    return f"{texts[0]} {operator} {texts[1]}"


def reduced(formula):
    """Returns the formula with its leftmost innermost operation replaced by the value."""
    operator, *operands = formula
    for place, operand in enumerate(operands):
        if operand not in CONSTANTS:
            operands[place] = reduced(operand)
            return (operator, *operands)
    return evaluate(formula)


def write(rng, formula):
    """Returns a problem of this formula in words that are drawn at random."""
    problem = rng.choice(WORDINGS).format(formula=in_words(formula))
    [answer] = solutions(formula)

    lines = []
    while formula not in CONSTANTS:
        formula = reduced(formula)
        lines.append(in_words(formula))
    return {"problem": problem, "answer": answer,
            "solution": "\n".join([*lines, f"#### {answer}"])}


def check(problem, completion):
    """Tell whether the final answer of a completion is the one word true or false that is right.

    Case, a full stop, and quotation marks do not matter."""
    word = final_answer(completion).strip(" \n.\"'").lower()
    return word in CONSTANTS and word == problem["answer"]


def perturb(rng, formula):
    """Yield the formulas with one constant or operator changed whose value is another one.

    One formula in ten, such as "true or true", has none."""
    changed = [other for other in neighbours(formula) if evaluate(other) != evaluate(formula)]
    yield from rng.sample(changed, len(changed))


def neighbours(formula):
    """Yield every formula in which one constant or one binary operator is another one."""
    if formula in CONSTANTS:
        yield "false" if formula == "true" else "true"
        return

    operator, *operands = formula
    if operator != "not":
        for other in BINARY:
            if other != operator:
                yield (other, *operands)
    for place, operand in enumerate(operands):
        for other in neighbours(operand):
            yield (operator, *operands[:place], other, *operands[place + 1:])


def guess(level):
    """Returns the accuracy of guessing, which is the same at every level."""
    return 0.5


TASK = puzzle("boolean", draw, write, check=check, perturb=perturb, guess=guess,
              least=1, most=12, levels=(2, 4), level_is="operators")
