"""Signs of the toy world: one word of three to five letters in one colour on another, their prompts and drawings.

    a sign that says "FOX" in red on a white background

Letters are capitals of Aileron Regular (Sora Sagano, CC0 1.0), the font inside Pillow, in two weights, each in a cell
of its own. Every word of `WORDS` belongs to one of two fixed sets: words to train on, and held-out ones that
no toy model was shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlhf_t2i.shapes.names import TOY_SIGN_SIZE
from rlhf_t2i.shapes.scenes import BACKGROUNDS, COLOURS, PALETTE, Split

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEIGHT, WIDTH = TOY_SIGN_SIZE
CELL = 16
"""Width of a letter's cell in pixels; the cells of a word begin at the left edge of its sign."""
LENGTHS = (3, 4, 5)
SIZE = 17
"""Size of the font in pixels."""
WEIGHTS = (2, 4)
"""Weights of the letters, in eighths of a pixel added around the lines of a letter."""
SHIFTS = (-1, 0, 1)
"""Offsets downwards, in pixels, at which a word is drawn."""
_OVERSAMPLING = 8

_WORDS = """
ACE AIR ANT APE ARM ART ASH AXE BAG BAR BAT BED BEE BIG BIN BOW BOX BUS CAB CAP CAR CAT COW CUP DAY DEN DOG DRY EAR
EGG ELF ELM EYE FAN FIG FIN FLY FOG FOX FUN GAS GEM GUM GYM HAM HAT HEN HOP HOT HUT ICE INK INN IVY JAM JAR JET JOY
KEY KIT LAB LAW LEG LIP LOG MAP MIX MUD NET NEW NUT OAK OIL OWL PAN PEA PEN PIE PIG POT RAM RAY RIB ROW RUG SEA SKI
SKY SUN TAX TEA TIN TOY VAN WAX WEB WET WIG YAK ZIP ZOO
ACID ATOM BABY BAKE BALL BAND BANK BARN BATH BEAR BELL BIRD BOAT BOLD BONE BOOK BOWL BULB CAFE CAKE CALM CAMP CARD
CAVE CITY CLAY CLUB COAL COAT COIN COLD CORN CRAB CUBE DAWN DEEP DEER DESK DISH DOCK DOOR DOVE DRUM DUCK DUST EAST
ECHO EXIT FARM FAST FERN FILM FIRE FISH FIVE FLAG FOOD FORK FROG FUEL GAME GATE GIFT GOAT GOLD GRID GULF HALF HALL
HARP HAWK HEAT HERB HILL HIVE HOME HOOK HORN IDEA IRON JAZZ JUMP KING KITE LAKE LAMB LAMP LEAF LIME LION LOCK LOFT
MAZE MEAL MILK MINT MOON MOSS MOTH NEST NOON NOTE OPEN OVEN PALM PARK PATH PEAR PINE PLUM POLO POND PORT QUIZ RAIN
RICE RING ROAD ROCK ROOF ROSE SAIL SALT SAND SEAL SHIP SHOE SHOP SILK SNOW SOAP SOFA SOUP STAR SURF SWAN TAXI TENT
TIDE TOWN TREE TUBE TUNA VASE VIEW WALK WAVE WEST WIND WING WOLF WOOD YARD YOGA ZERO ZONE
ALARM ALBUM ANGEL APPLE ARROW BACON BEACH BERRY BIRCH BLOCK BRAVE BREAD BRICK BRUSH CABIN CAMEL CANDY CEDAR CHAIR
CHESS CLOCK CLOUD COAST CORAL CROWN DAISY DANCE DEPOT DREAM EAGLE EARTH EMBER FAIRY FIELD FLUTE FRESH FRUIT GHOST
GIANT GLASS GLOBE GRAPE GRASS HAPPY HEART HONEY HORSE HOTEL HOUSE IVORY JEWEL JUICE KAYAK KOALA LEMON LIGHT LILAC
LUNCH MAGIC MANGO MAPLE MARSH METAL MOTEL MOUSE MUSIC NIGHT NORTH OASIS OCEAN OLIVE ONION OPERA OTTER PANDA PAPER
PARTY PEACE PEARL PHONE PIANO PIZZA PLANT PLAZA QUEEN QUIET RADIO RANCH RAVEN RIVER ROBOT SALAD SCARF SHARK SHEEP
SHELL SMILE SOUTH SPICE SPOON STONE STORM SUGAR SWEET TABLE TIGER TOAST TOWER TRAIN TULIP UNCLE VALVE VIDEO VIOLA
WAGON WATER WHALE WHEAT WOMAN WORLD YACHT ZEBRA
"""
WORDS = tuple(_WORDS.split())
"""Words of signs; none is a word of the grammar of prompts."""


