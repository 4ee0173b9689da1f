"""Family: how two people are related, told by a chain of relations between others.

    Cid's father is Gus. Ben is the brother of Cid. Ana is Ben's mother. What is Ana to Gus?

The level is the number of links, which is the number of sentences. At every level, so that a level
means one thing, their order is random, and nearly half of those behind the first link tell it from
the other end ("Gus is the father of Cid" instead of "Cid is the son of Gus"). All people differ.
The answer is one of the 21 words of KINDS, drawn first, uniformly. Then a chain is drawn for it
backward through the table of compositions: which two relations can have led to this one?

The worked solution takes one composition a line, from the person asked about to the other one, so a
line follows from the line above it and one sentence:

    Ana mother of Ben, Ben brother of Cid: Ana mother of Cid
    Ana mother of Cid, Gus father of Cid: Ana wife of Gus

The answer is unique because TABLE has only compositions that mean one relation in every family that
these assumptions allow: marriages join a man and a woman, nobody marries twice or has children
with somebody else, so there are no half-siblings, and nobody marries a relative, by blood or
marriage. Some call a parent's sister alone an aunt, others an uncle's wife too. Only entries that
hold for both usages are there: in the wide one the mother of an aunt need not be a grandmother, and
in the narrow one the wife of an uncle is no aunt. `families` looks at every family that a chain can
mean. It proves the answers in the tests, and here it rejects the chains that no family has, such as
three different parents of one person.

The sex of the first person, and so the word of the answer, is told by the first link. Names agree
with the sexes. Levels 2 to 4 have only 218, 1,574 and 10,152 chains that some family has, so one
answer can be two to three times as frequent as another in their held-out tenth. Left out:
sisters-in-law, because the word has two meanings, great-grandparents, and sentences that are not
needed.
Needs common.py.
"""
import functools
import re
from dataclasses import dataclass

from puzzles.common import NAMES, final_answer, puzzle

WOMEN = ("Ana", "Dora", "Eva", "Hana", "Kim", "Mia", "Nora", "Pia", "Ruth", "Zoe")
MEN = tuple(name for name in NAMES if name not in WOMEN)
WORDINGS = ("{a} is the {word} of {b}.", "{a} is {b}'s {word}.", "{b}'s {word} is {a}.")
QUESTIONS = ("What is {a} to {b}?", "How is {a} related to {b}?", "What relation is {a} to {b}?")
TRIES = 20          # divisions of a link that are tried before a chain is given up

# ------------------------------------------------------------------------------------ relations

# kind: the words for a woman and for a man
KINDS = {
    "parent": ("mother", "father"), "child": ("daughter", "son"), "sibling": ("sister", "brother"),
    "spouse": ("wife", "husband"), "grandparent": ("grandmother", "grandfather"),
    "grandchild": ("granddaughter", "grandson"), "aunt": ("aunt", "uncle"),
    "niece": ("niece", "nephew"), "cousin": ("cousin", "cousin"),
    "parent-in-law": ("mother-in-law", "father-in-law"),
    "child-in-law": ("daughter-in-law", "son-in-law"),
}
KIND = {word: kind for kind, words in KINDS.items() for word in words}
CONVERSE = {"parent": "child", "grandparent": "grandchild", "aunt": "niece",
            "parent-in-law": "child-in-law", "sibling": "sibling", "spouse": "spouse",
            "cousin": "cousin"}
CONVERSE |= {there: here for here, there in CONVERSE.items()}

# A chain is a tuple of links. The link (word, ">") says that somebody is the word of the next
# person of the chain, (word, "<") that the next person is the word of somebody.
LINKS = tuple((word, direction) for word in KIND for direction in "><")

