"""Entities, attributes and values that conversations are made of.

Copying must not depend on word lists, so every kind mixes listed words with invented ones: random
syllables, splices of arbitrary letters, codes and numbers. Pairs of an entity and a value are split
by a checksum into trained and held-out ones; the split needs no state and holds for ever.
"""

from __future__ import annotations

import random
import string
import zlib
from enum import Enum

HELD_OUT_SHARE = 16  # one pair in so many is never trained


class Split(Enum):
    """Which entity-value pairs a conversation may use."""

    TRAINED = "trained"
    HELD_OUT = "held out"


def split_of(entity: str, value: str) -> Split:
    """Return the side of the split that the pair belongs to, regardless of letter case."""
    digest = zlib.crc32(f"{entity.lower()}\n{value.lower()}".encode())
    return Split.HELD_OUT if digest % HELD_OUT_SHARE == 0 else Split.TRAINED


def capitalised(text: str) -> str:
    """Return `text` with its first character in upper case and the rest unchanged."""
    return text[:1].upper() + text[1:]


COLOURS = """red blue green yellow black white grey brown orange purple pink teal violet crimson
golden silver amber ivory scarlet turquoise navy olive beige maroon indigo""".split()
ADJECTIVES = """old new small large tall short quiet loud bright dark warm cold dry wet heavy light
round square narrow wide upper lower north south east west main spare hidden broken wooden stone
iron glass paper early late fast slow plain fancy rusty clean dusty secret central local outer
inner first second third last long little big young famous lost empty full""".split()
THINGS = """door gate house garden bridge tower room office desk box safe cabinet shelf boat ship
car truck train bus bicycle station harbour market library school museum church castle farm mill
barn shop bakery cafe hotel kitchen cellar attic roof window wall fence road street path river lake
hill forest island valley field orchard well pump engine motor machine printer server router camera
radio clock lamp table chair bed piano violin drum book letter map key lock chest bag basket bottle
barrel kettle oven stove ladder hammer drill saw rope anchor sail lantern telescope laboratory
warehouse factory workshop studio theatre stadium airport hospital clinic bank tunnel dam canal
lighthouse greenhouse fountain statue elevator archive vault locker ticket parcel package report
project team account device sensor valve tank battery cable antenna satellite rocket drone robot
horse dog cat bird""".split()
FOODS = """apple pear plum cherry peach grape lemon lime melon fig date olive tomato potato carrot
onion garlic pepper bean pea rice bread butter cheese milk cream honey sugar salt tea coffee cocoa
juice water soup stew pie cake biscuit waffle pancake noodle pasta pizza salad egg fish salmon
walnut almond mint basil ginger""".split()
ANIMALS = """fox wolf bear otter badger hare rabbit mouse owl hawk kestrel falcon eagle heron swan
duck goose robin raven crow magpie whale seal dolphin turtle lizard frog toad newt bee moth beetle
spider tiger lion panda camel zebra donkey pony goat sheep""".split()
NAMES = """Ada Alan Alice Amir Ana Anders Anna Anton Aria Arthur Astrid Ben Bella Boris Bruno Carla
Carlos Cecilia Chen Clara Daniel David Diana Dmitri Dora Edgar Elena Eli Elias Ella Emil Emma Erik
Esther Eva Farid Felix Fiona Frank Freya George Grace Greta Hana Hans Helen Henry Hugo Ida Igor
Ines Ingrid Iris Ivan Jack Jacob Jan Jane Jasmine Joan Jonas Jose Julia Karl Kate Kenji Kim Klara
Lara Lars Laura Leo Lena Liam Lina Linus Lisa Louis Lucy Luis Luna Maja Marco Maria Mark Marta Max
Maya Mia Miguel Mila Mina Mohammed Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paul Petra
Pierre Priya Quentin Rachel Ravi Rita Robert Rosa Ruth Sam Sara Sofia Stefan Sven Tara Theo Thomas
Tom Uma Vera Viktor Viola Walter Wei Yara Yuki Zara Zoe""".split()
SURNAMES = """Adler Baker Becker Brown Carter Chang Costa Fischer Garcia Hansen Hill Ito Jensen
Jones Keller Kowalski Larsen Lopez Martin Meyer Miller Moreau Nakamura Nguyen Novak Okafor Olsen
Patel Pereira Rossi Sato Schmidt Silva Singh Smith Stone Tanaka Taylor Turner Wagner Walker Weber
Wood Young""".split()
PLACES = """Lisbon Oslo Paris Rome Berlin Vienna Prague Madrid London Dublin Athens Cairo Lagos
Nairobi Tokyo Kyoto Osaka Seoul Delhi Mumbai Lima Quito Bogota Havana Toronto Boston Chicago Denver
Austin Seattle Sydney Perth Auckland Zurich Geneva Milan Turin Naples Porto Seville Lyon Nice Ghent
Bruges Hamburg Munich Dresden Warsaw Krakow Riga Vilnius Tallinn Helsinki Turku Bergen Malmo Aarhus
Reykjavik Edinburgh Bristol York Leeds Cardiff Norway Spain Peru Kenya India Japan Chile Canada
Iceland Greece Egypt""".split()
TREES = """Maple Oak Birch Cedar Willow Elm Ash Pine Linden Hazel Juniper Laurel Cypress Poplar Rose
Lily Iris Tulip Sunset River Harbour Castle Park Hill Station Market Church Mill Bridge North South
East West King Queen Victoria Albert""".split()
BUILDINGS = """House Street Road Avenue Lane Square Hall Tower Court Lodge Cottage Gardens Park
School Library Station Hospital Hotel Bridge Centre Farm Mill Institute Museum""".split()
JOBS = """baker teacher nurse doctor pilot painter carpenter plumber lawyer farmer gardener cook
driver dentist engineer librarian musician singer writer editor architect chemist biologist
translator photographer tailor jeweller sailor fisherman firefighter programmer designer
accountant""".split()
LANGUAGES = """English French German Spanish Italian Portuguese Dutch Danish Swedish Norwegian
Finnish Polish Czech Greek Turkish Arabic Hebrew Hindi Japanese Korean Chinese Russian Welsh
Icelandic""".split()
MATERIALS = """wood stone steel copper brass glass cotton wool silk leather paper clay marble
granite plastic rubber tin zinc oak slate concrete""".split()
MONTHS = """January February March April May June July August September October November
December""".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = "km m cm kg g litres tons hours minutes days years euros dollars metres miles".split()
ACCENTED = """café naïve Zoë Müller Łódź Ångström jalapeño São Genève Köln Dvořák Šárka Ægir œuvre
façade Gdańsk Malmö Åsa Özil İzmir Москва Киев Анна Αθήνα שלום مرحبا 東京 京都 北京 서울 नमस्ते ñandú
Søren 😀 🚀 ❤ €40 £25 ½""".split()

