"""The small world that the stories are about: who lives in it, where, with what, and what everything is like.

The entries carry what makes a story hang together: what an animal is good at decides whom a lost thing needs, what is
wrong with a thing decides how it is mended, a place decides what can be seen and heard there.
"""

from __future__ import annotations

from dataclasses import dataclass

GIRLS = """
Mia Anna Lena Ella Ruby Clara Nora Ida Lucy Rosa Emma Zoe Alice Grace Hanna Lily Maya Sara Eva Julia Tessa Wilma Dora
Kate Amy
""".split()
BOYS = """
Tom Ben Max Leo Paul Oscar Finn Jack Sam Theo Noah Emil Hugo Karl Peter Felix Oliver Simon David Ravi Omar Otto Jonas
Henry Will
""".split()
PETS = """
Rusty Pip Bella Coco Dot Pepper Hazel Moss Biscuit Nutmeg Smoky Daisy Button Clover Bramble Poppy Socks Sunny
""".split()


@dataclass(frozen=True)
class Kind:
    """An animal, or somebody with no name but what they are."""

    noun: str
    like: str  # adjectives, comma separated
    home: str
    food: str
    sound: str = ""
    skill: str = ""  # what it is asked for when it helps
    gender: str = ""  # she, he, or either
    animal: bool = True


def _animals(table: str) -> list[Kind]:
    return [Kind(*(part.strip() for part in line.split("/"))) for line in table.strip().splitlines()]


ANIMALS = _animals("""
fox / clever, quick, red / in a den under the roots of a tree / berries and eggs / barks / find
rabbit / small, quick, soft / in a hole under the hill / grass and carrots / squeaks / dig
hare / fast, brown, thin / in the long grass / grass and herbs / squeaks / run
mouse / tiny, grey, brave / behind the kitchen wall / cheese and seeds / squeaks / small
owl / wise, old, quiet / in a hollow oak / mice and beetles / hoots / dark
bear / big, brown, slow / in a warm cave / honey and fish / growls / strong
squirrel / quick, red, cheerful / in a nest of leaves high in a tree / nuts and seeds / chatters / climb
hedgehog / small, shy, round / under a heap of leaves / worms and apples / snuffles / find
frog / green, cheerful, loud / by the pond / flies / croaks / swim
duck / white, kind, loud / among the reeds / bread and water plants / quacks / swim
otter / playful, brown, quick / on the bank of the river / fish / whistles / swim
mole / blind, busy, black / under the meadow / worms / squeaks / dig
badger / old, strong, grumpy / deep under the wood / roots and worms / grunts / dig
crow / black, clever, old / at the top of the tallest tree / anything it finds / caws / fly
sparrow / small, brown, cheerful / under the roof of the barn / seeds / chirps / fly
swan / white, proud, calm / on the lake / water plants / hisses / swim
cat / soft, grey, curious / in the warm house by the stove / fish and milk / purrs / dark
dog / faithful, happy, young / in a basket by the door / meat and bones / barks / find
goat / stubborn, white, hungry / in a shed on the hill / leaves and grass / bleats / climb
sheep / gentle, white, woolly / on the green hill / grass / bleats / warm
cow / gentle, brown, patient / in the barn / grass and hay / moos / strong
horse / strong, brown, fast / in the stable / hay and apples / neighs / run
donkey / stubborn, grey, patient / in the old stable / hay and thistles / brays / strong
pig / pink, clever, muddy / behind the barn / potatoes and apples / grunts / find
hen / brown, busy, careful / in the hen house / corn / clucks / warm
goose / white, loud, brave / in the yard / grass and corn / honks / swim
snail / slow, small, patient / under a leaf / leaves / makes no sound / small
turtle / slow, old, calm / by the warm stones of the pond / leaves and berries / makes no sound / swim
bee / busy, small, golden / in a hive in the garden / honey / hums / fly
butterfly / bright, light, gentle / among the flowers / nectar / makes no sound / fly
elephant / huge, gentle, grey / near the wide river / leaves and fruit / trumpets / strong
lion / proud, strong, golden / on the warm plain / meat / roars / strong
monkey / funny, quick, brown / in the jungle / bananas and nuts / chatters / climb
penguin / small, funny, black / on the ice / fish / squawks / swim
whale / huge, calm, blue / in the deep sea / tiny shrimp / sings / swim
wolf / lonely, grey, strong / in the dark forest / meat / howls / run
deer / shy, gentle, brown / in the quiet wood / leaves and grass / makes hardly a sound / run
parrot / bright, loud, green / in a tall palm / fruit and nuts / talks / fly
""")

