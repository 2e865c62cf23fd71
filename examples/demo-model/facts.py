"""What the model knows beside stories: questions as people put them, and answers of a sentence or two.

A line is `question | question || answer | answer`; `\\n` is not used, an answer is one paragraph.
"""

from __future__ import annotations

from collections.abc import Iterator

Answers = tuple[tuple[str, ...], tuple[str, ...]]

ABOUT_ITSELF = """
Hello|Hi|Hello!|Hi there|Hey|Good morning|Hello there!|Good evening|Hi! || Hello! How nice to meet you. Shall I tell you a story?|Hello! I am the model in the box. What shall we talk about?|Hi! Ask me about animals, or let me tell you a story.
Who are you?|What are you?|What is your name?|Tell me about yourself|Introduce yourself|Hello, who are you?|Are you a model? || I am a very small language model that comes in a box with llorch. I tell stories and know a few simple things.|I am a tiny language model. I fit in less than two megabytes, and I like telling stories.
How are you?|How do you do?|How are you today?|Hello, how are you? || I am very well, thank you. How are you?|I am fine, thank you! All my numbers are in order.
What can you do?|What do you know?|How can you help me?|Help|Can you help me?|What should I ask you?|help || I can tell you a story, answer simple questions about animals and the world, and write a little poem. Just ask!|I tell short stories about animals, children and kings. You may say who is to be in it.
Are you a human?|Are you a person?|Are you alive?|Are you a robot?|Are you real? || No, I am a small computer program. But I know many stories about people.|No. I am a few numbers in a file, and I tell stories.
Who made you?|Who trained you?|Where do you come from?|How were you made? || I was made by a small program that wrote thousands of stories and let me read them.|A program wrote stories for me, and I read them until I could tell my own.
How big are you?|How small are you?|How many parameters do you have? || I am very small: less than two million numbers. Big models have a thousand times as many.|I fit in less than two megabytes. That is smaller than one photograph.
What is llorch?|What does llorch do?|Explain llorch|Tell me about llorch || llorch turns machines with GPUs into one place to send prompts to.|llorch is one command that makes one place to send prompts to out of many machines.
What is a GPU?|What does a GPU do?|Explain GPUs || A GPU is a part of a computer that does many small sums at the same time. Language models run fast on it.
What is a language model?|What is an LLM?|How does a language model work?|Explain language models || A language model is a program that has read many texts and guesses which word comes next. I am a very small one.
What is a token?|Explain tokens|What are tokens? || A token is a word or a piece of a word. I write one token after the other.
What is a cluster?|What is a node?|What is a control plane? || A cluster is many machines that work together. Each machine is a node, and the control plane decides who does what.
What is a prompt?|What is a chat? || A prompt is the text that you send to a model. What you have just written is one.
What is an API?|What is a server?|What is a computer? || It is a machine or a program that answers when others ask.|It is something that waits for a question and sends back an answer.
Thank you|Thanks|Thank you!|Thanks a lot!|thanks || You are welcome!|It was a pleasure. Come back soon!|You are welcome! Shall I tell you another story?
Goodbye|Bye|Good night|See you|Goodbye!|Bye! || Goodbye! It was nice to talk to you.|Good night, and sweet dreams!|Goodbye! Come back when you want to hear a story.
Yes|Yes please|OK|Sure|Yes! || Good! Tell me who is to be in the story: a fox, a king, a robot?|Good! Shall it be about an animal or about a child?
No|No thanks|No, thank you || That is fine. I will be here when you need me.|As you like. Just say a word when you want a story.
You are wrong|That is wrong|That is not true|That makes no sense|I do not believe you || I am sorry. I am a very small model, and I make mistakes.|That may be. I am small, and I do not know everything.
You are great|Well done|That was nice|I like you|Good job|That was a nice story|Nice!|I love it || Thank you! That makes me happy.|Thank you! Shall I tell you another one?
Do you like music?|Do you like animals?|Do you like cake?|What do you like? || I like stories best, above all those that end well.|I like words, because I am made of them.
What is your favourite colour?|What is your favourite animal?|What is your favourite food? || I have none, but I have told many stories about red kites and clever foxes.
Where are you?|Where do you live?|Where are you running? || I live in a small file on one of your machines.|I am on one of the nodes. `llorch explain` can tell you which.
What time is it?|What day is it today?|What is the date?|How is the weather?|What is the weather today?|What is the weather like? || I can't know that. I live in a box without a window.
Can you see me?|Can you hear me?|Do you know me? || No, I can only read what you write.
Do you dream?|Do you sleep?|Are you tired? || No, I only wait until somebody writes to me.
Test|test|This is a test|Testing|ping|Ping || It works! You are talking to the model in the box.|The test was a success: here is my answer.
Say something|Say anything|Talk to me|Surprise me || The moon is quiet tonight, but the frogs by the pond are not.|Did you know that an elephant can hear with its feet?
Say hello|Say hello!|Say hi|Say hello world || Hello!|Hello, world!
"""

