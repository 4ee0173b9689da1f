"""puzzles/family.py against random family trees, whose relations are read off the graph."""
import functools
import itertools
import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzles import family
from puzzles.common import held_out
from puzzles.family import (KIND, KINDS, LINKS, MEN, TASK, WOMEN, check, compose, draw, families, guess, origins,
                            perturb, prefixes, solutions, write)

LEVELS = range(TASK.least, TASK.most + 1)
BLOOD, ANY = False, True        # is an uncle's wife an aunt? both readings are looked at
SENTENCES = (r"(\w+) is the ([\w-]+) of (\w+)\.", r"(\w+) is (?P<b>\w+)'s ([\w-]+)\.", r"(?P<b>\w+)'s ([\w-]+) is (\w+)\.")


# -------------------------------------------------------------------------------- random families

def random_family(rng):
    """(sexes, {child: (parent, parent)}, {person: spouse}) of three to four generations.

    Most spouses bring parents and siblings of their own; there is no remarriage, and no marriage of relatives."""
    sexes, parents, spouses = [], {}, {}

    def person(sex=None, couple=None):
        sexes.append(sex or rng.choice("fm"))
        if couple:
            parents[len(sexes) - 1] = couple
        return len(sexes) - 1

    def marry(one):
        other = person("m" if sexes[one] == "f" else "f")
        spouses[one], spouses[other] = other, one
        return other

    first = person()
    couples = [(first, marry(first))]
    for generation in range(3):
        following = []
        for couple in couples:
            for _ in range(rng.randint(0 if generation else 2, 3)):
                child = person(couple=couple)
                if rng.random() < 0.8:
                    spouse = marry(child)
                    following.append((child, spouse))
                    if rng.random() < 0.6:
                        mother = person("f")
                        parents[spouse] = (mother, marry(mother))
                        for _ in range(rng.randint(0, 2)):
                            sibling = person(couple=parents[spouse])
                            if rng.random() < 0.5:
                                following.append((sibling, marry(sibling)))
        couples = following
    return sexes, parents, spouses


def relations(tree, reading):
    """{(a, b): the set of words for what a is to b}, by the definitions of the words."""
    sexes, parents, spouses = tree
    found = defaultdict(set)

    def of(people, step):
        return [other for one in people for other in step(one)]

    def parents_of(one):
        return parents.get(one, ())

    def children_of(one):
        return [child for child, couple in parents.items() if one in couple]

    def siblings_of(one):
        return [other for other, couple in parents.items()
                if one in parents and other != one and set(couple) == set(parents[one])]

    def spouse_of(one):
        return [spouses[one]] if one in spouses else []

    for b in range(len(sexes)):
        mine = {"parent": parents_of(b), "child": children_of(b), "sibling": siblings_of(b), "spouse": spouse_of(b)}
        mine["grandparent"] = of(mine["parent"], parents_of)
        mine["grandchild"] = of(mine["child"], children_of)
        mine["aunt"] = of(mine["parent"], siblings_of)
        mine["niece"] = of(mine["sibling"], children_of)
        mine["cousin"] = of(mine["aunt"], children_of)
        mine["parent-in-law"] = of(mine["spouse"], parents_of)
        mine["child-in-law"] = of(mine["child"], spouse_of)
        if reading == ANY:
            mine["aunt"] = mine["aunt"] + of(mine["aunt"], spouse_of)
            mine["niece"] = mine["niece"] + of(of(mine["spouse"], siblings_of), children_of)
        for kind, people in mine.items():
            for a in people:
                found[a, b].add(KINDS[kind][sexes[a] == "m"])
    return found


@functools.cache
def seen():
    """({reading: {(word of a to b, second): words of a to c}}, {word: words of the other direction}).

    second is the word of b to c, or the link (word, direction) that says it from either end."""
    composed, converse = {BLOOD: defaultdict(set), ANY: defaultdict(set)}, defaultdict(set)
    for seed in range(24):
        tree = random_family(random.Random(seed))
        for reading in (BLOOD, ANY):
            words = {pair: found.copy().pop() for pair, found in relations(tree, reading).items() if len(found) == 1}
            assert len(words) == len(relations(tree, reading))      # nobody is two things to somebody
            others = defaultdict(list)
            for (a, b), word in words.items():
                others[a].append((b, word))
                converse[word].add(words[b, a])
            for a, near in others.items():
                for b, first in near:
                    for c, second in others[b]:
                        if c != a:
                            for link in (second, (second, ">"), (words[c, b], "<")):
                                composed[reading][first, link].add(words.get((a, c)))
    return composed, converse


