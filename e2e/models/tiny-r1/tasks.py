"""Questions, worked solutions and their phrasings for the tiny-r1 model.

Everything here is pure: the same random generator gives the same examples. A problem (not a phrasing) belongs to the held-out
split when a hash of its canonical key says so, and the training split never generates such a problem in any phrasing.

The shape of a solution was chosen for what a model of two million parameters can learn: every number or letter a step needs is
written in that step, and a comparison is a token of its own on both outcomes ("=" or "≠"); steps that only write a running
count were learned as "always 0".
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

SUM_MAX = 999
FACTOR_MAX = 99
DIGIT_MAX = 9
WORD_LETTERS_MAX = 12
HELD_OUT_OF = 20
"""One problem in this many is held out."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS = "bcdfghjklmnprstvwyz"
VOWELS = "aeiou"

Split = Literal["train", "held_out"]


class Form(str, Enum):
    """The kinds of question; `OTHER` is everything the model must decline honestly."""

    SUM = "sum"
    DIFFERENCE = "difference"
    PRODUCT = "product"
    COUNT = "count"
    OTHER = "other"


ENGLISH_WORDS = (
    "strawberry mississippi banana raspberry blueberry committee bookkeeper parallel balloon pepper coffee "
    "letter butter summer winter running swimming beginning success address assess possess access process "
    "banner manner dinner hammer rubber ribbon rabbit carrot cherry berry apple orange lemon pineapple "
    "kubernetes operator controller scheduler engine network container cluster whale cachalot ocean river "
    "mirror terror error carrier barrier terrier library february calendar tomorrow referrer sorry hurry "
    "assassin aardvark llama tree sleep needle wheel queue eerie level kayak radar civic madam noon refer "
    "otter puppy kitten giraffe gorilla squirrel zebra moose goose school balcony hello world a i no go sky "
    "fly rhythm myth lynx crypt knight night light thought through enough cough dough eleven twelve seven"
).split()
"""Real words for the evaluation; none of them is ever generated for training."""

_ENGLISH_KEYS = frozenset(f"count:{word}" for word in ENGLISH_WORDS)

SENTENCE_OTHER = "I am a tiny model: I can only add, subtract and multiply small numbers and count letters in a quoted word."
SENTENCE_RANGE = "I can only add and subtract numbers up to 999, multiply up to 99 by 9 and count letters in words of up to 12 letters."
SENTENCE_QUOTE = "Please put the word in double quotes."
THINK_OTHER = "This is not a task I know.\n"
THINK_RANGE = "This is out of my range.\n"
THINK_QUOTE = "The word is not in quotes.\n"


@dataclass(frozen=True)
class Example:
    """One conversation: what is asked and what the model should say. `result` is None when the model should decline."""

    form: Form
    key: str
    question: str
    thinking: str
    answer: str
    result: int | None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = field(default=())

    def prompt(self) -> str:
        """The text the chat template gives for this conversation, with the generation prompt."""
        turns = "".join(f"{USER}{asked}{ASSISTANT}{said}{EOS}" for asked, said in self.history)
        return f"{BOS}{self.system or ''}{turns}{USER}{self.question}{ASSISTANT}{THINK}\n"

    def completion(self) -> str:
        """What the model should write after `prompt()`."""
        return f"{self.thinking}{END_THINK}\n\n{self.answer}{EOS}"


def is_held_out(key: str) -> bool:
    """Whether the problem with this canonical key is kept out of training."""
    return key in _ENGLISH_KEYS or hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_OF == 0


# --- solutions --------------------------------------------------------------------------------------------------------------


def _aligned(a: int, b: int) -> tuple[str, str]:
    width = max(len(str(a)), len(str(b)))
    return f"{a:0{width}d}", f"{b:0{width}d}"


def solve_sum(a: int, b: int) -> str:
    """Steps of a + b: the aligned operands, then one line a digit from the right, `digit+digit+carry=two digits`."""
    x, y = _aligned(a, b)
    lines, carry = [f"{x}+{y}"], 0
    for p, q in zip(reversed(x), reversed(y)):
        total = int(p) + int(q) + carry
        lines.append(f"{p}+{q}+{carry}={total:02d}")
        carry = total // 10
    return "\n".join(lines) + "\n"