PEOPLE = [
    Kind(*(part.strip() for part in line.split("/")), animal=False)
    for line in """
farmer / kind, busy, old / in a house with a red roof / bread and soup / sings while working / strong / he
baker / friendly, round, cheerful / above the bakery / fresh bread / whistles / warm / she
fisherman / quiet, old, patient / in a hut by the sea / fish / hums / swim / he
sailor / brave, young, cheerful / on a small ship / fish and dry bread / sings / climb / he
teacher / clever, kind, patient / next to the school / soup and apples / reads aloud / find / she
king / old, lonely, proud / in a castle on the hill / cake and roast apples / sighs / strong / he
queen / wise, kind, busy / in a castle of white stone / honey cake / laughs softly / find / she
princess / brave, curious, young / in a tall tower / cherries and cake / laughs / climb / she
prince / shy, young, kind / in a quiet castle / cake and pears / sighs / run / he
wizard / old, forgetful, kind / in a crooked tower / mushroom soup / mumbles / find / he
witch / clever, old, friendly / in a hut in the woods / pumpkin soup / laughs loudly / fly / she
knight / brave, tired, honest / in a small castle / bread and cheese / sings old songs / strong / he
giant / huge, gentle, lonely / behind the mountains / whole baskets of bread / hums deeply / strong / he
robot / small, shiny, polite / in a workshop / nothing but sunlight / beeps / strong / he
dragon / green, lonely, friendly / in a cave in the mountains / hot chilli soup / roars / fly / he
pirate / loud, bold, funny / on an old ship / coconuts and fish / sings loudly / swim / he
snowman / round, cold, cheerful / in the garden of a school / snowflakes / says little / warm / he
clown / funny, sad, colourful / in a yellow wagon / pancakes / plays the trumpet / climb / he
gardener / patient, quiet, kind / beside the rose garden / beans and tomatoes / hums / dig / she
grandmother / kind, old, wise / in a little house by the wood / pea soup / tells stories / warm / she
ghost / shy, pale, friendly / in the attic of an old house / moonlight / whispers / dark / he
shepherd / young, quiet, careful / in a hut on the hill / bread and cheese / plays the flute / run / she
""".strip().splitlines()
]


@dataclass(frozen=True)
class Place:
    the: str
    at: str  # a preposition for being there
    to: str  # and one for going there
    seen: str  # what there is, comma separated
    heard: str


PLACES = [
    Place(*(part.strip() for part in line.split("/")))
    for line in """
the forest / in / into / tall trees, ferns, red mushrooms / the wind in the leaves
the meadow / on / to / yellow flowers, butterflies, long grass / the bees
the river / by / to / smooth stones, small fish, reeds / the water
the lake / by / to / white swans, an old boat, water lilies / the waves on the stones
the sea / by / to / shells, high waves, white gulls / the waves
the beach / on / to / shells, warm sand, small crabs / the gulls
the hill / on / up / soft grass, an old stone wall, sheep / the wind
the mountain / on / up / grey rocks, snow, a narrow path / a far waterfall
the village / in / to / little houses, a fountain, a baker's shop / the church bell
the market / at / to / baskets of apples, colourful cloth, fresh bread / many voices
the garden / in / into / roses, beans, an apple tree / the birds
the farm / on / to / a red barn, hens, a big tractor / the cows
the park / in / to / green benches, a pond, old trees / children at play
the cave / in / into / strange stones, dark corners, drops of water / a soft dripping
the island / on / to / palm trees, white sand, a ruined tower / the sea
the old mill / at / to / a big wheel, sacks of flour, spiders / the turning wheel
the harbour / at / to / ships, nets, barrels / the ropes in the wind
the station / at / to / a long train, big clocks, suitcases / the whistle of a train
the school / at / to / small chairs, a blackboard, coloured pencils / the bell
the castle / in / to / long stairs, old pictures, a golden chair / steps in the hall
the attic / in / up to / dusty boxes, old hats, a broken mirror / the rain on the roof
the orchard / in / to / apple trees, ladders, baskets / the wasps
the swamp / in / into / mud, tall reeds, little lights / the frogs
the library / in / to / shelves full of books, quiet corners, a globe / the turning of pages
""".strip().splitlines()
]


@dataclass(frozen=True)
class Thing:
    """Something that can be owned, lost, made, broken and mended."""

    noun: str
    like: str
    trouble: str  # what it does not do any more
    cause: str
    mend: str  # past tense, without the subject
    works: str
    use: str