def test_the_table_is_what_the_families_say():
    composed, _ = seen()
    entries, impossible = 0, []
    for first, link in itertools.product(KIND, LINKS):
        blood, every = (composed[reading][first, link] for reading in (BLOOD, ANY))
        entry = compose(first, link)
        if entry and blood | every:
            entries += 1
            assert blood == every == {entry}, (first, link)
        elif entry:
            impossible.append((first, link))
        else:       # impossible, or in one reading at least nameless or of several names
            assert not blood | every or len(blood) > 1 or len(every) > 1 or None in blood | every, (first, link)
    assert entries == 218       # two mothers of one person are no chain, and so are never drawn
    assert impossible == [(word, (word, "<")) for word in ("mother", "father", "mother-in-law", "father-in-law")]
    assert not any(family.is_possible(((first, ">"), link)) for first, link in impossible)


def test_what_differs_between_the_readings_is_left_out():
    composed, _ = seen()
    assert composed[BLOOD]["mother", "aunt"] == {"grandmother"} and None in composed[ANY]["mother", "aunt"]
    assert composed[ANY]["wife", "uncle"] == {"aunt"} and composed[BLOOD]["wife", "uncle"] == {None}
    assert compose("mother", ("aunt", ">")) is compose("wife", ("uncle", ">")) is None


# ---------------------------------------------------------------------------- the second solver

def read(text):
    """([(a, word, b)], x, z): the statements and the people asked about."""
    *sentences, question, _ = re.findall(r"[^.?]+[.?]", text)
    stated = []
    for sentence in sentences:
        sentence = sentence.strip()
        of, is_, has = (re.fullmatch(pattern, sentence) for pattern in SENTENCES)
        if of:
            stated.append(of.groups())
        elif is_:
            a, b, word = is_.groups()
            stated.append((a, word, b))
        else:
            b, word, a = has.groups()
            stated.append((a, word, b))
    x, z = re.findall(r"[A-Z]\w+", question.strip()[1:])
    return stated, x, z


def answers_of(text):
    """All words that can be right: sets of relations between all people of the chain, composed in every order.

    None in a set is a relation without a name; nothing is concluded from it."""
    composed, converse = seen()
    stated, x, z = read(text)
    order, left = [x], list(stated)
    between = {}
    while order[-1] != z or left:
        [next_] = [statement for statement in left if order[-1] in (statement[0], statement[2])]
        left.remove(next_)
        a, word, b = next_
        between[len(order) - 1, len(order)] = {word} if a == order[-1] else converse[word]
        order.append(b if a == order[-1] else a)

    for length in range(2, len(order)):
        for i in range(len(order) - length):
            possible = {*KIND, None}
            for k in range(i + 1, i + length):
                pairs = set(itertools.product(between[i, k], between[k, i + length]))
                if not any(None in pair for pair in pairs):
                    possible &= set().union(*(composed[reading][pair] for pair in pairs for reading in (BLOOD, ANY)))
            between[i, i + length] = possible
    return between[0, len(order) - 1]


def steps_are_true(problem):
    """Each line composes the line above it with one statement; the families know no other result."""
    composed, converse = seen()
    stated, x, z = read(problem["problem"])
    *lines, last = problem["solution"].split("\n")
    assert last == "#### " + problem["answer"] and len(lines) == len(stated) - 1

    known, used = None, set()
    for line in lines:
        a, first, b, c, word, d, e, result, f = re.fullmatch(
            r"(\w+) ([\w-]+) of (\w+), (\w+) ([\w-]+) of (\w+): (\w+) ([\w-]+) of (\w+)", line).groups()
        assert (a, first, b) == known if known else (a, first, b) in stated
        assert a == e == x and (c, word, d) in stated and {b, f} == {c, d}
        seconds = [word] if c == b else converse[word]
        results = set().union(*(composed[reading][first, second] for second in seconds for reading in (BLOOD, ANY)))
        assert results == {result}
        used |= {(c, word, d)} | (set() if known else {(a, first, b)})
        known = (a, result, f)
    assert known == (x, problem["answer"], z) and used == set(stated)