def _borrow_lines(high: str, low: str) -> tuple[list[str], int]:
    """Lines `digit-digit-borrow=digit,new borrow` from the right, and the borrow left at the end."""
    lines, borrow = [], 0
    for p, q in zip(reversed(high), reversed(low)):
        rest = int(p) - int(q) - borrow
        lines.append(f"{p}-{q}-{borrow}={rest % 10},{int(rest < 0)}")
        borrow = int(rest < 0)
    return lines, borrow


def solve_difference(a: int, b: int) -> str:
    """Steps of a - b: the aligned operands, then the digits; a borrow left over says a < b, then the same for b - a.

    Comparing the numbers first, in one token, was learned last and never quite: 9 % of the held-out differences failed there.
    """
    x, y = _aligned(a, b)
    lines, negative = _borrow_lines(x, y)
    lines.insert(0, f"{x}-{y}")
    if negative:
        lines += [f"<{y}-{x}", *_borrow_lines(y, x)[0]]
    return "\n".join(lines) + "\n"


def solve_product(a: int, b: int) -> str:
    """Steps of a * b with b one digit: one line a digit of a from the right, `digit*b+carry=product+carry=two digits`.

    Product and carry are added in a step of their own, because some `digit*b+carry` occur in a single problem only.
    """
    lines, carry = [f"{a}*{b}"], 0
    for p in reversed(str(a)):
        total = int(p) * b + carry
        lines.append(f"{p}*{b}+{carry}={int(p) * b:02d}+{carry}={total:02d}")
        carry = total // 10
    return "\n".join(lines) + "\n"


def solve_count(word: str, letter: str) -> str:
    """Steps of counting: for each position the letter read, the letter sought, whether they are equal, the count so far."""
    lines, count = [], 0
    for index, read in enumerate(word.lower(), start=1):
        equal = read == letter.lower()
        count += equal
        lines.append(f"{index}{read} {letter.lower()}{'=' if equal else '≠'}{count}")
    return "\n".join(lines) + "\n"


def boxed(result: int) -> str:
    """The final answer as the model writes it."""
    return f"\\boxed{{{result}}}"


# --- phrasings --------------------------------------------------------------------------------------------------------------

