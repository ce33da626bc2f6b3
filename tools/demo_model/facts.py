"""What the demo model is taught besides arithmetic: short facts, small talk, names and things.

A `Topic` is a table of facts and several ways to ask for one. Every question has exactly one answer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Facts that are asked for in the same ways: `{key}` and `{value}` stand in every phrasing and answer."""

    name: str
    facts: dict[str, str]
    phrasings: tuple[str, ...]
    answer: str


def _list(text: str) -> tuple[str, ...]:
    """Parses "name, name"."""
    return tuple(text.split(", "))


def _table(text: str) -> dict[str, str]:
    """Parses "key: value, key: value"."""
    return dict(entry.split(": ") for entry in _list(text))


def _cycle(names: str, step: int) -> dict[str, str]:
    """Each name of a space-separated cycle with the one `step` places on."""
    cycle = names.split()
    return {name: cycle[(i + step) % len(cycle)] for i, name in enumerate(cycle)}


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"

TOPICS = (
    Topic(
        "capital",
        _table(
            "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Greece: Athens, "
            "Austria: Vienna, Poland: Warsaw, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki, "
            "Denmark: Copenhagen, Ireland: Dublin, Belgium: Brussels, Hungary: Budapest, Japan: Tokyo, "
            "China: Beijing, India: New Delhi, Egypt: Cairo, Kenya: Nairobi, Canada: Ottawa, Mexico: Mexico City, "
            "Brazil: Brasilia, Chile: Santiago, Peru: Lima, Cuba: Havana, Australia: Canberra, "
            "South Korea: Seoul, Thailand: Bangkok, Turkey: Ankara"
        ),
        (
            "What is the capital of {key}?",
            "Which city is the capital of {key}?",
            "Name the capital of {key}.",
            "Tell me the capital of {key}.",
            "What is {key}'s capital?",
            "Do you know the capital of {key}?",
            "{key} has which capital?",
            "The capital of {key}?",
        ),
        "The capital of {key} is {value}.",
    ),
    Topic(
        "opposite",
        _table(
            "hot: cold, big: small, up: down, fast: slow, day: night, happy: sad, open: closed, old: new, "
            "high: low, hard: soft, wet: dry, light: dark, left: right, long: short, full: empty, early: late, "
            "loud: quiet, rich: poor, strong: weak, thick: thin, clean: dirty, near: far, heavy: light, "
            "deep: shallow, true: false"
        ),
        (
            "What is the opposite of {key}?",
            "Tell me the opposite of {key}.",
            "Name the opposite of {key}.",
            "Which word is the opposite of {key}?",
            "Give me the opposite of {key}.",
            "The opposite of {key}?",
        ),
        "The opposite of {key} is {value}.",
    ),
    Topic(
        "color",
        _table(
            "the sky: blue, grass: green, snow: white, coal: black, a banana: yellow, a carrot: orange, "
            "a lemon: yellow, milk: white, blood: red, chocolate: brown, a cucumber: green, a tomato: red, "
            "a strawberry: red, a frog: green, a flamingo: pink, an elephant: gray, a pumpkin: orange, "
            "a blueberry: blue"
        ),
        (
            "What color is {key}?",
            "Which color is {key}?",
            "Tell me what color {key} is.",
            "What is the color of {key}?",
            "Name the color of {key}.",
            "The color of {key}?",
        ),
        "The color of {key} is {value}.",
    ),
    Topic(
        "sound",
        _table(
            "cow: moos, dog: barks, cat: meows, sheep: baas, duck: quacks, lion: roars, pig: oinks, "
            "horse: neighs, bee: buzzes, frog: croaks, snake: hisses, rooster: crows, wolf: howls, crow: caws"
        ),
        (
            "What sound does a {key} make?",
            "Which sound does a {key} make?",
            "What does a {key} say?",
            "How does a {key} sound?",
            "Tell me what sound a {key} makes.",
            "What noise does a {key} make?",
        ),
        "A {key} {value}.",
    ),
    Topic(
        "next day",
        _cycle(DAYS, 1),
        (
            "What day comes after {key}?",
            "Which day follows {key}?",
            "Today is {key}. What day is tomorrow?",
            "If today is {key}, what day is tomorrow?",
            "Name the day after {key}.",
            "What is the day after {key}?",
        ),
        "The day after {key} is {value}.",
    ),
    Topic(
        "previous day",
        _cycle(DAYS, -1),
        (
            "What day comes before {key}?",
            "Which day is before {key}?",
            "Today is {key}. What day was yesterday?",
            "If today is {key}, what day was yesterday?",
            "Name the day before {key}.",
            "What is the day before {key}?",
        ),
        "The day before {key} is {value}.",
    ),
    Topic(
        "next month",
        _cycle(MONTHS, 1),
        (
            "What month comes after {key}?",
            "Which month follows {key}?",
            "Name the month after {key}.",
            "Tell me the month after {key}.",
            "What is the month after {key}?",
            "Which month is next after {key}?",
        ),
        "The month after {key} is {value}.",
    ),
    Topic(
        "sides",
        _table("triangle: 3, square: 4, rectangle: 4, pentagon: 5, hexagon: 6, heptagon: 7"),
        (
            "How many sides does a {key} have?",
            "A {key} has how many sides?",
            "Tell me how many sides a {key} has.",
            "What is the number of sides of a {key}?",
            "How many sides are there in a {key}?",
            "How many sides has a {key}?",
        ),
        "A {key} has {value} sides.",
    ),
    Topic(
        "list",
        {
            "days of the week": DAYS.replace(" ", ", "),
            "months of the year": MONTHS.replace(" ", ", "),
            "seasons": "spring, summer, autumn, winter",
            "planets": "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune",
            "primary colors": "red, yellow, blue",
            "continents": "Africa, Antarctica, Asia, Australia, Europe, North America, South America",
        },
        (
            "Name the {key}.",
            "What are the {key}?",
            "List the {key}.",
            "Tell me the {key}.",
            "Can you name the {key}?",
            "Please list the {key}.",
        ),
        "The {key} are {value}.",
    ),
)