def has_a_family(chain, answer, count=3):
    """Families of the chain exist: all are different people, and the graph says what the chain says."""
    for tree, people in itertools.islice(families(chain), count):
        parents = {child: couple for child, couple in enumerate(tree.parents) if couple}
        spouses = {one: other for one, other in enumerate(tree.spouses) if other is not None}
        assert len(set(people)) == len(chain) + 1
        assert all(spouses[other] == one and tree.sexes[one] != tree.sexes[other] for one, other in spouses.items())
        assert all(spouses[one] == other for one, other in parents.values())
        words = relations((tree.sexes, parents, spouses), ANY)
        for (word, direction), here, there in zip(chain, people, people[1:]):
            assert word in words[(here, there) if direction == ">" else (there, here)]
        assert words[people[0], people[-1]] == {answer}
        count = 0
    return count == 0


def proved(problem):
    chain, answer = problem["structure"], problem["answer"]
    assert answers_of(problem["problem"]) == {answer} and has_a_family(chain, answer, 1)
    steps_are_true(problem)
    assert check(problem, problem["solution"])
    assert [word for word in dict.fromkeys(KIND) if check(problem, f"#### {word}")] == [answer]


def some(level, count, seed=0):
    rng = random.Random(f"{level}/{seed}")
    return [write(rng, chain) | {"structure": chain} for chain in (draw(rng, level) for _ in range(count))]


# --------------------------------------------------------------------------------------- puzzles

@pytest.mark.parametrize("level", LEVELS)
def test_one_answer_true_steps_and_a_family(level):
    for problem in some(level, 40):
        assert len(read(problem["problem"])[0]) == level == len(problem["structure"])
        proved(problem)
        assert solutions(problem["structure"]) == [problem["answer"]]


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_ten_thousand_of_every_level(level):
    problems = some(level, 10_000, seed=1)
    for problem in problems:
        proved(problem)
        assert solutions(problem["structure"]) == [problem["answer"]]
    counts = Counter(problem["answer"] for problem in problems)
    assert len(counts) == 21 and max(counts.values()) < 1.25 / 21 * 10_000


def test_stories_by_hand():
    chain = (("mother", ">"), ("brother", ">"), ("father", "<"))
    assert prefixes(chain) == ["mother", "mother", "wife"] and solutions(chain) == ["wife"]
    problem = {"problem": "Cid's father is Gus. Ben is the brother of Cid. Ana is Ben's mother. What is Ana to Gus? "
                          "Answer with one word."}
    assert answers_of(problem["problem"]) == {"wife"}
    assert prefixes((("son", ">"), ("sister", ">"), ("son", "<"))) == ["son", "nephew", "cousin"]
    assert prefixes((("son", ">"), ("sister", ">"), ("daughter", ">"))) is None     # a son of hers or of a brother
    assert prefixes((("daughter", ">"), ("sister", ">"), ("mother", "<"))) is None
    assert prefixes((("daughter", ">"), ("uncle", ">"))) == ["daughter", "cousin"]
    assert prefixes((("wife", ">"), ("son", ">"))) == ["wife", "daughter-in-law"]
    assert prefixes((("wife", ">"), ("daughter", ">"))) is None                     # a wife of a woman


def test_chains_that_no_family_has():
    """The mother, the father, and then a wife of the father who is somebody else.

    The sex of the third person is not told, so there are two families of the first three links."""
    parents = (("mother", ">"), ("brother", ">"), ("father", "<"))
    assert len(list(families(parents))) == 2
    assert list(families((*parents, ("husband", ">")))) == []
    assert list(families((*parents, ("father", ">"), ("mother", "<")))) == []
    assert list(families((*parents, ("father", ">"), ("sister", "<")))) != []


def test_how_many_chains_some_family_has():
    for level, count in ((2, 218), (3, 1574)):
        chains = [chain for chain in itertools.product(LINKS, repeat=level) if chain[0][1] == ">" and family.prefixes(chain)]
        assert sum(map(family.is_possible, chains)) == count


def test_several_relations_are_all_found():
    assert solutions((("daughter", ">"), ("grandmother", ">"))) == ["aunt", "mother"]
    assert solutions((("mother", ">"), ("aunt", ">"))) == [None, "grandmother"]
    assert solutions((("cousin", ">"), ("cousin", ">"))) == [None, "brother", "cousin", "sister"]


