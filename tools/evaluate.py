"""Errors of a model on any labelled file, labels for any other, and where the model comes from.

    python -m tools.evaluate runs/si/model.pt si_test.extxyz            # errors, by group
    python -m tools.evaluate runs/si/model.pt bare.cif --out labelled.extxyz
    python -m tools.evaluate runs/si/model.pt                           # how it was made

FILE is whatever tools.frames reads (files, globs, databases); besides, frames may lack all labels.
Frames that have some are compared with the model, beside one energy per species. --out writes all
frames with the model's energy, forces and stress, and with `source` (file and frame), `material`
and `group`; a file that exists is never replaced. Without labels, and without --out, what the
model says of the first frames is printed.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ase
import numpy as np

import facet
from tools.frames import (
    BadInput,
    add_names,
    expand,
    gather_files,
    leave_out,
    load_model,
    names_in,
    neighbours,
    print_to_stderr,
    what_there_is,
    write_whole,
)
from tools.labels import LABELS, TABLE, Names
from tools.options import add_evaluation, check_evaluation
from tools.sets import Frames

PORTION = 1000  # frames whose neighbours are in memory at a time
GROUPS = 20  # lines of groups at most
SHOWN = 10  # lines of predictions at most


# ─── Errors ──────────────────────────────────────────────────────────────────────────────────────


def predict(model: facet.Facet, frames, batch_atoms: int = 256) -> list[dict]:
    """Energy (eV), forces [N, 3] and stress [3, 3] (nan where there is no volume), in order.

    Raises BadInput, with the frame's name, for broken geometry.
    """
    out = []
    for start in range(0, len(frames), PORTION):
        some = [frames[i] for i in range(start, min(start + PORTION, len(frames)))]
        graphs = [neighbours(atoms, model.config) for atoms in some]
        for atoms, results in zip(some, facet.evaluate(model, graphs, batch_atoms), strict=True):
            out.append(complete(results, len(atoms)))
    return out


def complete(results: dict, atoms: int) -> dict:
    """Results under ASE's names → every label, nan for what is missing; stress [3, 3]."""
    return {label.name: label.array(results, atoms) for label in TABLE}


def labels(atoms: ase.Atoms) -> dict:
    """The labels of one frame, in the shapes of a prediction."""
    return complete(atoms.calc.results, len(atoms))


def errors(predictions: list[dict], frames) -> dict:
    """MAE and RMSE of each label: energy (meV/atom), forces (eV/Å, over components), stress (GPa).

    None where there are no labels, or no predictions of them; nan if any prediction is no number.
    """
    table = {}
    for label in TABLE:
        differences = [[]]
        for found, atoms in zip(predictions, frames, strict=True):
            wanted = labels(atoms)[label.name]
            if label.name not in found:
                continue
            difference = label.report.factor * (found[label.name] - wanted)
            if label.extensive:
                difference = difference / len(atoms)
            differences.append(difference[np.isfinite(wanted)])
        known = np.concatenate(differences)
        mae = float(np.abs(known).mean()) if len(known) else None
        rmse = float(np.sqrt((known**2).mean())) if len(known) else None
        table[label.report.column(label.quantity, "mae")] = mae
        table[label.report.column(label.quantity, "rmse")] = rmse
    return table


def errors_by_group(predictions: list[dict], frames) -> dict[str, dict]:
    """The errors of each group that the files name, and "structures"; the largest groups first."""
    members = {}
    for i, atoms in enumerate(frames):
        members.setdefault(atoms.info["group"], []).append(i)
    table = {}
    for group in sorted(members, key=lambda group: -len(members[group])):
        rows = members[group]
        found = errors([predictions[i] for i in rows], [frames[i] for i in rows])
        table[group] = {"structures": len(rows), **found}
    return table


def constant_baseline(frames, config: facet.Config) -> list[dict]:
    """What one energy per species alone predicts: no forces, no stress."""
    E0 = dict.fromkeys(config.species, 0.0)
    E0.update(zip(config.species, config.reference_energies))  # which may be empty
    predictions = []
    for atoms in frames:
        predictions.append(
            {
                "energy": sum(E0[symbol] for symbol in atoms.symbols),
                "forces": np.zeros((len(atoms), 3)),
                "stress": np.zeros((3, 3)),
            }
        )
    return predictions


