"""Who and what one story is about, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lexicon import (
    ANIMALS,
    BOYS,
    FOODS,
    GIRLS,
    PEOPLE,
    PETS,
    PLACES,
    SEASONS,
    SPOTS,
    THINGS,
    TREASURES,
    WEATHER,
    Kind,
    Place,
    Thing,
)
from wording import one_of, upper

HOMES = (
    "in a little house at the end of the road",
    "in a house by the river",
    "in a small village",
    "on a farm",
    "in a big noisy town",
    "above the bakery",
    "in a house with a green door",
)
LIKES = ("bread and butter", "pancakes", "apple pie", "stories", "cherries", "tomato soup", "chocolate", "music")
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}


@dataclass(frozen=True)
class Character:
    """`name` is how the story speaks of them after the introduction `intro`; `called` how others address them."""

    name: str
    intro: str
    called: str
    gender: str
    kind: Kind | None  # None: a child
    like: str
    home: str
    likes: str = "bread and butter"

    def slots(self, prefix: str) -> dict[str, str]:
        subject, oblique, possessive = PRONOUNS[self.gender]
        words = {
            "": self.name,
            "intro": self.intro,
            "called": self.called,
            "he": subject,
            "him": oblique,
            "his": possessive,
            "like": self.like,
            "kind": self.kind.noun if self.kind else ("girl" if self.gender == "she" else "boy"),
            "home": self.home,
            "food": self.kind.food if self.kind else self.likes,
        }
        found = {f"{prefix}{name}": text for name, text in words.items()}
        return found | {name[0].upper() + name[1:]: upper(text) for name, text in found.items()}


def child(rng: Random, name: str | None = None, gender: str | None = None) -> Character:
    gender = gender or rng.choice(("she", "he"))
    name = name or rng.choice(GIRLS if gender == "she" else BOYS)
    like = rng.choice(("little", "curious", "brave", "quiet", "cheerful", "clever", "shy", "kind", "dreamy"))
    noun = "girl" if gender == "she" else "boy"
    home, likes = rng.choice(HOMES), rng.choice(LIKES)
    return Character(name, f"a {like} {noun} called {name}", name, gender, None, like, home, likes)


def creature(rng: Random, kind: Kind, *, named: bool | None = None) -> Character:
    gender = kind.gender or rng.choice(("she", "he"))
    like = one_of(kind.like, rng)
    if named is None:
        named = kind.animal and rng.random() < 0.3
    if named:
        name = rng.choice(PETS)
        return Character(name, f"a {like} {kind.noun} called {name}", name, gender, kind, like, kind.home)
    return Character(f"the {kind.noun}", f"a {like} {kind.noun}", kind.noun, gender, kind, like, kind.home)


def anybody(rng: Random) -> Character:
    draw = rng.random()
    if draw < 0.35:
        return child(rng)
    return creature(rng, rng.choice(ANIMALS if draw < 0.8 else PEOPLE))


def somebody_else(rng: Random, *others: Character) -> Character:
    taken = {other.name for other in others} | {other.kind.noun for other in others if other.kind}
    while True:
        found = anybody(rng)
        if found.name not in taken and (found.kind is None or found.kind.noun not in taken):
            return found


def spot_and_helper(rng: Random, *others: Character) -> tuple[tuple[str, ...], Character]:
    """Where a lost thing is, and somebody else who can get it from there."""
    taken = {other.kind.noun for other in others if other.kind}
    while True:
        spot = rng.choice(SPOTS)
        able = [kind for kind in (*ANIMALS, *PEOPLE) if kind.skill == spot[2] and kind.noun not in taken]
        if able:
            return spot, creature(rng, rng.choice(able), named=False)


@dataclass
class Scene:
    """Everything a plot may speak of. What the caller leaves out is drawn."""

    rng: Random
    hero: Character
    friend: Character
    place: Place
    thing: Thing
    treasure: str
    food: str

    @classmethod
    def drawn(
        cls,
        rng: Random,
        hero: Character | None = None,
        friend: Character | None = None,
        place: Place | None = None,
        thing: Thing | None = None,
    ) -> Scene:
        hero = hero or anybody(rng)
        friend = friend or somebody_else(rng, hero)
        return cls(
            rng,
            hero,
            friend,
            place or rng.choice(PLACES),
            thing or rng.choice(THINGS),
            rng.choice(TREASURES),
            rng.choice(FOODS),
        )

    def slots(self) -> dict[str, str]:
        rng = self.rng
        (spot, obstacle, _, how), rescuer = spot_and_helper(rng, self.hero, self.friend)
        seen = [entry.strip() for entry in self.place.seen.split(",")]
        rng.shuffle(seen)
        look = one_of(self.thing.like, rng)
        own = self.treasure.split(" ", 1)[1] if self.treasure.startswith("a ") else self.treasure
        words = {
            "place": self.place.the,
            "at": f"{self.place.at} {self.place.the}",
            "to": f"{self.place.to} {self.place.the}",
            "seen": seen[0],
            "seen2": seen[1],
            "heard": self.place.heard,
            "thing": self.thing.noun,
            "look": look,
            "trouble": self.thing.trouble,
            "cause": self.thing.cause,
            "mend": self.thing.mend,
            "works": self.thing.works,
            "use": self.thing.use,
            "treasure": self.treasure,
            "own": own,
            "food": self.food,
            "thefood": f"the {self.food.split(' ', 1)[1]}",
            "weather": rng.choice(WEATHER),
            "season": rng.choice(SEASONS),
            "spot": spot,
            "obstacle": obstacle,
            "how": how,
        }
        words |= {upper(name): upper(text) for name, text in words.items()}
        return self.hero.slots("h") | self.friend.slots("f") | rescuer.slots("r") | words
