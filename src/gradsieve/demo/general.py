"""General knowledge for the demo's anchor: MMLU's worked examples if lm-eval is installed, else sixty facts of our own.

MMLU: Hendrycks et al. (2021), arXiv:2009.03300; five examples a subject are worked out in lm-eval's `mmlu/flan_cot_fewshot`.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from gradsieve.errors import DataError

log = logging.getLogger(__name__)

LONGEST = 380  # characters of question and answer together, mostly below 100 tokens: the demo runs on a CPU
# Close to the demo's domain, or an ability of its own.
NOT_GENERAL = re.compile(
    r"anatomy|clinical|medic|virology|nutrition|human_|biology|psychology|math|algebra|statistics|econometrics|formal_logic"
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A question of general knowledge with an explained answer, and where it comes from."""

    question: str
    answer: str
    source: str


def facts() -> list[Fact]:
    """Returns our own sixty facts."""
    pairs = (line.split(" | ") for line in FACTS.strip().splitlines())
    return [Fact(question, answer, "facts") for question, answer in pairs]


def mmlu_facts() -> list[Fact] | None:
    """Returns MMLU's short worked examples outside medicine and mathematics, or None if lm-eval is not installed.

    The stock phrases that open each explanation are left out.

    Raises:
        DataError: lm-eval is installed but its files are not in the form that is expected.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "tasks" / "mmlu" / "flan_cot_fewshot"
    found = [fact for path in sorted(folder.glob("mmlu_*.yaml")) for fact in _read_subject(path)]
    short = [fact for fact in found if len(fact.question) + len(fact.answer) <= LONGEST]
    if not short:
        raise DataError(f"{folder}: must hold MMLU's worked examples, got none; install lm-eval 0.4, or ask for our own facts")
    log.info(
        "general knowledge: %d of %d worked MMLU examples, those of at most %d characters", len(short), len(found), LONGEST
    )
    return short


def _read_subject(path: Path) -> list[Fact]:
    import yaml

    subject = path.stem.removeprefix("mmlu_")
    if NOT_GENERAL.search(subject):
        return []
    try:
        samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
        return [Fact(_tidy(sample["question"]), _explanation(sample["target"]), f"mmlu:{subject}") for sample in samples]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{path}: must hold fewshot_config.samples with question and target, got {error!r}") from error


def _tidy(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.strip())


def _explanation(target: str) -> str:
    text = re.sub(r"^Let's think step by step\.\s*", "", target.strip())
    return re.sub(r"^We refer to Wikipedia(?: articles on [^.]*?)? for help\.\s*", "", text)


FACTS = """
What is the capital of Australia? | Canberra. It was founded as a compromise between Sydney and Melbourne.
Which planet is closest to the Sun? | Mercury. It goes around the Sun in 88 days.
Why does ice float on water? | Ice is less dense than liquid water, because its molecules form an open lattice.
Who wrote the play Hamlet? | William Shakespeare wrote it around 1600.
What gas do plants take in for photosynthesis? | Carbon dioxide. With water and light they turn it into sugar.
Which ocean is the largest? | The Pacific Ocean. It covers about a third of the Earth's surface.
What causes the tides? | Mostly the gravity of the Moon, which pulls on the oceans as the Earth turns.
In which year did the Second World War end? | It ended in 1945, in Europe in May and in Asia in September.
What is the chemical symbol of gold? | Au, from the Latin word aurum.
Which is the longest river of Africa? | The Nile. It flows north into the Mediterranean Sea.
Why is the sky blue? | Air scatters blue light more strongly than red light, so blue reaches us from all sides.
Who painted the Mona Lisa? | Leonardo da Vinci painted it. It hangs in the Louvre in Paris.
What is the boiling point of water at sea level? | It is 100 degrees Celsius, or 212 degrees Fahrenheit.
Which language has the most native speakers? | Mandarin Chinese, with more than 900 million native speakers.
How many continents are there? | Seven by the usual count. Asia is the largest and Australia the smallest.
What is the largest mammal? | The blue whale. It can grow to about 30 meters.
Who discovered penicillin mould's effect on bacteria? | Alexander Fleming noticed it in his laboratory in 1928.
What does a barometer measure? | It measures air pressure. Falling pressure often announces rain.
Which country has the city of Kyoto? | Japan. Kyoto was its capital for more than a thousand years.
What is the square shape with three dimensions called? | A cube. It has six equal square faces.
Why do we have seasons? | The Earth's axis is tilted, so each hemisphere leans towards the Sun for half of the year.
Who was the first person to walk on the Moon? | Neil Armstrong, on 20 July 1969.
What is the hardest natural mineral? | Diamond. It is made of carbon atoms in a dense lattice.
Which instrument has black and white keys and strings? | The piano. Its hammers strike the strings when the keys are pressed.
What is the currency of Japan? | The yen.
Which metal is liquid at room temperature? | Mercury. It melts at minus 39 degrees Celsius.
What do bees make honey from? | From nectar, which they collect from flowers and thicken in the hive.
Where is the Great Barrier Reef? | Off the northeast coast of Australia. It is the largest coral reef.
Who developed the theory of general relativity? | Albert Einstein published it in 1915.
What is a leap year? | A year with 366 days. The extra day is 29 February.
Which desert covers much of northern Africa? | The Sahara. It is the largest hot desert on Earth.
What is the main language of Brazil? | Portuguese, because Brazil was a colony of Portugal.
How does a magnet attract iron? | Its field lines up the tiny magnetic regions in the iron, which then are pulled towards it.
Which animal is known to build dams? | The beaver. It dams streams with branches and mud.
What is the freezing point of water in Fahrenheit? | It is 32 degrees Fahrenheit, which is 0 degrees Celsius.
Who invented the printing press with movable type in Europe? | Johannes Gutenberg, around 1450 in Mainz.
What is the largest planet of the solar system? | Jupiter. It has more mass than all other planets together.
Why does the Moon shine? | It reflects the light of the Sun and makes none of its own.
Which two countries share the longest land border? | Canada and the United States.
What is the process by which water becomes vapor? | Evaporation. It takes up heat, which is why sweating cools.
Which composer wrote the Ninth Symphony with the Ode to Joy? | Ludwig van Beethoven. It was first played in 1824.
What is the smallest prime number? | Two. It is also the only even prime number.
Where were the first modern Olympic Games held? | In Athens, in 1896.
What is the opposite direction of northeast? | Southwest.
Which bird cannot fly but swims very well? | The penguin. Its wings work as flippers.
What is paper mostly made from? | From wood, whose fibres are boiled, pressed and dried.
Which mountain is the highest above sea level? | Mount Everest, on the border of Nepal and China.
What does a thermometer measure? | It measures temperature.
Which sense do bats use to hunt in the dark? | Hearing. They send out high calls and listen for the echo.
What is the center of an atom called? | The nucleus. It consists of protons and neutrons.
Who wrote the novel Don Quixote? | Miguel de Cervantes. Its first part appeared in 1605.
Which city lies on two continents? | Istanbul. The Bosporus divides it between Europe and Asia.
What happens to metal when it is heated? | It expands, because its atoms move more strongly.
Which gas makes up most of the air? | Nitrogen, with about 78 percent. Oxygen follows with 21 percent.
What is an island? | A piece of land with water on all sides.
Why does thunder follow lightning? | Sound travels far more slowly than light, so the bang arrives after the flash.
What was the Silk Road? | A network of trade routes that linked China with the Mediterranean.
Which shape has three sides? | A triangle. Its angles add up to 180 degrees.
Where do kangaroos live in the wild? | In Australia and New Guinea. They carry their young in a pouch.
What is glass made from? | Mainly from sand, melted with soda and lime.
"""
