"""Writes a benchmark of needle videos in Video-MME's and LVBench's layout.

    python -m experiments.needle_benchmark --output=needle_benchmark --videos=100 --frames=256
    python -m experiments.evaluate --flagfile=experiments/configs/needle/adapttoken.cfg \\
        --data=needle_benchmark --workdir=runs/needle/adapttoken
"""

from absl import flags

from adapttoken_jax.evaluation.needle_benchmark import write_benchmark
from adapttoken_jax.needle import DIFFICULTIES, SPLITS
from adapttoken_jax.progress import Progress
from adapttoken_jax.result import made_directory
from experiments import command

_OUTPUT = flags.DEFINE_string("output", None, "Directory to write, made if missing.", required=True)
_VIDEOS = flags.DEFINE_integer("videos", 100, "Videos, with three questions each.", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 256, "Frames of a video, at 4 per second.", lower_bound=1)
_FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "Seed of the first video.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "test", list(SPLITS), "Which videos.")
_DIFFICULTY = flags.DEFINE_enum("difficulty", "normal", list(DIFFICULTIES), "Difficulty of the videos.")


def run() -> None:
    """The whole run, from flags to files."""
    made_directory("output", _OUTPUT.value)
    given = (_OUTPUT, _VIDEOS, _FRAMES, _FIRST_SEED, _SPLIT, _DIFFICULTY)
    with Progress() as progress:
        write_benchmark(*(flag.value for flag in given), progress)


if __name__ == "__main__":
    command.start("needle_benchmark", run)