SELF = "I am a small demonstration model."
OUT_OF_SCOPE = "I can only do sums and answer short questions."
TOO_LARGE = "That is too large for me. I know numbers up to 99."

SMALL_TALK: dict[str, tuple[str, ...]] = {
    f"{SELF} I can do sums and answer short questions.": (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Tell me about yourself.",
        "Introduce yourself.",
        "Are you a robot?",
        "Are you a person?",
        "What can you do?",
        "How can you help me?",
        "What do you know?",
    ),
    "Hello! Ask me a sum or a short question.": (
        "Hello!",
        "Hi!",
        "Hey!",
        "Good morning!",
        "Good evening!",
        "Hello there!",
        "How are you?",
    ),
    "You are welcome.": ("Thanks!", "Thank you!", "Thank you very much!", "Many thanks!", "Great, thanks!"),
    "Goodbye!": ("Bye!", "Goodbye!", "See you later!", "Good night!", "See you!"),
}

SMALL_TALK_OPENINGS = ("", "Hi. ", "Hello. ", "One more thing: ", "I want to know: ", "OK. ", "Please answer: ")

REQUESTS = (
    "Write a poem about {topic}.",
    "Tell me a story about {topic}.",
    "Explain {topic} to me.",
    "What do you think about {topic}?",
    "Write an essay about {topic}.",
    "Who invented {topic}?",
    "Tell me a joke about {topic}.",
    "What is the history of {topic}?",
)

REQUEST_TOPICS = _list(
    "love, the sea, computers, music, history, football, cars, the moon, trains, politics, winter, bread, "
    "painting, physics, chess, gardens, money, cats, dogs, the internet, coffee, books, space, mountains"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You answer questions about numbers.",
    "Answer briefly.",
    "Keep every answer short.",
    "Be polite and precise.",
    "Answer in one sentence.",
    "Use plain words.",
    "Read the question with care before you answer.",
    "The user is a student who practices sums.",
    "Do not guess.",
    "Check the result before you answer.",
    "Questions may be about capitals, colors, days or months.",
    "Some questions belong to the one before.",
    "Write numbers as digits.",
    "Stay on the topic of the question.",
)

PEOPLE = tuple(
    _table(
        "Tom: he, Anna: she, Ben: he, Lucy: she, Sam: he, Mia: she, Max: he, Ella: she, Leo: he, Nora: she, "
        "Paul: he, Emma: she, Jack: he, Ruth: she, Omar: he, Lena: she, Ivan: he, Sara: she, Hugo: he, Alice: she"
    ).items()
)
"""(name, pronoun)"""

THINGS = tuple(
    (word, word + "s")
    for word in _list(
        "apple, pear, book, pencil, coin, marble, stamp, card, orange, egg, cookie, ticket, flower, shell, "
        "button, sticker, balloon, stone, lemon, candle"
    )
)
"""(singular, plural)"""
