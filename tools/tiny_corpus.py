"""The small model's world: a template grammar for stories, questions, sums and facts to remember, and its tokenizer.

Every document is a list of (text, weight) pieces that join to one string; the weight is the loss weight of the
piece's tokens (0.1 and 0.3: words that nobody can foresee; 1: prose; 1.9: a result; 2 and 2.5: a word that
comes again; 4: a word that must be recalled; 6: a count over the whole text). Pieces meet only where
the pre-tokenizer cuts anyway, so they can be tokenized one by one.
"""
import functools, os, random, re
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, USER, BOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
THINK, DONE = "<think>", "</think>"
FAINT, DULL, PROSE, SUM, AGAIN, KEY, GIST = 0.1, 0.3, 1.0, 1.9, 2.5, 4.0, 6.0

GIRLS = "Mia Anna Lily Rosa Ella Nora Zoe Ivy Ruby Cleo Ada Greta".split()
BOYS = "Tom Ben Leo Sam Max Finn Jack Oscar Hugo Theo Emil Otto".split()
NAMES = GIRLS + BOYS
ANIMALS = "fox owl cat dog bear mouse frog duck hen goat rabbit crow otter badger turtle snail".split()
COLOURS = "red blue green yellow white black brown pink golden silver".split()
OBJECTS = ("kite ball key lamp drum hat boat bell book coin cup map ring rope shell spoon stone flute basket button "
           "candle feather scarf mirror clock ladder lantern pillow bottle whistle").split()
PLACES = ("barn mill garden forest harbour tower kitchen market school cave castle meadow library attic "
          "lighthouse village bakery cottage").split()
FOODS = "soup bread honey cheese cake jam pie rice milk plums nuts tea pears grapes beans".split()
JOBS = "baker sailor teacher painter farmer doctor singer gardener miller pilot tailor fisher".split()
SOUNDS = dict(cat="meow", dog="woof", duck="quack", hen="cluck", frog="croak", owl="hoot", goat="baa", mouse="squeak",
              crow="caw", bear="growl")
HOMES = dict(fox="den", bear="cave", mouse="hole", hen="barn", owl="tree", frog="pond", crow="nest", otter="river",
             rabbit="burrow", dog="house")
OPPOSITES = dict(big="small", hot="cold", day="night", up="down", happy="sad", fast="slow", old="new", wet="dry",
                 light="dark", soft="hard", open="closed", full="empty")
THINGS = dict(grass="green", snow="white", honey="golden", coal="black", mud="brown", milk="white", blood="red")
SKY = dict(grass="green", snow="white", coal="black", mud="brown", milk="white")
WORDS = ("zero one two three four five six seven eight nine ten").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

a = lambda w: ("an " if w[0] in "aeiou" else "a ") + w
cap = lambda s: s[0].upper() + s[1:]

# Places have their own small sentences: filler whose scene is the same for a whole document.
SCENES = dict(
    sea=["The waves rolled over the sand.", "A gull cried above the water.", "Salt wind blew from the sea.",
         "A crab walked slowly along the shore.", "The tide came in and went out again.",
         "Far away a ship passed by.", "Foam danced on the waves.", "The nets were drying in the sun."],
    forest=["Leaves whispered in the trees.", "A twig cracked under the moss.", "Mushrooms grew beside the path.",
            "The ferns were wet with dew.", "A woodpecker knocked on an oak.", "Sunlight fell through the branches.",
            "Pine cones lay on the ground.", "It smelled of bark and earth."],
    snow=["Snow fell without a sound.", "Ice hung from the roof.", "The frost painted flowers on the window.",
          "Footprints crossed the white field.", "The cold wind bit every nose.", "A sledge stood by the door.",
          "The stars were sharp and clear.", "Everybody wore two pairs of gloves."],
    town=["The bell of the town hall rang.", "A cart rattled over the stones.", "Pigeons sat on the fountain.",
          "Smoke rose from the chimneys.", "People talked in front of the shops.", "A window opened and closed.",
          "The street lamps were lit early.", "Somebody swept the steps."],
    farm=["The cows stood in the long grass.", "A rooster crowed on the fence.", "The hay smelled sweet and warm.",
          "Mud stuck to every boot.", "The plough rested by the gate.", "Corn stood high in the field.",
          "Bees hummed around the clover.", "A tractor coughed and went quiet."])

