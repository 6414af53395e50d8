"""Names and numbers that generated tasks are made of."""

from __future__ import annotations

import random
from collections.abc import Iterator

_ADJECTIVES = """
amber bitter brave bright calm clever cloudy crisp curious daring dusty eager early faint fancy fierce frozen gentle
giant golden grand happy hollow humble icy jolly keen kind late lively lonely loud lucky mellow merry mighty misty
modest narrow noble odd pale plain polite proud quick quiet rapid rare ripe rough round royal rusty salty secret sharp
shiny silent silver simple sleepy slow smooth snowy solid steady still stormy strange sturdy sunny sweet tall tame
tidy tiny vivid warm wide wild wise young
"""
_NOUNS = """
acorn anchor apple arrow badger barrel basket beacon beaver bell birch blanket boat bridge brook bucket button cabin
camel candle canyon castle cedar chapel clock cloud comet copper coral cradle cricket crown dagger desert dolphin
dragon eagle ember engine falcon feather fiddle flame forest fountain fox garden glacier goose granite hammer harbor
hawk hedge heron hill island ivory jacket juniper kettle lantern lemon lily lion lotus maple marble meadow mirror
mountain needle oak ocean orchard otter owl paddle palace parrot pebble pepper pigeon pillow pine planet pond poppy
puzzle quartz rabbit raven ribbon river rocket saddle sailor salmon shadow shell shovel spider spruce squirrel stable
statue summit swan table temple thistle thunder tiger timber tower trumpet tulip tunnel turtle valley velvet violin
wagon walnut walrus water whale wheel willow window winter wolf
"""
ADJECTIVES = _ADJECTIVES.split()
NOUNS = _NOUNS.split()


def names(source: random.Random) -> Iterator[str]:
    """Every ``adjective-noun`` once, shuffled."""
    found = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    source.shuffle(found)
    yield from found


def number(source: random.Random, digits: int = 5) -> str:
    """A number of ``digits`` digits that does not begin with 0."""
    return str(source.randrange(10 ** (digits - 1), 10**digits))