# If A is the first of B and B is the second of C, then A is TABLE[first][second] of C.
TABLE = {
    "parent": {"parent": "grandparent", "child": "spouse", "sibling": "parent",
               "spouse": "parent-in-law"},
    "child": {"parent": "sibling", "child": "grandchild", "sibling": "niece", "spouse": "child",
              "aunt": "cousin", "child-in-law": "grandchild"},
    "sibling": {"parent": "aunt", "child": "child", "sibling": "sibling",
                "grandchild": "grandchild", "niece": "niece", "cousin": "cousin"},
    "spouse": {"parent": "parent", "child": "child-in-law", "grandparent": "grandparent",
               "parent-in-law": "parent-in-law", "child-in-law": "child"},
    "grandparent": {"sibling": "grandparent"},
    "grandchild": {"spouse": "grandchild"},
    "aunt": {"sibling": "aunt"},
    "niece": {"parent": "cousin"},
    "cousin": {"sibling": "cousin"},
    "parent-in-law": {"parent": "grandparent", "spouse": "parent", "child-in-law": "spouse"},
    "child-in-law": {"spouse": "child-in-law"},
}


def sex_of(word):
    """Returns the sex that a relation tells of its bearer: "f", "m", or "" for a cousin."""
    woman, man = KINDS[KIND[word]]
    if woman == man:
        return ""
    return "f" if word == woman else "m"


def kind_of(link):
    """Returns the kind of relation that a person has to the next one of the chain."""
    word, direction = link
    return KIND[word] if direction == ">" else CONVERSE[KIND[word]]


def compose(relation, link):
    """Returns the relation of A to C if A has a relation to B, and a link leads from B to C.

    Returns None where it has no name or more than one."""
    kind = TABLE[KIND[relation]].get(kind_of(link))
    # A is B's wife, so B is a man: the link must not call B a daughter
    of_spouse = KIND[relation] == "spouse" and link[1] == ">"
    if kind is None or of_spouse and sex_of(relation) == sex_of(link[0]):
        return None
    woman, man = KINDS[kind]
    return man if sex_of(relation) == "m" else woman


def prefixes(chain):
    """Returns the relations of the first person to each later one, or None if one has no name."""
    relations = [chain[0][0]]
    for link in chain[1:]:
        relations.append(compose(relations[-1], link))
        if relations[-1] is None:
            return None
    return relations


# ------------------------------------------------------------------------------------- families

# The steps that lead from somebody to the people whose parent, child, ... he or she is. So the step
# "child" goes up, from a child to its parents.
PATHS = {
    "parent": (("parent",),), "child": (("child",),), "sibling": (("sibling",),),
    "spouse": (("spouse",),), "grandparent": (("parent", "parent"),),
    "grandchild": (("child", "child"),), "cousin": (("child", "sibling", "parent"),),
    "aunt": (("sibling", "parent"), ("spouse", "sibling", "parent")),
    "niece": (("child", "sibling"), ("child", "sibling", "spouse")),
    "parent-in-law": (("parent", "spouse"),), "child-in-law": (("spouse", "child"),),
}


@dataclass
class Family:
    """People 0, 1, ... who are all related: lists of their sexes, spouses and parents."""
    sexes: list         # "f" or "m"
    spouses: list       # a person, or None where nobody is known
    parents: list       # two people, the smaller number first, or None

    def with_person(self, sex, spouse=None, parents=None):
        """Returns a family with one more person, the last."""
        spouses = [*self.spouses, spouse]
        if spouse is not None:
            spouses[spouse] = len(self.sexes)
        return Family([*self.sexes, sex], spouses, [*self.parents, parents])

    def completed(self, person, step):
        """Returns a family in which a person has the spouse or the parents that a step needs."""
        new = len(self.sexes)
        if step in ("child", "sibling") and self.parents[person] is None:
            family = self.with_person("f").with_person("m", spouse=new)
            family.parents[person] = (new, new + 1)
            return family
        if step in ("parent", "spouse") and self.spouses[person] is None:
            return self.with_person("m" if self.sexes[person] == "f" else "f", spouse=person)
        return self

    def whose(self, person, step):
        """Returns the people of the family whose parent, child, sibling or spouse a person is."""
        parents = self.parents[person]
        if step == "child":
            return parents or ()
        if step == "spouse":
            return () if self.spouses[person] is None else (self.spouses[person],)
        if step == "parent":
            return [child for child, couple in enumerate(self.parents)
                    if couple and person in couple]
        return [other for other, couple in enumerate(self.parents)
                if couple and couple == parents and other != person]

    def moves(self, person, step, sexes):
        """Yield (family, other) for all whose parent, child, sibling or spouse a person can be.

        Those of the family come first, then a new child or sibling of each of `sexes`."""
        family = self.completed(person, step)
        for other in family.whose(person, step):
            yield family, other

        if step in ("parent", "sibling"):
            couple = family.parents[person]
            if step == "parent":
                couple = tuple(sorted((person, family.spouses[person])))
            for sex in sexes:
                yield family.with_person(sex, parents=couple), len(family.sexes)


