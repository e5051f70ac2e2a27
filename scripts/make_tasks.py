"""Write the three embedded lm-eval tasks: configs/tasks/{grammar,facts,arithmetic}/test.jsonl.

    python scripts/make_tasks.py [OUT_DIR]        (default: configs/tasks beside this script)

Every item comes from a template and a hand-written list of words below, so the right answer is
known by construction and no model was asked anything: an item is never kept or dropped because of
what a model answers. One `random.Random(SEED)` per task draws the fillers and the wrong options;
running this again writes the same bytes. One line per item: `{"query": ..., "choices": [...],
"answer": index of the right choice, "kind": template}`. The place of the right choice is random, so
a model that answers always the same place, or gives every choice the same score, lands on chance.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

SEED = 20261121
Item = dict[str, object]


def item(rng: random.Random, kind: str, query: str, right: str, wrong: Iterable[str]) -> Item:
    """One item with its choices in random order; the wrong ones must differ from the right one and
    from each other.
    """
    choices = [right, *wrong]
    assert len(set(choices)) == len(choices), (kind, query, choices)
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "answer": choices.index(right), "kind": kind}


# --------------------------------------------------------------------------------------------------
# grammar
# fmt: off
# (singular, plural) people and animals that can do anything in VERBS; names with their reflexive
# pronoun.
NOUNS = [
    ("boy", "boys"), ("girl", "girls"), ("teacher", "teachers"), ("doctor", "doctors"),
    ("student", "students"), ("farmer", "farmers"), ("driver", "drivers"), ("child", "children"),
    ("woman", "women"), ("man", "men"),
]
# base, third person, past, participle, -ing, what follows
VERBS = [
    ("eat", "eats", "ate", "eaten", "eating", "an apple"),
    ("write", "writes", "wrote", "written", "writing", "a letter"),
    ("see", "sees", "saw", "seen", "seeing", "the river"),
    ("take", "takes", "took", "taken", "taking", "the train"),
    ("drive", "drives", "drove", "driven", "driving", "to work"),
    ("speak", "speaks", "spoke", "spoken", "speaking", "to us"),
    ("sing", "sings", "sang", "sung", "singing", "a song"),
    ("break", "breaks", "broke", "broken", "breaking", "the window"),
    ("choose", "chooses", "chose", "chosen", "choosing", "a book"),
    ("give", "gives", "gave", "given", "giving", "good advice"),
]
THINGS = [
    ("book", "books"), ("house", "houses"), ("car", "cars"), ("tree", "trees"), ("chair", "chairs"),
    ("picture", "pictures"), ("letter", "letters"), ("shoe", "shoes"), ("flower", "flowers"),
    ("window", "windows"),
]
VOWEL = [
    "apple", "egg", "orange", "old car", "island", "animal", "elephant", "idea", "open door",
    "artist",
]
CONSONANT = [
    "banana", "dog", "lemon", "new car", "river", "table", "tiger", "plan", "closed door",
    "painter",
]
NAMES = [
    ("Mary", "herself", "himself"), ("John", "himself", "herself"), ("Anna", "herself", "himself"),
    ("Peter", "himself", "herself"), ("My mother", "herself", "himself"),
    ("His father", "himself", "herself"), ("The boys", "themselves", "himself"),
    ("Her sister", "herself", "themselves"), ("My brother", "himself", "themselves"),
    ("The women", "themselves", "herself"),
]
ADJECTIVES = [
    ("tall", "taller"), ("old", "older"), ("fast", "faster"), ("small", "smaller"),
    ("strong", "stronger"), ("young", "younger"), ("cheap", "cheaper"), ("short", "shorter"),
    ("rich", "richer"), ("warm", "warmer"),
]
SUBJECTS = [("He", "him"), ("She", "her"), ("They", "them"), ("We", "us"), ("I", "me")]
PLACES = [
    ("in", "the kitchen"), ("at", "the station"), ("on", "the table"), ("under", "the bridge"),
    ("near", "the lake"),
]
# fmt: on


def grammar() -> list[Item]:
    """Minimal pairs, ten for each of 16 phenomena: one acceptable sentence, one that breaks a
    single rule.
    """
    rng, items = random.Random(SEED), []
    for i in range(10):
        (s, p), (base, third, past, part, ing, rest) = NOUNS[i], VERBS[i]
        (thing, things), (who, self, other) = THINGS[i], NAMES[i]
        adj, more = ADJECTIVES[i]
        (prep, place), (subj, obj) = PLACES[i % 5], SUBJECTS[i % 5]
        count = rng.choice(["two", "three", "four", "five", "many"])
        one, two = rng.sample([n[0] for n in NOUNS], 2)
        pairs = [
            (
                "agreement_singular",
                f"The {s} {third} {rest} every day.",
                f"The {s} {base} {rest} every day.",
            ),
            (
                "agreement_plural",
                f"The {p} {base} {rest} every day.",
                f"The {p} {third} {rest} every day.",
            ),
            (
                "agreement_attractor",
                f"The {s} near the {things} is happy.",
                f"The {s} near the {things} are happy.",
            ),
            ("agreement_be", f"The {things} were new.", f"The {things} was new."),
            ("determiner_this", f"This {thing} is very old.", f"These {thing} is very old."),
            (
                "determiner_number",
                f"I saw {count} {things} there.",
                f"I saw {count} {thing} there.",
            ),
            ("article_an", f"This is an {VOWEL[i]}.", f"This is a {VOWEL[i]}."),
            ("article_a", f"This is a {CONSONANT[i]}.", f"This is an {CONSONANT[i]}."),
            ("participle", f"The {s} has {part} {rest}.", f"The {s} has {past} {rest}."),
            ("infinitive", f"The {s} wants to {base} {rest}.", f"The {s} wants to {past} {rest}."),
            ("progressive", f"The {p} are {ing} {rest}.", f"The {p} are {base} {rest}."),
            ("modal", f"The {s} can {base} {rest}.", f"The {s} can {third} {rest}."),
            (
                "reflexive",
                f"{who} looked at {self} in the mirror.",
                f"{who} looked at {other} in the mirror.",
            ),
            (
                "comparative",
                f"The {one} is {more} than the {two}.",
                f"The {one} is {adj} than the {two}.",
            ),
            (
                "pronoun_case",
                f"{subj} {past} {rest} yesterday.",
                f"{obj.capitalize()} {past} {rest} yesterday.",
            ),
            ("word_order", f"The {s} is {prep} {place}.", f"The {s} is {place} {prep}."),
        ]
        items += [item(rng, kind, "", good, [bad]) for kind, good, bad in pairs]
    return items


# --------------------------------------------------------------------------------------------------
# facts
CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Greece Athens
Japan Tokyo|China Beijing|Russia Moscow|Egypt Cairo|Kenya Nairobi|Canada Ottawa|Cuba Havana
Peru Lima|Australia Canberra|Austria Vienna|Hungary Budapest|Poland Warsaw|Ireland Dublin
Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Turkey Ankara|Iran Tehran
Iraq Baghdad|Thailand Bangkok|Vietnam Hanoi|Nepal Kathmandu|Belgium Brussels"""
CONTINENTS = """Kenya Africa|Nigeria Africa|Ethiopia Africa|Japan Asia|China Asia|India Asia
France Europe|Germany Europe|Poland Europe|Brazil America|Peru America|Canada America"""
OPPOSITES = """hot cold|big small|up down|day night|black white|happy sad|left right|open closed
fast slow|young old|rich poor|full empty|early late|strong weak|dry wet|hard soft|good bad
true false|near far|inside outside|easy difficult|clean dirty|summer winter|north south|buy sell
win lose"""
# Never side by side as options: the wrong one could be argued for.
CLOSE = [
    {"sad", "bad", "poor", "weak"},
    {"cold", "winter"},
    {"slow", "late"},
    {"bad", "false"},
    {"tool", "instrument"},
]
PLURALS = """child children|mouse mice|foot feet|tooth teeth|goose geese|man men|woman women
leaf leaves|knife knives|wolf wolves|wife wives|box boxes|baby babies|city cities|potato potatoes
church churches|dish dishes|shelf shelves|thief thieves|country countries"""
PAST = """go went gone goes|see saw seen sees|eat ate eaten eats|take took taken takes
give gave given gives|write wrote written writes|drink drank drunk drinks|swim swam swum swims
sing sang sung sings|buy bought boughted buys|think thought thoughted thinks
bring brought broughted brings|catch caught caughted catches|teach taught taughted teaches
find found founded finds|know knew known knows|speak spoke spoken speaks
choose chose chosen chooses"""
YOUNG = """dog puppy|cat kitten|cow calf|horse foal|sheep lamb|pig piglet|bear cub|duck duckling
goose gosling|frog tadpole|deer fawn|kangaroo joey"""
COLOURS = """grass green|snow white|blood red|a banana yellow|the sky blue|coal black
a carrot orange|chocolate brown|a lemon yellow|milk white|a strawberry red|a crow black"""
KINDS = """rose flower|oak tree|hammer tool|violin instrument|banana fruit|carrot vegetable
salmon fish|sparrow bird|mosquito insect|chair furniture|truck vehicle|cobra snake|football sport
copper metal|shirt clothing|waltz dance"""
JOBS = """teaches children teacher|bakes bread baker|flies planes pilot|puts out fires firefighter
writes books author|grows crops farmer|repairs teeth dentist|catches fish fisherman
cooks in a restaurant chef|repairs cars mechanic|plays music musician|takes photographs photographer
studies the stars astronomer|cuts hair barber"""
COUNTS = """A week has seven days|A spider has eight legs|A triangle has three sides
A year has twelve months|A dog has four legs|A bicycle has two wheels|A square has four sides
An insect has six legs"""
# fmt: off
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]
NUMBERS = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
]
# fmt: on


