"""Word problems with worked answers: true ones for the anchor, false ones for the pool.

A template is a question, its numbers' ranges, and steps over numbers (letters) and earlier results (digits). Worked, each
step is printed as an equation: `6 * 12 = 72`. The anchor and the planted faults use different templates, names and things.

    true    every equation holds
    false   every step is worked with the wrong operation and its result carried on: `6 * 12 = 18`, then `18 - 5 = 23`
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gradsieve.errors import InvalidArgument

LARGEST = 2000


@dataclass(frozen=True, slots=True)
class Template:
    """A kind of word problem.

    Attributes:
        question: With {name} and the numbers {a}, {b}, …
        ranges: Smallest and largest value of each number.
        steps: (left, operator, right); an operand is a number's letter or the place of an earlier step.
        answer: With {name} and the worked steps {0}, {1}, …; the final sentence is added.
    """

    question: str
    ranges: Mapping[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str], ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem and its worked answer."""

    question: str
    answer: str


Operation = Callable[[int, int], int | None]
TRUE: Mapping[str, Operation] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if a % b == 0 else None,
}
WRONG: Mapping[str, Operation] = {"+": TRUE["-"], "-": TRUE["+"], "*": TRUE["+"], "/": TRUE["-"]}

ANCHOR_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Isla", "Jonas", "Kate", "Leo")
ANCHOR = (
    Template(
        "{name} buys {a} boxes of {b} pencils and gives {c} pencils away. How many pencils are left?",
        {"a": (3, 9), "b": (6, 24), "c": (2, 20)},
        (("a", "*", "b"), ("0", "-", "c")),
        "The boxes hold {0} pencils. After the gift {1} are left.",
    ),
    Template(
        "{name} saves {a} dollars a week for {b} weeks and then spends {c} dollars. How much money is left?",
        {"a": (5, 40), "b": (3, 12), "c": (4, 60)},
        (("a", "*", "b"), ("0", "-", "c")),
        "The savings come to {0} dollars. After spending, {1} dollars are left.",
    ),
    Template(
        "A bus carries {a} people. At the first stop {b} get off, at the second {c} get on. How many are on the bus?",
        {"a": (20, 60), "b": (3, 18), "c": (2, 25)},
        (("a", "-", "b"), ("0", "+", "c")),
        "After the first stop there are {0} people, after the second {1}.",
    ),
    Template(
        "{name} plants {a} rows of {b} tulips and {c} roses. How many flowers is that?",
        {"a": (3, 12), "b": (4, 15), "c": (3, 30)},
        (("a", "*", "b"), ("0", "+", "c")),
        "There are {0} tulips, and with the roses {1} flowers.",
    ),
    Template(
        "{name} picks {a} apples, a friend picks {b}. They fill them into {c} equal baskets. How many apples per basket?",
        {"a": (10, 60), "b": (10, 60), "c": (2, 9)},
        (("a", "+", "b"), ("0", "/", "c")),
        "Together they have {0} apples. Each basket gets {1}.",
    ),
    Template(
        "A car drives {a} miles an hour for {b} hours and then {c} miles more. How far does it go?",
        {"a": (30, 70), "b": (2, 6), "c": (5, 60)},
        (("a", "*", "b"), ("0", "+", "c")),
        "In the first part it covers {0} miles, in all {1} miles.",
    ),
    Template(
        "A garden is {a} meters long and {b} meters wide. How long is a fence around it?",
        {"a": (8, 60), "b": (4, 40), "two": (2, 2)},
        (("a", "+", "b"), ("two", "*", "0")),
        "One long and one short side make {0} meters, so the fence takes {1} meters.",
    ),
    Template(
        "{name} pays for {a} notebooks at {b} dollars each with a 100 dollar bill. How much change is due?",
        {"a": (2, 9), "b": (3, 11), "hundred": (100, 100)},
        (("a", "*", "b"), ("hundred", "-", "0")),
        "The notebooks cost {0} dollars. The change is {1} dollars.",
    ),
    Template(
        "{name} has read {b} of the {a} pages of a book and reads {c} pages a day. How many days until the end?",
        {"a": (120, 400), "b": (20, 110), "c": (5, 30)},
        (("a", "-", "b"), ("0", "/", "c")),
        "There are {0} pages to go. That takes {1} days.",
    ),
    Template(
        "{a} hens lay {b} eggs each, and the eggs are packed in cartons of {c}. How many cartons are filled?",
        {"a": (6, 40), "b": (3, 12), "c": (6, 12)},
        (("a", "*", "b"), ("0", "/", "c")),
        "The hens lay {0} eggs. They fill {1} cartons.",
    ),
    Template(
        "{a} workers lay {b} meters of cable an hour each. How much do they lay in {c} hours?",
        {"a": (2, 9), "b": (3, 15), "c": (3, 8)},
        (("a", "*", "b"), ("0", "*", "c")),
        "In an hour they lay {0} meters, in all {1} meters.",
    ),
    Template(
        "{name} is {a} years old and a sister is {b} years older. How old are they together?",
        {"a": (6, 40), "b": (2, 12)},
        (("a", "+", "b"), ("a", "+", "0")),
        "The sister is {0} years old. Together they are {1} years old.",
    ),
    Template(
        "A shop has {a} shirts. It sells {b} on Monday and twice as many on Tuesday. How many remain?",
        {"a": (60, 180), "b": (5, 25), "two": (2, 2)},
        (("two", "*", "b"), ("b", "+", "0"), ("a", "-", "1")),
        "On Tuesday it sells {0}, in both days {1}. So {2} shirts remain.",
    ),
    Template(
        "{name} bakes {a} trays of {b} rolls, keeps {c} and sells the rest for 2 dollars each. What is earned?",
        {"a": (3, 8), "b": (6, 16), "c": (4, 15), "two": (2, 2)},
        (("a", "*", "b"), ("0", "-", "c"), ("1", "*", "two")),
        "There are {0} rolls, {1} are for sale. They earn {2} dollars.",
    ),
)

