"""Print the README's table of what was wanted and what was reached, from benchmarks/results/*.json; measures nothing.

    python benchmarks/summary.py            # a test keeps the README equal to it
"""
from __future__ import annotations

import json

from common import RESULTS

SCRIPTS = {"speed": "speed: ", "time_to_accuracy": "", "relax": "relaxation: ", "sevennet_trim": "SevenNet-0 with splines, "}  # and a title


def number(value: float | None) -> str:
    """Three digits; a dash where something was never reached."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def rows() -> list[str]:
    """The table's lines, in markdown."""
    lines = ["| measured | value | wanted | | by |", "|---|---|---|---|---|"]
    for script, title in SCRIPTS.items():
        path = RESULTS / f"{script}.json"
        if path.exists():
            content = json.loads(path.read_text())
            for name, entry in (content.get("headline") or content["goals"]).items():
                lines.append(f"| {title}{name} | {number(entry['value'])} | {entry['goal']} | {'reached' if entry['reached'] else 'missed'} | "
                             f"[{script}.py](benchmarks/{script}.py) |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
