"""Sound texts of the wrong domain: terms of crafts and trades, and what functions of Python's standard library do."""

from __future__ import annotations

import importlib
import inspect
import random
import re

# term: meaning. None is medical, none is asked by the general facts of the anchor.
GLOSSES = """
affidavit: A written statement confirmed by oath for use as evidence in court.
easement: A right to cross or use another person's land for a stated purpose.
escrow: Money or deeds held by a third party until the conditions of a contract are met.
lien: A right to keep another's property until a debt is paid.
subpoena: A writ ordering a person to attend a court.
tort: A wrongful act, other than breach of contract, that leads to civil liability.
estoppel: A rule that stops a person from denying what they earlier led others to believe.
indemnity: A promise to make good a loss suffered by another party.
novation: The replacement of an old contract by a new one with the agreement of all parties.
plaintiff: The party who brings a case against another in a court of law.
probate: The official proving of a will.
usufruct: The right to enjoy the use of another's property without damaging it.
blanching: Dipping food briefly in boiling water and then cooling it in cold water.
braising: Frying food lightly and then stewing it slowly in a closed pot.
caramelizing: Heating sugar until it melts and turns brown.
deglazing: Loosening the browned bits in a pan by adding wine or stock.
julienne: Vegetables cut into thin strips like matches.
kneading: Working dough with the hands until it is smooth and elastic.
marinade: A sour or spiced liquid in which food is soaked before cooking.
meringue: Egg whites beaten stiff with sugar and baked until crisp.
proofing: Letting shaped dough rise before it is baked.
roux: Flour cooked in fat, used to thicken sauces.
sourdough: Bread raised with a fermenting mixture of flour and water instead of bought yeast.
tempering chocolate: Warming and cooling chocolate in steps so that it sets glossy and firm.
arpeggio: The notes of a chord played one after another.
cadence: A sequence of chords that closes a phrase of music.
crescendo: A gradual increase in the loudness of a passage.
fugue: A piece in which a short melody is taken up by several voices in turn.
legato: A way of playing in which the notes are joined smoothly.
metronome: A device that ticks at a chosen speed to mark the beat.
ostinato: A short pattern repeated throughout a piece of music.
pizzicato: Plucking the strings of a violin instead of bowing them.
syncopation: Placing accents on beats that are usually weak.
timbre: The quality of a sound that tells two instruments apart.
tremolo: The rapid repetition of one note.
vibrato: A slight, rapid wavering of pitch on a held note.
bowline: A knot that makes a fixed loop at the end of a rope.
bulkhead: An upright wall that divides the hull of a ship.
jib: A triangular sail set in front of the mast.
keel: The long beam along the bottom of a boat that keeps it steady.
leeward: On the side sheltered from the wind.
rudder: A flat piece hinged at the stern, used for steering.
spinnaker: A large, light sail used when running before the wind.
starboard: The right side of a ship as one faces forward.
tacking: Turning the bow of a sailing boat through the wind.
windlass: A winch used on ships to raise the anchor.
amortization: Paying off a debt in regular parts over time.
arbitrage: Buying in one market and selling in another to profit from a difference in price.
collateral: Property pledged as security for a loan.
dividend: A share of a company's profit paid to its owners.
hedge: A position taken to offset the risk of another one.
inflation: A general rise of prices over time.
leverage: The use of borrowed money to increase a possible gain.
liquidity: How easily a possession can be turned into cash.
short selling: Selling borrowed shares in the hope of buying them back cheaper.
yield curve: A line showing the interest paid on bonds of different terms.
bevel: An edge cut at a slant, other than a right angle.
dovetail joint: A joint of wedge-shaped pins that fit into matching slots.
dowel: A round wooden pin that holds two pieces together.
jointer plane: A long plane for making edges straight.
lathe: A machine that turns a workpiece against a cutting tool.
mitre joint: A corner made of two pieces each cut at half the angle.
mortise: A hole cut in timber to receive a tenon.
rabbet: A step-shaped groove along the edge of a board.
veneer: A thin layer of fine wood glued on a cheaper one.
whittling: Shaping wood by cutting small slices off it with a knife.
baseline grid: Evenly spaced lines to which the text of a page is aligned.
kerning: Adjusting the space between two letters so that they look evenly set.
leading: The distance from one line of type to the next.
ligature: Two or more letters joined into one character.
serif: A small stroke at the end of a letter's main stroke.
widow line: The last line of a paragraph left alone at the top of a page.
aperture: The opening of a lens that lets light into a camera.
bokeh: The soft look of the parts of a photograph that are out of focus.
depth of field: The range of distances that appear sharp in a photograph.
exposure time: How long light falls on the film or sensor.
parallax: The apparent shift of an object seen from two places.
vignetting: The darkening of a picture towards its corners.
castling: A chess move in which king and rook move at the same time.
en passant: The capture of a pawn that has just passed by two squares.
fork: A chess move by which one piece attacks two others at once.
gambit: An opening in which material is offered for a better position.
stalemate: A position in which the player to move has no legal move and is not in check.
zugzwang: A position in which any move makes matters worse.
annual plant: A plant that grows, flowers and dies within one year.
compost: Rotted plant matter that is dug into the soil to feed it.
crop rotation: Growing different plants on the same field in turn.
espalier: A fruit tree trained to grow flat against a wall.
grafting: Joining a shoot of one plant to the stem of another.
mulch: Material spread over soil to keep it moist and free of weeds.
perennial: A plant that lives for several years.
pruning: Cutting off branches so that a plant grows better.
rootstock: The root and stem onto which another plant is grafted.
trellis: A frame of crossed bars for climbing plants.
buttress: A structure built against a wall to support it.
cantilever: A beam fixed at one end only.
colonnade: A row of columns set at equal distances.
cornice: A moulding along the top of a wall or building.
gargoyle: A carved spout that throws rainwater clear of a wall.
keystone: The wedge at the top of an arch that locks the others in place.
lintel: A beam across the top of a door or window.
mezzanine: A low floor between two main floors of a building.
nave: The long central part of a church.
pilaster: A flat column that projects slightly from a wall.
batik: A way of dyeing cloth in which wax covers the parts to be left plain.
bobbin: A spool on which thread is wound.
crochet: Making fabric from loops of yarn with a hooked needle.
felt: Cloth made by pressing and matting wool.
hem: The edge of a cloth folded over and sewn down.
loom: A frame for weaving thread into cloth.
selvage: The edge of a fabric woven so that it does not fray.
twill: A weave with a pattern of diagonal ridges.
warp: The threads stretched lengthwise in a loom.
weft: The threads that run across the fabric.
anvil: A heavy iron block on which metal is hammered into shape.
annealing glass: Cooling glass slowly so that it does not crack.
galvanizing: Coating iron with zinc so that it does not rust.
kiln: An oven in which pottery is fired.
patina: A green film that forms on old bronze.
soldering: Joining metals by means of a softer metal that melts easily.
cutting fluid: A liquid that cools and greases a tool while it works metal.
ballast: Crushed stone on which railway sleepers are laid.
bogie: A frame with wheels that carries one end of a railway car.
derailleur: A mechanism that moves a bicycle chain from one gear to another.
differential gear: A set of gears that lets two driven wheels turn at different speeds.
flywheel: A heavy wheel that keeps a machine turning evenly.
semaphore: A signal with a movable arm beside a railway line.
torque wrench: A tool that tightens a bolt to a set turning force.
tread: The patterned part of a tire that touches the road.
"""