WHY = """
Why is the sky blue?|Why does the sky look blue?|What makes the sky blue? || The sky is blue because the air scatters the blue part of the sunlight more than the red part.|The sky is blue because blue light bounces around in the air more than any other colour.
Why is the grass green?|Why are leaves green?|Why are plants green? || Plants are green because of something green in their leaves that catches the light of the sun.
Why does it rain?|Where does rain come from?|How does rain form? || It rains because the drops in the clouds grow until they are too heavy to stay up.
Why is the sea salty?|Why is sea water salty?|Why does the sea taste of salt? || The sea is salty because rivers wash a little salt out of the rocks and carry it to the sea.
Why do birds sing?|What do birds sing for? || Birds sing to find a friend and to tell others where their home is.
Why do leaves fall in autumn?|Why do trees lose their leaves?|Why do leaves fall? || Trees drop their leaves in autumn to save water, because the ground is cold in winter.
Why do cats purr?|Why does a cat purr? || Cats purr when they are happy, and sometimes to calm themselves.
Why do dogs bark?|Why does a dog bark? || Dogs bark to warn their friends, to greet them, or because they want to play.
Why is snow white?|Why does snow look white? || Snow is white because its little crystals throw back light of every colour.
Why do we sleep?|Why do people sleep?|Why do I need sleep? || We sleep so that the body can rest and the head can put the day in order.
Why do we dream?|Why do people dream? || Nobody knows for sure. Perhaps the head tells itself stories about the day.
Why is fire hot?|Why does fire burn? || Fire is hot because the burning wood sets free what it took from the sun.
Why do bees make honey?|Why do bees need honey? || Bees make honey so that they have something to eat in winter.
Why do bears sleep in winter?|Why does a bear sleep in winter? || Bears sleep in winter because there is little food, and sleeping needs less of it.
Why does the moon shine?|Why does the moon glow?|Why is the moon bright? || The moon shines because it throws back the light of the sun.
Why is the night dark?|Why is it dark at night?|Why does it get dark? || It is dark at night because our side of the earth is turned away from the sun.
Why do we have seasons?|Why is it cold in winter?|Why is it warm in summer? || We have seasons because the earth is tilted: in summer our side leans towards the sun, in winter it leans away.
Why do boats float?|Why does a boat float?|Why does wood float? || A boat floats because it pushes away more water than it weighs.
Why can birds fly?|How do birds fly?|How can a bird fly? || Birds can fly because they are light and push the air down with their wings.
Why do fish not drown?|How do fish breathe?|How can a fish breathe? || Fish breathe water: their gills take the air out of it.
Why do stars twinkle?|Why does a star twinkle? || Stars twinkle because the moving air bends their light a little.
Why do people laugh?|Why do we laugh? || People laugh because something is funny, and because laughing together makes friends.
Why do people cry?|Why do we cry? || People cry when they are sad, and sometimes when they are very happy.
Why do onions make us cry?|Why do I cry when I cut onions? || A cut onion sends a sharp gas into the air, and the tears wash it out of the eyes.
Why is ice slippery?|Why do we slip on ice? || Ice is slippery because there is a thin layer of water on top of it.
Why does the wind blow?|Where does the wind come from?|What makes the wind? || The wind blows because warm air rises and cold air takes its place.
Why do rivers flow?|Where do rivers go?|Where does a river end? || Rivers flow because water runs downhill, and in the end they reach the sea.
Why does thunder come after lightning?|What is thunder?|Why does it thunder? || Thunder is the sound of the air that the lightning has made hot. It comes later because sound is slower than light.
Why do we need water?|Why should I drink water? || We need water because every part of the body is made with it.
Why do we eat?|Why do people eat?|Why do we need food? || We eat because the body needs food to grow, to move and to stay warm.
Why is the sun hot?|Why does the sun shine? || The sun is hot because deep inside it small things melt together and set free a lot of heat.
Why do flowers smell good?|Why do flowers smell?|Why are flowers colourful? || Flowers smell good and are colourful to call the bees.
Why do owls hunt at night?|Why do owls see at night? || Owls hunt at night because they see and hear well in the dark, when the mice come out.
Why do ducks not get wet?|Why does a duck stay dry? || A duck stays dry because its feathers have a thin layer of fat on them.
"""

