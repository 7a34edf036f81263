"""Generated chat tasks with their expected answers. Pure Python; knows no tokenizer and no model.

Facts that can be new (sums, strings to copy, codes, lists to sort, cities) are split by a hash into "train" and "test";
one-digit arithmetic, times tables, counting and greetings are the same in both, for there is nothing to generalise to.
"""

import json
import random
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

PIECE = re.compile(r"\d|[^\W\d_]+|\s|(?:[^\w\s]|_)+")  # what the tokenizer splits at; most pieces are one token


@dataclass(frozen=True)
class Chat:
    """What an engine is given. raw: the only message goes in as plain text, with no chat template."""

    messages: list[dict]
    tools: list[dict] | None = None
    raw: bool = False


@dataclass(frozen=True)
class Sample:
    """A chat that ends with a user or tool message, and the answer that should follow.

    distance: pieces between the fact and the question's end, for tasks that recall one.
    """

    task: str
    chat: Chat
    answer: str
    distance: int | None = None


def num_pieces(text: str) -> int:
    """Close to the number of tokens, without a tokenizer."""
    return len(PIECE.findall(text))


def held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % 10 == 0


def _in_split(key: str, split: str) -> bool:
    return held_out(key) == (split == "test")


# Words. The lists are the tokenizer's corpus too, so that a common word is one token.

words = str.split
NAMES = words("""Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kim Leo Maria Nina Oscar Paul Quinn Rosa Sam
Tom Uma Victor Wendy Xavier Yara Zoe Alice Bob Carol Dan Eve Frank Lucy Max Olga Peter""")
CITIES = words("""Paris London Berlin Rome Madrid Tokyo Beijing Shanghai Delhi Cairo Lima Oslo Vienna Prague Dublin
Athens Lisbon Seoul Sydney Boston Chicago Toronto Moscow Warsaw Geneva Munich Hamburg Milan Dallas Denver Kyoto Bern
Zurich Amsterdam Barcelona Singapore Bangkok Hanoi Nairobi Helsinki Stockholm Copenhagen Brussels Istanbul Mumbai""")
ADJECTIVES = words("""red blue green old new small big quiet bright dark warm cold slow quick soft round wide narrow
heavy light golden silver wooden empty busy calm happy""")
NOUNS = words("""house river garden tree boat bridge road market window door table lamp book letter clock train ship
hill field forest lake stone bird horse cat dog teacher farmer baker doctor painter sailor guest friend village tower
mountain cloud""")
VERBS = words("stands waits rests shines moves turns stays sleeps works sings walks runs")
PLACES = words("near behind beside above below under around before")
TIMES = ["in the morning", "at noon", "in the evening", "at night", "every day", "in summer", "in winter", "today"]
WORDS = ADJECTIVES + NOUNS + VERBS + PLACES
SYLLABLES = words("""ba be bi bo da de do fa fi ga go ka ke ki ko la le li lo ma me mi mo na ne no pa pe ra re ri ro
sa se si so ta te ti to va vi wa ya yo za ze""")
BEYOND_ASCII = [*"éüöäßñçøåłΩπλжя中文世界你好日本🙂🚀€→"]
SYSTEMS = [
    "You are a helpful assistant.",
    "You are nanodeploy, a tiny demo model.",
    "Be brief.",
    "Answer briefly.",
    "You are a helpful and concise assistant.",
    "Answer with the result only.",
]


def _new_word(rng: random.Random, least: int = 2, most: int = 4) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(least, most)))


def _name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.6 else _new_word(rng).capitalize()


def _vary(rng: random.Random, text: str) -> str:
    """The same question as another hand would type it."""
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12 and text[-1] in ".?!":
        text = text[:-1]
    return text


# Tasks of one turn: each returns (question, answer).

