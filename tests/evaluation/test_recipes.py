"""Every flagfile is read by the command that it is for, and stands for a row of the paper's tables."""

import pathlib

import pytest

from adapttoken_jax import cli, config, terminal
from adapttoken_jax.evaluation.published import published

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
FILES = sorted(CONFIGS.rglob("*.cfg"))
EVALUATE = next(command for command in cli.COMMANDS if command.name == "evaluate")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_flagfile_is_read(path):
    words = [f"--flagfile={path}", "--data=d", "--workdir=w"]
    values = terminal.parse(
        EVALUATE, words if path.parent.name == "needle" else [*words, "--benchmark=lvbench", "--model=m"]
    )
    assert values.method == {"base": "full"}.get(path.stem, path.stem.partition("_")[0])
    if path.parent.name != "needle":
        sizes = config.SIZES[path.parent.name]
        settings = config.AdaptTokenConfig.for_model(sizes, **terminal.given_settings(values))
        frames = path.stem.partition("_")[2]
        assert settings.max_frames == (int(frames) if frames else 768 if path.stem == "base" else 4096)
        if path.stem not in ("base", "uniform") and "72b/lite" not in str(path):
            assert published(path.parent.name, values.method, settings.max_frames, "lvbench") is not None


def test_there_is_a_file_for_every_published_row():
    found = {f"{path.parent.name}/{path.stem}" for path in FILES}
    rows = {"qwen2.5-vl-7b": ("base", "flexselect", "lite", "adapttoken", "adapttoken_8192", "adapttoken_10000")}
    rows["qwen2.5-vl-72b"] = ("base", "flexselect", "adapttoken")
    assert {f"{model}/{row}" for model, names in rows.items() for row in names} <= found
    assert published("qwen2.5-vl-7b", "full", 768, "videomme") == 65.4
    assert published("qwen2.5-vl-7b", "adapttoken", 10000, "lvbench") == 55.6
    assert published("qwen2.5-vl-72b", "lite", 4096, "mlvu") is None