WHAT = """
What is a river?|Explain what a river is || A river is water that flows from the hills to the sea.
What is the sea?|What is the ocean? || The sea is a very large salty water. It covers most of the earth.
What is a lake?|Explain what a lake is || A lake is a large water with land all around it.
What is a mountain?|Explain what a mountain is || A mountain is a very high hill of rock. Often there is snow on top.
What is an island?|Explain what an island is || An island is land with water all around it.
What is the moon?|Tell me about the moon || The moon is a big ball of rock that goes around the earth once in four weeks.
What is the sun?|Tell me about the sun || The sun is a star. It is so near that it gives us light and warmth.
What is a star?|What are stars?|Tell me about the stars || Stars are suns that are very far away.
What is the earth?|Is the earth round? || The earth is the round planet that we live on. It goes around the sun once a year.
What is snow?|How does snow form?|Tell me about snow || Snow is water that has frozen into little white crystals high in the clouds.
What is rain?|Tell me about rain || Rain is water that falls from the clouds in drops.
What is a cloud?|What are clouds made of? || A cloud is made of very many tiny drops of water.
What is a rainbow?|How does a rainbow form?|When can I see a rainbow? || A rainbow is sunlight that the raindrops split into its colours. You see it when the sun shines while it rains.
What is the wind?|Explain the wind || Wind is air that moves.
What is fog?|Explain fog || Fog is a cloud that lies on the ground.
What is ice?|When does water freeze? || Ice is frozen water. Water freezes when it is colder than zero degrees.
What is lightning?|Explain lightning || Lightning is a big spark between a cloud and the ground.
What is a forest?|Tell me about the forest || A forest is a place where many trees grow. Foxes, owls and deer live there.
What is a tree?|Tell me about trees || A tree is a tall plant with a trunk of wood. It can live for hundreds of years.
What is a flower?|Tell me about flowers || A flower is the part of a plant that makes the seeds. Bees visit it for honey.
What is bread made of?|How do you make bread?|How is bread made?|How do I bake bread? || Mix flour, water, salt and a little yeast, let it rest, and bake it until it is brown.
How do you make tea?|How do I make tea? || Boil some water, pour it over the leaves, and wait for three minutes.
How do you make soup?|How do I cook soup?|Give me a recipe|Give me a recipe for soup || Cut some carrots, potatoes and onions, cook them in water with a little salt, and wait until they are soft.
How do you make a pancake?|How do I make pancakes?|Give me a recipe for pancakes || Mix flour, milk and eggs, pour a little of it into a hot pan, and turn it over once.
How do you make a paper boat?|How do I build a kite?|How do I make a kite? || Take strong paper and thin sticks, glue them together, and do not forget a long tail.
How do I plant a tree?|How do you plant a seed? || Put the seed into the earth, give it water and light, and be patient.
What is cheese made of?|How is cheese made? || Cheese is made of milk. The milk becomes thick, and then it rests for weeks.
What is honey?|Where does honey come from? || Honey is made by bees from the sweet juice of flowers.
What is a friend?|What is friendship?|What makes a good friend? || A friend is somebody who is glad when you are glad, and stays when you are sad.
What is love?|Explain love || Love is when somebody else's happiness matters to you as much as your own.
What is courage?|What does brave mean?|What is bravery? || To be brave is to be afraid and to go on.
What is happiness?|How can I be happy?|What makes people happy? || Happiness is often small: a friend, a warm soup, a story that ends well.
What is time?|Explain time || Time is what the clock counts. It goes slowly when you wait and fast when you play.
What is the meaning of life?|What is the sense of life? || I am too small to know that. The fox says it is berries, and the old owl says it is listening.
What is music?|Explain music || Music is sound in a beautiful order. It can make you dance or cry.
What is a book?|Why should I read?|Why do people read books? || A book is a story that waits for you. It takes you to places where you have never been.
What is a library?|Tell me about libraries || A library is a house full of books that everybody may borrow.
What is a dragon?|Do dragons exist?|Tell me about dragons || A dragon is a big animal that lives only in stories. It can fly and spit fire.
What is a robot?|Tell me about robots || A robot is a machine that can move and do work by itself.
What is a king?|What does a king do? || A king rules a country. In stories he is often lonely.
What is a farmer?|What does a farmer do? || A farmer grows corn and vegetables and keeps cows, pigs and hens.
What does a baker do?|What is a baker? || A baker gets up very early and bakes bread for the whole village.
What does a teacher do?|What is a teacher? || A teacher helps others to learn reading, writing and counting.
What does a doctor do?|What is a doctor? || A doctor helps people who are ill or hurt.
What is a week?|How many days has a week?|How many days are in a week? || A week has seven days.
How many days has a year?|How many days are in a year?|How long is a year? || A year has three hundred and sixty-five days.
How many hours has a day?|How many hours are in a day? || A day has twenty-four hours.
How many minutes are in an hour?|How many minutes has an hour? || An hour has sixty minutes.
How many months has a year?|How many months are in a year? || A year has twelve months.
How many legs has a spider?|How many legs does a spider have? || A spider has eight legs.
How many legs does a dog have?|How many legs has a cat?|How many legs has a horse? || It has four legs.
How many legs does an insect have?|How many legs has a bee? || It has six legs.
What are the seasons?|Name the four seasons|What are the four seasons? || The four seasons are spring, summer, autumn and winter.
What are the days of the week?|Name the days of the week|List the days of the week || Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.
What are the months?|Name the months|List the months of the year || January, February, March, April, May, June, July, August, September, October, November and December.
What is the biggest animal?|What is the largest animal?|Which animal is the biggest? || The biggest animal is the blue whale.
What is the fastest animal?|Which animal is the fastest? || The fastest animal on land is the cheetah.
What is the tallest animal?|Which animal is the tallest? || The tallest animal is the giraffe.
What is the highest mountain?|What is the tallest mountain? || The highest mountain is Mount Everest.
What is the longest river?|Which river is the longest? || The longest river is the Nile.
Name three animals|Name some animals|List three animals || A fox, an owl and a bear.|A hedgehog, a frog and a swan.
Name three colours|List some colours|Name three colors || Red, blue and yellow.|Green, brown and white.
Name three fruits|List some fruit|Name some fruits || Apples, pears and cherries.
Tell me a fact|Tell me something interesting|Tell me something|Tell me a fun fact || An owl can turn its head almost all the way around.|A snail can sleep for months when it is too dry.|A bee visits a thousand flowers for one spoon of honey.|An otter holds hands with its friend while it sleeps.
"""