FACTS = dict(  # kind: (statement up to the value, end, question, the values)
    has=("{n} has a", ".", "What does {n} have?", None),
    lives=("{n} lives in the", ".", "Where does {n} live?", PLACES),
    likes=("{n} likes", ".", "What does {n} like?", FOODS),
    job=("{n} wants to be a", ".", "What does {n} want to be?", JOBS))


def fact(r, name, kind):
    """One fact: (name, kind, value)."""
    return name, kind, r.choice(COLOURS) + " " + r.choice(OBJECTS) if kind == "has" else r.choice(FACTS[kind][3])


def facts(r, n, names=None):
    """Up to n facts with different (name, kind), in random order. Names are taken out of `names`, so that documents
    that stand in one row never contradict each other."""
    names = NAMES[:] if names is None else names
    r.shuffle(names)
    use = [names.pop() for _ in range(min(len(names), max(1, (n * r.choice((1, 1, 2)) + 1) // 2)))]
    pool = [(x, k) for x in use for k in FACTS]
    return [fact(r, *x) for x in r.sample(pool, min(n, len(pool)))]


def state(f, weight, space=" "):
    """The sentence of a fact; `weight` is that of its value."""
    before, end, _, _ = FACTS[f[1]]
    return [(space + before.format(n=f[0]), DULL if weight < 1 else PROSE), (" " + f[2], weight), (end, PROSE)]


question = lambda f: FACTS[f[1]][2].format(n=f[0])


def ask(f, think=False):
    """One turn that asks for a fact."""
    head = [(USER + question(f), DULL), (BOT, PROSE)]
    if think:
        return head + [(THINK + "I look for " + f[0] + ".", PROSE), *state(f, KEY), (DONE, PROSE),
                       *state(f, PROSE, ""), (EOS, PROSE)]
    return head + [(DONE, PROSE), *state(f, KEY, ""), (EOS, PROSE)]


# ---- stories

def story(r):
    """A short story, 6 to 12 sentences, about a child, an animal and a lost or found thing."""
    n, friend = r.sample(NAMES, 2)
    girl = n in GIRLS
    she, her = ("she", "her") if girl else ("he", "his")
    him = "her" if girl else "him"
    an, ob, co = r.choice(ANIMALS), r.choice(OBJECTS), r.choice(COLOURS)
    place, food = r.choice(PLACES), r.choice(FOODS)
    size = r.choice(("small", "old", "clever", "shy", "hungry", "sleepy"))
    thing = f"{co} {ob}"
    time = r.choice(("One morning", "One evening", "One day", "Last summer", "On a rainy day"))
    start = r.choice((f"Once upon a time there was a {'girl' if girl else 'boy'} called {n}. {cap(she)} lived in the {place}.",
                      f"{n} was a {r.choice(('kind', 'brave', 'curious', 'quiet'))} {'girl' if girl else 'boy'} "
                      f"who lived in the {place}.",
                      f"In the {place} lived a {'girl' if girl else 'boy'} called {n}."))
    happy = r.choice((f"{n} laughed, and the {an} laughed too.", f"{n} was so happy that {she} danced around the {place}.",
                      f"The {an} was very proud.", f"From that day on, {n} and the {an} were friends."))
    end = r.choice(("And they all slept well that night.", f"Then they ate {food} together and went to bed.",
                    f"And if you walk past the {place} today, you can still hear them singing.",
                    "The moon came out and smiled.", f"In the evening they told {friend} the whole story."))
    plot = r.randrange(6)
    if plot == 0:    # lost and found
        body = (f"{cap(she)} had a {thing}, and {she} loved it very much. {time} the {thing} was gone! {n} "
                f"looked under the "
                f"bed and behind the door, but it was not there. Then {she} met {a(size)} {an}. \"Why are you "
                f"sad?\" asked the "
                f"{an}. \"I have lost my {thing},\" said {n}. \"I saw it in the {(p := r.choice(PLACES))},\" "
                f"said the {an}. "
                f"So they went to the {p} together, and there was the {thing}!")
    elif plot == 1:  # sharing food
        body = (f"{time} {she} sat down to eat {food}. {cap(a(size))} {an} came by and looked at the {food}. "
                f"\"Are you hungry?\" "
                f"asked {n}. \"Yes, very hungry,\" said the {an}. So {n} gave "
                f"{r.choice(('half of the ' + food, 'some of the ' + food))} to the "
                f"{an}. The next day the {an} came back with a {thing}. \"This is for you,\" said the {an}, "
                f"\"because you shared "
                f"your {food} with me.\"")
    elif plot == 2:  # help
        body = (f"{time} {she} heard a small voice. \"Help! Help!\" it cried. {cap(a(size))} {an} had fallen "
                f"into a "
                f"{r.choice(('hole', 'bucket', 'well'))}. {n} took {her} {thing} and {friend} took a rope, and "
                f"together they pulled. "
                f"They pulled once, they pulled twice, and out came the {an}! \"Thank you, {n}! Thank you, "
                f"{friend}!\" said the {an}.")
    elif plot == 3:  # a present
        body = (f"{time} {friend} came to visit. \"I have something for you,\" said {friend}. It was a {thing}. "
                f"\"What can it "
                f"do?\" asked {n}. \"It can make {a(an)} dance,\" said {friend}. {n} did not believe it. But "
                f"when {she} held up the {thing}, "
                f"{a(size)} {an} came out of the {place} and began to dance!")
    elif plot == 4:  # a race
        body = (f"{time} {n} and {a(size)} {an} had a race to the {(p := r.choice(PLACES))}. \"I will win,\" "
                f"said the {an}. They ran past "
                f"the trees and over the bridge. The {an} was fast, but it stopped to eat {food}. {n} did not "
                f"stop. {cap(she)} came "
                f"to the {p} first and won a {thing}. \"Next time I will eat later,\" said the {an}.")
    else:            # afraid of the dark
        body = (f"{cap(she)} was afraid of the dark. {time} {a(size)} {an} knocked at the window. \"Do not be "
                f"afraid,\" said the {an}. \"Take "
                f"this {thing}. When it is dark, hold it and count to {r.choice(WORDS[3:])}.\" {n} took the "
                f"{thing} and counted. "
                f"And the dark was not so dark any more. \"Thank you,\" said {n} to the {an}.")
    return f"{start} {body} {happy} {end}", an, n, dict(thing=thing, ob=ob, an=an, n=n, place=place, friend=friend)


def told(r, s):
    """The pieces of a story; its hero, animal, things and places weigh more when they come again."""
    text, known, out = s[0], set(), []
    for piece in re.split("( (?:" + "|".join([s[1], *s[3].values()]) + r")\b)", text):
        out += [(piece, AGAIN if piece in known else PROSE)] if piece else []
        known |= {piece} if piece.strip() in (s[1], *s[3].values()) else set()
    return out


def raw_stories(r, n):
    """n stories as plain text with an empty line between them."""
    return [x for i in range(n) for x in [("\n\n", PROSE)] * (i > 0) + told(r, story(r))] + [(EOS, PROSE)]


def told_story(r, think=False):
    """The request for a story and the story."""
    s = story(r)
    _, an, n, _ = s
    want = r.choice((f"Tell me a story about {a(an)}.", f"Tell me a story about {n}.", f"Tell me a story about {n} and {a(an)}.",
                     f"Please tell me a story about {a(an)}.", "Tell me a story.", f"Can you tell me a story about {a(an)}?",
                     f"Write a short story about {a(an)}."))
    mind = f"{THINK}A story. It needs {a(an)}, {n} and a happy end.{DONE}" if think else DONE
    return [(USER + want, DULL), (BOT + mind, PROSE), *told(r, s), (EOS, PROSE)]


def story_questions(r):
    """A story to read, then questions about it."""
    text, _, _, s = story(r)
    qs = [("Who is the story about?", "The story is about", f" {s['n']}", f" and {a(s['an'])}."),
          (f"Where did {s['n']} live?", f"{s['n']} lived in the", f" {s['place']}", "."),
          ("Which animal is in the story?", f"There is {a(s['an'])[:-len(s['an'])].strip()}", f" {s['an']}", " in the story."),
          (f"What colour was the {s['ob']}?", f"The {s['ob']} was", f" {s['thing'].split()[0]}", ".")]
    out = [(USER + text, DULL)]
    for i, (q, before, key, end) in enumerate(r.sample(qs, r.randint(1, 4))):
        out += [((USER if i else " ") + q, DULL), (BOT + DONE + before, PROSE), (key, KEY), (end + EOS, PROSE)]
    return out


# ---- small talk, knowledge, sums

def sum_turn(r, think=None):
    think = r.random() < 0.4 if think is None else think
    x, y, op = r.randint(1, 10), r.randint(1, 10), r.choice("plus plus minus times".split())
    if op == "minus":
        x, y = max(x, y), min(x, y)
    if op == "times":
        x, y = r.randint(1, 10), r.randint(1, 5)
    z = dict(plus=x + y, minus=x - y, times=x * y)[op]
    if op == "plus" and x < 10 < z:
        why = f"{x} and {10 - x} make 10. Then {y - 10 + x} more make {z}."
    elif op == "times":
        why = f"I add {x} again and again: " + ", ".join(str(x * i) for i in range(1, y + 1)) + "."
    else:
        why = f"I start at {x} and count {y} {'down' if op == 'minus' else 'up'}. That is {z}."
    q = r.choice((f"What is {x} {op} {y}?", f"How much is {x} {op} {y}?", f"{x} {op} {y}?"))
    return [(USER + q, DULL), (BOT + (THINK + why if think else "") + DONE + f"{x} {op} {y} is", PROSE), (f" {z}", SUM),
            ("." + EOS, PROSE)]


HELLO = ["Hello!", "Hi!", "Good morning!", "Hello, who are you?", "Who are you?", "What are you?", "What is your name?"]


def talk_turn(r):
    k = r.randrange(12)
    if k == 0:
        q = r.choice(HELLO)
        ans = (r.choice(("Hello! How can I help you?", "Hello! Shall I tell you a story?")) if "you" not in q else
               "I am a very small model. I can tell stories, remember things and add numbers.")
    elif k == 1:
        an = r.choice(list(SOUNDS)); q, ans = f"What does {a(an)} say?", f"{cap(a(an))} says {SOUNDS[an]}."
    elif k == 2:
        an = r.choice(list(HOMES)); q, ans = f"Where does {a(an)} sleep?", f"{cap(a(an))} sleeps in {a(HOMES[an])}."
        if HOMES[an] in ("river", "pond"): ans = f"{cap(a(an))} sleeps by the {HOMES[an]}."
    elif k == 3:
        w = r.choice(list(OPPOSITES)); w, v = r.choice(((w, OPPOSITES[w]), (OPPOSITES[w], w)))
        q, ans = f"What is the opposite of {w}?", f"The opposite of {w} is {v}."
    elif k == 4:
        w = r.choice(list(SKY)); q, ans = f"What colour is {w}?", f"{cap(w)} is {SKY[w]}."
    elif k == 5:
        i = r.randrange(7); q, ans = f"Which day comes after {DAYS[i]}?", f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}."
    elif k == 6:
        n = r.randint(3, 10); q, ans = f"Count to {WORDS[n]}.", cap(", ".join(WORDS[1:n + 1])) + "."
    elif k == 7:
        q, ans = r.choice((("What can you do?", "I can tell stories, answer small questions, remember things and add numbers."),
                           ("How are you?", "I am well, thank you. And you?"), ("Thank you!", "You are welcome!"),
                           ("Are you a person?", "No, I am a very small model."), ("Goodbye!", "Goodbye! Come back soon."),
                           ("Good night!", "Good night! Sleep well."), ("Do you like stories?", "Yes, I like stories about animals."),
                           ("Tell me a joke.", "Why did the owl sit on the clock? To be on time!")))
    elif k == 8:
        i, j = sorted(r.sample(range(1, 11), 2)); i, j = r.choice(((i, j), (j, i)))
        q, ans = f"Which is more, {WORDS[i]} or {WORDS[j]}?", f"{cap(WORDS[max(i, j)])} is more."
    elif k == 9:
        job, does = r.choice((("baker", "bakes bread"), ("sailor", "sails the sea"), ("teacher", "works in a school"),
                              ("painter", "paints pictures"), ("farmer", "works in the field"), ("doctor", "helps sick people"),
                              ("singer", "sings songs"), ("pilot", "flies a plane"), ("tailor", "makes coats")))
        q, ans = f"What does a {job} do?", f"A {job} {does}."
    else:
        items = r.sample(OBJECTS + FOODS + ANIMALS, r.randint(2, 5))
        q, ans = "Say this: " + ", ".join(items) + ".", cap(", ".join(items)) + "."
    return [(USER + q, DULL), (BOT + DONE + ans + EOS, PROSE)]


def chat(r):
    """A few turns of small talk, sums and stories."""
    out = []
    for _ in range(r.choice((1, 2, 3, 5, 9))):
        k = r.random()
        out += sum_turn(r) if k < 0.4 else told_story(r, r.random() < 0.15) if k < 0.5 else talk_turn(r)
    return out


# ---- things to remember

def scene_filler(r, scene):
    """A sentence without a fact: of the scene, or, if `scene` is a list, of one of its animals."""
    if isinstance(scene, str):
        return " " + r.choice(SCENES[scene])
    return " " + cap(a(r.choice(scene))) + r.choice((" came by.", " said hello.", " looked in."))


def visitors(r):
    """Three or four animals, one of them about twice as often as the others: only a count over the whole text finds it."""
    kinds = r.sample(ANIMALS, r.choice((3, 4)))
    return kinds + kinds[:1] * r.choice((1, 1, 2))


def compare(r, count, n):
    """Up to n turns that ask which of two animals came more often, or which of all; count: {animal: how often}."""
    turn = lambda q, x: [(USER + q, DULL), (BOT + DONE + "The", PROSE), (" " + x, GIST), ("." + EOS, PROSE)]
    out = [turn(f"Who came more often, the {x} or the {y}?", max(x, y, key=count.get))
           for x in count for y in count if count[x] * 1.15 < count[y] or count[y] * 1.15 < count[x]]
    first, second = sorted(count.values())[:-3:-1]
    if second * 1.15 < first:
        out.append(turn("Which animal came most often?", max(count, key=count.get)))
    return r.sample(out, min(n, len(out)))


def repeat(r, n):
    """A list of words, said once more: the simplest long copy."""
    pool = r.choice((OBJECTS, FOODS, PLACES, NAMES, OBJECTS + FOODS + ANIMALS + COLOURS))
    words = r.sample(pool, min(n, len(pool)))
    first, rest = words[0], words[1:]
    out = [(USER + "Repeat:", DULL), *((" " + w, DULL) for w in words), (".", DULL)]
    out += [(BOT + DONE + "I repeat:", PROSE), (" " + first, PROSE)]
    return out + [(" " + w, 2.0) for w in rest] + [("." + EOS, PROSE)]


def recall(r, size, names=None):
    """Facts in a scene's filler, then every fact is asked for once: about `size` tokens in all."""
    n = max(2, round(size / 24 * r.choice((0.4, 0.6, 0.8, 0.95) if size < 300 else (0.1, 0.2, 0.4, 0.8))))
    fs, scene = facts(r, n, names), r.choice(list(SCENES)) if r.random() < 0.4 else visitors(r)
    n = len(fs)
    fill = max(0, int((size - 26 * n - 10) / 9.5))         # a filler sentence is about 8 tokens, a fact with its question 24
    items = [("f", f) for f in fs] + [("s", None)] * fill
    if r.random() < 0.4:                                   # facts first, so that they are far away
        head = items[:n]; tail = items[n:]
        cut = r.randint(0, len(tail)); items = head + tail[:cut]; r.shuffle(items); items += tail[cut:]
    else:
        r.shuffle(items)
    out, seen = [(USER + "Listen.", DULL)], []
    for kind, f in items:
        seen += [] if kind == "f" else [scene_filler(r, scene)]
        out += state(f, DULL) if kind == "f" else [(seen[-1], DULL)]
    asked = fs[:]
    r.shuffle(asked)
    turns = [ask(f, r.random() < 0.1) for f in asked]
    if not isinstance(scene, str):
        if fill > 20:
            for t in compare(r, {x: sum(f" {x} " in t for t in seen) for x in set(scene)}, 2):
                turns.insert(r.randint(0, len(turns)), t)
    elif fill > 3 and r.random() < 0.5:
        turns.insert(r.randint(0, len(turns)), [(USER + "Where does this happen?", DULL),
                                                (BOT + DONE + PLACE_OF[scene][0], PROSE), (PLACE_OF[scene][1], KEY),
                                                ("." + EOS, PROSE)])
    first = turns[0][0]
    turns[0][0] = (" " + first[0][len(USER):], first[1])   # the first question belongs to the same message
    for t in turns:
        out += t
    return out


PLACE_OF = dict(sea=("This happens by the", " sea"), forest=("This happens in the", " forest"),
                snow=("This happens in the", " snow"),
                town=("This happens in the", " town"), farm=("This happens on the", " farm"))


def parade(r, size, ask=6, animals=None):
    """Visitors, then who came more often. Each comes 1.3 to 2 times as often as the next, earlier or later on the whole, and
    the last visitors lie outside the window: a few of the mentions tell little, their sum over the whole text tells all.
    Animals are taken out of `animals`, so that parades in one row never mix."""
    animals, tail = ANIMALS[:] if animals is None else animals, r.randint(4, 8)
    r.shuffle(animals)
    kinds = [animals.pop() for _ in range(r.choice((2, 2, 3, 4)))]
    ask = min(ask, 2 * len(kinds))
    n = max(16, int((min(size, r.choice((300, 400, 600, 1000))) - 12 * tail - 18 * ask) / 5.2))
    share = [1.0]
    for _ in kinds[1:]:
        share.append(share[-1] / r.uniform(1.3, 2))
    count = {x: round(n * y / sum(share)) for x, y in zip(kinds, share)}
    late = {x: r.random() for x in kinds}
    seen = sorted((late[x] + r.random(), x) for x in kinds for _ in range(count[x]))
    scene, turns = r.choice(list(SCENES)), compare(r, dict(r.sample(list(count.items()), len(count))), ask)
    out = [(USER + "Listen.", DULL)] + [(scene_filler(r, [x]), FAINT) for _, x in seen]
    out += [(scene_filler(r, scene), FAINT) for _ in range(tail)]
    (head, weight), *rest = turns[0]                       # the first question belongs to the same message
    return out + [(" " + head[len(USER):], weight), *rest] + [x for t in turns[1:] for x in t]


def told_facts(r, size, names=None):
    """Facts told one by one in a chat, stories and small talk between them, then questions."""
    out, left, known = [], size, []
    fs = facts(r, r.randint(2, max(2, size // 90)), names)
    for f in fs:
        out += [(USER, DULL), *state(f, DULL, ""), (BOT + DONE + "I will remember that", PROSE), *state(f, 2.0),
                (EOS, PROSE)]
        left -= 48
        while left > 60 * (len(fs) - len(known)) and r.random() < 0.6:
            t = told_story(r) if left > 400 and r.random() < 0.5 else sum_turn(r) if r.random() < 0.4 else talk_turn(r)
            out += t
            left -= sum(len(x) for x, _ in t) // 4
        known.append(f)
    r.shuffle(known)
    for f in known:
        out += ask(f, r.random() < 0.1)
    return out


def document(r, size, mix, names=None, animals=None):
    """One document of at most about `size` tokens; mix: weights of repeat, recall, told_facts, story reading, chat, story,
    and parade (may be left out)."""
    k = r.choices(range(len(mix)), mix)[0]
    if k == 6 and (size < 300 or animals is not None and len(animals) < 4):
        k = 4
    if names is not None and len(names) < 8 and k in (1, 2):
        k = 4
    body = (repeat(r, r.randint(4, max(5, min(60, size // 3)))) if k == 0 else
            recall(r, size * r.choice((0.4, 0.7, 0.97)), names) if k == 1 else
            told_facts(r, size * r.choice((0.5, 0.95)), names) if k == 2 else
            story_questions(r) if k == 3 else
            chat(r) if k == 4 else
            raw_stories(r, r.randint(1, max(1, size // 150))) if k == 5 else
            parade(r, size, animals=animals))
    return [(BOS, 0.0)] + body


def text_of(doc):
    return "".join(t for t, _ in doc)


# ---- the tokenizer: the structure of the V4 tokenizer.json, merges learnt from the corpus

SPLITS = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
          "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
          " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]
SPECIAL = [BOS, EOS, "<｜▁pad▁｜>"]
ADDED = """<｜fim▁hole｜> <｜fim▁begin｜> <｜fim▁end｜> <｜User｜> <｜Assistant｜> <|EOT|> <｜tool▁calls▁begin｜>
<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜>
<｜tool▁output▁begin｜> <｜tool▁output▁end｜> <｜tool▁sep｜> <｜begin▁of▁repo▁name｜> <｜end▁of▁repo▁name｜>
<｜begin▁of▁file▁name｜> <｜end▁of▁file▁name｜> <｜begin▁of▁file｜> <｜end▁of▁file｜> <think> </think> ｜DSML｜
<｜begin▁sys｜> <｜end▁sys｜> <｜latest_reminder｜> <｜action｜> <｜query｜> <｜authority｜> <｜domain｜> <｜task｜> <｜political｜>
<｜entity｜> <｜title｜> <｜safety｜> <｜answer｜> <｜search｜> <dsml: </dsml: <｜search▁begin｜> <｜search▁end｜>
<｜extracted_url｜> <｜read_url｜>""".split()
LAST = "<｜end_of_query｜>"

FILE = os.path.join(os.path.dirname(__file__), "../models/tiny/tokenizer.json")


def texts():
    """What the merges are learnt from: documents without control tokens, and every word that can be a fact."""
    r = random.Random(1)
    for _ in range(6000):
        s = text_of(document(r, 400, [1, 3, 3, 1, 3, 4]))
        for x in SPECIAL + ADDED:
            s = s.replace(x, "\n")
        yield from s.split("\n")
    for w in (NAMES + OBJECTS + COLOURS + PLACES + FOODS + JOBS + ANIMALS):
        yield (" " + w) * 1000


@functools.cache
def tokenizer(size):
    """The tokenizers.Tokenizer with `size` ids: 3 special, 256 bytes, merges, 45 added tokens. Once learnt, it stays."""
    if os.path.exists(FILE):
        return Tokenizer.from_file(FILE)
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([])
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(x), "isolated") for x in SPLITS] +
        [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=size - len(ADDED) - 1, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    t.add_tokens([AddedToken(x, normalized=True, special=False) for x in ADDED])
    t.add_special_tokens([AddedToken(LAST, normalized=False, special=True)])
    os.makedirs(os.path.dirname(FILE), exist_ok=True)
    t.save(FILE)
    return t


if __name__ == "__main__":
    r = random.Random(0)
    for i in range(6):
        mix = [0] * 6; mix[i] = 1
        print(text_of(document(r, 400, mix)), "\n")
