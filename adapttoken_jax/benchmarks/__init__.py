"""The four benchmarks of long-video question answering: questions, prompts, scores.

items, report = BENCHMARKS["videomme"].load("/data/Video-MME")
ask = PROMPTS["videomme"]["lmms-eval"](items[0], None)
"""

from adapttoken_jax.benchmarks import longvideobench, lvbench, mlvu, videomme
from adapttoken_jax.benchmarks.items import Benchmark, Item, Report, SubtitleFile
from adapttoken_jax.benchmarks.prompts import PROMPTS
from adapttoken_jax.benchmarks.scoring import SCORERS, Cell, Scorer, Scores, Verdict, score_all

__all__ = [
    "BENCHMARKS", "PROMPTS", "SCORERS", "Benchmark", "Cell", "Item", "Report", "Scorer", "Scores", "SubtitleFile",
    "Verdict", "score_all",
]  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK for module in (videomme, longvideobench, lvbench, mlvu)
}
