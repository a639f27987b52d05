"""The fair comparison: methods x budgets x seeds; a model is trained on each subset, measured, and differences get intervals.

config        one YAML file → frozen dataclasses (typed: YAML values → field types)
cells         which cells there are, each a unit that is run, kept and resumed by itself
material      data read, checked for leaks (leaks), tokens, test sets
stores        gradients, taken once for all arms
subsets       what each arm chooses, from them
training      one cell's work: train, measure, let it answer
records       the folder: what is kept of a cell, results.jsonl
checks        what is refused before a model is loaded
run           cell by cell
team          the processes of a launcher: all train, the first does everything else
speed         what a cell takes, from what others took
estimate      how long it will take
statistics    paired bootstrap over items and seeds
paired        differences between any two arms, with their intervals
summary       what can be said: where each arm stands, who is better than whom
page          the report: tables (CSV, Markdown), figures (SVG; labels: where those of points go), units (of metrics)
command       the flags, and what is printed
"""

from gradsieve.compare.config import Arm, Config, TestFiles, load_config
from gradsieve.compare.estimate import Forecast, forecast
from gradsieve.compare.run import Comparison

__all__ = ["Arm", "Comparison", "Config", "Forecast", "TestFiles", "forecast", "load_config"]
