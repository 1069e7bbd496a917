"""From a video to the vision tower's input: probe -> plan a clip -> decode, resize and cut into patches.

`probe` reads a file's timing without decoding it, `plan_clip` decides which frames are taken and how large they become,
`read_patches` decodes them chunk by chunk. NumPy, PyAV and Pillow only: nothing here knows the model or JAX.

Three presets (`PRESETS`) gather the conventions in which the published preprocessing codes differ. A *slot* is
`temporal_patch` consecutive sampled frames (two for every released model), the unit of time that the model sees.
"""

from adapttoken_jax.video.decode import FrameReader, decoding_cost
from adapttoken_jax.video.patches import (
    PIXEL_MEAN,
    PIXEL_STD,
    SlotPatches,
    cut_patches,
    normalised,
    read_images,
    read_patches,
)
from adapttoken_jax.video.probe import Frames, VideoInfo, probe
from adapttoken_jax.video.resize import resize_bicubic, resize_pillow
from adapttoken_jax.video.sampling import PRESETS, Clip, Preset, frame_count, plan_clip, slot_edges, smart_resize

__all__ = [
    "PIXEL_MEAN",
    "PIXEL_STD",
    "PRESETS",
    "Clip",
    "FrameReader",
    "Frames",
    "Preset",
    "SlotPatches",
    "VideoInfo",
    "cut_patches",
    "decoding_cost",
    "frame_count",
    "normalised",
    "plan_clip",
    "probe",
    "read_images",
    "read_patches",
    "resize_bicubic",
    "resize_pillow",
    "slot_edges",
    "smart_resize",
]
