"""Needle videos: long synthetic videos whose answer hides in a few frames, and the small model trained on them.

`scene` makes a video with its ground truth from a seed, `write_mp4` writes it, `Scene.images` renders it to an array.
"""

from adapttoken_jax.needle.questions import Question, option_distribution, word_distributions
from adapttoken_jax.needle.render import COLOURS, SHAPES, FrameTable, render
from adapttoken_jax.needle.scenes import DIFFICULTIES, SPLITS, TASKS, Difficulty, Needle, Scene, scene
from adapttoken_jax.needle.video_file import write_mp4

__all__ = [
    "COLOURS",
    "DIFFICULTIES",
    "SHAPES",
    "SPLITS",
    "TASKS",
    "Difficulty",
    "FrameTable",
    "Needle",
    "Question",
    "Scene",
    "option_distribution",
    "render",
    "scene",
    "word_distributions",
    "write_mp4",
]