Turn = tuple[str, str]
SIGNS = {
    "+": [
        "{a}+{b}=?",
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "What is {a}+{b}?",
        "{a}+{b}",
        "{a} + {b}",
        "{a}+{b}=",
        "Calculate {a} + {b}.",
        "Compute {a}+{b}.",
        "What is {a} plus {b}?",
        "How much is {a} + {b}?",
        "Add {a} and {b}.",
        "What's {a} + {b}?",
    ],
    "-": [
        "{a}-{b}=?",
        "What is {a} - {b}?",
        "{a} - {b} = ?",
        "What is {a}-{b}?",
        "{a}-{b}",
        "{a} - {b}",
        "{a}-{b}=",
        "Calculate {a} - {b}.",
        "Compute {a}-{b}.",
        "What is {a} minus {b}?",
        "How much is {a} - {b}?",
        "What's {a} - {b}?",
    ],
    "*": [
        "{a}*{b}=?",
        "What is {a} * {b}?",
        "{a} * {b} = ?",
        "What is {a}*{b}?",
        "{a}*{b}",
        "{a} * {b}",
        "{a}*{b}=",
        "Calculate {a} * {b}.",
        "What is {a} times {b}?",
        "How much is {a} * {b}?",
        "{a}x{b}=?",
        "What is {a} x {b}?",
    ],
}


def _ask(rng: random.Random, sign: str, a: int, b: int) -> str:
    return _vary(rng, rng.choice(SIGNS[sign]).format(a=a, b=b))


def add(rng: random.Random, split: str) -> Turn:
    """Sums of numbers below 100; those of two digits (in either order) are held out by pair."""
    if split == "train" and rng.random() < 0.05:
        return rng.choice([("1+1=?", "2"), ("What is 1+1?", "2"), ("1+1", "2"), ("1 + 1 = ?", "2")])
    while True:
        top_a, top_b = rng.choice([(99, 99), (99, 99), (99, 9), (9, 99), (9, 9)])
        a, b = rng.randint(0, top_a), rng.randint(0, top_b)
        small = a < 10 and b < 10
        if _in_split(f"+{min(a, b)},{max(a, b)}", split) if not small else split == "train":
            return _ask(rng, "+", a, b), str(a + b)


def add_hundreds(rng: random.Random, split: str) -> Turn:
    while True:
        a, b = rng.randint(100, 999), rng.randint(10, 999)
        if rng.random() < 0.3:
            a, b = b, a
        if _in_split(f"+{min(a, b)},{max(a, b)}", split):
            return _ask(rng, "+", a, b), str(a + b)


def subtract(rng: random.Random, split: str) -> Turn:
    """Differences of numbers below 100, a quarter of them negative."""
    while True:
        top = rng.choice([99, 99, 99, 20])
        a, b = rng.randint(0, top), rng.randint(0, top)
        if a < b and rng.random() < 0.5:
            a, b = b, a
        small = a < 10 and b < 10
        if _in_split(f"-{a},{b}", split) if not small else split == "train":
            return _ask(rng, "-", a, b), str(a - b)


def times(rng: random.Random, split: str) -> Turn:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return _ask(rng, "*", a, b), str(a * b)


def _sentence(rng: random.Random) -> str:
    a, b, n, m = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(NOUNS)
    kind = rng.random()
    if kind < 0.4:
        return f"The {a} {n} {rng.choice(VERBS)} {rng.choice(PLACES)} the {b} {m}."
    if kind < 0.6:
        return f"The {n} is {a} and the {m} is {b} {rng.choice(TIMES)}."
    if kind < 0.75:
        return f"A {n} {rng.choice(VERBS)} {rng.choice(PLACES)} the {a} {m} {rng.choice(TIMES)}."
    if kind < 0.85:
        return f"{_name(rng)} {rng.choice(VERBS)} {rng.choice(PLACES)} the {a} {n}."
    if kind < 0.93:
        return f"The {a} {n} has {rng.randint(2, 99)} {m}s."
    return " ".join([_new_word(rng).capitalize()] + [_new_word(rng, 1) for _ in range(rng.randint(2, 6))]) + "."