@dataclass(frozen=True, slots=True)
class Sign:
    """The content of a prompt: a word in capitals, its colour and its background."""

    word: str
    colour: str
    background: str

    @property
    def prompt(self) -> str:
        return f'a sign that says "{self.word}" in {self.colour} on a {self.background} background'


_SIGN = re.compile(rf'a sign that says "([a-z]+)" in ({"|".join(COLOURS)}) on an? ({"|".join(BACKGROUNDS)}) background')
GROUNDS = tuple((colour, ground) for colour, ground in product(COLOURS, BACKGROUNDS) if colour != ground)


def is_sign_prompt(prompt: str) -> bool:
    """Return True for a prompt that begins as those of signs do."""
    return prompt.strip().lower().startswith("a sign ")


def parse_sign(prompt: str) -> Sign:
    """Return the sign of a prompt; ValueError for a prompt outside the grammar or with invisible letters."""
    found = _SIGN.fullmatch(prompt.strip().lower())
    if found is None or len(found[1]) not in LENGTHS:
        raise ValueError(
            f'The prompt {prompt!r} is not in the grammar of the signs. Valid is \'a sign that says "FOX" in red on a '
            f"white background', with a word of three to five letters, the colours {', '.join(COLOURS)} and the "
            f"backgrounds {', '.join(BACKGROUNDS)}."
        )
    if found[2] == found[3]:
        raise ValueError(f"The prompt {prompt!r} has letters in the colour of their background.")
    return Sign(found[1].upper(), found[2], found[3])


def words(split: Split) -> list[str]:
    """Return the words of a split; a quarter is held out, by the sum of the places of their letters in the alphabet."""
    held_out = [sum(map(LETTERS.index, word)) % 4 == 0 for word in WORDS]
    return [word for word, out in zip(WORDS, held_out, strict=True) if split == "all" or out == (split == "held-out")]


def sign_prompts(split: Split) -> list[str]:
    """Return one prompt of each word of a split; colours and backgrounds take turns."""
    return [Sign(word, *GROUNDS[7 * i % len(GROUNDS)]).prompt for i, word in enumerate(words(split))]


# --- drawing --------------------------------------------------------------------------------------


@cache
def glyphs(weight: int) -> Float[Tensor, "26 24 16"]:
    """Return how much of each pixel of its cell each letter covers, in [0, 1]."""
    font = ImageFont.load_default(SIZE * _OVERSAMPLING)
    cells: list[Tensor] = []
    for letter in LETTERS:
        mask = Image.new("L", (CELL * _OVERSAMPLING, HEIGHT * _OVERSAMPLING), 0)
        baseline = round((HEIGHT / 2 + 0.35 * SIZE) * _OVERSAMPLING)
        place = (CELL * _OVERSAMPLING / 2, baseline)
        ImageDraw.Draw(mask).text(place, letter, font=font, fill=255, anchor="ms", stroke_width=weight)
        fine = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)
        cells.append(torch.nn.functional.avg_pool2d(fine[None, None], _OVERSAMPLING)[0, 0])
    return torch.stack(cells)


def cover_of(word: str, *, weight: int, shift: int) -> Float[Tensor, "24 80"]:
    """Return how much of each pixel the letters of a word cover, in [0, 1]; `shift` is in pixels downwards."""
    cover = torch.zeros(HEIGHT, WIDTH)
    letters = torch.cat([glyphs(weight)[LETTERS.index(letter)] for letter in word], dim=1)
    cover[:, : letters.shape[1]] = letters.roll(shift, 0)
    return cover


def render_signs(signs: Sequence[Sign], *, rng: np.random.Generator) -> Float[Tensor, "B 3 24 80"]:
    """Draw each sign once in a random weight, place and shade; RGB in [0, 1]."""
    images = torch.empty(len(signs), 3, HEIGHT, WIDTH)
    for image, sign in zip(images, signs, strict=True):
        cover = cover_of(sign.word, weight=int(rng.choice(WEIGHTS)), shift=int(rng.choice(SHIFTS)))
        ground, ink = (
            torch.tensor(PALETTE[name])[:, None, None] + float(rng.uniform(-0.04, 0.04))
            for name in (sign.background, sign.colour)
        )
        image[:] = ground + cover * (ink - ground)
    return images.clamp(0, 1)