def table_line(name: str, table: dict) -> str:
    """One line of the table of errors; – where there are no labels."""
    cells = [f"  {name:34s}"]
    for label in TABLE:
        unit = label.report
        mae = table[unit.column(label.quantity, "mae")]
        rmse = table[unit.column(label.quantity, "rmse")]
        cell = "–" if mae is None else f"{mae:.{unit.digits}f} ({rmse:.{unit.digits}f})"
        cells.append(f"{cell:>{unit.width}s}")
    return " ".join(cells)


def print_table(what: str, rows: dict[str, dict], groups: dict[str, dict]) -> None:
    """Facet and the baselines; a line for each group, where the files name several.

    what: that the errors are of, such as "6 test structures".
    """
    titles = [f"{label.quantity} MAE (RMSE) {label.report.text}" for label in TABLE]
    print(f"\n{what}               {'    '.join(titles)}")
    for name, table in rows.items():
        print(table_line(name, table))

    if len(groups) > 1:
        left_out = len(groups) - GROUPS
        print("Facet, by group" + (f" ({left_out} smaller groups left out)" * (left_out > 0)))
        for group, table in list(groups.items())[:GROUPS]:
            print(table_line(f"{group or 'no group'} ({table['structures']})", table))


def tell_broken(predictions: list[dict], frames, say: Callable[[str], None]) -> None:
    """Say for which frames the model gives an energy or forces that are no numbers."""
    broken = []
    for found, atoms in zip(predictions, frames, strict=True):
        if not all(np.isfinite(found[label.name]).all() for label in TABLE if label.expected):
            broken.append(atoms.info["source"])
    if broken:
        say(f"warning: the model gives no numbers (nan or infinity) for {len(broken)} of "
            f"{len(frames)} frames, such as {broken[0]}; errors with these are nan")


# ─── Frames, with and without labels ─────────────────────────────────────────────────────────────


def read(patterns: Sequence[str], names: Names) -> Frames:
    """The frames of files, globs and databases, checked, with the labels that they have, if any.

    Raises BadInput for what tools.frames refuses, but frames may lack all labels.
    """
    return gather_files(expand(patterns), names, say=print_to_stderr, bare=True)


# ─── What the model says of them ─────────────────────────────────────────────────────────────────


def compare(model: facet.Facet, frames: Frames, predictions: list[dict]) -> None:
    """Print the errors on those frames that have labels, beside the baseline, by group."""
    rows = np.flatnonzero(frames.labels().any(1))
    some = frames.take(rows)
    ours = [predictions[i] for i in rows]
    constant = constant_baseline(some, model.config)
    print_table(
        f"{len(some)} labelled frames",
        {"Facet": errors(ours, some), "constant per species": errors(constant, some)},
        errors_by_group(ours, some),
    )
    if len(some) < len(frames):
        print(f"{len(frames) - len(some)} frames without labels do not count")


def print_predictions(frames: Frames, predictions: list[dict]) -> None:
    """A line for each of the first frames."""
    titles = [f"{label.quantity} ({label.unit})" for label in TABLE]
    print(f"\n{'largest component of':34s} {' '.join(f'{title:>16s}' for title in titles)}")
    for atoms, found in zip(frames[:SHOWN], predictions):
        cells = [f"{largest(found[label.name]):16.6g}" for label in TABLE]
        print(f"{atoms.info['source']:34s} {' '.join(cells)}")
    if len(frames) > SHOWN:
        print(f"and {len(frames) - SHOWN} more; --out writes them all")


def largest(value: np.ndarray) -> float:
    """The number with the largest size; nan if there is one."""
    return float(value.flat[np.abs(value).argmax()])


def write(path: Path, frames: Frames, predictions: list[dict]) -> None:
    """The frames with the model's labels, as extended XYZ."""
    write_whole(path, [relabelled(*both) for both in zip(frames, predictions, strict=True)])


def relabelled(atoms: ase.Atoms, found: dict) -> ase.Atoms:
    """The frame with other labels, as they stand in a file."""
    atoms.calc = None
    if not atoms.info["group"]:
        del atoms.info["group"]
    if atoms.info["material"] == atoms.info["source"]:  # it has none
        del atoms.info["material"]
    for name in leave_out(atoms):
        print_to_stderr(f"note: extended XYZ cannot hold the {name} of a frame: left out")
    for label in TABLE:
        value = found[label.name]
        if np.isfinite(value).all():
            place = atoms.arrays if label.per_atom else atoms.info
            place[label.name] = value if value.ndim else float(value)
    return atoms


