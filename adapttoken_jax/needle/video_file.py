"""Needle scenes as real video files: H.264 in mp4, written with PyAV."""

import pathlib
from fractions import Fraction

from adapttoken_jax.errors import UserError
from adapttoken_jax.needle.scenes import Scene
from adapttoken_jax.result import naming, partial_path

_QUALITY = "12"  # x264's constant rate factor; this one keeps colours within a few levels


def write_mp4(scene: Scene, path, fps: float = 4.0) -> pathlib.Path:
    """Writes all frames of a scene.

    Args:
      scene: any length; frames are rendered and encoded in pieces.
      path: of the mp4; written under another name first, so that a broken run leaves no half a file.
      fps: frames per second of the file.

    Raises:
      UserError: `fps` is not positive or the directory does not exist.
    """
    path = pathlib.Path(path)
    if not fps > 0:
        raise UserError(f"fps {fps}: must be positive")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; create it first")
    partial = partial_path(path)
    try:
        with naming(path, partial):
            _encode(scene, partial, fps)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _encode(scene, path, fps):
    import av  # scenes in memory need no encoder

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.options = {"crf": _QUALITY, "preset": "fast", "threads": "1"}
        for images in scene.image_chunks():
            for image in images:
                for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