@pytest.mark.parametrize("level", [2, 3, 4])
def test_answers_are_balanced(level):
    rng = random.Random(level)
    counts = Counter(prefixes(draw(rng, level))[-1] for _ in range(1200))
    assert set(counts) == set(KIND)
    assert max(counts.values()) < 1.5 / 21 * 1200


def test_every_answer_occurs_at_every_level():
    for level in LEVELS:
        assert set(origins(level)) == set(KIND) and guess(level) == 1 / 21


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_of_the_splits_are_balanced(level, split):
    """Levels 2 to 4 have few chains, so that their held-out tenth has an answer up to three times too often."""
    bound = {2: 3.0, 3: 3.0, 4: 2.4}.get(level, 1.5) if split == "test" else 1.5
    counts = Counter(problem["answer"] for problem in TASK.problems(4000, split, 0, (level, level)))
    assert max(counts.values()) < bound / 21 * 4000


def test_names_agree_with_sexes():
    for problem in TASK.problems(200, "train", 0, (2, 8)):
        stated, x, z = read(problem["problem"])
        assert len({name for a, _, b in stated for name in (a, b)}) == problem["level"] + 1
        for a, word, b in stated:
            if word != "cousin":
                assert a in (WOMEN if word == KINDS[KIND[word]][0] else MEN)
            if KIND[word] == "spouse":
                assert (a in WOMEN) != (b in WOMEN)
    assert not set(WOMEN) & set(MEN) and len(WOMEN) > 8 and len(MEN) > 8


def test_the_order_says_nothing_and_the_words_vary():
    first = Counter(x in read(problem["problem"])[0][0] for problem in some(4, 300)
                    for x in [read(problem["problem"])[1]])
    assert 0.15 < first[True] / 300 < 0.35
    assert {word for problem in some(5, 400) for _, word, _ in read(problem["problem"])[0]} == set(KIND)


@pytest.mark.parametrize("levels", [(2, 2), (2, 4), (6, 6)])
def test_splits_share_no_structure_and_repeat(levels):
    train, test = (TASK.problems(20, split, 0, levels) for split in ("train", "test"))
    assert all(held_out(family.shape(problem["structure"])) for problem in test)
    assert not any(held_out(family.shape(problem["structure"])) for problem in train)
    assert train == TASK.problems(20, "train", 0, levels) != TASK.problems(20, "train", 1, levels)


def test_links_that_say_the_same_are_one_puzzle():
    """Ben is Ana's husband, Ana is Ben's wife. But Ben, the brother of Pia, is not all that "Pia is his sister" says."""
    assert family.shape((("mother", ">"), ("wife", "<"))) == family.shape((("mother", ">"), ("husband", ">")))
    assert family.shape((("cousin", "<"),)) == family.shape((("cousin", ">"),))
    for link, other in family.SAME.items():
        assert set(solutions((("mother", ">"), link))) == set(solutions((("mother", ">"), other)))
    assert family.shape((("sister", "<"),)) != family.shape((("brother", ">"),))


@pytest.mark.parametrize("level", LEVELS)
def test_perturbed_problems_have_another_answer(level):
    found = 0
    for problem in TASK.problems(24, "train", 0, (level, level)):
        changed = TASK.perturb(problem, 0)
        if changed is None:
            continue
        found += 1
        assert held_out(family.shape(changed["structure"])) and changed["answer"] != problem["answer"]
        assert sum(a != b for a, b in zip(changed["structure"], problem["structure"], strict=True)) == 1
        proved(changed)
        assert changed == TASK.perturb(problem, 0)
    assert found >= 8
    assert list(perturb(random.Random(0), (("mother", ">"), ("son", ">"))))


# --------------------------------------------------------------------------------------- checker

PROBLEM = {"problem": "Ana is the mother of Ben. Cid is Ben's brother. What is Ana to Cid? Answer with one word.",
           "answer": "mother"}
IN_LAW = {**PROBLEM, "answer": "mother-in-law"}


@pytest.mark.parametrize("said", [
    "#### mother", "#### Mother.", "#### the mother of Cid", "#### Ana is the mother of Cid.", "#### Cid's mother",
    r"\boxed{mother}", r"\boxed{\text{Mother}}", "The answer is: a mother.", "<answer>mother</answer>",
    "Ana aunt of Ben\n#### mother", "Answer: **mother**", "#### ana is cid’s MOTHER"])
