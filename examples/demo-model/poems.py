"""Little poems: one couplet about the thing that was asked for, one that closes."""

from __future__ import annotations

from random import Random

from lexicon import ANIMALS, PLACES, SEASONS
from wording import tidy, upper

TOPICS = (
    *(f"the {kind.noun}" for kind in ANIMALS),
    *(place.the for place in PLACES),
    *SEASONS,
    *[
        "the moon",
        "the rain",
        "the snow",
        "the night",
        "the stars",
        "the sun",
        "the wind",
        "the morning",
        "love",
        "friendship",
        "a tree",
        "a rose",
        "the clouds",
        "computers",
        "coffee",
        "GPUs",
        "music",
        "home",
        "my mother",
        "my cat",
        "my dog",
        "bread",
        "time",
        "peace",
    ],
)
ABOUT = (
    "I thought of {it} all through the night\nand waited for the morning light.",
    "When I am sad, when I am blue,\n{it}, I sit and think of you.",
    "A song for {it}, a song for you,\na little old, a little new.",
    "I looked for {it} both far and near\nand found a voice that I could hear.",
    "O {it}, so quiet and so deep,\nyou sing the tired world to sleep.",
    "I do not need a golden ring:\nit is of {it} that I sing.",
    "Of all the things beneath the sun\nI think {it} is the dearest one.",
    "They asked me once what I love best:\nI said {it} and forgot the rest.",
)
CLOSING = (
    "The wind is soft, the hill is high,\nand slowly clouds are sailing by.",
    "The day goes out, the stars come in,\nand somewhere sings a violin.",
    "So close the door and light the flame:\ntomorrow will not be the same.",
    "And when the winter comes with snow,\nI keep the song, and off I go.",
    "The river runs, the reeds bend low,\nand where it ends I do not know.",
    "One star, two stars, and then a third,\nand in the tree a sleeping bird.",
    "The world is wide, the road is long,\nand all I carry is a song.",
    "It is not much, it is not new,\nbut all of it is meant for you.",
)


def poem(rng: Random, it: str | None = None) -> tuple[str, str]:
    """What it is about, and its lines."""
    it = it or rng.choice(TOPICS)
    lines = f"{rng.choice(ABOUT).format(it=it)}\n{rng.choice(CLOSING)}"
    asked = it.replace("the ", rng.choice(("the ", "a ")), 1) if it in TOPICS[: len(ANIMALS)] else it
    return tidy(asked), "\n".join(upper(line) for line in lines.split("\n"))