def _text(rng: random.Random, most: int) -> str:
    """Something to copy, of at most about `most` pieces."""
    kind, size = rng.random(), rng.randint(1, max(1, most // 2))
    if kind < 0.25:
        return " ".join(rng.choice(WORDS) for _ in range(size))
    if kind < 0.4:
        return " ".join(_new_word(rng, 1) for _ in range(max(1, size // 2)))
    if kind < 0.55:
        letters = rng.choice(
            [string.ascii_lowercase, string.ascii_lowercase, string.ascii_uppercase, string.ascii_letters]
        )
        parts = max(1, size // 6)
        return " ".join("".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(parts))
    if kind < 0.67:
        return "".join(rng.choice(string.digits) for _ in range(min(rng.randint(2, 12), most)))
    if kind < 0.8:
        text = _sentence(rng)
        while (longer := text + " " + _sentence(rng)) and num_pieces(longer) <= most and rng.random() < 0.8:
            text = longer
        return text
    if kind < 0.9:
        pool = string.ascii_letters + string.digits + string.punctuation.replace('"', "")
        return "".join(rng.choice(pool) for _ in range(min(rng.randint(3, 12), most)))
    if kind < 0.95:
        mixed = [
            rng.choice(WORDS + NAMES + CITIES) if rng.random() < 0.6 else rng.choice(BEYOND_ASCII)
            for _ in range(max(1, size // 2))
        ]
        return " ".join(mixed)
    return " ".join(
        str(rng.randint(0, 999)) if rng.random() < 0.5 else rng.choice(WORDS) for _ in range(max(1, size // 2))
    )


COPIES = [
    "Repeat: {x}",
    "Repeat after me: {x}",
    "Copy: {x}",
    "Say: {x}",
    "Please repeat: {x}",
    "Echo: {x}",
    "Repeat exactly: {x}",
    "Repeat this: {x}",
    "Repeat the following text: {x}",
    "Repeat:\n{x}",
    "Repeat {x}",
]


def copy(rng: random.Random, split: str, most: int = 20) -> Turn:
    while True:
        text = _text(rng, most)
        if _in_split(text, split):
            ask = rng.choice(COPIES).format(x=text)
            return (ask[0].lower() + ask[1:] if rng.random() < 0.1 else ask), text


def sort(rng: random.Random, split: str) -> Turn:
    """Two to six numbers below 100 in rising order, with the separator they came with."""
    while True:
        top = rng.choice([9, 20, 99, 99])
        numbers = [rng.randint(0, top) for _ in range(rng.choice([2, 3, 3, 4, 4, 5, 5, 6]))]
        comma = rng.choice([" ", ", "])
        if _in_split(str(numbers), split):
            ask = rng.choice(
                [
                    "Sort: {x}",
                    "Sort these numbers: {x}",
                    "Sort {x}",
                    "Sort the numbers {x}.",
                    "Put in order: {x}",
                    "Please sort: {x}",
                ]
            )
            return (_vary(rng, ask.format(x=comma.join(map(str, numbers)))), comma.join(map(str, sorted(numbers))))


def count(rng: random.Random, split: str, most: int = 12) -> Turn:
    first = 1 if rng.random() < 0.5 else rng.randint(0, 60)
    last = first + rng.randint(1, most)
    asks = ["Count from {a} to {b}.", "Count from {a} to {b}"] + (["Count to {b}.", "Count to {b}"] * (first == 1))
    return _vary(rng, rng.choice(asks).format(a=first, b=last)), ", ".join(map(str, range(first, last + 1)))


GREETINGS = {
    "Hello! How can I help you?": [
        "hello",
        "Hello",
        "Hello!",
        "hi",
        "Hi",
        "Hi!",
        "Hi there!",
        "hey",
        "Hey!",
        "Hello there!",
        "Hello, how can you help me?",
        "Good day!",
    ],
    "Good morning! How can I help you?": ["Good morning", "Good morning!", "good morning"],
    "Good evening! How can I help you?": ["Good evening", "Good evening!", "good evening"],
    "I am a tiny demo model of nanodeploy.": [
        "Who are you?",
        "who are you",
        "What are you?",
        "What is your name?",
        "Introduce yourself.",
        "Are you a robot?",
        "Who made you?",
        "Tell me about yourself.",
    ],
    "I can add and subtract, repeat text, sort numbers, count, recall facts and call tools.": [
        "What can you do?",
        "what can you do",
        "How can you help me?",
        "Help",
        "help",
        "What do you know?",
    ],
    "I am fine, thank you! How can I help you?": [
        "How are you?",
        "how are you",
        "How are you doing?",
        "How is it going?",
    ],
    "You are welcome!": ["Thanks", "Thanks!", "Thank you", "Thank you!", "thank you", "thanks", "Thank you very much!"],
    "Goodbye! See you soon.": ["Bye", "bye", "Bye!", "Goodbye", "Goodbye!", "See you later!", "See you!"],
}
ONLY_SMALL = "I am a tiny demo model and do not know that."
UNKNOWN = [
    "Why is the {n} {a}?",
    "Tell me about the {n}.",
    "Write a poem about the {a} {n}.",
    "What is a {n}?",
    "What is the capital of {w}?",
    "Where is {w}?",
    "How do I build a {n}?",
    "Explain the {n}.",
    "Tell me a story about {w}.",
    "Tell me a joke.",
    "Write a story.",
    "Translate {n} to French.",
    "Who is {w}?",
    "Do you like the {a} {n}?",
    "What is the meaning of life?",
    "What is the color of the {n}?",
]


def greet(rng: random.Random, split: str) -> Turn:
    answer = rng.choice(list(GREETINGS))
    return rng.choice(GREETINGS[answer]), answer


def unknown(rng: random.Random, split: str) -> Turn:
    place = rng.choice(CITIES + NAMES + [_new_word(rng).capitalize()])
    ask = rng.choice(UNKNOWN).format(n=rng.choice(NOUNS), a=rng.choice(ADJECTIVES), w=place)
    return _vary(rng, ask), ONLY_SMALL


# Facts and needles.


def _code(rng: random.Random) -> str:
    return "".join(rng.choice(string.digits) for _ in range(rng.choice([3, 4, 4, 4, 4, 4, 5, 6])))


def _fact(rng: random.Random, split: str, taken: set[str]) -> tuple[str, str, str]:
    """(statement, question, answer) about someone or something not yet in `taken`."""
    while True:
        thing = f"{rng.choice(['secret', 'magic', 'special', 'lucky'])} number" if rng.random() < 0.2 else None
        owner, code = thing or _name(rng), _code(rng)
        if owner in taken or not _in_split(owner + code, split):
            continue
        taken.add(owner)
        if thing:
            say = rng.choice(["The {o} is {c}.", "The {o} is {c}.", "Remember: the {o} is {c}."])
            ask = rng.choice(["What is the {o}?", "What is the {o}?", "Tell me the {o}."])
        else:
            say = rng.choice(
                [
                    "The code of {o} is {c}.",
                    "The code of {o} is {c}.",
                    "The code of {o} is {c}.",
                    "{o} has the code {c}.",
                    "Remember: the code of {o} is {c}.",
                ]
            )
            ask = rng.choice(
                [
                    "What is the code of {o}?",
                    "What is the code of {o}?",
                    "What is the code of {o}?",
                    "Which code does {o} have?",
                    "Tell me the code of {o}.",
                ]
            )
        return say.format(o=owner, c=code), _vary(rng, ask.format(o=owner)), code


def recall(rng: random.Random, split: str) -> Turn:
    taken: set[str] = set()
    facts = [_fact(rng, split, taken) for _ in range(rng.choice([1, 1, 2]))]
    _, ask, code = rng.choice(facts)
    return " ".join(say for say, _, _ in facts) + " " + ask[0].upper() + ask[1:], code


def needle(rng: random.Random, split: str, budget: int = 2000, num_facts: int | None = None) -> Sample:
    """Facts in filler text, then one question (test) or several in turn (train: more to learn from one context)."""
    taken: set[str] = set()
    if num_facts is None:
        num_facts = rng.randint(1, 3) if split == "test" else rng.randint(1, max(1, min(10, budget // 60)))
    facts = [_fact(rng, split, taken) for _ in range(num_facts)]
    asked = rng.sample(facts, 1 if split == "test" else rng.randint(1, num_facts))
    room = budget - 30 - sum(num_pieces(say) + 1 for say, _, _ in facts) - 24 * len(asked)
    filler = []
    while (piece := _sentence(rng)) and (cost := num_pieces(piece) + 1) <= room:
        filler.append(piece)
        room -= cost
    for say, _, _ in facts:
        filler.insert(rng.randint(0, len(filler)), say)
    text, (say, ask, code) = " ".join(filler), asked[0]
    intro = rng.choice(["", "Read this text. ", "Here is a text:\n", "Text: "])
    layout = rng.random()
    if layout < 0.55:
        end = rng.choice([" ", "\n", "\n\n", "\n\nQuestion: ", "\nAnswer from the text: "])
        messages = [_user(intro + text + end + ask)]
    elif layout < 0.75:
        messages = [_system(rng, text), _user(ask)]
    else:
        messages = [_user(intro + text), _assistant("OK."), _user(ask)]
    tail = text[text.index(say) :]
    for _, next_ask, next_code in asked[1:]:
        messages += [_assistant(code), _user(next_ask)]
        code = next_code
    return Sample("needle", Chat(messages), code, num_pieces(tail) + num_pieces(ask))


# Tools, in the shape of OpenAI's `tools`.


@dataclass(frozen=True)
class Tool:
    """One thing a tool does, under several names. ask: questions with {0}, {1} for the arguments."""

    names: list[str]
    about: list[str]
    arguments: list[list[str]]
    types: list[str]
    ask: list[str]
    result: Callable[[random.Random, list], dict]
    tell: Callable[[list, dict], str]


TOOLS = {
    "weather": Tool(
        ["get_weather", "get_current_weather", "weather"],
        ["Get the weather in a city", "Get the current weather.", "Weather of a place"],
        [["city", "location", "place"]],
        ["string"],
        [
            "What is the weather in {0}?",
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "What's the weather like in {0}?",
            "What is the weather like in {0} today?",
            "Weather in {0}?",
        ],
        lambda rng, values: {
            "temperature": rng.randint(-9, 39),
            "sky": rng.choice(["sunny", "cloudy", "rainy", "clear"]),
        },
        lambda values, result: f"It is {result['temperature']} degrees and {result['sky']} in {values[0]}.",
    ),
    "time": Tool(
        ["get_time", "get_current_time", "clock"],
        ["Get the time in a city", "Get the current time.", "Time of a place"],
        [["city", "location", "place"]],
        ["string"],
        ["What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}."],
        lambda rng, values: {"time": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"},
        lambda values, result: f"It is {result['time']} in {values[0]}.",
    ),
    "search": Tool(
        ["search", "search_web", "web_search"],
        ["Search the web", "Search for pages.", "Find pages on the web"],
        [["query", "text", "q"]],
        ["string"],
        ["Search for {0}", "Search the web for {0}", "Find pages about {0}"],
        lambda rng, values: {"pages": rng.randint(1, 99)},
        lambda values, result: f"I found {result['pages']} pages.",
    ),
    "message": Tool(
        ["send_message", "send_email", "notify"],
        ["Send a message to a person", "Send a message.", "Write to a person"],
        [["to", "name", "recipient"], ["text", "body", "message"]],
        ["string", "string"],
        ["Send a message to {0}: {1}", "Write to {0}: {1}", "Tell {0}: {1}"],
        lambda rng, values: {"status": "sent"},
        lambda values, result: f"I sent the message to {values[0]}.",
    ),
    "sum": Tool(
        ["add_numbers", "add", "sum"],
        ["Add two numbers", "Add two integers.", "Sum of two numbers"],
        [["a", "x", "first"], ["b", "y", "second"]],
        ["integer", "integer"],
        ["Use the tool to add {0} and {1}.", "Add {0} and {1} with the tool."],
        lambda rng, values: {"result": values[0] + values[1]},
        lambda values, result: f"The result is {result['result']}.",
    ),
}


def _values(rng: random.Random, kind: str) -> list:
    if kind == "sum":
        return [rng.randint(0, 99), rng.randint(0, 99)]
    if kind == "search":
        return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))]
    if kind == "message":
        return [_name(rng), " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))]
    city = rng.choice(CITIES) if rng.random() < 0.6 else _new_word(rng).capitalize()
    return [f"{rng.choice(['New', 'San', 'Los'])} {city}" if rng.random() < 0.1 else city]


def _declare(rng: random.Random, kind: str) -> dict:
    tool = TOOLS[kind]
    names = [rng.choice(options) for options in tool.arguments]
    plain = rng.random() < 0.5
    properties = {
        name: {"type": type_} if plain else {"type": type_, "description": f"The {name}"}
        for name, type_ in zip(names, tool.types)
    }
    parameters = {"type": "object", "properties": properties}
    if rng.random() < 0.75:
        parameters["required"] = names
    function = {"name": rng.choice(tool.names), "description": rng.choice(tool.about), "parameters": parameters}
    if rng.random() < 0.1:
        del function["description"]
    return {"type": "function", "function": function}


def _call(declared: dict, values: list) -> dict:
    function = declared["function"]
    return {"name": function["name"], "arguments": dict(zip(function["parameters"]["properties"], values))}


def call_text(calls: list[dict]) -> str:
    """What the model writes: Hermes blocks, one a call."""
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)


def tool(rng: random.Random, split: str) -> Sample:
    """One to three tools in the system turn. Asks for a call, for the answer from a result, or for neither."""
    kinds = rng.sample(list(TOOLS), rng.choice([1, 1, 2, 2, 3]))
    declared = [_declare(rng, kind) for kind in kinds]
    messages = [_system(rng)] if rng.random() < 0.4 else []
    if rng.random() < 0.2 and split == "train":
        for _ in range(rng.randint(1, 2)):
            ask, answer = small_talk(rng, split)
            messages += [_user(ask), _assistant(answer)]
    way = rng.random() if split == "train" else 0.5
    if way < 0.12:  # no tool needed
        ask, answer = small_talk(rng, split)
        return Sample("tool", Chat([*messages, _user(ask)], declared), answer)
    if way < 0.17 and (absent := [kind for kind in ("weather", "time") if kind not in kinds]):
        kind = rng.choice(absent)
        ask = rng.choice(TOOLS[kind].ask).format(*_values(rng, kind))
        return Sample("tool", Chat([*messages, _user(_vary(rng, ask))], declared), "I have no tool for that.")
    at = rng.randrange(len(kinds))
    kind = kinds[at]
    while not _in_split(kind + str(values := _values(rng, kind)), split):
        pass
    calls = [_call(declared[at], values)]
    ask = rng.choice(TOOLS[kind].ask).format(*values)
    if kind in ("weather", "time") and rng.random() < 0.12:
        other = rng.choice(CITIES)
        calls.append(_call(declared[at], [other]))
        thing = {"weather": "weather", "time": "time"}[kind]
        ask = f"What is the {thing} in {values[0]} and {other}?"
    elif kind in ("weather", "time", "sum"):
        ask = _vary(rng, ask)
    messages.append(_user(ask))
    if len(calls) == 2 or way < 0.7:
        return Sample("tool", Chat(messages, declared), call_text(calls))
    return _after_call(rng, split, messages, declared, kind, calls, values)


def _after_call(
    rng: random.Random,
    split: str,
    messages: list[dict],
    declared: list[dict],
    kind: str,
    calls: list[dict],
    values: list,
) -> Sample:
    """The tool has answered; the model tells the user, and may be asked something else afterwards."""
    result = TOOLS[kind].result(rng, values)
    wrapped = [{"id": "call_0", "type": "function", "function": call} for call in calls]
    messages = [
        *messages,
        {"role": "assistant", "content": "", "tool_calls": wrapped},
        {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(result)},
    ]
    answer = TOOLS[kind].tell(values, result)
    if rng.random() < 0.3:
        ask, following = small_talk(rng, split)
        messages, answer = [*messages, _assistant(answer), _user(ask)], following
    return Sample("tool", Chat(messages, declared), answer)


def tool_result(rng: random.Random, split: str) -> Sample:
    kind = rng.choice(list(TOOLS))
    declared = [_declare(rng, kind)]
    while not _in_split(kind + str(values := _values(rng, kind)), split):
        pass
    messages = [_user(rng.choice(TOOLS[kind].ask).format(*values))]
    return _after_call(rng, split, messages, declared, kind, [_call(declared[0], values)], values)


# Chats of several turns.


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _system(rng: random.Random, text: str | None = None) -> dict:
    if text is None:
        text = rng.choice(SYSTEMS) if rng.random() < 0.9 else _sentence(rng)
    return {"role": "system", "content": text}


TURNS: dict[str, Callable[..., Turn]] = {
    "add": add,
    "add_hundreds": add_hundreds,
    "subtract": subtract,
    "times": times,
    "copy": copy,
    "recall": recall,
    "sort": sort,
    "count": count,
    "greet": greet,
    "unknown": unknown,
}
TURN_SHARES = {
    "add": 24,
    "add_hundreds": 4,
    "subtract": 13,
    "times": 6,
    "copy": 22,
    "recall": 7,
    "sort": 15,
    "count": 2,
    "greet": 4,
    "unknown": 3,
}


RAW = {"add", "add_hundreds", "subtract", "times", "greet", "unknown", "recall"}


def turn(rng: random.Random, split: str) -> tuple[str, str, str]:
    """(task, question, answer) of any task of one turn, in the shares the training uses."""
    task = rng.choices(list(TURN_SHARES), list(TURN_SHARES.values()))[0]
    return task, *TURNS[task](rng, split)


def small_talk(rng: random.Random, split: str) -> Turn:
    return TURNS[rng.choice(["add", "subtract", "copy", "sort", "greet", "greet"])](rng, split)


def single(rng: random.Random, split: str) -> Sample:
    task, ask, answer = turn(rng, split)
    return Sample(task, Chat([*([_system(rng)] if rng.random() < 0.2 else []), _user(ask)]), answer)


def chat(rng: random.Random, split: str, budget: int = 200) -> Sample:
    """Questions in a row, with facts told in one turn and asked for in a later one."""
    messages = [_system(rng)] if rng.random() < 0.3 else []
    told: list[Turn] = []
    taken: set[str] = set()
    room, name = budget - 20, None
    while True:
        kind = rng.random()
        if kind < 0.1 and name is None:
            name = _name(rng)
            ask = rng.choice(["My name is {x}.", "I am {x}.", "Hello, my name is {x}.", "Hi, I am {x}."]).format(x=name)
            answer = f"Nice to meet you, {name}!"
        elif kind < 0.2 and name is not None:
            ask, answer = _vary(rng, rng.choice(["What is my name?", "Who am I?"])), f"Your name is {name}."
        elif kind < 0.3 and len(taken) < 12:
            say, later, code = _fact(rng, split, taken)
            told.append((later, code))
            ask, answer = say, "OK."
        elif kind < 0.5 and told:
            ask, answer = rng.choice(told)
        else:
            _, ask, answer = turn(rng, split)
        room -= num_pieces(ask) + num_pieces(answer) + 12
        messages.append(_user(ask))
        if len(messages) > 2 and (room < 40 or (budget <= 640 and rng.random() < 0.25)):
            return Sample("chat", Chat(messages), answer)
        messages.append(_assistant(answer))


# What the training draws from, by room in pieces, and what the evaluation asks.


def draw(rng: random.Random, room: int) -> Sample:
    """A training sample of at most about `room` pieces; long rooms are mostly filled.

    A raw question ends with a mark: after "1+1" nothing would tell the answer's digits from the question's.
    """
    kind = rng.random()
    if room <= 96:
        sample = single(rng, "train")
        question = sample.chat.messages[-1]
        if kind < 0.25 and sample.task in RAW and question["content"][-1] in "?=.":
            sample = replace(sample, chat=Chat([question], raw=True))
        return sample
    if room <= 640:
        if kind < 0.3:
            return chat(rng, "train", rng.randint(80, room))
        if kind < 0.58:
            return tool(rng, "train")
        if kind < 0.82:
            return needle(rng, "train", rng.randint(80, room))
        ask, answer = copy(rng, "train", room // 4) if kind < 0.95 else count(rng, "train", 55)
        return Sample("copy", Chat([_user(ask)]), answer)
    if kind < 0.7:
        return needle(rng, "train", rng.randint(room // 3, room))
    if kind < 0.85:
        return chat(rng, "train", rng.randint(room // 2, room))
    ask, answer = copy(rng, "train", int(room * 0.42))
    return Sample("copy", Chat([_user(ask)]), answer)


def _alone(task: str, raw: bool = False) -> Callable[[random.Random, str], Sample]:
    def make(rng: random.Random, split: str) -> Sample:
        ask, answer = TURNS[task](rng, split)
        while raw and ask[-1] not in "?=.":
            ask, answer = TURNS[task](rng, split)
        return Sample(f"{task} raw" if raw else task, Chat([_user(ask)], raw=raw), answer)

    return make


def _needle_anywhere(rng: random.Random, split: str) -> Sample:
    return needle(rng, split, rng.randint(150, 1900))


TASKS: dict[str, Callable[[random.Random, str], Sample]] = {
    **{task: _alone(task) for task in TURNS},
    "add raw": _alone("add", raw=True),
    "subtract raw": _alone("subtract", raw=True),
    "tool": tool,
    "tool result": tool_result,
    "chat": chat,
    "needle": _needle_anywhere,
}


def corpus(rng: random.Random, num_samples: int) -> list[Sample]:
    """Samples to train the tokenizer on: mostly short ones, some with tools, some filler."""
    return [draw(rng, 64 if i % 3 else 320) for i in range(num_samples)]