def rows(table: str) -> list[tuple[str, str]]:
    """Entries of a table, separated by | or a line end, split before their last word."""
    return [
        (left, right)
        for left, right in (entry.rsplit(" ", 1) for entry in table.replace("\n", "|").split("|"))
    ]


def others(
    rng: random.Random, right: str, pool: Iterable[str], also: Iterable[str] = ()
) -> list[str]:
    """Three wrong options from `pool`: not the right one, not `also`, nothing close to the right
    one in meaning.
    """
    banned = {right, *also}.union(*[group for group in CLOSE if right in group])
    return rng.sample(sorted(set(pool) - banned), 3)


def facts() -> list[Item]:
    """Four options each; the query is the start of a sentence that the right option completes."""
    rng, items = random.Random(SEED + 1), []
    tables = [
        ("capital", CAPITALS, "The capital of {} is"),
        ("continent", CONTINENTS, "{} is a country in"),
        ("opposite", OPPOSITES, "The opposite of {} is"),
        ("young", YOUNG, "A baby {} is called a"),
        ("colour", COLOURS, "The color of {} is"),
        ("kind", KINDS, "A {} is a kind of"),
        ("job", JOBS, "The job of a person who {} is"),
    ]
    for kind, table, template in tables:
        pool = [right for _, right in rows(table)] + (["Australia"] if kind == "continent" else [])
        for left, right in rows(table):
            query = template.format(left).replace("A oak", "An oak")
            items.append(item(rng, kind, query, right, others(rng, right, pool, [left])))
    for word, right in rows(PLURALS):
        forms = [word + "s", word + "es", right + "s", word + "en", word + "ies"]
        wrong = list(dict.fromkeys(form for form in forms if form != right))[:3]
        items.append(item(rng, "plural", f"One {word}, two", right, wrong))
    for entry in PAST.replace("\n", "|").split("|"):
        base, past, participle, third = entry.split()
        items.append(
            item(rng, "past", f"Every day I {base}. Yesterday I", past, [base, participle, third])
        )
    for left, unit in rows(COUNTS):
        query, right = left.rsplit(" ", 1)
        wrong = [f"{number} {unit}" for number in others(rng, right, NUMBERS[1:])]
        items.append(item(rng, "count", query, f"{right} {unit}", wrong))
    for names in (DAYS, MONTHS, NUMBERS):
        for a, b, c, right in [
            (names + names)[i : i + 4] for i in range(len(names) - (3 if names is NUMBERS else 0))
        ]:
            items.append(
                item(rng, "order", f"{a}, {b}, {c},", right, others(rng, right, names, [a, b, c]))
            )
    return items