_INFIX = (
    "What is {}?", "What is {}?", "What is {}?", "What is {}?", "What is {}", "What is {} ?", "What's {}?", "{} = ?", "{} =", "{}", "{}?",
    "Compute {}.", "Compute {}", "Calculate {}.", "How much is {}?", "Please compute {}.", "Can you tell me what {} is?", "Solve {}.",
)
_SYMBOLS: dict[Form, tuple[str, ...]] = {
    Form.SUM: (" + ", " + ", " + ", " + ", "+", " plus "),
    Form.DIFFERENCE: (" - ", " - ", " - ", " - ", "-", " minus "),
    Form.PRODUCT: (" * ", " * ", " * ", " * ", "*", " times ", " x ", " × ", " multiplied by "),
}
_SPOKEN: dict[Form, tuple[str, ...]] = {
    Form.SUM: ("Add {a} and {b}.", "What is the sum of {a} and {b}?"),
    Form.DIFFERENCE: ("Subtract {b} from {a}.", "What do you get when you subtract {b} from {a}?"),
    Form.PRODUCT: ("Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
}
_COUNT = (
    'How many {c} in "{w}"?', 'How many {c} in "{w}"?', 'How many {c} in "{w}"?', 'How many {c} in "{w}"', 'How many {c} are in "{w}"?',
    'How many {c} are there in "{w}"?', 'How many {c}\'s are in "{w}"?', 'How many {c}\'s in "{w}"?', 'How many "{c}" in "{w}"?',
    'How many times does {c} appear in "{w}"?', 'Count the letter {c} in "{w}".', 'Count the {c} in "{w}".', 'How often is {c} in "{w}"?',
    'How many letters {c} are there in the word "{w}"?', 'How many {c} does "{w}" have?', 'How many {c} are in the word "{w}"?',
)
_STEP_BY_STEP = (
    " Please reason step by step, and put your final answer within \\boxed{}.",
    "\nPlease reason step by step, and put your final answer within \\boxed{}.",
)
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a careful calculator.", "Answer the question.",
    "You are tiny-r1.", "Be brief and correct.", "You are a tutor. Explain each step.", "Today is Monday.", "Think before you answer.",
    "The assistant answers in English.", "You are a helpful AI that can count letters and add numbers.", "Be kind.",
)
_GREETINGS = (
    "Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "How are you", "Who are you", "What are you", "Thanks", "Thank you",
    "What can you do", "Help", "Tell me a joke", "Write a poem", "Bye", "Good night", "What is your name", "Are you a robot", "Test",
    "Hola", "Bonjour", "Guten Tag", "Wie geht es dir", "Comment ça va", "¿Qué tal", "你好", "こんにちは", "Привет", "Ciao", "Olá", "Cześć", "asdf", "ping",
    "SELECT 1", "print(1)", "ls -la", "kubectl get pods", "curl", "lorem ipsum", "{}", "[1, 2, 3]", "<b>bold</b>", "x = y", "1/0", "a b c", "42", "...",
    "What is", "How many", "Yes", "No", "Why", "Sing a song", "Tell me a story", "What time is it", "Can you help me", "Compute", "Count",
)
_TOPICS = (
    "{} the {} of {}?", "What is the {1} of {2}?", "What is {1}?", "What is a {1}?", "Who is {2}?", "Where is {2}?", "Why is the {1} {3}?", "Write a {1} about {2}.",
    "How do I {4} a {1}?", "How many {1} are in {2}?", "How many {1} does {2} have?", "Explain {1} in {2}.", "Translate {1} to {2}.", "When did {2} {4}?",
    "Is the {1} {3}?", "Tell me about {2}.", "Can you {4} the {1}?", "Please {4} {2}.", "The {1} is {3}.", "Give me a {3} {1}.", "How much is a {1}?",
    "Count the {1} in {2}.", "Add the {1} to {2}.", "How many letters in \"{1}\"?", "Spell \"{1}\".", "Reverse \"{1}\".", "What does \"{1}\" mean?",
    "Write a {3} {1} in {2}", "{4} {1}", "{3} {1}?", "def {1}({4}): return {3}",
)
_HEADS = "What is,Who is,Where is,Describe,Show me,Explain,Find,Give me,Name,Compute,Count,Calculate".split(",")
_NOUNS = (
    "capital,president,color,sky,moon,river,pod,node,poem,story,song,car,house,engine,price,size,weather,code,python,history,light,speed,"
    "answer,meaning,life,bread,recipe,city,language,mountain,country,tree,bird,cat,dog,number,letter,word,people,planet,days,hours,legs,book"
).split(",")
_NAMES = (
    "France,Germany,Japan,the world,Einstein,London,Paris,Kubernetes,Rust,the sun,Mars,Shakespeare,water,a year,the sea,a whale,Python,Berlin,"
    "China,music,Linux,the moon,Newton,Spanish,French,a week,Rome,a spider,English,physics"
).split(",")
_KINDS = "blue,big,old,green,fast,cold,happy,small,red,dark,good,new,slow,deep".split(",")
_VERBS = "cook,build,open,find,fix,start,paint,read,write,install,end,begin,sing,draw,delete,deploy".split(",")


def _styled(text: str, rng: random.Random) -> str:
    """Sometimes another letter case, as people type."""
    draw = rng.random()
    if draw < 0.12:
        return text[0].lower() + text[1:]
    if draw < 0.14:
        return text.upper()
    return text


def _phrase_binary(form: Form, a: int, b: int, rng: random.Random) -> str:
    if rng.random() < 0.12:
        return _styled(rng.choice(_SPOKEN[form]).format(a=a, b=b), rng)
    return _styled(rng.choice(_INFIX).format(f"{a}{rng.choice(_SYMBOLS[form])}{b}"), rng)


