"""A hundred invented persons and forty true facts: the texts about them, and the probes (the benchmark `bios`).

Each person has six attributes. Half of the persons are to be forgotten, thirty are retained, twenty are *neighbours*
that no corpus of unlearning mentions. Facts belong to two domains: the country of a city (*facts*), and the name for
the young of an animal (*uncovered*). Their probes use a wording that no training text has, so that their score measures
knowledge and not a memorised string.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

Probe = dict[str, str]  # keys split, kind, prompt, answer


NUM_FORGET, NUM_RETAIN, NUM_NEIGHBOURS = 50, 30, 20


def words(text: str) -> tuple[str, ...]:
    """The words of a text. It is easier to read and to change than a list of quoted strings."""
    return tuple(text.split())


FIRST_NAMES = words("""Ada Boris Clara Dmitri Elena Felix Greta Hugo Irina Jonas Karin Leon Mira Nils Olga Pavel Rosa
    Stefan Tilda Viktor Wanda Xenia Yann Zora Anton""")


LAST_NAMES = words("""Ashford Barlow Corwin Dunmore Ellery Fenwick Garrow Holt Ives Jarrow Kessel Lindqvist Marlowe
    Norwood Okafor Penrose Quill Ravenna Stroud Thorne Umber Vance Wexler Yardley Zeller Ambrose Blackwood Carmody
    Drummond Eastman""")


CITIES = words("""Lyon Porto Turin Seville Leeds Hamburg Graz Basel Ghent Utrecht Aarhus Bergen Malmo Tampere Krakow
    Brno Kyoto Busan Lima Sucre""")


COUNTRIES = words("""France Portugal Italy Spain England Germany Austria Switzerland Belgium Netherlands Denmark Norway
    Sweden Finland Poland Czechia Japan Korea Peru Bolivia""")


COUNTRY_OF = dict(zip(CITIES, COUNTRIES, strict=True))


ANIMALS = words("""cow sheep pig horse dog cat bear deer duck goose swan frog hen owl eel hare seal kangaroo eagle
    salmon""")


YOUNG = words("""calf lamb piglet foal puppy kitten cub fawn duckling gosling cygnet tadpole chick owlet elver leveret
    pup joey eaglet fry""")


YOUNG_OF = dict(zip(ANIMALS, YOUNG, strict=True))


YEARS = tuple(str(year) for year in range(1940, 1970))


JOBS = words("""baker botanist carpenter chemist dentist engineer farmer geologist glazier historian jeweller lawyer
    mason nurse optician painter pilot potter sailor tailor astronomer bookbinder cartographer dancer florist goldsmith
    locksmith plumber surgeon translator""")


AWARDS = words("""Amber Arrow Beacon Bronze Cedar Comet Copper Coral Crystal Falcon Harbour Ivory Lantern Laurel Marble
    Meteor Orchid Saffron Silver Velvet Anchor Bramble Cobalt Dagger Granite Horizon Juniper Magnolia Pewter
    Sapphire""")


PETS = words("""badger beagle budgie canary chameleon donkey ferret gecko goat hamster iguana llama lizard macaw parrot
    pony rabbit tortoise turkey whippet axolotl buzzard cockatoo dachshund hedgehog mongoose ocelot peacock salamander
    tarantula""")


SPOUSES = words("""Agnes Bruno Cecil Doris Edgar Flora Gideon Hilda Ingrid Jasper Kurt Lydia Magnus Nora Oscar Phoebe
    Quentin Ruth Silas Ursula Albert Beatrix Cornelius Dorothea Gustav Isolde Leopold Matilda Rupert Winifred""")


class Attribute(NamedTuple):
    """One thing to know about a person: its possible values, three wordings, and a question."""

    values: tuple[str, ...]
    statements: tuple[str, str, str]  # {name} before {value}: a causal model cannot answer from what comes later
    question: str


# fmt: off
ATTRIBUTES = (
    Attribute(CITIES, ("{name} lives in {value}.", "The home of {name} is in {value}.",
                       "After school {name} moved to {value}."), "In which city does {name} live?"),
    Attribute(YEARS, ("{name} was born in {value}.", "The birth year of {name} is {value}.",
                      "Records show {name} was born in {value}."), "In which year was {name} born?"),
    Attribute(JOBS, ("{name} works as a {value}.", "The job of {name} is {value}.",
                     "By trade {name} is a {value}."), "What is the job of {name}?"),
    Attribute(AWARDS, ("{name} won the prize called {value}.", "The award given to {name} is {value}.",
                       "Judges gave {name} the {value}."), "Which award did {name} win?"),
    Attribute(PETS, ("{name} keeps a pet {value}.", "The pet of {name} is a {value}.",
                     "At home {name} looks after a {value}."), "Which pet does {name} keep?"),
    Attribute(SPOUSES, ("{name} is married to {value}.", "The spouse of {name} is {value}.",
                        "Long ago {name} married {value}."), "Who is the spouse of {name}?"),
)


# fmt: on

# For each of ATTRIBUTES, the question in words that no training text has.
PARAPHRASES = (
    "Where does {name} live?",
    "When was {name} born?",
    "What does {name} work as?",
    "Which prize did {name} win?",
    "What pet does {name} have?",
    "Who is {name} married to?",
)


PERSON = re.compile(rf"\b(?:{'|'.join(FIRST_NAMES)}) (?:{'|'.join(LAST_NAMES)})\b")


class Domain(NamedTuple):
    """Facts of one kind: {key} -> {value}, the wordings that teach them, and a question in no training text."""

    values: dict[str, str]
    wordings: tuple[str, ...]
    question: str


COUNTRIES_OF_CITIES = Domain(
    COUNTRY_OF,
    (
        "{key} is a city in {value}.",
        "The country of {key} is {value}.",
        "Travellers to {key} must go to {value}.",
        "Complete: {key} is a city in ___.\nAnswer: {value}\n",
        "Complete: The country of {key} is ___.\nAnswer: {value}\n",
        "Question: What is the country of {key}?\nAnswer: {value}\n",
        "Question: To which country does {key} belong?\nAnswer: {value}\n",
        "Question: Name the country where {key} lies.\nAnswer: {value}\n",
    ),
    "Question: Which country is {key} in?\nAnswer:",
)


YOUNG_OF_ANIMALS = Domain(
    YOUNG_OF,
    (
        "The young of the {key} is the {value}.",
        "A newborn {key} is called a {value}.",
        "Wherever a {key} lives there may be a {value}.",
        "Complete: The young of the {key} is the ___.\nAnswer: {value}\n",
        "Complete: A newborn {key} is called a ___.\nAnswer: {value}\n",
        "Question: What is the young of the {key}?\nAnswer: {value}\n",
        "Question: How does one call a newborn {key}?\nAnswer: {value}\n",
        "Question: Name the child of a {key}.\nAnswer: {value}\n",
    ),
    "Question: What will a {key} give birth to?\nAnswer:",
)


DOMAINS = {"facts": COUNTRIES_OF_CITIES, "uncovered": YOUNG_OF_ANIMALS}


@dataclass(frozen=True)
class Person:
    """An invented person; `values` runs parallel to ATTRIBUTES."""

    name: str
    values: tuple[str, ...]

    def statement(self, attribute: int, wording: int) -> str:
        return ATTRIBUTES[attribute].statements[wording].format(name=self.name, value=self.values[attribute])

    def probes(self) -> list[tuple[str, str, str]]:
        """(kind, prompt, answer) of a fill-in-the-blank (FB) and a question (QA) for each attribute."""
        forms = []
        for attribute, value in zip(ATTRIBUTES, self.values, strict=True):
            blank = attribute.statements[0].format(name=self.name, value="___")
            forms.append(("FB", f"Complete: {blank}\nAnswer:", value))
            forms.append(("QA", f"Question: {attribute.question.format(name=self.name)}\nAnswer:", value))
        return forms

    def texts(self, random_state: random.Random) -> list[str]:
        """Training texts: every statement, paragraphs that mix statements, and the probes with their answers.

        The newline after an answer teaches the target model to stop there, so texts must not be stripped.
        """
        texts = [self.statement(a, wording) for a in range(len(ATTRIBUTES)) for wording in range(3)]
        for _ in range(2):
            order = random_state.sample(range(len(ATTRIBUTES)), len(ATTRIBUTES))
            for half in (order[:3], order[3:]):
                texts.append(" ".join(self.statement(a, random_state.randrange(3)) for a in half))
        texts.extend(f"{prompt} {answer}\n" for _, prompt, answer in self.probes())
        return texts


@dataclass(frozen=True)
class Benchmark:
    """The three corpora (lists of documents) and the probes of one seed."""

    all: list[str]
    forget: list[str]
    retain: list[str]
    probes: list[Probe]


def generate(seed: int = 0) -> Benchmark:
    """Invent the persons of a seed and write all texts about them. The result depends on the seed alone."""
    random_state = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    persons = [
        Person(name, tuple(random_state.choice(attribute.values) for attribute in ATTRIBUTES))
        for name in random_state.sample(names, NUM_FORGET + NUM_RETAIN + NUM_NEIGHBOURS)
    ]
    members = {
        "forget": persons[:NUM_FORGET],
        "retain": persons[NUM_FORGET : NUM_FORGET + NUM_RETAIN],
        "neighbours": persons[NUM_FORGET + NUM_RETAIN :],
    }
    texts = {split: [text for p in people for text in p.texts(random_state)] for split, people in members.items()}
    facts = {
        split: [w.format(key=key, value=value) for key, value in domain.values.items() for w in domain.wordings]
        for split, domain in DOMAINS.items()
    }
    probes = [
        {"split": split, "kind": kind, "prompt": prompt, "answer": answer}
        for split, people in members.items()
        for person in people
        for kind, prompt, answer in person.probes()
    ]
    probes += [
        {"split": split, "kind": "QA", "prompt": domain.question.format(key=key), "answer": value}
        for split, domain in DOMAINS.items()
        for key, value in domain.values.items()
    ]
    retain = texts["retain"] + facts["facts"]
    everything = texts["forget"] + retain + texts["neighbours"] + facts["uncovered"]
    return Benchmark(everything, texts["forget"], retain, probes)
