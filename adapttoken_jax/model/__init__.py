"""The model: everything that is traced. It knows nothing of video files, and torch nowhere."""

from adapttoken_jax.model.qwen import Qwen25VL
from adapttoken_jax.model.text import Context, Probe, Tail

__all__ = ["Context", "Probe", "Qwen25VL", "Tail"]