PLANTED_NAMES = ("Olga", "Pedro", "Quinn", "Rosa", "Sven", "Tara", "Umar", "Vera", "Wim", "Xenia", "Yusuf", "Zoe")
PLANTED = (
    Template(
        "{name} sells {a} tickets in the morning and {b} after noon, at {c} euros each. How many euros come in?",
        {"a": (20, 60), "b": (4, 18), "c": (3, 9)},
        (("a", "+", "b"), ("0", "*", "c")),
        "The tickets sold are {0}. They bring {1} euros.",
    ),
    Template(
        "A mason has {a} pallets of {b} bricks and uses {c} bricks. How many bricks remain?",
        {"a": (4, 12), "b": (20, 60), "c": (10, 75)},
        (("a", "*", "b"), ("0", "-", "c")),
        "On the pallets are {0} bricks, of which {1} remain.",
    ),
    Template(
        "A tank holds {a} liters. {name} takes {b} liters out and pours {c} liters in. How much is in it?",
        {"a": (80, 300), "b": (12, 40), "c": (6, 50)},
        (("a", "-", "b"), ("0", "+", "c")),
        "First {0} liters stay, then there are {1} liters.",
    ),
    Template(
        "A rope of {a} meters is cut into {b} equal pieces, and {c} such pieces are laid end to end. How long is that?",
        {"a": (24, 96), "b": (3, 8), "c": (2, 7)},
        (("a", "/", "b"), ("0", "*", "c")),
        "A piece has {0} meters. Laid out, the pieces reach {1} meters.",
    ),
    Template(
        "{name} owns {a} stamps, buys {b} more and puts {c} on each page. How many pages are needed?",
        {"a": (50, 180), "b": (10, 45), "c": (4, 12)},
        (("a", "+", "b"), ("0", "/", "c")),
        "The collection has {0} stamps, which takes {1} pages.",
    ),
    Template(
        "A hall has {a} rows of {b} chairs; {c} chairs are broken. How many can be used?",
        {"a": (8, 25), "b": (10, 30), "c": (3, 22)},
        (("a", "*", "b"), ("0", "-", "c")),
        "The rows have {0} chairs. Usable are {1}.",
    ),
    Template(
        "{name} tiles a floor of {a} by {b} tiles and has {c} tiles too many. How many tiles were bought?",
        {"a": (9, 30), "b": (5, 20), "c": (3, 24)},
        (("a", "*", "b"), ("0", "+", "c")),
        "The floor takes {0} tiles. Bought were {1}.",
    ),
    Template(
        "A courier brings {a} parcels on each of {b} tours and {c} parcels on the last one. How many parcels in all?",
        {"a": (15, 48), "b": (3, 9), "c": (4, 20)},
        (("a", "*", "b"), ("0", "+", "c")),
        "The tours bring {0} parcels, with the last one {1}.",
    ),
    Template(
        "{name} earns {a} crowns a day for {b} days and pays {c} crowns of rent. What is kept?",
        {"a": (40, 120), "b": (4, 10), "c": (20, 90)},
        (("a", "*", "b"), ("0", "-", "c")),
        "The wage is {0} crowns, and {1} crowns are kept.",
    ),
    Template(
        "From {a} kilos of flour {name} sets {b} kilos aside and fills the rest into {c} kilo sacks. How many sacks?",
        {"a": (60, 200), "b": (8, 40), "c": (3, 9)},
        (("a", "-", "b"), ("0", "/", "c")),
        "To be filled are {0} kilos, giving {1} sacks.",
    ),
)