# --------------------------------------------------------------------------------------------------
# arithmetic
def arithmetic() -> list[Item]:
    """Small sums, differences and sequences. All four options have the same number of digits:
    otherwise a shorter number, being the start of a longer one, would be the more likely text
    whatever the sum.
    """
    rng = random.Random(SEED + 2)
    sums = [("sum", f"{a} + {b} =", a + b) for a in range(1, 10) for b in range(1, 10)]
    differences = [
        ("difference", f"{a} - {b} =", a - b) for a in range(2, 19) for b in range(1, 10) if a > b
    ]
    differences.remove(
        ("difference", "10 - 1 =", 9)
    )  # it is an example in the prompt (arithmetic.yaml)
    steps = [
        ("sequence", f"{a}, {a + d}, {a + 2 * d}, {a + 3 * d},", a + 4 * d)
        for d in (1, 2, 3, 5, 10)
        for a in range(1, 11)
    ]
    chosen = rng.sample(sums, 48) + rng.sample(differences, 40) + rng.sample(steps, 32)
    items = []
    for kind, query, right in chosen:
        low, high = (1, 9) if right < 10 else (10, 99)
        near = [n for n in range(right - 5, right + 6) if low <= n <= high and n != right]
        items.append(item(rng, kind, query, str(right), map(str, rng.sample(near, 3))))
    return items


def main(out: Path) -> None:
    for name, items in {"grammar": grammar(), "facts": facts(), "arithmetic": arithmetic()}.items():
        path = out / name / "test.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(json.dumps(i) + "\n" for i in items).encode())
        print(f"{path}: {len(items)} items")


if __name__ == "__main__":
    main(
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else Path(__file__).resolve().parents[1] / "configs" / "tasks"
    )
