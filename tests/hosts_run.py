"""One of several processes that answer the same questions on one mesh; started by `tests/test_hosts.py`.

    python -m tests.hosts_run PROCESS DIRECTORY MESH CASE...

DIRECTORY holds `model` and `clip.mp4`. The process writes `result-INDEX.json` into it: the results of the cases by
name, how many slots it decoded at a time, and how many bytes of weights it read.
"""

import json
import pathlib
import sys
import traceback

import adapttoken_jax as at
from adapttoken_jax import encoding, hosts
from adapttoken_jax.calibration import model_fingerprint
from adapttoken_jax.errors import UserError
from adapttoken_jax.feature_cache import FeatureCache
from checkpoints_convert import safetensors_file

QUESTIONS = ["What is in the video?", "Where does it end?"]
OPTIONS = ["a cat", "a dog", "a cow", "a hen"]
SMALL = dict(max_pixels=4704, slots_per_group=4, budget=20, max_answer_tokens=2, max_frames=48, fps=24.0)
# Name of a case -> settings beside `SMALL`, and arguments of `at.answer`.
CASES = {
    "full": ({}, {}),
    "lite": (
        {"stop_groups": 2, "stop_agreement": False, "stop_entropy": 9.0, "group_order": "bit_reversed"},
        {"method": "lite"},
    ),
    "no time": ({}, {"deadline": 0.0}),
}


def answers(directory: pathlib.Path, mesh: str | None, cases) -> dict[str, list[dict]]:
    """The content of `result.json` of both questions, by case, the model's fingerprint, and what a cache says."""
    model = at.load(directory / "model", mesh=mesh)
    found = {"fingerprint": model_fingerprint(model), "cache": ""}
    try:
        FeatureCache(directory / "cache", model)
    except UserError as error:
        found["cache"] = str(error)
    for name in cases:
        settings, arguments = CASES[name]
        config = at.AdaptTokenConfig.for_model(model.config, **SMALL, **settings)
        both = at.answer(model, directory / "clip.mp4", QUESTIONS, [OPTIONS] * 2, config, **arguments)
        found[name] = [json.loads(result.to_json()) for result in both]
    return found


def record() -> tuple[list[int], list[int]]:
    """Two lists that fill up: slots decoded at a time, and bytes read from the checkpoint."""
    slots, sizes = [], []
    read = safetensors_file.StoredTensor.read

    class Decoded(encoding.SlotPatches):
        def take_slots(self, count):
            taken = super().take_slots(count)
            slots.append(len(taken))
            return taken

    def read_and_count(tensor, shape, index=()):
        part = read(tensor, shape, index)
        sizes.append(part.nbytes)
        return part

    encoding.SlotPatches, safetensors_file.StoredTensor.read = Decoded, read_and_count
    return slots, sizes


def main(process: str, directory: str, mesh: str, *cases: str) -> None:
    """See the module's docstring."""
    hosts.start("hosts_run", process)
    try:
        slots, sizes = record()
        found = answers(pathlib.Path(directory), mesh, cases) | {"slots": slots, "bytes": sum(sizes)}
        index = process.partition("/")[0]
        (pathlib.Path(directory) / f"result-{index}.json").write_text(json.dumps(found))
        status = 0
    except Exception:
        traceback.print_exc()
        status = 1
    sys.exit(hosts.leave(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