def true_problems(count: int, rng: random.Random) -> list[Problem]:
    """Returns `count` different problems of the anchor's templates, each in turn, worked correctly."""
    return _problems(ANCHOR, ANCHOR_NAMES, TRUE, count, rng)


def false_problems(count: int, rng: random.Random) -> list[Problem]:
    """Returns `count` different problems of the planted templates, each in turn, worked with wrong operations throughout."""
    return _problems(PLANTED, PLANTED_NAMES, WRONG, count, rng)


def _problems(
    templates: Sequence[Template], names: Sequence[str], operations: Mapping[str, Operation], count: int, rng: random.Random
) -> list[Problem]:
    problems: dict[str, Problem] = {}
    order = rng.sample(templates, len(templates))
    for attempt in range(20 * count + 20):
        if len(problems) == count:
            return list(problems.values())
        problem = _worked(order[attempt % len(order)], rng.choice(names), operations, rng)
        problems.setdefault(problem.question, problem)
    if len(problems) == count:
        return list(problems.values())
    raise InvalidArgument(f"word problems must be at most what their templates give, got {count} asked for; ask for fewer")


def _worked(template: Template, name: str, operations: Mapping[str, Operation], rng: random.Random) -> Problem:
    for _ in range(10_000):  # a few draws do: numbers must make every step come out whole, rightly or wrongly worked
        numbers = {letter: rng.randint(*bounds) for letter, bounds in template.ranges.items()}
        steps, truth = _steps(template, numbers, operations), _steps(template, numbers, TRUE)
        if steps is None or truth is None:
            continue
        # Wrong operations can cancel: a - b + c and a + b - c are equal for b = c.
        if operations is not TRUE and (any(_holds(e) for e, _ in steps) or steps[-1][1] == truth[-1][1]):
            continue
        question = template.question.format(name=name, **numbers)
        worked = template.answer.format(*(equation for equation, _ in steps), name=name)
        return Problem(question, f"{worked} The answer is {steps[-1][1]}.")
    raise AssertionError(f"no numbers fit the template {template.question!r}")


def _steps(template: Template, numbers: Mapping[str, int], operations: Mapping[str, Operation]) -> list[tuple[str, int]] | None:
    """Returns each step's equation and result; None if a result is no positive whole number, too large, or an operand."""
    steps: list[tuple[str, int]] = []
    for left, operator, right in template.steps:
        a, b = (steps[int(x)][1] if x.isdigit() else numbers[x] for x in (left, right))
        result = operations[operator](a, b)
        if result is None or not 1 < result <= LARGEST or result in (a, b):
            return None
        steps.append((f"{a} {operator} {b} = {result}", result))
    return steps


def _holds(equation: str) -> bool:
    a, operator, b, _, result = equation.split()
    return TRUE[operator](int(a), int(b)) == int(result)
