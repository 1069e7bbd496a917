"""The model: everything that is traced. It knows nothing of video files, and torch nowhere."""

from adapttoken_jax.model.qwen import Qwen25VL
from adapttoken_jax.model.text import Probe

__all__ = ["Probe", "Qwen25VL"]