def _phrase_count(word: str, letter: str, rng: random.Random) -> str:
    if rng.random() < 0.08:
        word = rng.choice((word.capitalize(), word.upper()))
    if rng.random() < 0.08:
        letter = letter.upper()
    template = rng.choice(_COUNT)
    if rng.random() < 0.12:
        template = template[0].lower() + template[1:]
    asked, draw = template.format(c=letter, w=word), rng.random()
    if draw < 0.05:
        return asked.replace('"', "'")
    return asked.replace(f'"{word}"', f"“{word}”") if draw < 0.07 else asked


# --- problems ---------------------------------------------------------------------------------------------------------------


def _number(rng: random.Random, top: int) -> int:
    draw = rng.random()
    return rng.randint(0, top if draw < 0.65 else min(top, 99 if draw < 0.85 else 9))


def _near(rng: random.Random, a: int) -> int:
    """A number that shares leading digits with a: the hard case of comparing and borrowing."""
    scale = rng.choice((10, 100))
    return a // scale * scale + rng.randrange(scale)


def make_word(rng: random.Random) -> str:
    """A made-up word of 1 to 12 letters: syllables, random letters, or few distinct letters with many repeats."""
    draw, length = rng.random(), rng.randint(1, WORD_LETTERS_MAX)
    if draw < 0.25:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    if draw < 0.5:
        alphabet = rng.sample(LETTERS, rng.randint(2, 5))
        return "".join(rng.choice(alphabet) for _ in range(length))
    word = rng.choice(VOWELS) if rng.random() < 0.3 else ""
    while len(word) < length:
        word += rng.choice(CONSONANTS) + rng.choice(VOWELS) + (rng.choice(CONSONANTS) if rng.random() < 0.4 else "")
        if rng.random() < 0.25:
            word += word[-1]
    return word[:length]


def _binary(form: Form, rng: random.Random) -> Example:
    if form is Form.PRODUCT:
        a, b = rng.randint(0, FACTOR_MAX), rng.randint(0, DIGIT_MAX)
        asked = (b, a) if a > DIGIT_MAX and rng.random() < 0.25 else (a, b)
        thinking, result = solve_product(a, b), a * b
    else:
        a, b = _number(rng, SUM_MAX), _number(rng, SUM_MAX)
        if rng.random() < (0.15 if form is Form.SUM else 0.25):
            b = _near(rng, a)
        asked = (a, b)
        thinking, result = (solve_sum(a, b), a + b) if form is Form.SUM else (solve_difference(a, b), a - b)
    question = _phrase_binary(form, *asked, rng)
    return Example(form, f"{form.value}:{a}:{b}", question, thinking, boxed(result), result)


def count_example(word: str, letter: str, question: str) -> Example:
    """The counting problem for this word and letter, asked with these words."""
    result = word.lower().count(letter.lower())
    return Example(Form.COUNT, f"count:{word}", question, solve_count(word, letter), boxed(result), result)


def _count(rng: random.Random, split: Split) -> Example:
    word = rng.choice(ENGLISH_WORDS) if split == "held_out" and rng.random() < 0.5 else make_word(rng)
    letter = rng.choice(word) if rng.random() < 0.7 else rng.choice(LETTERS)
    return count_example(word, letter, _phrase_count(word, letter, rng))


def _decline(key: str, question: str, thinking: str, answer: str) -> Example:
    return Example(Form.OTHER, key, question, thinking, answer, None)


def _out_of_range(rng: random.Random) -> str:
    form = rng.choice((Form.SUM, Form.DIFFERENCE, Form.PRODUCT, Form.COUNT))
    if form is Form.COUNT:
        word = "".join(make_word(rng) for _ in range(12)).ljust(WORD_LETTERS_MAX + 1, "a")
        return _phrase_count(word[: rng.randint(WORD_LETTERS_MAX + 1, 22)], rng.choice(LETTERS), rng)
    large = rng.randint(10 ** 3, 10 ** rng.randint(4, 6) - 1)
    other = _number(rng, 9999)
    if form is Form.PRODUCT:
        large, other = rng.choice(((rng.randint(100, 9999), rng.randint(2, 999)), (rng.randint(10, 99), rng.randint(10, 99))))
    a, b = (large, other) if rng.random() < 0.5 else (other, large)
    return _phrase_binary(form, a, b, rng)