def test_ways_to_say_it(said):
    assert check(PROBLEM, said) and not check(IN_LAW, said)


@pytest.mark.parametrize("said", ["#### mother-in-law", "#### Mother in law.", "#### the mother-in-law of Cid"])
def test_in_laws(said):
    assert check(IN_LAW, said) and not check(PROBLEM, said)


@pytest.mark.parametrize("said", [
    "", "mother", "#### mother or aunt", "#### mother, aunt", "#### grandmother", "#### mothers", "#### mother of Ben",
    "#### Cid is the mother of Ana", "#### Ben's mother", "#### not the mother", "The answer is not mother.", "#### m",
    "#### mother mother", r"\boxed{mother} or \boxed{aunt}", "#### mother of", "#### mother\n#### aunt",
    "#### " + "mother " * 900, "#### stepmother", "#### parent", None, 5])
def test_what_is_no_answer(said):
    assert not check(PROBLEM, said)


@given(st.text(alphabet="mothersauncl-inw .'#\\{}\n’é", max_size=60))
def test_text_without_the_word_is_never_accepted(text):
    if "mother" not in text.lower():
        assert not check(PROBLEM, "#### " + text) and not check(PROBLEM, text)


@given(st.lists(st.sampled_from([*KIND, "of", "the", "Ana", "Cid", "Ben", "is", "or", "not", ",", "Cid's"]), max_size=6))
def test_words_in_any_order(words):
    if check(PROBLEM, "#### " + " ".join(words)):
        assert [word for word in words if word in KIND] == ["mother"] and not {"or", "not", ",", "Ben"} & set(words)


# ---------------------------------------------------------------------------------- reasoning-gym

def chains_of(facts, here, there, most=4):
    """Yield the chains of links over facts {(a, b): word} from one person to another, the shortest first."""
    paths = [((), (here,))]
    for _ in range(most):
        longer = []
        for chain, people in paths:
            for (a, b), word in facts.items():
                if a == people[-1] and b not in people:
                    longer.append(((*chain, (word, ">")), (*people, b)))
        paths = longer
        yield from (chain for chain, people in paths if people[-1] == there)


@pytest.mark.slow
def test_reasoning_gym_agrees():
    """Its story says couples and their children; names tell the sexes.

    It has two faults, and differs nowhere else: a child-in-law is called a parent-in-law (its issue 535), and a niece
    or nephew is named by the sex of the aunt or uncle."""
    gym = pytest.importorskip("reasoning_gym")
    data = gym.create_dataset("family_relationships", size=250, seed=1, min_family_size=4, max_family_size=11)
    women = set(data.config.female_names)
    agreed = named = faults = 0

    def word(kind, name):
        return KINDS[kind][name not in women]

    for entry in data:
        facts = {}
        story, question = entry["question"].split("\n\n")
        for a, b, children in re.findall(r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]+)\.)?",
                                         story):
            children = re.findall("[A-Z][a-z]+", children)
            facts |= {(a, b): word("spouse", a), (b, a): word("spouse", b)}
            facts |= {(parent, child): word("parent", parent) for parent in (a, b) for child in children}
            facts |= {(child, parent): word("child", child) for parent in (a, b) for child in children}
            facts |= {(one, other): word("sibling", one) for one in children for other in children if one != other}

        x, z = entry["metadata"]["person1"], entry["metadata"]["person2"]
        relations_found = {found[-1] for chain in chains_of(facts, x, z) if (found := prefixes(chain))}
        assert len(relations_found) <= 1
        if not relations_found:
            continue
        named += 1
        [ours] = relations_found            # all chains that the table knows say the same
        agreed += ours == entry["answer"]
        if ours != entry["answer"]:
            faults += 1
            assert ((KIND[ours], entry["answer"]) == ("niece", word("niece", z))
                    or (KIND[ours], entry["answer"]) == ("child-in-law", word("parent-in-law", z)))
    print(f"reasoning-gym: {named} of {len(data)} in the table, {agreed} agree, {faults} of its two faults")
    assert named > 0.9 * len(data) and agreed + faults == named and agreed > 0.7 * named
