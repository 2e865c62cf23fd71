"""The plots. A story is an opening, the beats of one plot, and an ending that fits it.

A beat is a template (see `wording`); one that begins with `?` may be left out. In a template h is the hero, f a friend, r one who has
the skill that is needed: `{h}` the name, `{hhe} {hhim} {hhis}` the pronouns, capitals at the start of a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from cast import Scene
from lexicon import COLOURS
from wording import filled

OPENINGS = (
    "Once upon a time there was {hintro}. {Hhe} lived {hhome}.",
    "Once upon a time there was {hintro} who lived {hhome}.",
    "Once upon a time, {hhome}, there lived {hintro}.",
    "Once upon a time {hintro} lived {hhome}.",
    "There was once {hintro} who (loved|liked) {hfood}.",
    "Long ago there lived {hintro}. Every (morning|evening) {hhe} went {to}.",
    "One {weather} (morning|evening|afternoon|day) {hintro} (went|walked|came) {to}.",
    "One day {hintro} (went|walked) {to}.",
    "In the (middle of {season}|first days of {season}) {hintro} went {to}.",
    "It was a {weather} (morning|evening|day) in {season}. {Hintro} sat {at} and listened to {heard}.",
    "{Hintro} lived {hhome}, not far from {place}.",
    "On a {weather} day {hintro} was walking {to}.",
    "The {hlike} {hkind} (lived {hhome}|sat {at} and listened to {heard}|went {to}|was (hungry|tired|happy|alone) that day).",
    "It was a (dark|quiet|cold|stormy) night, and {hintro} could not sleep.",
    "{At}, where there (is|was) nothing but {seen} and {seen2}, there lived {hintro}.",
)
ABOUT = (
    "{Hhe} was very {hlike}, and everybody knew it.",
    "{Hhe} liked (to listen to {heard}|to look at {seen}|to sit {at}).",
    "{Hhis} best friend was {fintro}.",
    "Most of all {hhe} loved {hfood}.",
)


@dataclass(frozen=True)
class Plot:
    """`about` is what a reader would say the story is about: used when one is asked for."""

    about: str
    beats: tuple[str, ...]
    ending: tuple[str, ...]


PLOTS = (
    Plot(
        "something lost",
        (
            "{H} had {treasure} (that {hhis} grandmother had given {hhim}|and took it everywhere|that brought good luck).",
            "(One day|That day) {hhe} lost it {at}. (|{Hhe} looked behind every stone, but the {own} was gone.)",
            '?("Where can it be?" {hhe} said|{Hhe} was so sad that {hhe} could not eat).',
            "Then {hhe} saw it: it was {spot}. But {obstacle}.",
            '{H} (asked {r} for help|went to {r} for help|went to {r} and told {rhim} everything). "(Do not worry|Leave it to me|I will try)," said {r}.',
            "So {r} {how}.",
            "?{H} (was so happy that {hhe} danced|laughed and jumped for joy|held the {own} tight).",
        ),
        (
            '"Thank you!" said {h}, and {hhe} gave {r} {food}.',
            "From that day on {h} and {r} were friends.",
            "{H} never lost the {own} again.",
            "Since then {h} (knows|has known) that everybody is good at something.",
        ),
    ),
    Plot(
        "a broken thing",
        (
            "{H} had a {look} {thing}. {Hhe} liked to {use}.",
            'But one {weather} (day|morning) the {thing} {trouble}. (|"What is wrong with it?" said {h}.)',
            "?{Hhe} shook it and turned it around, but (that did not help|nothing happened).",
            '(Then|Just then) {fintro} came by and looked at it (closely|for a long time). "I see," said {f}. "{Cause}."',
            "Together they {mend}.",
            "And (really|look): {works}!",
        ),
        (
            "{H} thanked {f}, and they (shared|ate) {food} together.",
            '"It is easy when you know the cause," said {f}.',
            "Now {h} and {f} use it together every day.",
            "{H} was proud, because {hhe} had learned how to mend it.",
        ),
    ),
    Plot(
        "being afraid",
        (
            "{H} was afraid of (the dark|thunder|deep water|high places|big dogs|being alone). (|{Hhe} did not tell anybody.)",
            "One (dark|stormy|cold|quiet|windy) night {hhe} had to go {to}, because {fintro} was (ill|lost there|waiting there).",
            "{Hhis} heart beat fast. {Hhe} heard (a strange sound|a noise|something behind {hhim}).",
            '"Who is there?" {hhe} (called|whispered|asked).',
            "But it was only {heard}. {H} had to laugh.",
            "?{Hhe} sang a little song and walked on.",
            'Soon {hhe} found {f}. "You came all this way alone?" asked {f}. "You are brave!"',
        ),
        (
            '"I was afraid," said {h}, "but I went on." And that is what brave means.',
            "Since that night {h} (has not been|was not) afraid any more.",
            "They walked home together, and the way was (short|not dark at all).",
        ),
    ),
    Plot(
        "sharing",
        (
            "{H} had {food} and was very hungry. {Hhe} sat down {at} to eat.",
            "Then {fintro} came along. {Fhe} was thin and (tired|cold|wet).",
            '"I have not eaten since yesterday," said {f}.',
            "{H} looked at {thefood}. It was (not very big|just enough for one). (|{Hhe} thought for a moment.)",
            '"We can share," said {h}, and {hhe} gave {f} the bigger half.',
            "?They ate slowly and looked at {seen}.",
            "The next (day|week) {h} (fell into a ditch|was caught in the rain|lost the way), and it was {f} who helped {hhim}.",
        ),
        (
            "Half of something with a friend is better than all of it alone.",
            '"You helped me, so I help you," said {f}.',
            "After that they (often|always) ate together.",
        ),
    ),
    Plot(
        "a race",
        (
            'One day {fintro} said, "I am the fastest of all!" "Let us see," said {h}.',
            "They (wanted to race|agreed to race) from {place} to the old bridge. (|All the others came to watch.)",
            "{F} ran so fast that (the dust flew|nobody could see {fhim}). {H} went steadily, step by step.",
            'Halfway {f} (lay down to sleep|stopped to eat {food}|stopped to look at {seen}). "I have time," {fhe} thought.',
            "{H} did not stop. {Hhe} went on and on, past {f}.",
            "When {f} looked up, {h} was already at the bridge.",
        ),
        (
            '"Being fast is good," said {h}, "but going on is better."',
            '{F} laughed and said, "You have won, and I have learned something."',
            "Everybody cheered, and {h} shared {food} with {f}.",
        ),
    ),
    Plot(
        "a storm",
        (
            "{H} took the {look} {thing} and went {to}, for {hhe} wanted to {use}.",
            "Suddenly the sky grew dark, and (a storm came up|thunder rolled|heavy rain began to fall).",
            '"(Come in quickly|This way|Over here)!" called {fintro} from (a small hut|an open door|under a big rock).',
            "They sat close together and listened to (the thunder|the rain|the wind). (|It was almost cosy.)",
            "?{F} told a funny story, and {h} forgot to be afraid.",
            "After an hour the sun came out, and there was a rainbow over {place}.",
        ),
        (
            '"Without the storm I would not have met you," said {h}.',
            "{H} went home, wet but happy.",
            "Every time it rains, {h} thinks of {f}.",
        ),
    ),
    Plot(
        "a secret",
        (
            "One {weather} day {hhe} found {treasure} {at}, between {seen} and {seen2}.",
            '"Whose is it?" {hhe} (wondered|asked {fintro}).',
            "Nobody knew. So {h} (looked at it closely|turned it over|held it up to the light).",
            'There was something written on it: ("Look under the oldest tree."|"Go where the water begins."|"Count ten steps to the north.")',
            "{H} did what it said, and there was (a little door|a wooden box|a hidden path).",
            "Behind it {hhe} found (a garden full of flowers|a table with {food}|hundreds of old letters|a room full of toys).",
            "?{Hhis} eyes grew big.",
        ),
        (
            "{H} told only {hhis} best friend about it.",
            "It has been {hhis} secret ever since.",
            '"The best secrets are those you can share," said {h}, and {hhe} invited everybody.',
        ),
    ),
    Plot(
        "learning something",
        (
            "{H} wanted to learn to (swim|whistle|dance|read|bake bread|ride a bicycle|play the flute).",
            '(|At first it looked easy. )But {hhe} could not do it. "I will never learn it," said {h}.',
            '{Fintro} heard that. "I needed a hundred days," said {f}. "How many have you tried?" "One," said {h}.',
            "So they practised every (day|morning|evening) {at}.",
            '?Sometimes {h} wanted to give up, but {f} (only smiled|said, "Once more").',
            "On the (tenth|twentieth|hundredth) day it suddenly worked!",
        ),
        (
            "{H} was so proud that {hhe} showed it to everybody.",
            '"You see," said {f}, "it only needs time."',
            "Now {h} teaches it to the little ones.",
        ),
    ),
    Plot(
        "telling the truth",
        (
            "{H} was playing with {treasure} {at}. (|{Hhe} was not careful.)",
            "(Crash|Bang|Crack)! It hit the {look} {thing} of {fintro}, and now the {thing} was broken.",
            "Nobody had seen it. {H} (hid behind a wall|ran home|wanted to say nothing).",
            "But (that night {hhe} could not sleep|{hhis} supper did not taste good), because {hhe} was ashamed.",
            'The next morning {hhe} went to {f} and said, "It was me. I am sorry."',
            '{F} was (angry at first|quiet for a while). Then {fhe} said, "Thank you for telling me the truth."',
            "?They {mend}, and it was as good as new.",
        ),
        (
            "That night {h} slept very well.",
            "A broken {thing} can be mended, and so can a friendship.",
            "{H} felt as light as a feather.",
        ),
    ),
    Plot(
        "a new friend",
        (
            "{Fintro} had just moved {to}. {Fhe} did not know anybody.",
            "{H} saw {fhim} sitting alone {at}. {F} looked (sad|lonely|shy).",
            '"Do you want to play?" asked {h}. {F} only shook {fhis} head.',
            "So {h} sat down beside {fhim} and said nothing. They (watched|looked at) {seen}.",
            'After a while {f} said, "I miss my old home." "Tell me about it," said {h}.',
            "{F} told {hhim} everything, and the longer {fhe} talked, the happier {fhe} became.",
            "?Then {h} showed {fhim} {seen2}.",
        ),
        (
            "When the sun went down, they were friends.",
            '"Will you come back tomorrow?" asked {f}. "Every day," said {h}.',
            "Sometimes it is enough to sit beside somebody.",
        ),
    ),
    Plot(
        "a little seed",
        (
            '{Fintro} gave {hhim} a seed. "Plant it and be patient," said {f}.',
            "{H} put the seed into the earth {at} and gave it water every day.",
            'A week passed, and nothing happened. "(Is it dead|Did I do something wrong)?" asked {h}.',
            '"It is working under the earth, where you cannot see it," said {f}.',
            "?{H} waited (through the rain|all through {season}) and looked every morning.",
            "Then one day there was a small green leaf. It grew and grew until it was (a tall sunflower|a strong apple tree|a bush full of berries).",
        ),
        (
            "Good things need time.",
            "{H} and {f} sat in its shade and were happy.",
            "And every year {h} plants a new one.",
        ),
    ),
    Plot(
        "a noise at night",
        (
            "One night there was a (strange|terrible|funny) noise. (Knock, knock, knock!|Scratch, scratch, scratch!|Bump, bump, bump!)",
            '{H} sat up in bed. "(Is it a thief|Is it a ghost|What is that)?" {hhe} (thought|whispered).',
            "{Hhe} took {hhis} {look} {thing} and went to look. (|The floor was cold under {hhis} feet.)",
            "The noise came from (the kitchen|the roof|behind the door|under the stairs).",
            "Slowly {h} (opened the door|looked around the corner). There sat {fintro}!",
            '"(Sorry|I am sorry)," said {f}. "I (was hungry|was cold|could not find the door)."',
        ),
        (
            "{H} laughed and gave {fhim} {food}. Then they both slept until noon.",
            '"Next time, just ring the bell," said {h}.',
            "Since then {f} comes to visit every week, and by day.",
        ),
    ),
    Plot(
        "building something",
        (
            "{H} and {fintro} wanted to build (a house in a tree|a bridge over the stream|a raft|a hut of branches) {at}.",
            "{H} (brought|carried) the wood, and {f} brought nails and a rope.",
            "They worked all day. But (in the night the wind blew it down|when they stood on it, it fell apart), because (the ropes were too loose|the wood was too thin|they had been in a hurry).",
            '"(Let us give up|It is no use)," said {h}. "No," said {f}. "Now we know what not to do."',
            "They began again, slowly and carefully, (with stronger wood|with better knots|and measured everything twice).",
            "?In the evening they were tired and had dirty hands.",
            "This time it (held|stood firm).",
        ),
        (
            "They sat in it, ate {food} and listened to {heard}.",
            '"The second time is the best time," said {h}.',
            "It is still there today.",
        ),
    ),
    Plot(
        "a birthday",
        (
            "Tomorrow was the birthday of {fintro}. {H} wanted to give {fhim} something, but {hhe} had no money.",
            '{Hhe} went {to} to think. There {hhe} found {treasure}. (|"That is pretty," thought {h}, "but is it enough?")',
            "{H} (cleaned it|wrapped it in leaves|tied a ribbon around it) and wrote a little poem.",
            "The next day everybody brought big presents. {H} was (ashamed|nervous) and came last.",
            "{F} opened the little parcel and read the poem. {Fhe} was silent for a moment.",
            '"This is the best present of all," {fhe} said, "because you made it yourself."',
        ),
        (
            "Then they all ate {food} and danced until night.",
            "{H} was happier than {f}.",
            "A present is as big as the thought in it.",
        ),
    ),
    Plot(
        "a rescue",
        (
            "{At} {hhe} heard (a small voice|somebody crying|a cry for help). It was {fintro}!",
            "{F} (was stuck in the mud|had hurt {fhis} foot|was caught in a net|had fallen into a hole).",
            '"Help me, please!" said {f}. "I will," said {h}, "but I am not strong enough alone."',
            "So {h} ran to {r}. Together they (pulled|worked) as hard as they could.",
            "One, two, three, and {f} was free!",
            "?{F} was (cold|wet|weak), so they wrapped {fhim} in a blanket and gave {fhim} {food}.",
        ),
        (
            '"I will never forget this," said {f}.',
            "The three of them have been friends ever since.",
            "What one cannot do, three can.",
        ),
    ),
    Plot(
        "a wish",
        (
            'One night {h} saw a falling star. "I wish I could (fly|be big|be a king|talk to the moon|never have to sleep)," {hhe} said.',
            "In the morning the wish had come true! At first it was wonderful.",
            "But soon {h} noticed that (nobody played with {hhim} any more|everybody was afraid of {hhim}|{hhe} was tired and lonely).",
            '{Fintro} asked, "Why are you so sad? You have what you wanted."',
            '"I (miss my friends|want to be myself again|did not think about it)," said {h}.',
            "That night {hhe} looked for another star and wished everything back.",
        ),
        (
            "When {hhe} woke up, {f} was there, and everything was as before.",
            "Since then {h} (thinks before {hhe} wishes|is careful with wishes).",
            '"It is good to be what you are," said {f}.',
        ),
    ),
    Plot(
        "a quarrel",
        (
            "{H} and {fintro} were good friends. But one {weather} day both of them wanted to {use}.",
            'There was only one {thing}. "It is mine!" (cried|called|said) {h}. "No, I (found|saw|had) it first!" said {f}.',
            "They pulled at it from both sides until (it fell into the mud|it slipped out of their hands|both fell over).",
            "?After that they did not speak to each other for (two days|a whole week).",
            "{H} (went {to}|sat down {at}) alone, but (even {seen} looked sad|it was not the same without {f}).",
            'Then {f} came slowly along. "I am sorry," they both said at the same time.',
        ),
        (
            "They laughed, and the {look} {thing} belonged to both of them.",
            '"You first," said {h}. "No, you first," said {f}.',
            "A {thing} is only a {thing}, but a friend is a friend.",
        ),
    ),
    Plot(
        "the way home",
        (
            "{H} had gone too far and did not know the way home any more. (It was getting dark|Fog lay over {place}|Snow was falling).",
            "{Hhe} (called|shouted) as loud as {hhe} could, but only the echo answered.",
            'Then {hhe} met {fintro}. "I have lost my way," said {h}.',
            '"(Look at the stars|Listen to the river|Follow the wind)," said {f}. "(It|That) always (leads home|shows the way), if you are patient."',
            "They walked side by side, past {seen} and {seen2}.",
            "?When {h} was tired, {f} sang a song, and {hhis} feet became lighter.",
            "At last {hhe} saw (a light in the window|the smoke of the chimney|the old gate). {Hhe} was home!",
        ),
        (
            '"Come in and eat {food} with me," said {h} to {f}.',
            "Now {h} knows the way, and {hhe} shows it to others.",
            "{H} waved until {f} was only a small dot in the distance.",
        ),
    ),
    Plot(
        "being small",
        (
            "Everybody said that {h} was too (small|young|slow) to help. That made {hhim} (sad|angry).",
            "One {weather} day there was great excitement {at}: {fintro} had lost {treasure}, and it lay {spot}.",
            "All the big ones tried, but {obstacle}. They (shouted|pushed|argued), and nothing happened.",
            '"May I try?" asked {h}. Some of them laughed.',
            "But {h} had an idea. {Hhe} fetched {r}, and {r} {how}.",
            "?For a moment nobody said a word.",
        ),
        (
            '"You are not small," said {f}. "Your head is full of big ideas."',
            "Nobody ever laughed at {h} again.",
            "Since that day they ask {h} first.",
        ),
    ),
    Plot(
        "a song",
        (
            "{H} had a song in {hhis} head, but {hhe} did not know how it went on.",
            "{Hhe} asked everybody {at}. Nobody knew the (end|last line).",
            "So {hhe} sat down and hummed it again and again. {Heard} (hummed with {hhim}|sounded almost like it).",
            '{Fintro} stopped and listened. "My grandmother sang that," {fhe} said.',
            "Together they sang it to the end. It was about {seen} and about coming home.",
            "?The others came closer, one after the other, and some of them had tears in their eyes.",
        ),
        (
            "Since then it has been sung {at} every evening.",
            '"A song is finished when two sing it," said {f}.',
            "That night {h} slept with a smile.",
        ),
    ),
    Plot(
        "a long winter",
        (
            "It was the longest winter of all. Snow lay on everything, and {h} had only {food} left.",
            "There was a knock at the door. Outside stood {fintro}, white with snow.",
            '"May I come in? I am so cold," said {f}. {H} thought of {hhis} small supper, and then {hhe} opened the door wide.',
            "They sat by the fire, and {f} told stories of {place}, of {seen} and of {heard}.",
            "?Outside the wind howled, but inside it was warm.",
            "In the morning {f} was gone. But on the table lay {treasure}, and outside the first (flower|green leaf) was looking out of the snow.",
        ),
        (
            "Spring had come.",
            "{H} kept it and thought of {f} every winter.",
            '"Whoever opens the door lets the spring in," says {h} today.',
        ),
    ),
    Plot(
        "a good idea",
        (
            "There was a problem {at}: (it was too hot|there was no water|it was boring|nobody could sleep because of {heard}).",
            "Everybody (complained|grumbled) about it, day after day. Only {h} said nothing and thought.",
            'On the third day {hhe} stood up. "I have an idea," said {h}. "But I need a rope and {treasure}."',
            '"What for?" asked {fintro}. "(Wait and see|You will see tomorrow)," said {h} and (smiled|laughed).',
            "{Hhe} worked all night, and {f} held the lamp.",
            "In the morning everybody came running. It (really worked|was the best idea of the year)!",
        ),
        (
            '"How did you do that?" they asked. "I thought first," said {h}.',
            "{F} was the first to clap.",
            "And when there is a problem today, they look at {h}.",
        ),
    ),
)


_ONE_DAY = re.compile(r"^One (?:\w+ )?(day|night|morning)\b")


def told(scene: Scene, plot: Plot | None = None, *, short: bool = False) -> str:
    """One story."""
    rng = scene.rng
    slots = scene.slots()
    plot = plot or rng.choice(PLOTS)
    named = scene.hero.name == scene.hero.called
    opening = rng.choice([opening for opening in OPENINGS if not (named and "{hkind}" in opening)])
    knows_friend = False
    parts = [opening]
    happening = not re.search(r"there was|lived|Long ago|night", opening, re.IGNORECASE)
    if not short and rng.random() < 0.45:
        about = rng.choice(ABOUT if scene.hero.like not in COLOURS else ABOUT[1:])
        knows_friend = "{fintro}" in about
        parts.append(about)
    beats = [beat for beat in plot.beats if not beat.startswith("?") or (not short and rng.random() < 0.6)]
    parts += [beat.removeprefix("?") for beat in beats]
    parts.append(rng.choice(plot.ending))
    said = _told(parts, slots, rng, knows_friend)
    if happening:  # it is one day already
        said[1] = _ONE_DAY.sub(r"That \1", said[1])
    return " ".join(said)


def _told(parts: list[str], slots: Mapping[str, str], rng: Random, knows_friend: bool) -> list[str]:
    known = dict(slots)
    if knows_friend:
        known |= {"fintro": slots["f"], "Fintro": slots["F"]}
    said = []
    for part in parts:
        introduces_twice = part in ABOUT and "{fintro}" in part
        said.append(filled(part, slots if introduces_twice else known, rng))
        if "{fintro}" in part or "{Fintro}" in part:
            known |= {"fintro": slots["f"], "Fintro": slots["F"]}
    return said
