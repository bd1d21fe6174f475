"""Make lesson/tour.ipynb from lesson/README.md: text cells, code cells and what they print.

    python lesson/notebook.py

A notebook is JSON. The outputs are what stands behind the arrows in the page; test_lesson.py runs
the blocks and compares, and fails when the notebook is older than the page.
"""
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
START = """import os
import sys

if not os.path.exists("facet.py"):      # a notebook starts in its own folder
    os.chdir("..")
sys.path.insert(0, os.getcwd())"""


def lines_of(text: str) -> list[str]:
    """As notebooks store them: each with its end of line."""
    return text.strip("\n").splitlines(keepends=True)


def text_cell(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": lines_of(text)}


def code_cell(text: str, count: int) -> dict:
    """The arrows, # → …, become the cell's output."""
    code = re.sub(r"(?m)^# → .*\n|  +# → .*$", "", text)
    printed = "".join(line + "\n" for line in re.findall(r"# → (.*)", text))
    outputs = []
    if printed:
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines_of(printed)})
    return {"cell_type": "code", "execution_count": count, "metadata": {}, "outputs": outputs,
            "source": lines_of(code)}


def notebook(page: str) -> str:
    """The notebook of a page, JSON."""
    cells = [code_cell(START, 1)]
    pieces = re.split(r"(?ms)^```python\n(.*?)^```\n", page)  # text, code, text, …
    for i, piece in enumerate(pieces):
        if not piece.strip():
            continue
        cells.append(code_cell(piece, 2 + i // 2) if i % 2 else text_cell(piece))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4,
               "nbformat_minor": 4}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    page = (HERE / "README.md").read_text(encoding="utf-8")
    (HERE / "tour.ipynb").write_text(notebook(page), encoding="utf-8")