KIN = """sister brother mother father dog cat boss neighbour friend daughter son wife husband aunt
uncle teacher doctor horse car bike boat house team company parrot hamster""".split()

_ATTRIBUTES_OF_KIND = {
    "code": """code;door code;access code;password;serial number;PIN;key;label;id;tag;
        licence plate;reference;room number;locker code;gate code;alarm code;booking code;
        wifi password""",
    "number": """price;height;weight;length;age;capacity;phone number;size;width;depth;speed;
        budget;number of rooms;floor;population;salary;score;temperature;distance;rank;limit""",
    "person": """owner;manager;director;author;driver;captain;keeper;inventor;builder;guide;
        contact;teacher;name;leader;founder;assistant;tenant;doctor;nickname;designer""",
    "place": """home;location;city;birthplace;address;destination;origin;hometown;capital;
        headquarters;parking place;home town""",
    "colour": "colour;color;favourite colour;favorite color;paint;logo colour",
    "food": """favourite food;favourite drink;favourite fruit;favorite food;dessert;breakfast;
        main product;snack""",
    "animal": "mascot;favourite animal;pet;symbol;emblem",
    "date": """birthday;opening day;deadline;founding year;start date;opening time;closing time;
        next meeting;departure time;arrival time;release date""",
    "other": """material;language;job;hobby;status;type;model;version;brand;shape;smell;motto;
        theme;purpose;nationality;instrument;subject;title;topic;style;flavour;favourite book;
        favourite city;favourite word;secret word;codeword;favourite number;plan;role;team;
        department""",
}
ATTRIBUTES = {
    kind: [attribute.strip() for attribute in attributes.split(";")]
    for kind, attributes in _ATTRIBUTES_OF_KIND.items()
}