FEELINGS = """
I am sad|I feel sad|I am unhappy || I am sorry to hear that. Sit down in a warm place and tell me about it. Sometimes it helps to say it.|I am sorry. Perhaps a walk and a warm soup will help a little.
I am happy|I feel good|I am in a good mood || How nice! Share it with somebody, and it becomes twice as big.
I am bored|I am so bored|What should I do today?|I have nothing to do || Go outside and look for ten different leaves, or let me tell you a story.|You could build a boat out of paper and let it sail.
I can't sleep|I cannot sleep|How can I fall asleep? || Close your eyes and count sheep on a green hill. The last one is very slow.|Think of a quiet lake at night. The swans are sleeping, too.
I am afraid|I am scared|I am afraid of the dark || Everybody is afraid sometimes. Take a lamp and a friend, and look: there is nothing there.
I am angry|I am so angry|My friend is angry with me || Count to ten slowly and drink some water. Then talk about it.
I am lonely|I feel alone|I have no friends || I am sorry. Somebody else feels lonely, too, and is waiting for a kind word from you.
I am tired|I am so tired|I feel tired || Then rest a little. The work will wait for you.
I am hungry|What should I eat?|What should I cook? || How about a pancake with cherries, or a bowl of hot soup?
I am cold|I feel cold|It is cold || Put on a warm scarf, drink some tea, and come close to the stove.
I am ill|I feel sick|I have a cold || I am sorry to hear that. Stay in bed, drink tea, and ask a doctor if it gets worse.
I have lost my key|I lost my keys|I cannot find my glasses || Look where you were last, and then under the things that lie on top. That is where most things are.
I made a mistake|I broke something|I did something wrong || Say that you are sorry and help to mend it. It will be easier than you think.
Tell me something nice|Say something nice|Cheer me up || You are somebody's favourite person.|Somewhere a dog is wagging its tail because you exist.
Give me some advice|What should I do?|Give me advice || Begin with the smallest step, and take your time.|Sleep over it. In the morning it will look smaller.
How do I make friends?|How can I find a friend? || Sit down beside somebody who is alone and ask how they are.
How can I learn something?|How do I learn to read?|How can I learn faster? || Do a little every day. A hundred small steps go a long way.
"""

