"""AdaptToken in JAX: questions about hours of video, answered by Qwen2.5-VL without training.

    import adapttoken_jax as at
    model = at.load("path/to/Qwen2.5-VL-7B-Instruct")
    result = at.answer(model, "film.mp4", "Who opens the letter?", options=["the boy", "the judge"])

Axis letters used throughout: B batch (contexts, or groups side by side), Q questions, T query (and temporal slots in
vision), S key, N heads, K kv-heads, G query heads per kv-head, H head dim, D model, F ff, V vocab; P patches, W
windows, M merged tokens; L layers, A answer tokens; g groups.
"""

import importlib
from typing import TYPE_CHECKING

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.errors import UserError

if TYPE_CHECKING:
    from adapttoken_jax.loading import Model, load
    from adapttoken_jax.pipeline import answer
    from adapttoken_jax.result import Result
    from adapttoken_jax.video import Frames

__all__ = ["AdaptTokenConfig", "Frames", "Model", "Result", "UserError", "answer", "load"]

# Loaded on first use, so that the command line answers `--help` without starting JAX.
_LAZY = {"Model": "loading", "load": "loading", "answer": "pipeline", "Result": "result", "Frames": "video"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
