"""Print the tables of README.md and benchmarks/README.md from benchmarks/results/*.json; measures nothing.

    python benchmarks/summary.py            # prints; a test keeps both pages equal to it
    python benchmarks/summary.py --write    # puts them into the pages, in place of those with the same heading
"""
from __future__ import annotations

import argparse
import sys

from common import ROOT, read_results

SCRIPTS = {"speed": "speed: ", "time_to_accuracy": "", "relax": "relaxation: ", "sevennet_trim": "SevenNet-0 with splines, ", "density": "density: "}  # and a title
M64, M128 = "MACE 64x0e+64x1o", "MACE 128x0e"
SHARES = [f"{what} of {M64}, share" for what in ("force MAE (eV/Å)", "energy MAE (meV/atom)")]
PEERS = (  # the README's table: what, against whom, script, what follows the values, and (goal's name, format of its value) …
    ("energy, forces, stress", f"{M64} · {M128} · SevenNet-0 · NequIP, compiled", "speed", " × as fast",
     *((f"bare, {peer} / Facet, 89 species", "{:.1f}") for peer in (M64, M128, "SevenNet-0", "NequIP compiled"))),
    ("a training step", f"{M64} · {M128}", "speed", " × as fast", *((f"train, {peer} / Facet, 89 species", "{:.1f}") for peer in (M64, M128))),
    ("memory", "the most frugal of them", "speed", " of it", ("memory, Facet / smallest peer, 89 species", "{:.0%}")),
    ("training on silicon until its best force · energy error", M64, "time_to_accuracy", " of its processor time",
     *((f"Si, processor time to the best {share}", "{:.0%}") for share in SHARES)),
    ("training on crystals of 15 elements until the same", M64, "time_to_accuracy", " of its processor time",
     *((f"crystals, processor time to the best {share}", "{:.0%}") for share in SHARES)),
    ("relaxing crystals one by one: in all · the model's part", M64, "relax", " × as fast",
     ("wall time of all relaxations, MACE / Facet", "{:.1f}"), ("per step, the model's part, MACE / Facet", "{:.1f}")),
    ("relaxing many at once by `facet.relax`", f"{M64}, one by one", "relax", " × as many in the same processor time",
     ("crystals per second of processor time, facet.relax / MACE with ASE", "{:.1f}")),
    ("SevenNet-0 with splines for its radial MLPs, and exact folds", "as it comes", "sevennet_trim", " off",
     ("without training: fewer parameters, %", "{:.0f} % fewer parameters"), ("without training: energy, meV/atom", "{:.2f} meV/atom"),
     ("without training: force, meV/Å", "{:.1f} meV/Å")))


def goals(script: str) -> dict[str, dict]:
    """What was aimed at: value, goal and whether it is reached, by name."""
    content = read_results(script)
    return content.get("headline") or content["goals"]


def number(value: float | None) -> str:
    """Three digits; a dash where something was never reached."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def all_goals() -> list[str]:
    """Everything that was aimed at, reached or not, for benchmarks/README.md."""
    lines = ["| measured | value | wanted | | by |", "|---|---|---|---|---|"]
    for script, title in SCRIPTS.items():
        for name, entry in goals(script).items():
            lines.append(f"| {title}{name} | {number(entry['value'])} | {entry['goal']} | {'reached' if entry['reached'] else 'missed'} | [{script}.py]({script}.py) |")
    return lines


def beside_peers() -> list[str]:
    """The README's table; a goal that was missed stands beside its value."""
    lines = ["| | against | Facet | by |", "|---|---|---|---|"]
    for what, whom, script, after, *entries in PEERS:
        table, cells = goals(script), []
        for name, text in entries:
            value, words = table[name]["value"], table[name]["goal"].split()
            wanted = " ".join([*words[:2], text.format(float(words[2]))])
            cells.append(("never" if value is None else text.format(value)) + f" (wanted: {wanted})" * (not table[name]["reached"]))
        lines.append(f"| {what} | {whom} | {' · '.join(cells)}{after} | [{script}.py](benchmarks/{script}.py) |")
    return lines


def density() -> list[str]:
    """What summing first is worth, and what the whole model takes."""
    content = read_results("density")
    lines = ["| milliseconds, edge by edge → neighbours first | one thread | two threads |", "|---|---|---|"]
    for task in ("energy+forces", "training step"):
        cells = [content["threads"][threads]["layer"][task] for threads in "12"]
        lines.append(f"| one layer, {task.replace('+', ' and ')} | " + " | ".join(
            f"{cell['edge_wise_ms']:.1f} → {cell['density_ms']:.1f} ({cell['ratio']:.1f} ×)" for cell in cells) + " |")
    ms = [content["threads"][threads]["scaling"]["ms"] for threads in "12"]
    for atoms in ("8", "64", "512", "4096"):
        lines.append(f"| the default model, {int(atoms):,} silicon atoms | {ms[0][atoms]:,.1f} | {ms[1][atoms]:,.1f} |")
    return lines


TABLES = {beside_peers: "README.md", density: "README.md", all_goals: "benchmarks/README.md"}  # and the page where each stands


def write(lines: list[str], page: str) -> None:
    """Put a table in place of the one with the same first line."""
    before, found, old = (ROOT / page).read_text(encoding="utf-8").partition(lines[0] + "\n")
    if not found:
        sys.exit(f"{page}: no table begins with {lines[0]}")
    rest = old.partition("\n\n")[2]
    (ROOT / page).write_text(before + "\n".join(lines) + "\n" + ("\n" + rest if rest else ""), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    sys.stdout.reconfigure(encoding="utf-8")
    if parser.parse_args().write:
        for table, page in TABLES.items():
            write(table(), page)
    print("\n\n".join("\n".join(table()) for table in TABLES))
