"""Conversations: what somebody asks, and what the model is to answer.

A conversation is a list of (role, text). Most are one question; some go on, ask about the story that was just told, or
begin with a system message that changes how the answers sound.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from random import Random

from cast import Character, Scene, child, creature, somebody_else
from facts import CAPITALS, COLOURS, JOKES, OPPOSITES, TABLES, YOUNG
from lexicon import ANIMALS, PEOPLE, PLACES, THINGS, Kind
from phrases import (
    AGAIN,
    ANY_STORY,
    NUMBERS,
    OTHER_HOMES,
    OTHER_LIKE,
    OTHERS,
    PLAIN_SYSTEMS,
    POLITE_SYSTEMS,
    REFUSALS,
    SHORT_SYSTEMS,
    SOUNDS,
    STORY_REQUESTS,
    UNKNOWN,
)
from poems import poem
from stories import PLOTS, Plot, told
from wording import tidy, upper

Turn = tuple[str, str]
Exchange = tuple[str, str]


# ---------------------------------------------------------------- words that the model has never seen


def made_up(rng: Random) -> str:
    """A word or a name that is none: what a person brings along has to be understood as a name, whatever it is."""
    syllables = (
        rng.choice(
            [
                "b",
                "c",
                "d",
                "f",
                "g",
                "h",
                "j",
                "k",
                "l",
                "m",
                "n",
                "p",
                "r",
                "s",
                "t",
                "v",
                "w",
                "x",
                "z",
                "br",
                "dr",
                "fr",
                "gr",
                "kl",
                "pr",
                "st",
                "tr",
                "sh",
                "th",
            ]
        )
        + rng.choice(["a", "e", "i", "o", "u", "a", "e", "o", "ai", "ee", "ou"])
        + rng.choice(("", "", "n", "r", "l", "s", "m", "x", "ck"))
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    word = "".join(syllables)
    return word.capitalize() if rng.random() < 0.4 else word


def gibberish(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.75:
        return made_up(rng)
    if draw < 0.85:
        return "".join(rng.choice(string.ascii_letters + string.digits + "_-./#:") for _ in range(rng.randint(3, 9)))
    if draw < 0.9:
        return "".join(
            chr(rng.choice((rng.randint(0xC0, 0x24F), rng.randint(0x400, 0x44F), rng.randint(0x4E00, 0x9FA5))))
            for _ in range(3)
        )
    return rng.choice(OTHERS)


def asked(text: str, rng: Random) -> str:
    """As people type it: not always with a capital, a question mark, or every letter."""
    draw = rng.random()
    if draw < 0.12:
        text = text[0].lower() + text[1:]
    elif draw < 0.16:
        text = text.lower()
    draw = rng.random()
    if draw < 0.12:
        text = text.rstrip("?.!")
    elif draw < 0.16 and not text.endswith(("?", ".", "!")):
        text += rng.choice((".", "!", "?", " please", ", please") if len(text) > 12 else (".", "!"))
    elif draw < 0.19 and text[-1] == "?":
        text = rng.choice(("Can you tell me: ", "Please tell me: ", "Hello! ", "Hey, ", "I have a question. ")) + text
    if rng.random() < 0.04 and len(text) > 8:
        at = rng.randrange(1, len(text) - 1)
        text = text[:at] + text[at + 1 :]
    return text


# ---------------------------------------------------------------- one question, one answer


def fact(rng: Random) -> Exchange:
    questions, answers = rng.choice(rng.choices(TABLES, weights=(5, 3, 5, 2))[0])
    return asked(rng.choice(questions), rng), rng.choice(answers)


def joke(rng: Random) -> Exchange:
    riddle, end = (part.strip() for part in rng.choice(JOKES.strip().splitlines()).split("||"))
    if rng.random() < 0.15:
        return asked(riddle, rng), end
    please = (
        "Tell me a joke",
        "Do you know a joke?",
        "Make me laugh",
        "A joke, please",
        "Tell me something funny",
        "Another joke",
    )
    return asked(rng.choice(please), rng), f"{riddle} {end}"


def unknown(rng: Random) -> Exchange:
    template = rng.choice(UNKNOWN)
    question = re.sub(r"\(([^()]*)\)", lambda found: rng.choice(found[1].split("|")), template)
    while "@" in question:
        question = question.replace("@", gibberish(rng), 1)
    return asked(tidy(question), rng), rng.choice(REFUSALS)


def small_fact(rng: Random) -> Exchange:
    return rng.choice((_capital, _colour, _opposite, _young, _animal, _animal, _animal))(rng)


def _capital(rng: Random) -> Exchange:
    country, city = rng.choice(CAPITALS).split()
    ways = (
        f"What is the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Name the capital of {country}",
        f"Capital of {country}?",
        f"The capital of {country} is",
    )
    return asked(rng.choice(ways), rng), f"The capital of {country} is {city}."


def _colour(rng: Random) -> Exchange:
    thing, colour = rng.choice(COLOURS).split("|")
    word = rng.choice(("colour", "color"))
    return asked(f"What {word} is {thing}?", rng), f"{upper(thing)} is {colour}."


def _opposite(rng: Random) -> Exchange:
    pair = rng.choice(OPPOSITES).split()
    rng.shuffle(pair)
    ways = (f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]}?", f"Opposite of {pair[0]}")
    return asked(rng.choice(ways), rng), f"The opposite of {pair[0]} is {pair[1]}."


def _young(rng: Random) -> Exchange:
    animal, young = rng.choice(YOUNG).split()
    return asked(f"What is a baby {animal} called?", rng), tidy(f"A baby {animal} is called a {young}.")


def _animal(rng: Random) -> Exchange:
    kind = rng.choice(ANIMALS)
    a = tidy(f"a {kind.noun}")
    some = upper(a)
    likes = [part.strip() for part in kind.like.split(",")]
    exchange = rng.choice(
        (
            (
                (f"Where does {a} live?", f"Where is the home of {a}?", f"Where do I find {a}?"),
                f"{some} lives {kind.home}.",
            ),
            ((f"What does {a} eat?", f"What is the food of {a}?", f"What do I feed {a}?"), f"{some} eats {kind.food}."),
            (
                (f"What does {a} do?", f"What sound does {a} make?", f"What does {a} sound like?"),
                f"{some} {kind.sound}.",
            ),
            (
                (
                    f"What is {a}?",
                    f"Tell me about {a}",
                    f"What do you know about {a}?",
                    f"Describe {a}",
                    f"Explain what {a} is",
                ),
                f"{some} is a {likes[0]} animal. It lives {kind.home} and eats {kind.food}.",
            ),
            ((f"What is {a} like?", f"How is {a}?"), f"{some} is {likes[0]}, {likes[1]} and {likes[2]}."),
        )
    )
    return asked(rng.choice(exchange[0]), rng), tidy(exchange[1])


def sums(rng: Random) -> Exchange:
    if rng.random() < 0.25:
        end = rng.randint(3, 12)
        count = " ".join(f"{number}," for number in range(1, end)) + f" {end}."
        up = rng.choice(
            (f"Count to {end}", f"Count from 1 to {end}", f"Count to {NUMBERS[end]}", f"Please count to {end}.")
        )
        return asked(up, rng), count
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    sign, word, result = rng.choice((("+", "plus", left + right), ("-", "minus", left), ("*", "times", left * right)))
    if sign == "-":
        left += right
    ways = (f"What is {left} {sign} {right}?", f"What is {left}{sign}{right}?", f"What is {left} {word} {right}?",
            f"How much is {left} {word} {right}?", f"{left} {sign} {right}", f"{left}{sign}{right}=")  # fmt: skip
    return asked(rng.choice(ways), rng), f"{left} {word} {right} is {result}."


def verse(rng: Random) -> Exchange:
    draw = rng.random()
    other = f"the {rng.choice(OTHERS)}" if draw < 0.2 else made_up(rng) if draw < 0.35 else None
    it, lines = poem(rng, other)
    kind = rng.choice(("poem", "poem", "short poem", "song", "haiku", "rhyme"))
    ways = (f"Write a {kind} about {it}", f"Write a {kind} about {it}.", f"Can you write a {kind} about {it}?",
            f"A {kind} about {it}, please", f"Make a {kind} about {it}", f"Write me a {kind} on {it}")  # fmt: skip
    if rng.random() < 0.15:
        return asked(
            rng.choice(("Write a poem", "Tell me a poem", "A poem, please", "Write a haiku", "Sing a song")), rng
        ), lines
    return asked(rng.choice(ways), rng), lines


# ---------------------------------------------------------------- stories that somebody asks for


def story(rng: Random, *, short: bool = False) -> tuple[Exchange, Scene]:
    it, scene, plot, wanted = _wish(rng)
    short = short or rng.random() < 0.4
    for _ in range(12):
        text = told(scene, plot, short=short)
        if all(word in text for word in wanted):
            break
    request = rng.choice(ANY_STORY) if not it else tidy(rng.choice(STORY_REQUESTS).format(it=it))
    return (asked(request, rng), text), scene


def _wish(rng: Random) -> tuple[str, Scene, Plot | None, tuple[str, ...]]:
    """What is asked for, the scene and the plot that grant it, and words that have to be in the story."""
    draw = rng.random()
    if draw < 0.12:
        return "", Scene.drawn(rng), None, ()
    if draw < 0.22:
        plot = rng.choice(PLOTS)
        return plot.about, Scene.drawn(rng), plot, ()
    if draw < 0.30:
        place = rng.choice(PLACES)
        return place.the, Scene.drawn(rng, place=place), None, (place.the,)
    if draw < 0.38:
        thing = rng.choice(THINGS)
        return f"a {thing.noun}", Scene.drawn(rng, thing=thing), rng.choice(_WITH_THING), (thing.noun,)
    hero = wanted_hero(rng)
    it = f"a {hero.kind.noun}" if hero.kind else _child_words(hero, rng)
    if hero.kind and hero.name == hero.called and rng.random() < 0.9:
        it += f" {rng.choice(('called', 'named'))} {hero.name}"
    draw = rng.random()
    if draw < 0.2:
        friend = somebody_else(rng, hero)
        it += f" and {f'a {friend.kind.noun}' if friend.kind else friend.name}"
        return it, Scene.drawn(rng, hero, friend), None, (hero.called, friend.called)
    if draw < 0.32:
        place = rng.choice(PLACES)
        return f"{it} {place.at} {place.the}", Scene.drawn(rng, hero, place=place), None, (place.the,)
    if draw < 0.42:
        thing = rng.choice(THINGS)
        return (
            f"{it} {rng.choice(('with', 'and'))} a {thing.noun}",
            Scene.drawn(rng, hero, thing=thing),
            rng.choice(_WITH_THING),
            (thing.noun,),
        )
    if draw < 0.5:
        plot = rng.choice(PLOTS)
        return f"{it} and {plot.about}", Scene.drawn(rng, hero), plot, ()
    return it, Scene.drawn(rng, hero), None, ()


_WITH_THING = tuple(plot for plot in PLOTS if plot.about in ("a broken thing", "a storm", "telling the truth"))


def wanted_hero(rng: Random, *, made_up_too: bool = True) -> Character:
    draw = rng.random()
    if draw < 0.3:
        return child(rng, made_up(rng).capitalize() if made_up_too and rng.random() < 0.75 else None)
    if draw < 0.6:
        kind = rng.choice((*ANIMALS, *PEOPLE))
    else:
        noun = made_up(rng).lower() if made_up_too and rng.random() < 0.25 else rng.choice(OTHERS)
        kind = Kind(noun, OTHER_LIKE, rng.choice(OTHER_HOMES), rng.choice(("soup", "bread", "apples", "berries")))
    hero = creature(rng, kind, named=False)
    if made_up_too and rng.random() < 0.2:
        name = made_up(rng).capitalize()
        return Character(
            name, f"a {hero.like} {kind.noun} called {name}", name, hero.gender, kind, hero.like, kind.home
        )
    return hero


def _child_words(hero: Character, rng: Random) -> str:
    noun = "girl" if hero.gender == "she" else "boy"
    return rng.choice(
        (
            f"a {noun} called {hero.name}",
            f"a {noun} named {hero.name}",
            hero.name,
            f"a little {noun} called {hero.name}",
        )
    )


def question_about(scene: Scene, text: str, rng: Random) -> Exchange | None:
    """A question that the story before answers, if there is one."""
    hero, friend = scene.hero, scene.friend
    can_ask = [
        (("Who was the story about?", "Who was in the story?", "Who was it about?"), f"It was about {hero.intro}.")
    ]
    if hero.home in text:
        ways = (f"Where did {hero.name} live?", "Where was that?", f"Where does {hero.name} live?")
        can_ask.append((ways, f"{upper(hero.name)} lived {hero.home}."))
    if friend.intro in text:
        can_ask.append(
            ((f"Who met {hero.name}?", "Who else was there?", "Who was the other one?"), f"It was {friend.intro}.")
        )
    if scene.place.the in text:
        ways = ("Where did it happen?", "Where was it?", f"Where was {hero.name}?")
        can_ask.append((ways, f"It was {scene.place.at} {scene.place.the}."))
    ways, answer = rng.choice(can_ask)
    return asked(rng.choice(ways), rng), tidy(answer)


# ---------------------------------------------------------------- whole conversations


SINGLE: tuple[tuple[Callable[[Random], Exchange], float], ...] = (
    (fact, 5), (small_fact, 2.5), (joke, 0.7), (unknown, 2), (sums, 1.6), (verse, 1.5),
)  # fmt: skip


def exchange(rng: Random) -> Exchange:
    makers, weights = zip(*SINGLE, strict=True)
    return rng.choices(makers, weights=weights)[0](rng)


def one_answer(rng: Random) -> list[Turn]:
    system, voice = _system(rng)
    question, answer = exchange(rng)
    return [*_first(system), ("user", question), ("assistant", voice(answer))]


def conversation(rng: Random) -> list[Turn]:
    system, voice = _system(rng)
    turns = _first(system)
    for _ in range(rng.choice((1, 2, 2, 3, 4, 5))):
        if rng.random() < 0.3:
            (question, answer), scene = story(rng, short=system in SHORT_SYSTEMS)
            _add(turns, question, _in_voice(system, voice, answer))
            if rng.random() < 0.6 and voice is _same:
                follow = question_about(scene, answer, rng)
                if follow:
                    _add(turns, *follow)
            if rng.random() < 0.2:
                _add(turns, asked(rng.choice(AGAIN), rng), _in_voice(system, voice, told(Scene.drawn(rng), short=True)))
        else:
            question, answer = exchange(rng)
            _add(turns, question, voice(answer))
            if answer.endswith(("a story?", "one?")) and rng.random() < 0.6:
                _add(
                    turns,
                    rng.choice(("Yes", "Yes, please", "yes please", "Sure", "OK", "Yes!")),
                    _in_voice(system, voice, told(Scene.drawn(rng), short=True)),
                )
    return turns


def _first(system: str) -> list[Turn]:
    return [("system", system)] if system else []


def _add(turns: list[Turn], question: str, answer: str) -> None:
    turns += (("user", question), ("assistant", answer))


def _in_voice(system: str, voice: Callable[[str], str], story: str) -> str:
    """A story stays whole where short answers are wanted: half a story is no answer."""
    return story if system in SHORT_SYSTEMS else voice(story)


def _same(answer: str) -> str:
    return answer


def _system(rng: Random) -> tuple[str, Callable[[str], str]]:
    """A system message, and what it makes of an answer."""
    draw = rng.random()
    if draw < 0.6:
        return "", _same
    if draw < 0.75:
        return rng.choice(PLAIN_SYSTEMS), _same
    if draw < 0.82:
        return rng.choice(SHORT_SYSTEMS), first_sentence
    if draw < 0.88:
        return rng.choice(POLITE_SYSTEMS), lambda answer: f"With pleasure. {answer}"
    who, sound = rng.choice(tuple(SOUNDS.items()))
    text = tidy(
        rng.choice(
            ("You are a {who}.", "You are a {who}", "Talk like a {who}.", "Be a {who}.", "Answer like a {who}.")
        ).format(who=who)
    )
    return text, lambda answer: f"{sound}! {answer}"


def first_sentence(text: str) -> str:
    found = re.match(r".*?[.!?]\"?(?= |\n|$)", text, re.DOTALL)
    return found[0] if found else text