def families(chain, sexes="fm"):
    """Yield (family, people) for all families that a chain can mean, without people it passes by.

    people[i] is the i-th person of the chain. sexes is the order in which unknown ones are tried.
    A link leads to people who are in the family already, or to new ones."""
    for sex in sexes:
        yield from _continued(Family([sex], [None], [None]), (0,), chain, sexes)


def _continued(family, people, chain, sexes):
    """Yield (family, people) for all ways in which the chain goes on from the last of `people`."""
    if not chain:
        yield family, people
        return

    link, *rest = chain
    word, direction = link
    if direction == ">" and not is_called(family, people[-1], word):
        return
    for path in PATHS[kind_of(link)]:
        for larger, person in _walks(family, people[-1], path, sexes):
            is_right = direction == ">" or is_called(larger, person, word)
            if is_right and person not in people:
                yield from _continued(larger, (*people, person), rest, sexes)


def is_called(family, person, word):
    """Tell whether somebody of a person's sex is called by this word."""
    return sex_of(word) in ("", family.sexes[person])


def _walks(family, person, path, sexes):
    """Yield (family, person at the end) for all ways to walk the steps of a path."""
    if not path:
        yield family, person
        return
    for larger, other in family.moves(person, path[0], sexes):
        yield from _walks(larger, other, path[1:], sexes)


def solutions(chain):
    """Returns all relations that the first person can have to the last, None for a nameless one.

    Looks at every family that the chain can mean."""
    found = set()
    for family, people in families(chain):
        found |= named(family, people[0], people[-1]) or {None}
    return sorted(found, key=str)


def named(family, person, other):
    """Returns the set of the relations that a person has to the other one in a family."""
    found = set()
    for kind, paths in PATHS.items():
        for path in paths:
            reached = [person]
            for step in path:
                reached = [end for start in reached for end in family.whose(start, step)]
            if other in reached:
                found.add(KINDS[kind][family.sexes[person] == "m"])
    return found


# -------------------------------------------------------------------------------------- puzzles

@functools.cache
def count_chains(level):
    """Returns {relation: how many chains of `level` links mean it by the table}."""
    if level == 1:
        return dict.fromkeys(KIND, 1)
    return {relation: sum(ways) for relation, (_, ways) in origins(level).items()}


@functools.cache
def origins(level):
    """Returns {relation: ([(relation of all links but the last, last link)], [number of chains])}.

    The keys are the relations that a chain of `level` links, 2 or more, can mean."""
    found = {}
    for before, ways in count_chains(level - 1).items():
        for link in LINKS:
            relation = compose(before, link)
            if relation is None:
                continue

            pairs, counts = found.setdefault(relation, ([], []))
            pairs.append((before, link))
            counts.append(ways)
    return found


def draw(rng, level):
    """Returns a chain of `level` links that some family has."""
    answer = rng.choice(list(origins(level)))
    chain = None
    while chain is None:
        chain = draw_chain(rng, level, answer)
    return chain