THINGS = [
    Thing(*(part.strip() for part in line.split("/")))
    for line in """
kite / red, yellow, paper / would not fly / its tail was too short / tied a long ribbon to its tail / the kite climbed high above the trees / fly it in the wind
boat / little, wooden, blue / would not float / there was a hole in it / closed the hole with wax / the boat floated like a duck / sail it on the pond
lantern / old, brass, green / would not shine / there was no oil in it / filled it with oil / warm light filled the room / carry it through the dark
clock / old, tall, golden / did not tick any more / dust had got into its wheels / blew the dust out of its wheels / the clock ticked like new / look at it every hour
music box / small, silver, round / would not play / its spring was broken / put in a new spring / a sweet song filled the air / listen to it before sleep
drum / big, red, round / sounded dull / its skin was loose / pulled the skin tight / the drum sounded like thunder / beat it at every feast
umbrella / big, yellow, striped / let the rain in / it had a tear / sewed the tear with strong thread / not a drop came through / take it out in the rain
bicycle / blue, rusty, fast / would not move / its chain had come off / put the chain back and oiled it / the wheels turned without a sound / ride it down the hill
swing / wooden, high, old / hung crooked / one rope was too short / tied a longer rope to it / the swing flew up to the leaves / swing until supper
cart / wooden, heavy, little / would not roll / one wheel was cracked / nailed a strong board to the wheel / the cart rolled smoothly down the road / carry apples in it
flute / wooden, thin, silver / made no sound / a pea was stuck in it / pushed the pea out with a straw / the flute sang like a bird / play it in the evening
bell / small, silver, heavy / did not ring / its tongue was missing / hung a little stone inside / the bell rang clear and bright / ring it at noon
sledge / fast, red, wooden / would not slide / its runners were rusty / rubbed the runners with a candle / the sledge flew over the snow / race it down the hill
lamp / small, green, old / stayed dark / its wire was loose / pushed the wire back / the lamp glowed like a star / read beside it
toy train / little, black, shiny / kept stopping / a hair was caught in its wheels / pulled the hair out / the train ran round and round / play with it on rainy days
basket / wide, brown, new / dropped everything / its handle had come off / wove a new handle from willow / it carried twenty apples / gather nuts in it
pump / iron, green, old / gave no water / a leaf was stuck in the pipe / cleaned the pipe / cold clear water came out / water the garden with it
tent / small, green, round / fell down every night / one pole was bent / cut a new pole from hazel wood / the tent stood firm in the wind / sleep in it in summer
balloon / huge, red, striped / stayed on the ground / the basket was too heavy / took the stones out of the basket / the balloon rose over the roofs / look at the world from it
telescope / long, brass, old / showed only fog / its glass was dirty / cleaned the glass with a soft cloth / the stars came near enough to touch / look at the moon with it
hat / tall, green, funny / kept falling off / it was too big / sewed a band into it / the hat sat right even in the wind / wear it on Sundays
watering can / green, small, tin / leaked / its bottom was cracked / closed the crack with clay / every drop stayed inside / water the beans with it
door / heavy, blue, old / would not open / its lock was rusty / put a drop of oil into the lock / the door opened without a sound / go through it every morning
spinning top / bright, wooden, small / fell over at once / its tip was bent / straightened the tip / the top danced across the floor / spin it on the table
""".strip().splitlines()
]

TREASURES = """a golden key|a blue marble|a silver ring|a red scarf|a warm glove|a little book|a shiny coin|a green button|a smooth white stone|
a wooden spoon|a small mirror|a letter|a toy horse|a striped sock|a silver whistle|a straw hat|a pocket knife|a ball of wool|a glass bead|
a red ball|a pair of glasses|a paper crown|a map""".replace("\n", "").split("|")

FOODS = """a loaf of bread|an apple|a pot of soup|a piece of cheese|a honey cake|a basket of cherries|a bowl of porridge|a plum pie|
a handful of nuts|a warm pancake|a jar of honey|a ripe pear|a bag of biscuits|a bowl of berries""".replace(
    "\n", ""
).split("|")

# Where a lost thing was, why it could not be taken, and which skill gets it out, how.
SPOTS = [
    tuple(part.strip() for part in line.split("/"))
    for line in """
at the bottom of the pond / the water was deep and cold / swim / dived down and came up with it
in the top of a tall tree / the branches were thin and high / climb / climbed from branch to branch and brought it down
on the roof of the tower / nobody had a ladder so long / fly / flew up and pushed it gently over the edge
under the earth of the field / the ground was hard and dry / dig / dug a deep hole and pulled it out
in a narrow crack in the wall / every hand was too big for it / small / slipped into the crack and pushed it out
under a heavy stone / nobody could move the stone / strong / leaned against the stone until it rolled away
in a dark corner of the cave / it was too dark to see anything / dark / saw it at once, for darkness is no trouble for such eyes
somewhere in the long grass / the grass was as high as a house for something so small / find / walked slowly with the nose to the ground until it was found
on a cart that was rolling down the road / the cart was getting faster and faster / run / ran as fast as the wind and caught it
inside a block of ice / the ice was thick and cold / warm / breathed on the ice until it melted
""".strip().splitlines()
]

COLOURS = frozenset(["white", "black", "grey", "brown", "red", "green", "blue", "golden", "pink", "bright"])
WEATHER = ["sunny", "windy", "rainy", "foggy", "cold", "warm", "snowy", "quiet", "grey", "bright", "frosty", "stormy"]
SEASONS = ["spring", "summer", "autumn", "winter"]
