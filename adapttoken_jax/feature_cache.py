"""Vision features on disk: a later question about the same video needs neither decoding nor the vision tower.

An entry is one file, named by a hash of all that its numbers depend on: the content of the video, the frames taken from
it and their size, the weights and attention kernel of the vision tower, the number format, the kind and number of
devices and whether there are groups, which decide how much is computed at once, and the libraries' versions.
It holds the slots that have been encoded so far, so a scan that stopped early leaves what it has. Entries are replaced
as a whole under a temporary name: nobody reads half of one, and of several writers the last one stays.

An entry is a zip of plain bytes: NumPy reads its own files with `ast`, which Python 3.11 cannot use in several threads.
"""

import contextlib
import hashlib
import os
import pathlib
import sys
import time
import zipfile

import jax
import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import Model
from adapttoken_jax.result import PARTIAL_PATHS, atomic_file, library_versions, made_directory
from adapttoken_jax.video import PRESETS, Clip

_VERSION = 4  # 1: pixels were normalised on the host, which rounds otherwise; 2: on any devices; 3: in other chunks
_SLOT = np.dtype("<i4")
_REMAINS_S = 3600.0


class FeatureCache:
    """A directory of entries for one model. Reads all of the vision tower's weights once, to know them again.

    Attributes:
      model: what the entries' features are computed with.

    Raises:
      UserError: the directory cannot be made or written to, or the model is spread over several hosts.
    """

    def __init__(self, directory: str | os.PathLike, model: Model):
        self._directory = made_directory("feature_cache", directory)
        _remove_remains(self._directory)
        if jax.process_count() > 1:
            raise UserError("--feature_cache: works on one host only; drop it")
        self.model, self._hash = model, _model_hash(model)

    def entry(self, clip: Clip, scanned: bool = False) -> "Entry":
        """The entry of a clip, which may not exist yet. Reads the whole video file once.

        Whether the clip is `scanned` decides how many of its slots are encoded at once, and with that the last bits.
        """
        digest = hashlib.sha256(f"{_VERSION} {self._hash} {_content_hash(clip)} {scanned}".encode())
        digest.update(f"{clip.height} {clip.width} {PRESETS[clip.preset].resizer}".encode())
        digest.update(clip.slot_frames.tobytes())
        return Entry(self._directory / f"{digest.hexdigest()[:40]}.zip")


def _remove_remains(directory: pathlib.Path) -> None:
    """Removes what killed processes have left of entries: parts that nobody has written to for a while."""
    for part in directory.glob(PARTIAL_PATHS):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _REMAINS_S:
                part.unlink()


class Entry:
    """The features of one clip on disk, or the place for them."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def read(self, features: np.ndarray) -> np.ndarray:
        """Fills `features` [T, M, D] where the entry has them; returns which slots these are, bool [T].

        An entry that is damaged counts as empty, with a note on stderr.
        """
        there = np.zeros(len(features), bool)
        try:
            with zipfile.ZipFile(self.path) as content:
                slots = np.frombuffer(content.read("slots"), _SLOT)
                values = np.frombuffer(content.read("features"), features.dtype)
            features[slots] = values.reshape(len(slots), *features.shape[1:])
            there[slots] = True
        except FileNotFoundError:
            pass
        except Exception as error:  # of which changed bytes give many; zip checks a sum over each array
            print(f"{self.path}: damaged ({error}); its features are computed again", file=sys.stderr)
        return there

    def write(self, features: np.ndarray, there: np.ndarray) -> None:
        """Replaces the entry by the slots that are `there`; a full disk or memory costs no more than the entry."""
        try:
            known = features if there.all() else features[there]
            with atomic_file(self.path) as file, zipfile.ZipFile(file, "w") as content:
                content.writestr("slots", np.flatnonzero(there).astype(_SLOT).tobytes())
                content.writestr("features", np.ascontiguousarray(known).reshape(-1).view(np.uint8))
        except (OSError, MemoryError) as error:
            why = getattr(error, "strerror", None) or "too little memory"
            print(f"{self.path}: not written ({why}); the features are not kept", file=sys.stderr)


def _content_hash(clip: Clip) -> str:
    if clip.info.frames is not None:
        images = clip.info.frames.images
        digest = hashlib.sha256(f"{images.shape}".encode())
        digest.update(np.ascontiguousarray(images).data)
        return digest.hexdigest()
    with open(clip.info.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_hash(model: Model) -> str:
    """SHA-256 of everything about the model and this program that features depend on."""
    devices = jax.devices()[:1] if model.mesh is None else model.mesh.devices.flat
    computed = f"{model.dtype.name} {model.vision_kernel.name} {len(devices)} x {devices[0].device_kind}"
    digest = hashlib.sha256(f"{model.config.vision} {computed} {sorted(library_versions().items())}".encode())
    for leaf in jax.tree.leaves(model.module.vision):
        digest.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).data)
    return digest.hexdigest()