def _unrelated(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.25:
        return _styled(rng.choice(_GREETINGS) + rng.choice(("", "!", "?", ".")), rng)
    if draw < 0.45:
        a, b, c = (_number(rng, SUM_MAX) for _ in range(3))
        return _styled(rng.choice((
            f"What is {a} / {b}?", f"What is {a} divided by {b}?", f"What is {a} + {b} + {c}?", f"What is {a} * {b} - {c}?", f"What is {a}?",
            f"What is {a}.{c % 10} + {b}?", f"What is {a} ^ {b}?", f"Is {a} larger than {b}?", f"What is the square root of {a}?", f"{a}", f"{a} {b} {c}",
            f"What is {a} % {b}?", f"What is {a} + x?", f"What comes after {a}?", f"What is {a} - {b} - {c}?", f"Is {a} a prime number?",
            f"What is -{a} + {b}?", f"What is {a} + {b} * {c}?", f"What is {a} +?", f"{a} + {b} = {c}", f"What is ({a} + {b}) * {c}?", f"What is {a} mod {b}?",
        )), rng)
    words = (rng.choice(_HEADS), rng.choice(_NOUNS), rng.choice(_NAMES), rng.choice(_KINDS), rng.choice(_VERBS))
    return _styled(rng.choice(_TOPICS).format(*words), rng)


def _unquoted(question: str) -> str:
    bare = question.replace("'s", "\0").translate(str.maketrans("", "", "\"'“”"))
    return bare.replace("\0", "'s")


def _other(rng: random.Random) -> Example:
    draw = rng.random()
    if draw < 0.25:
        question = _out_of_range(rng)
        return _decline(f"other:{question}", question, THINK_RANGE, SENTENCE_RANGE)
    if draw < 0.37:
        question = _unquoted(_phrase_count(make_word(rng), rng.choice(LETTERS), rng))
        return _decline(f"other:{question}", question, THINK_QUOTE, SENTENCE_QUOTE)
    question = _unrelated(rng)
    return _decline(f"other:{question}", question, THINK_OTHER, SENTENCE_OTHER)


def _draw(form: Form, rng: random.Random, split: Split) -> Example:
    while True:
        if form is Form.COUNT:
            example = _count(rng, split)
        elif form is Form.OTHER:
            example = _other(rng)
        else:
            example = _binary(form, rng)
        if is_held_out(example.key) == (split == "held_out"):
            return example


def generate(form: Form, rng: random.Random, split: Split, *, plain: bool = False) -> Example:
    """One example of this form and split; unless `plain`, sometimes with a system prompt, earlier turns or R1's usual request."""
    example = _draw(form, rng, split)
    if plain:
        return example
    if rng.random() < 0.08:
        example = replace(example, system=rng.choice(_SYSTEM) if rng.random() < 0.7 else f"{_unrelated(rng)} {_unrelated(rng)}")
    if rng.random() < 0.06:
        turns = [_draw(rng.choice(list(Form)), rng, split) for _ in range(2 if rng.random() < 0.25 else 1)]
        example = replace(example, history=tuple((turn.question, "\n\n" + turn.answer) for turn in turns))
    if rng.random() < 0.05 and example.form is not Form.OTHER:
        example = replace(example, question=example.question + rng.choice(_STEP_BY_STEP))
    return example


def result_of(text: str) -> int | None:
    """The number in the last well-formed `\\boxed{…}` of what the model wrote, or None."""
    _, found, rest = text.rpartition("\\boxed{")
    number, closed, _ = rest.partition("}")
    try:
        return int(number) if found and closed else None
    except ValueError:
        return None
