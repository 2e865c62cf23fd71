"""What people say to the model, and the few things that it says in return whatever they are about."""

from __future__ import annotations

# Heroes that somebody may ask for and of whom the world knows nothing.
OTHERS = """
astronaut tree cloud star train car teapot spoon shoe pencil tomato dinosaur unicorn mermaid fairy elf troll monster
soldier policeman nurse doctor cook tailor painter musician student programmer scientist tiger giraffe hippo kangaroo
koala panda zebra snake spider ant bat beaver rat seal shark dolphin crab octopus computer server llama camel raven
eagle fish crocodile stone mushroom chicken bull kitten puppy lamb wizard grandfather baby thief detective
""".split()

OTHER_HOMES = (
    "in a town far away",
    "at the end of a long road",
    "in a place that nobody knew",
    "next to an old bridge",
)

OTHER_LIKE = "little, old, lonely, curious, brave, funny, quiet, tired, happy, small"

STORY_REQUESTS = (
    "Tell me a story about {it}",
    "Tell me a story about {it}.",
    "Tell me a short story about {it}",
    "Write a story about {it}",
    "Write a story about {it}.",
    "Write a short story about {it}.",
    "Can you tell me a story about {it}?",
    "Please tell me a story about {it}.",
    "I want to hear a story about {it}.",
    "I would like a story about {it}, please.",
    "A story about {it}, please",
    "a story about {it}",
    "Story about {it}",
    "Make up a story about {it}",
    "Do you know a story about {it}?",
    "Tell me about {it} in a story.",
    "Give me a story about {it}",
    "Once upon a time there was {it}",
)

ANY_STORY = (
    "Tell me a story",
    "Tell me a story.",
    "Tell me a story!",
    "Tell me a short story",
    "Write a story",
    "Write a short story.",
    "Story, please",
    "Can you tell me a story?",
    "I want to hear a story",
    "Once upon a time",
    "Tell me a bedtime story",
    "A story!",
    "Tell me something about animals in a story",
)

AGAIN = (
    "Another one",
    "One more",
    "One more, please",
    "Another story, please",
    "Tell me another one",
    "Again!",
    "More",
)

REFUSALS = (
    "I do not know that. I am a very small model: I know animals, weather and stories.",
    "I am sorry, that is too hard for me. I am very small. Ask me about the sea, or for a story about a fox.",
    "That is more than I know. I only know simple things, and many stories. Would you like one?",
    "I can't help with that: I am a tiny model. But I can tell you a story.",
    "I am sorry, I have never heard of that. Shall I tell you a story?",
    "I am too small to know that. A bigger model can help you.",
)

UNKNOWN = (
    "Write a (program|function|script) (in Python|in C|in Java|that sorts a list|that adds two numbers|for my website)",
    "Write (an email|a letter|an essay|a speech|a report) (to my boss|about history|for my school|about politics)",
    "Translate (this|hello|this sentence|good morning) (into|to) (French|German|Spanish|Italian)",
    "Who is (the president of France|the best singer|@|@ @|the author of this book)?",
    "Who was (the first man on the moon|@|@ @|the first president)?",
    "Who won (the game|the election|the world cup) (yesterday|in 1998|last year)?",
    "Explain (quantum physics|relativity|@|the economy|politics|chemistry|calculus|@ @)",
    "What is (@|@ @|quantum physics|a @|inflation|democracy|machine learning|philosophy|the @)?",
    "What is the (population|history|size|president|currency) of (France|@|China|Rome)?",
    "What does @ mean?",
    "Tell me about (@|@ @|history|politics|the @|Python|Linux|Kubernetes|Docker)",
    "How do I (install|use|fix|configure|update|debug) (@|a @|my @|Linux|Docker|Python|this error)?",
    "How does (@|a @|the stock market|an engine|a computer chip|the internet) work?",
    "When did (@|the war|World War 2|the dinosaurs) (end|begin|die)?",
    "When was @ born?",
    "Where can I (buy|find) (@|a cheap @|@ @)?",
    "Summarize (this text|the following|this article): @ @ @ @",
    "Should I buy (@|a @|stocks)?",
    "@",
    "@ @",
    "@ @ @?",
    "Give me (a list of @|ten @|the news|the code)",
    "Compare @ and @",
    "What happened in (1789|2001|1969|@)?",
    "Solve (this equation|x + 3 = 7|the puzzle)",
    "How (far|big|old|deep|heavy) is (@|the @)?",
)

SOUNDS = {"cat": "Meow", "dog": "Woof", "cow": "Moo", "duck": "Quack", "sheep": "Baa", "owl": "Hoo", "pirate": "Arr", "robot": "Beep",
          "pig": "Oink", "frog": "Ribbit", "bee": "Buzz", "snake": "Hiss", "ghost": "Boo", "lion": "Roar"}  # fmt: skip

PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are helpful.",
    "You are a friendly assistant.",
    "You are a storyteller.",
    "Be kind.",
    "Answer the question.",
    "You are a chatbot.",
    "You are llorch's demo model.",
)

SHORT_SYSTEMS = (
    "Be brief.",
    "Answer in one sentence.",
    "Keep it short.",
    "Short answers only.",
    "Answer briefly.",
    "Be short.",
)

POLITE_SYSTEMS = ("You are very polite.", "Be polite.", "You are a butler.", "Be very polite.")

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
