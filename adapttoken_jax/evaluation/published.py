"""Accuracies in percent as arXiv 2603.28696 prints them: VideoMME without subtitles, MLVU, LongVideoBench, LVBench.

A row is (model, method, most frames); frames are None where the row does not say them.
"""

COLUMNS = ("videomme", "mlvu", "longvideobench", "lvbench")

_7B, _72B = "qwen2.5-vl-7b", "qwen2.5-vl-72b"

_ROWS = {
    (_7B, "base", None): (65.4, 70.2, 59.5, 45.3),
    (_7B, "flexselect", None): (68.2, 72.5, 62.4, 51.2),
    (_7B, "lite", 4096): (69.8, 76.3, 65.1, 53.3),
    (_7B, "adapttoken", 4096): (70.5, 76.8, 65.2, 54.8),
    (_7B, "adapttoken", 8192): (70.2, 77.1, 65.5, 54.9),
    (_7B, "adapttoken", 10000): (70.1, 77.1, 65.8, 55.6),
    (_72B, "base", None): (73.4, 76.3, 66.2, 47.3),
    (_72B, "flexselect", None): (74.4, 76.6, 66.4, 56.6),
    (_72B, "adapttoken", 4096): (76.1, 79.8, 70.5, 59.7),
}


def published(model: str | None, method: str, frames: int, benchmark: str) -> float | None:
    """The printed accuracy of a row, or None. The row "base" is the model alone: our arm `full`."""
    name = "base" if method == "full" else method
    row = _ROWS.get((model, name, frames)) or _ROWS.get((model, name, None))
    return row[COLUMNS.index(benchmark)] if row and benchmark in COLUMNS else None