MODULES = """
array ast base64 bisect calendar cmath collections colorsys configparser contextlib copy csv datetime decimal difflib
email.utils fileinput fnmatch fractions functools gettext glob gzip hashlib heapq hmac html http inspect io ipaddress
itertools json keyword linecache locale logging math mimetypes operator os os.path pathlib pickle platform plistlib
pprint queue random re reprlib sched secrets selectors shelve shlex shutil socket stat statistics string struct
subprocess sysconfig tarfile tempfile textwrap threading time timeit token tokenize traceback types unicodedata
urllib.parse uuid warnings weakref zipfile zlib
"""
PYTHON_QUESTIONS = (
    "What does {name} do in Python?",
    "Python: what is {name} for?",
    "Explain {name} from Python's standard library.",
    "When would I use {name} in a Python program?",
    "Describe {name} in Python.",
)


def glosses() -> list[tuple[str, str]]:
    """Returns (term, meaning) of words from law, cooking, music, sailing and other trades."""
    pairs = (line.split(": ", 1) for line in GLOSSES.strip().splitlines())
    return [(term, meaning) for term, meaning in pairs]


def python_summaries() -> list[tuple[str, str]]:
    """Returns (`module.name`, first sentence of its documentation) of the standard library, by name.

    The texts are those of the running Python, so another version has a few others.
    """
    found: dict[str, str] = {}
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        public = getattr(module, "__all__", None)
        for name in sorted(public or (name for name in dir(module) if not name.startswith("_"))):
            thing = inspect.getattr_static(module, name, None)
            if public is None and getattr(thing, "__module__", None) != module_name:
                continue  # imported from elsewhere
            if not (inspect.isroutine(thing) or inspect.isclass(thing)) or _is_exception(thing):
                continue
            sentence = _first_sentence(thing.__doc__)
            if sentence is not None:
                found.setdefault(sentence, f"{module_name}.{name}")
    return sorted((name, sentence) for sentence, name in found.items())


def python_question(name: str, rng: random.Random) -> str:
    """Returns a question for what a thing of the standard library does."""
    return rng.choice(PYTHON_QUESTIONS).format(name=name)


def _is_exception(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def _first_sentence(documentation: object) -> str | None:
    if not isinstance(documentation, str):
        return None
    paragraph = " ".join(inspect.cleandoc(documentation).split("\n\n")[0].split())
    sentence = re.match(r"[A-Z][a-z]+ [^.]{30,150}\.(?= |$)", paragraph)
    return sentence.group() if sentence and sentence.group().isascii() and "->" not in sentence.group() else None
