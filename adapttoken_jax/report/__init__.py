"""The HTML report of answered questions: one file that needs no network, no script and no other file.

    from adapttoken_jax import report
    report.write("report.html", [report.entry(model.config, "film.mp4", result, question, options)])

Design decisions:
- Python decides what is shown and where (`timeline`, `moments`, `page`: numbers, words and SVG path data); the
  templates only lay it out. Jinja2 escapes every value, so text from the user is text and nothing else; a content
  security policy in the page forbids scripts and requests on top.
- Charts are stretched to the width they get (`preserveAspectRatio="none"`), and their labels are HTML beside them, so
  that text keeps its size on a phone.
- No script: folding is `<details>`, the switches over the frames are check boxes that CSS reads.
- Colours are named once, in `templates/report.css`, for light and for dark; the tests compute their contrast.
"""

from adapttoken_jax.report.entries import Evidence, ReportEntry, entry
from adapttoken_jax.report.page import render, write

__all__ = ["Evidence", "ReportEntry", "entry", "render", "write"]