PERSONAL = """name;age;job;birthday;favourite colour;favorite color;favourite food;favourite animal;
favourite number;favourite city;phone number;hobby;address;lucky number;password;codeword;email;
favourite drink;nickname;home town;account number;seat;locker code;flight;hotel;room number;budget;
language;surname;favourite book;team;deadline;secret word;order number;PIN""".split(";")
PERSONAL = [attribute.strip() for attribute in PERSONAL]

_ONSETS = [
    *"""b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sm sn
    sp st str sw t th tr tw v w wh y z""".split(),
    *[""] * 2,
]
_NUCLEI = "a e i o u ai au ea ee ei ie io oa oo ou y".split()
_CODAS = [
    *"""b ck d f g k l ll lt m mp n nd ng nk nt p r rd rk rn rt s ss st t th x z""".split(),
    *[""] * 5,
]
_LOWER = [*COLOURS, *ADJECTIVES, *THINGS, *FOODS, *ANIMALS, *JOBS, *MATERIALS]
_UPPER = [*NAMES, *SURNAMES, *PLACES, *TREES, *BUILDINGS, *LANGUAGES, *MONTHS, *WEEKDAYS]


class Words:
    """Draws entities, attributes and values from one random generator, which the caller owns."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng = rng
        self._split = split

    def invented(self) -> str:
        """Return a word that no list holds, in lower case, capitalised or in capitals."""
        rng = self._rng
        if rng.random() < 0.7:
            syllables = rng.choice((1, 1, 2, 2, 2, 3))
            word = "".join(
                rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
                for _ in range(syllables)
            )
        else:
            word = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 8)))
        draw = rng.random()
        if draw < 0.45:
            return word
        return word.capitalize() if draw < 0.9 else word.upper()

    def word(self) -> str:
        """Return any single word: listed, listed in another case, invented or accented."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.35:
            return rng.choice(_LOWER)
        if draw < 0.55:
            return rng.choice(_UPPER)
        if draw < 0.65:
            return rng.choice(_LOWER).capitalize()
        if draw < 0.68:
            return rng.choice(_UPPER).lower()
        if draw < 0.70:
            return rng.choice(_LOWER).upper()
        if draw < 0.97:
            return self.invented()
        return rng.choice(ACCENTED)

    def code(self) -> str:
        """Return a code such as `4417`, `B-17`, `kx93q` or `AB 1029`."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.45:
            return "".join(rng.choice(string.digits) for _ in range(rng.randint(2, 6)))
        letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(1, 3)))
        digits = str(rng.randint(1, 10 ** rng.randint(1, 4)))
        if draw < 0.75:
            return letters + rng.choice(("", "-", "-", " ")) + digits
        alphabet = rng.choice(
            (string.ascii_lowercase + string.digits, string.ascii_uppercase + string.digits)
        )
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 7)))

    def number(self) -> str:
        """Return a number, with a unit or a fraction now and then."""
        rng = self._rng
        number = str(rng.randint(1, 10 ** rng.randint(1, 5)))
        draw = rng.random()
        if draw < 0.5:
            return number
        if draw < 0.85:
            return f"{number} {rng.choice(UNITS)}"
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99)}"

    def date(self) -> str:
        """Return a day, a weekday, a time or a year."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.4:
            return f"{rng.randint(1, 31)} {rng.choice(MONTHS)}"
        if draw < 0.6:
            return rng.choice(WEEKDAYS)
        if draw < 0.8:
            return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
        return str(rng.randint(1400, 2100))

    def phrase(self) -> str:
        """Return two or three words."""
        return " ".join(self.word() for _ in range(self._rng.choice((2, 2, 3))))

    def person(self) -> str:
        """Return a first name, a full name or a titled surname."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.45:
            return rng.choice(NAMES)
        if draw < 0.65:
            return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"
        if draw < 0.75:
            return f"{rng.choice(('Dr.', 'Mr.', 'Mrs.', 'Ms.', 'Captain'))} {rng.choice(SURNAMES)}"
        return self.invented().capitalize()

    def entity(self) -> str:
        """Return what a fact can be about, as it stands in the middle of a sentence."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.22:
            return f"the {rng.choice(COLOURS + ADJECTIVES)} {rng.choice(THINGS)}"
        if draw < 0.27:
            return f"the {rng.choice(THINGS)}"
        if draw < 0.30:
            return f"the {rng.choice(THINGS)} in {rng.choice(PLACES)}"
        if draw < 0.42:
            return f"{rng.choice(TREES)} {rng.choice(BUILDINGS)}"
        if draw < 0.47:
            return f"{self.invented().capitalize()} {rng.choice(BUILDINGS)}"
        if draw < 0.53:
            kind = rng.choice(("room", "floor", "team", "gate", "box", "unit", "track", "Room"))
            return f"{kind} {rng.randint(1, 99)}"
        if draw < 0.57:
            return f"{rng.choice(('project', 'Project', 'the ship', 'planet'))} {self.word()}"
        if draw < 0.75:
            return self.person()
        if draw < 0.79:
            return rng.choice(PLACES)
        if draw < 0.82:
            return f"the {self.invented().lower()} {rng.choice(THINGS)}"
        if draw < 0.95:
            return self.word()
        return self.phrase()

    def sibling(self, entity: str) -> str:
        """Return an entity that differs from `entity` in one word, if it has more than one."""
        rng = self._rng
        *front, last = entity.split(" ")
        if not front:
            return self.entity()
        if last.isdigit():
            return " ".join([*front, str(rng.randint(1, 99))])
        if last in BUILDINGS:
            return f"{rng.choice(TREES)} {last}"
        if front[0] == "the":
            return f"the {rng.choice(COLOURS + ADJECTIVES)} {last}"
        if rng.random() < 0.5:
            return " ".join([*front, rng.choice(SURNAMES)])
        return f"{rng.choice(NAMES)} {last}"

    def attribute(self) -> tuple[str, str]:
        """Return an attribute and the kind of value that suits it."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.82:
            kind = rng.choice(list(ATTRIBUTES))
            return rng.choice(ATTRIBUTES[kind]), kind
        if draw < 0.92:
            return f"{rng.choice(_LOWER)} {rng.choice(('code', 'name', 'number', 'size'))}", "any"
        return self.invented().lower(), "any"

    def value(self, kind: str) -> str:
        """Return a value: half the time of the given kind, otherwise of any."""
        rng = self._rng
        if kind == "any" or rng.random() < 0.5:
            kind = rng.choice(
                ("code", "code", "number", "word", "word", "word", "phrase", "person")
            )
        if kind == "code":
            return self.code()
        if kind == "number":
            return self.number()
        if kind == "person":
            return self.person()
        if kind == "place":
            return rng.choice(PLACES) if rng.random() < 0.7 else self.entity()
        if kind == "colour":
            return rng.choice(COLOURS) if rng.random() < 0.7 else f"dark {rng.choice(COLOURS)}"
        if kind == "food":
            return rng.choice(FOODS)
        if kind == "animal":
            return rng.choice(ANIMALS)
        if kind == "date":
            return self.date()
        if kind == "phrase":
            return self.phrase()
        return self.word()

    def value_for(self, entity: str, kind: str, other_than: str = "") -> str:
        """Return a value whose pair with `entity` lies on this side of the split."""
        while True:
            value = self.value(kind)
            if value != other_than and split_of(entity, value) is self._split:
                return value

    def message(self) -> str:
        """Return a meaningless message of two to ten words, to be repeated."""
        rng = self._rng
        while True:
            text = " ".join(
                self.word() if rng.random() < 0.9 else self.code()
                for _ in range(rng.randint(2, 10))
            )
            if split_of("repeat", text) is self._split:
                break
        if rng.random() < 0.5:
            text = capitalised(text)
        return text + rng.choice(("", "", ".", ".", "!", "?"))

    def filler(self) -> str:
        """Return a sentence that states none of the facts that are asked for."""
        rng = self._rng
        noun, other = rng.choice(THINGS), self.word()
        return rng.choice(
            (
                f"The {rng.choice(ADJECTIVES)} {noun} stood near {other} for many years.",
                f"Nothing of note happened on {rng.choice(WEEKDAYS)}.",
                f"Visitors often ask about the {noun} and the {rng.choice(ANIMALS)}.",
                f"In {rng.choice(MONTHS)} it rained in {rng.choice(PLACES)}.",
                f"{rng.choice(NAMES)} and {rng.choice(NAMES)} walked to the {noun}.",
                f"Please keep the {noun} closed when {other} is near.",
                f"This part was written by {self.person()} and has not been changed since.",
                f"There are {rng.randint(2, 40)} {rng.choice(FOODS)} trees behind the {noun}.",
                f"We were told that {other} will follow later.",
                f"It is said that every {noun} needs a {rng.choice(ADJECTIVES)} {other}.",
            )
        )