def draw_chain(rng, level, answer):
    """Returns a chain that means `answer`, or None where the choices on the way lead to none.

    The first link, at first the answer alone, is replaced by two that compose to it, until there
    are `level`. It always tells the first sex."""
    chain = ((answer, ">"),)
    for length in range(level, 1, -1):
        relation = chain[0][0]
        divisions = rng.choices(*origins(length)[relation], k=TRIES)
        longer = [((before, ">"), link, *chain[1:]) for before, link in divisions]

        chain = next(filter(is_possible, longer), None)
        if chain is None:
            return None
    return chain


def is_possible(chain):
    """Tell whether there is a family with such a chain of different people."""
    return next(families(chain), None) is not None


def write(rng, chain):
    """Returns a problem of this chain; names, wordings and the order are drawn at random."""
    family, people = next(families(chain, rng.choice(("fm", "mf"))))
    fresh = {"f": iter(rng.sample(WOMEN, len(WOMEN))), "m": iter(rng.sample(MEN, len(MEN)))}
    names = [next(fresh[family.sexes[person]]) for person in people]

    stated = []         # who is what of whom
    for (word, direction), here, there in zip(chain, names, names[1:]):
        stated.append((here, word, there) if direction == ">" else (there, word, here))
    sentences = [rng.choice(WORDINGS).format(a=a, word=word, b=b) for a, word, b in stated]
    rng.shuffle(sentences)
    question = rng.choice(QUESTIONS).format(a=names[0], b=names[-1])

    # the relation to the third person, to the fourth, ...
    relations = prefixes(chain)
    lines = []
    for i in range(1, len(chain)):
        a, word, b = stated[i]
        lines.append(f"{names[0]} {relations[i - 1]} of {names[i]}, {a} {word} of {b}: "
                     f"{names[0]} {relations[i]} of {names[i + 1]}")
    answer = relations[-1]
    return {"problem": " ".join([*sentences, question, "Answer with one word."]), "answer": answer,
            "solution": "\n".join([*lines, f"#### {answer}"])}


def check(problem, completion):
    """Tell whether the final answer of a completion is the right relation and no other word.

    "mother", "The mother of Cid.", "Cid's mother" and "Ana is the mother of Cid" are the same if
    these are the two people asked about. Case and hyphens do not matter."""
    answer = final_answer(completion).strip(" \n.\"'").replace("\u2019", "'")
    *_, person, other = re.findall("|".join(NAMES), problem["problem"])

    pattern = (rf"(?:{person} is )?(?:(?:the|an?|{other}'s) )?([a-z]+(?:[- ]in[- ]law)?)"
               rf"(?: (?:of|to) {other})?")
    said = re.fullmatch(pattern, answer, re.I)
    return said is not None and said[1].lower().replace(" ", "-") == problem["answer"]


def perturb(rng, chain):
    """Yield the chains with one link replaced whose answer is another one."""
    answer = prefixes(chain)[-1]
    places = [(place, word) for place in range(len(chain)) for word in KIND]
    for place, word in rng.sample(places, len(places)):
        other = (*chain[:place], (word, chain[place][1]), *chain[place + 1:])
        relations = prefixes(other)
        if relations and relations[-1] != answer and is_possible(other):
            yield other


# links that say the same: Ana is Ben's wife, Ben is Ana's husband
SAME = {("wife", "<"): ("husband", ">"), ("husband", "<"): ("wife", ">"),
        ("cousin", "<"): ("cousin", ">")}


def shape(chain):
    """Returns the chain with one way to say each link, for which one is chosen is but wording."""
    # with this word the held-out puzzles of levels 2 and 3 are the least unbalanced
    return "links", tuple(SAME.get(link, link) for link in chain)


def guess(level):
    """Returns the accuracy of guessing among the relations that occur at a level."""
    return 1 / len(origins(level))


TASK = puzzle("family", draw, write, check=check, perturb=perturb, shape=shape, guess=guess,
              least=2, most=8, levels=(2, 4), level_is="links")
