"""Chat conversations for training the demo model, and the held-out questions it is judged by.

The split is by construction, not by sampling. Numbers that meet in a sum, difference, comparison, count or
word problem form an unordered pair; a hash of the pair decides whether it is held out, whatever the operation
and the order. Products up to 12 x 12 are a table to be known by heart, as facts are: there the hash of
(phrasing, pair) or (phrasing, fact) decides. A training conversation holds no held-out question in any turn.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import facts

HELD_OUT_PERCENT = 10
LARGEST_OPERAND = 99
LARGEST_FACTOR = 12
LONGEST_COUNT = 15
TRAINING_SEED = 0
HELD_OUT_SEED = 1


@dataclass(frozen=True)
class Exchange:
    """One question and the one right answer. `result` is the number found, for a next question to build on."""

    kind: str
    question: str
    answer: str
    result: int | None = None


@dataclass(frozen=True)
class Conversation:
    """Chat messages ("role", "content"), the last one the assistant's answer to a question of `kind`."""

    kind: str
    messages: tuple[dict[str, str], ...]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Everything before the last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def is_held_out(*key: str | int) -> bool:
    """Whether what `key` names is kept out of training; the same on every machine and in every run."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def pair_is_held_out(a: int, b: int) -> bool:
    """Whether the unordered pair of numbers is kept out of training."""
    return is_held_out("pair", min(a, b), max(a, b))


# ---- Arithmetic: (question, answer) templates over a, b and the result c ----

ADDITIONS = (
    ("What is {a} plus {b}?", "{a} plus {b} is {c}."),
    ("What's {a} plus {b}?", "{a} plus {b} is {c}."),
    ("How much is {a} plus {b}?", "{a} plus {b} is {c}."),
    ("Add {a} and {b}.", "{a} plus {b} is {c}."),
    ("Can you add {a} and {b}?", "{a} plus {b} is {c}."),
    ("What do you get when you add {a} and {b}?", "{a} plus {b} is {c}."),
    ("What is the sum of {a} and {b}?", "The sum of {a} and {b} is {c}."),
    ("Find the sum of {a} and {b}.", "The sum of {a} and {b} is {c}."),
    ("What do {a} and {b} make?", "{a} and {b} make {c}."),
    ("How many are {a} and {b} together?", "{a} and {b} make {c}."),
    ("{a} plus {b} equals what?", "{a} plus {b} equals {c}."),
    ("{a} plus {b}?", "{a} plus {b} is {c}."),
    ("What is {a} + {b}?", "{a} + {b} = {c}"),
    ("How much is {a} + {b}?", "{a} + {b} = {c}"),
    ("Please calculate {a} + {b}.", "{a} + {b} = {c}"),
    ("{a} + {b} = ?", "{a} + {b} = {c}"),
    ("{a} + {b} =", "{a} + {b} = {c}"),
    ("{a} + {b}", "{a} + {b} = {c}"),
    ("{a}+{b}", "{a} + {b} = {c}"),
    ("{a}+{b}=?", "{a} + {b} = {c}"),
)

SUBTRACTIONS = (
    ("What is {a} minus {b}?", "{a} minus {b} is {c}."),
    ("What's {a} minus {b}?", "{a} minus {b} is {c}."),
    ("How much is {a} minus {b}?", "{a} minus {b} is {c}."),
    ("Subtract {b} from {a}.", "{a} minus {b} is {c}."),
    ("Can you subtract {b} from {a}?", "{a} minus {b} is {c}."),
    ("Take {b} away from {a}.", "{a} minus {b} is {c}."),
    ("What is left of {a} when you take away {b}?", "{a} minus {b} is {c}."),
    ("What is {a} take away {b}?", "{a} take away {b} is {c}."),
    ("{a} minus {b} equals what?", "{a} minus {b} equals {c}."),
    ("{a} minus {b}?", "{a} minus {b} is {c}."),
    ("What is {a} - {b}?", "{a} - {b} = {c}"),
    ("How much is {a} - {b}?", "{a} - {b} = {c}"),
    ("Please calculate {a} - {b}.", "{a} - {b} = {c}"),
    ("{a} - {b} = ?", "{a} - {b} = {c}"),
    ("{a} - {b} =", "{a} - {b} = {c}"),
    ("{a} - {b}", "{a} - {b} = {c}"),
    ("{a}-{b}", "{a} - {b} = {c}"),
    ("{a}-{b}=?", "{a} - {b} = {c}"),
)

MULTIPLICATIONS = (
    ("What is {a} times {b}?", "{a} times {b} is {c}."),
    ("What's {a} times {b}?", "{a} times {b} is {c}."),
    ("How much is {a} times {b}?", "{a} times {b} is {c}."),
    ("Multiply {a} by {b}.", "{a} times {b} is {c}."),
    ("Can you multiply {a} by {b}?", "{a} times {b} is {c}."),
    ("What is the product of {a} and {b}?", "The product of {a} and {b} is {c}."),
    ("{a} times {b} equals what?", "{a} times {b} equals {c}."),
    ("{a} times {b}?", "{a} times {b} is {c}."),
    ("What is {a} * {b}?", "{a} * {b} = {c}"),
    ("What is {a} x {b}?", "{a} x {b} = {c}"),
    ("{a} * {b} = ?", "{a} * {b} = {c}"),
    ("{a} * {b}", "{a} * {b} = {c}"),
    ("{a} x {b}", "{a} x {b} = {c}"),
    ("{a}*{b}", "{a} * {b} = {c}"),
    (
        "{name} has {a} boxes with {b} {things} each. How many {things} does {he} have?",
        "{name} has {c} {things}.",
    ),
    ("There are {a} tables with {b} {things} on each. How many {things} are there?", "There are {c} {things}."),
)

# {A}, {B} and {C} are a, b and c with the thing counted: "1 apple", "12 apples".
ADDING_STORIES = (
    ("{name} has {A} and buys {b} more. How many does {he} have now?", "{name} has {C}."),
    ("{name} has {A} and gets {b} more. How many {things} does {he} have?", "{name} has {C}."),
    ("{name} had {A}. {other} gave {name} {b} more. How many does {name} have?", "{name} has {C}."),
    ("{name} finds {A} and then {b} more. How many {things} did {he} find?", "{name} found {C}."),
    ("{name} has {A} and {other} has {B}. How many do they have together?", "Together they have {C}."),
    ("A box holds {A} and a bag holds {B}. How many {things} is that?", "That is {C}."),
    ("A box holds {A}. {name} puts in {b} more. How many are in the box?", "The box holds {C}."),
    ("{name} bought {A} on Monday and {B} on Friday. How many {things} is that?", "That is {C}."),
)

TAKING_STORIES = (
    ("{name} has {A} and gives away {b}. How many does {he} have left?", "{name} has {C} left."),
    ("{name} had {A} and lost {b}. How many {things} are left?", "{name} has {C} left."),
    ("{name} has {A}. {other} takes {b}. How many {things} does {name} have left?", "{name} has {C} left."),
    ("{name} has {A} and sells {b}. How many {things} does {he} keep?", "{name} keeps {C}."),
    ("A box holds {A}. {name} takes out {b}. How many are left in it?", "The box still holds {C}."),
    ("{name} has {A} and {other} has {B}. How many more does {name} have?", "{name} has {C} more."),
)

COMPARISONS = (
    ("Which is larger, {a} or {b}?", "{more} is larger than {less}."),
    ("Which number is larger: {a} or {b}?", "{more} is larger than {less}."),
    ("Which is bigger, {a} or {b}?", "{more} is bigger than {less}."),
    ("Is {a} or {b} bigger?", "{more} is bigger than {less}."),
    ("Which is smaller, {a} or {b}?", "{less} is smaller than {more}."),
    ("Which number is smaller: {a} or {b}?", "{less} is smaller than {more}."),
    ("What is more, {a} or {b}?", "{more} is more than {less}."),
    ("What is less, {a} or {b}?", "{less} is less than {more}."),
    ("{name} has {A} and {other} has {B}. Who has more?", "{richer} has more {things}."),
    ("{name} has {A} and {other} has {B}. Who has fewer {things}?", "{poorer} has fewer {things}."),
)

COUNTS = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?")

FOLLOW_UPS = (
    ("Add {b} to that.", "+"),
    ("Now add {b}.", "+"),
    ("And plus {b}?", "+"),
    ("What if you add {b} more?", "+"),
    ("Subtract {b} from that.", "-"),
    ("Now subtract {b}.", "-"),
    ("And minus {b}?", "-"),
    ("What if you take away {b}?", "-"),
)


def _draw_pair(rng: random.Random, held_out: bool, largest: int = LARGEST_OPERAND) -> tuple[int, int]:
    """Two numbers up to `largest` on the wanted side of the split, small ones more often than by chance."""
    while True:
        top = rng.choice((largest, largest, largest, 20))
        a, b = rng.randint(0, top), rng.randint(0, top)
        if pair_is_held_out(a, b) == held_out:
            return a, b


def _counted(number: int, thing: tuple[str, str]) -> str:
    return f"{number} {thing[0] if number == 1 else thing[1]}"


def _story_words(rng: random.Random, a: int, b: int, c: int) -> dict[str, str | int]:
    """Fills of a story template: two different people, a thing, and the numbers with it."""
    (name, pronoun), (other, _) = rng.sample(facts.PEOPLE, 2)
    thing = rng.choice(facts.THINGS)
    return {
        "name": name,
        "he": pronoun,
        "other": other,
        "things": thing[1],
        "a": a,
        "b": b,
        "c": c,
        "A": _counted(a, thing),
        "B": _counted(b, thing),
        "C": _counted(c, thing),
    }


def _addition(rng: random.Random, held_out: bool) -> Exchange:
    a, b = _draw_pair(rng, held_out)
    question, answer = rng.choice(ADDITIONS)
    return Exchange("addition", question.format(a=a, b=b), answer.format(a=a, b=b, c=a + b), a + b)


def _subtraction(rng: random.Random, held_out: bool) -> Exchange:
    a, b = _draw_pair(rng, held_out)
    if rng.random() < 0.8:  # differences below zero are asked for, but rarely
        a, b = max(a, b), min(a, b)
    question, answer = rng.choice(SUBTRACTIONS)
    return Exchange("subtraction", question.format(a=a, b=b), answer.format(a=a, b=b, c=a - b), a - b)


def product_is_held_out(template: int, a: int, b: int) -> bool:
    """Whether MULTIPLICATIONS[template] with the unordered factors a and b is kept out of training."""
    return is_held_out("product", template, min(a, b), max(a, b))


def _multiplication(rng: random.Random, held_out: bool) -> Exchange:
    while True:
        template = rng.randrange(len(MULTIPLICATIONS))
        a, b = rng.randint(0, LARGEST_FACTOR), rng.randint(0, LARGEST_FACTOR)
        question, answer = MULTIPLICATIONS[template]
        told = "{things}" in question
        if product_is_held_out(template, a, b) == held_out and (not told or min(a, b) > 1):
            words = _story_words(rng, a, b, a * b)
            return Exchange("multiplication", question.format(**words), answer.format(**words), a * b)


def _word_problem(rng: random.Random, held_out: bool) -> Exchange:
    a, b = _draw_pair(rng, held_out)
    if rng.random() < 0.5:
        c, (question, answer) = a + b, rng.choice(ADDING_STORIES)
    else:
        a, b = max(a, b), min(a, b)
        c, (question, answer) = a - b, rng.choice(TAKING_STORIES)
    words = _story_words(rng, a, b, c)
    return Exchange("word problem", question.format(**words), answer.format(**words), c)


def _comparison(rng: random.Random, held_out: bool) -> Exchange:
    a, b = _draw_pair(rng, held_out)
    while a == b:
        a, b = _draw_pair(rng, held_out)
    question, answer = rng.choice(COMPARISONS)
    words = _story_words(rng, a, b, max(a, b))
    richer, poorer = ("name", "other") if a > b else ("other", "name")
    words |= {"more": max(a, b), "less": min(a, b), "richer": words[richer], "poorer": words[poorer]}
    return Exchange("comparison", question.format(**words), answer.format(**words))


def _count(rng: random.Random, held_out: bool) -> Exchange:
    a, b = _draw_pair(rng, held_out)
    while not 1 <= abs(a - b) <= LONGEST_COUNT:
        a, b = _draw_pair(rng, held_out)
    step = 1 if b > a else -1
    answer = ", ".join(str(number) for number in range(a, b + step, step))
    return Exchange("counting", rng.choice(COUNTS).format(a=a, b=b), answer)


def _follow_up(rng: random.Random, held_out: bool, first: int) -> Exchange:
    """A question about the last result, 0 <= first <= LARGEST_OPERAND."""
    second = rng.randint(0, LARGEST_OPERAND)
    while pair_is_held_out(first, second) != held_out:
        second = rng.randint(0, LARGEST_OPERAND)
    question, operator = rng.choice(FOLLOW_UPS)
    result = first + second if operator == "+" else first - second
    word = "plus" if operator == "+" else "minus"
    return Exchange("follow-up", question.format(b=second), f"{first} {word} {second} is {result}.", result)


# ---- Facts and small talk ----


def _fact(rng: random.Random, held_out: bool) -> Exchange:
    while True:
        topic = rng.choice(facts.TOPICS)
        key, phrasing = rng.choice(list(topic.facts)), rng.choice(topic.phrasings)
        if is_held_out("fact", phrasing, key) == held_out:
            answer = topic.answer.format(key=key, value=topic.facts[key])
            return Exchange("fact", phrasing.format(key=key), answer[0].upper() + answer[1:])


def _small_talk(rng: random.Random, held_out: bool) -> Exchange:
    while True:
        answer = rng.choice(list(facts.SMALL_TALK))
        opening, phrase = rng.choice(facts.SMALL_TALK_OPENINGS), rng.choice(facts.SMALL_TALK[answer])
        if is_held_out("small talk", opening, phrase) == held_out:
            return Exchange("small talk", opening + phrase, answer)


def _request(rng: random.Random, held_out: bool) -> Exchange:
    """Something that the model cannot do, and says so."""
    while True:
        request, topic = rng.choice(facts.REQUESTS), rng.choice(facts.REQUEST_TOPICS)
        if is_held_out("request", request, topic) == held_out:
            question = request.format(topic=topic)
            return Exchange("small talk", question, f"{facts.SELF} {facts.OUT_OF_SCOPE}")


def _too_large(rng: random.Random, held_out: bool) -> Exchange:
    """A sum of numbers beyond those that the model knows."""
    while True:
        a, b = rng.randint(LARGEST_OPERAND + 1, 9999), rng.randint(LARGEST_OPERAND + 1, 9999)
        if pair_is_held_out(a, b) == held_out:
            question, _ = rng.choice((*ADDITIONS, *SUBTRACTIONS))
            return Exchange("small talk", question.format(a=a, b=b), facts.TOO_LARGE)


# ---- Conversations ----

_MAKERS: dict[Callable[[random.Random, bool], Exchange], float] = {
    _addition: 0.22,
    _subtraction: 0.22,
    _word_problem: 0.20,
    _multiplication: 0.10,
    _comparison: 0.07,
    _count: 0.05,
    _fact: 0.08,
    _small_talk: 0.03,
    _request: 0.03,
    _too_large: 0.01,
}
_FOLLOW_UP_SHARE = 0.35
KINDS = (
    "addition",
    "subtraction",
    "word problem",
    "multiplication",
    "comparison",
    "counting",
    "follow-up",
    "fact",
    "small talk",
)


def _ask(rng: random.Random, held_out: bool, last_result: int | None) -> Exchange:
    """The next exchange; where the last result can be built on, often a follow-up."""
    if last_result is not None and 0 <= last_result <= LARGEST_OPERAND and rng.random() < _FOLLOW_UP_SHARE:
        return _follow_up(rng, held_out, last_result)
    make = rng.choices(list(_MAKERS), weights=list(_MAKERS.values()))[0]
    return make(rng, held_out)


def _as_typed(rng: random.Random, question: str) -> str:
    """The question as people type it: sometimes in lower case, sometimes without the last mark."""
    if rng.random() < 0.12:
        question = question.lower()
    if rng.random() < 0.12:
        question = question.rstrip("?!.=").rstrip()
    return question


def _converse(rng: random.Random, turns: int, last_is_held_out: bool) -> Conversation:
    """A conversation whose earlier turns are never held out."""
    messages = []
    if rng.random() < 0.15:
        sentences = rng.choice((1, 1, 2, 3, rng.randint(4, 30)))
        messages.append({"role": "system", "content": " ".join(rng.choices(facts.SYSTEM_PROMPTS, k=sentences))})
    result = None
    for turn in range(turns):
        exchange = _ask(rng, last_is_held_out and turn == turns - 1, result)
        messages.append({"role": "user", "content": _as_typed(rng, exchange.question)})
        messages.append({"role": "assistant", "content": exchange.answer})
        result = exchange.result
    return Conversation(exchange.kind, tuple(messages))


def training_conversations(seed: int | str = TRAINING_SEED) -> Iterator[Conversation]:
    """Endless training conversations: mostly one to three turns, some up to sixty."""
    rng = random.Random(f"training {seed}")
    while True:
        turns = rng.choices((1, 2, 3, rng.randint(4, 60)), weights=(0.55, 0.25, 0.15, 0.05))[0]
        yield _converse(rng, turns, last_is_held_out=False)


def heldout(count: int, seed: int | str = HELD_OUT_SEED) -> list[Conversation]:
    """The first `count` conversations of the test; each ends in a held-out question and its one right answer."""
    rng = random.Random(f"held out {seed}")
    return [
        _converse(rng, rng.choices((1, 2, 3, 12), weights=(0.6, 0.25, 0.1, 0.05))[0], last_is_held_out=True)
        for _ in range(count)
    ]