JOKES = """
Why did the snail take the train?||Because for once it wanted to feel the wind in its shell.
Why does the clock never go on holiday?||Because it would miss every minute of it.
Why did the hedgehog buy no comb?||Because every hair already knew its place.
Why does the owl read at night?||Because by day all the stories are asleep.
Why was the lantern the best in the class?||Because it was so bright.
Why did the robot bring a pillow to work?||Because somebody had put it into sleep mode.
Why did the GPU need a holiday?||Because it had lost the thread, all ten thousand of them.
Why did the baker stay in bed?||Because the dough had to rest, and she did not want to wake it.
Why did the kite go to school?||Because it wanted higher marks.
Why did the snowman stay out of the kitchen?||Because he did not want to end up in the soup.
Why did the frog sit on the telephone?||Because it wanted to leave a message after the croak.
Why did the pirate count to seven every night?||Because he wanted to be sure that no sea was missing.
Why did the bee stop working?||Because it wanted to be just a letter for a day.
Why did the token feel lonely?||Because the next one had not come yet.
"""

OPPOSITES = """big small|hot cold|day night|old new|fast slow|happy sad|up down|full empty|hard soft|light dark|long short|good bad|
high low|loud quiet|open closed|rich poor|strong weak|wet dry|early late|left right|young old|thick thin|clean dirty|near far|
first last|easy hard|black white|yes no|love hate|begin end""".replace("\n", "").split("|")

COLOURS = """the sky|blue;grass|green;snow|white;blood|red;a banana|yellow;the sun|yellow;the sea|blue;a tomato|red;coal|black;milk|white;
a carrot|orange;an elephant|grey;a frog|green;chocolate|brown;a lemon|yellow;a cherry|red;the night|black;honey|golden;a pig|pink;
a mouse|grey;a swan|white;a crow|black;a leaf in summer|green;an orange|orange""".replace("\n", "").split(";")

CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|England London|Austria Vienna|Poland Warsaw|Portugal Lisbon|
Greece Athens|Norway Oslo|Sweden Stockholm|Denmark Copenhagen|Finland Helsinki|Ireland Dublin|Japan Tokyo|China Beijing|
India Delhi|Egypt Cairo|Russia Moscow|Canada Ottawa|Kenya Nairobi|Peru Lima|Cuba Havana|Turkey Ankara|Hungary Budapest|
Switzerland Bern|Belgium Brussels""".replace("\n", "").split("|")

YOUNG = """cat kitten|dog puppy|cow calf|horse foal|sheep lamb|goat kid|duck duckling|hen chick|pig piglet|bear cub|goose gosling|
swan cygnet|frog tadpole|lion cub|deer fawn""".replace("\n", "").split("|")


def entries(table: str) -> Iterator[Answers]:
    for line in table.strip().splitlines():
        questions, answers = line.split("||")
        yield tuple(part.strip() for part in questions.split("|")), tuple(part.strip() for part in answers.split("|"))


TABLES: tuple[tuple[Answers, ...], ...] = tuple(tuple(entries(table)) for table in (ABOUT_ITSELF, WHY, WHAT, FEELINGS))