# ─── Where a model comes from ────────────────────────────────────────────────────────────────────


def describe(model: facet.Facet, path: Path) -> str:
    """The Config in words, and the origin of the model."""
    c = model.config
    parameters = sum(weights.numel() for weights in model.parameters())
    energies = []
    for symbol, energy in zip(c.species, c.reference_energies):
        energies.append(f"{symbol} {energy:.4f}")
    lines = [
        ("model", path),
        ("elements", " ".join(c.species)),
        ("cutoff", f"{c.cutoff:g} Å in each layer, {c.cutoff * c.layers:g} Å through all"),
        ("network", f"{c.layers} layers of {c.channels} channels in {c.groups} groups, degree "
                    f"{c.degree}, {c.splines} splines, grid layer {c.activation}"),
        ("parameters", parameters),
        ("E0 (eV)", ", ".join(energies) or "0"),
        *describe_origin(model.origin),
    ]
    return "\n".join(f"{name:<14}{text}" for name, text in lines)


def describe_origin(origin: dict) -> list[tuple[str, str]]:
    """What a model says of its training: name and text of each line."""
    if not origin:
        return [("origin", "the file does not tell: it is of an older format, or not of "
                           "train_small.py")]
    lines = []
    for name in ("command", "date"):
        lines.append((name, origin.get(name) or "unknown"))
    if base := origin.get("init"):
        lines.append(("begun from", f"{base['file']}, SHA-256 {base['sha256']}"))
    for name in ("versions", "units"):
        lines.append((name, listed(origin.get(name, {}))))

    # the files of each set
    for part, files in origin.get("data", {}).items():
        for file in files:
            text = f"{file['frames']} frames of {file['file']}, SHA-256 {file['sha256']}"
            lines.append((part, text))
        if not files:
            lines.append((part, "none"))

    shortest = {pair: f"{distance:.2f}" for pair, distance in origin.get("shortest", {}).items()}
    lines.append(("shortest (Å)", listed(shortest)))
    return lines


def listed(table: dict) -> str:
    """{"torch": "2.9", "ase": "3.26"} → torch 2.9, ase 3.26."""
    return ", ".join(f"{name} {value}" for name, value in table.items()) or "unknown"


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="model.pt of train_small.py")
    parser.add_argument("files", metavar="FILE", nargs="*", help="files or globs")
    parser.add_argument(
        "--out",
        metavar="OUT.extxyz",
        type=Path,
        help="write all frames with the model's labels here; refused if the file exists",
    )
    add_names(parser)
    add_evaluation(parser)
    args = parser.parse_intermixed_args(arguments)  # options before FILE, too

    check_evaluation(parser, args)
    if args.out and not args.files:
        parser.error(f"--out {args.out}: there are no frames to write; name files after the model")
    if args.out and args.out.suffix != ".extxyz":
        parser.error(f"--out {args.out}: the output is extended XYZ; name it something.extxyz")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        if args.out and args.out.exists():
            raise BadInput(f"--out {args.out}: exists already; remove it, or give another name")
        model = load_model(args.model, args.device).requires_grad_(False)
        if not args.files:
            print(describe(model, args.model))
            return

        # what the model says
        frames = read(args.files, names_in(args))
        try:
            predictions = predict(model, frames, args.batch_atoms)
        except BadInput as error:
            raise BadInput(f"{error}; remove the frame, or take another model") from error
        tell_broken(predictions, frames, print_to_stderr)

        # errors where there are labels, predictions where nobody has seen them yet
        if frames.labels().any():
            compare(model, frames, predictions)
        else:
            expected = " or ".join(label.name for label in TABLE if label.expected)
            print(
                f"No frame has {expected}, so no errors are given. Beside its geometry the first "
                f"has {what_there_is(expand(args.files)[0])}; tell names of labels by "
                f"{', '.join(f'--{name}' for name in LABELS)}."
            )
            if not args.out:
                print_predictions(frames, predictions)
        if args.out:
            write(args.out, frames, predictions)
            print(f"{args.out}: {len(frames)} frames with the model's {', '.join(LABELS)}")
    except (BadInput, MemoryError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
