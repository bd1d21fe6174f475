"""The tables of README.md and benchmarks/README.md, from benchmarks/results/*.json.

    python benchmarks/summary.py            # prints them; a test keeps both pages equal to it
    python benchmarks/summary.py --write    # puts them into the pages

It measures nothing. A table takes the place of the one in the page with the same first line.
"""
from __future__ import annotations

import sys

import numpy as np
from common import ROOT, SETS, columns, command_line, read_results
from common import rows as rows_of

M64 = "MACE 64x0e+64x1o"
M128 = "MACE 128x0e"
NEQUIP = "NequIP compiled"
ENERGY = "energy_mae_meV_per_atom"
FORCE = "force_mae_eV_per_A"
STRESS = "stress_mae_GPa"
ERRORS = {FORCE: "force MAE (eV/Å)", ENERGY: "energy MAE (meV/atom)"}

# Published test errors on the same splits. Si, Li: Zuo et al., J. Phys. Chem. A 124, 731 (2020).
# AcAc: arXiv 2206.07697, table 3, MACE after hours of an A100. NbMoTaW: SNAP, npj Comput. Mater. 6,
# 70 (2020), whose training set has quaternaries.
PUBLISHED = {  # test file: model: energy, forces, in the units of `usual_errors`
    "Si": {"GAP": ("2.91", "0.07"), "MTP": ("2.21", "0.06")},
    "Li": {"GAP": ("0.49", "0.01"), "MTP": ("0.49", "0.01")},
    "AcAc, 300 K": {"MACE, hours of an A100": ("0.9", "5.1")},
    "AcAc, 600 K": {"MACE, hours of an A100": ("4.6", "22.4")},
    "NbMoTaW, elements": {"SNAP": ("4.13", "0.132")},
    "NbMoTaW, binaries": {"SNAP": ("5.35", "0.031")},
    "NbMoTaW, quaternaries": {"SNAP": ("5.94", "0.189")}}


# ─── Speed ───────────────────────────────────────────────────────────────────────────────────────


def speed_ratio(runs: dict, job: str, peer: str, threads: int, species: int = 89) -> float:
    """Milliseconds of a peer over Facet's: the least over crystals."""
    crystals = ("Si 64", "Si 512") if job == "bare" else ("4 x Si 64",)
    ratios = []
    for run in runs.values():
        wanted = run["species"] == species and run["threads"] == threads
        for crystal in crystals if wanted else ():
            row = run[job].get(crystal, {})
            if peer in row and "Facet" in row:
                ratios.append(row[peer]["ms"] / row["Facet"]["ms"])
    return min(ratios)


def memory_share(runs: dict, species: int = 89) -> float:
    """Facet's peak memory over that of the most frugal peer: the largest over crystals, threads."""
    shares = []
    for run in runs.values():
        for crystal in ("Si 512", "Si 4096") if run["species"] == species else ():
            peak = {name: one["peak_GB"] for name, one in run["bare"].get(crystal, {}).items()}
            ours = peak.pop("Facet", None)
            if ours and peak:
                shares.append(ours / min(peak.values()))
    return max(shares)


def speed() -> list[str]:
    """Each model's numbers at one thread, 89 species."""
    runs = read_results("speed")["runs"].values()
    run = next(run for run in runs if run["species"] == 89)
    rows = []
    for name, about in run["models"].items():
        cells = [f"{about['parameters']:,}"]
        for job, crystal in (
            ("bare", "Si 64"), ("bare", "Si 512"), ("calculator", "Si 512"), ("train", "4 x Si 64")
        ):
            found = run[job].get(crystal, {}).get(name)
            cells.append(f"{found['ms']:,.0f}" if found else "–")
        cells.append(f"{run['bare']['Si 512'][name]['peak_GB']:.2f}")
        rows.append([name, *cells])
    return table(
        "89 species, one thread", "parameters", "64 atoms (ms)", "512 atoms (ms)",
        "512, through ASE (ms)", "training step (ms)", "memory, 512 atoms (GB)", rows=rows)


# ─── Accuracy ────────────────────────────────────────────────────────────────────────────────────


def spread(values: list, digits: int) -> str:
    """Mean ± standard deviation over the seeds; the value alone where there is one seed."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def usual_errors(label: str, found: dict) -> tuple[str, tuple[str, str], tuple[str, str]]:
    """Kind, units and values of the energy and force errors as they are usually given: MAE per
    atom, for molecules RMSE of the total energy. Values with their spreads over the seeds.
    """
    if label.startswith("AcAc"):
        energy = np.array(found["energy_rmse_meV_per_atom"]) * np.array(found["atoms"])
        force = 1000 * np.array(found["force_rmse_eV_per_A"])
        return "RMSE", ("meV", "meV/Å"), (spread(energy, 1), spread(force, 1))
    return "MAE", ("meV/atom", "eV/Å"), (spread(found[ENERGY], 2), spread(found[FORCE], 4))


def trainings(size: str = "medium") -> dict[str, dict]:
    """{test file: columns of the trainings of this size}, in the order of SETS."""
    found = {label: [] for _, tests in SETS.values() for label in tests}
    for row in rows_of(read_results("accuracy")["tests"]):
        if row["size"] == size:
            found[row["test"]].append(row)
    return {label: columns(runs) for label, runs in found.items() if runs}


def accuracy() -> list[str]:
    """Test errors with default settings, a line for each test file."""
    lines = []
    for label, found in trainings().items():
        kind, units, values = usual_errors(label, found)
        stress = "–" if found[STRESS][0] is None else spread(found[STRESS], 3)
        constants = []
        for key in (ENERGY, FORCE, STRESS):
            value = found["constant"][key][0]
            digits = ",.0f" if (value or 0) >= 100 else ".3g"
            constants.append("–" if value is None else f"{value:{digits}}")
        lines.append([
            label, f"{kind}, {' · '.join(units)}", *values, stress,
            f"{np.mean(found['cpu_seconds']) / 60:.1f}", f"{np.mean(found['steps']):,.0f}",
            " · ".join(constants)])
    return table(
        "test errors", "of energy · forces", "energy", "forces", "stress MAE (GPa)", "CPU-minutes",
        "steps", "constants: MAE", rows=lines)


def sizes() -> list[str]:
    """Test errors of the three sizes, a line for each test file."""
    found = {size: trainings(size) for size in ("small", "medium", "large")}
    clock = {"small": "cpu_seconds", "medium": "cpu_seconds", "large": "train_seconds"}
    lines = []
    for label, medium in found["medium"].items():
        kind, units, _ = usual_errors(label, medium)
        cells = [label, f"{kind}, {' · '.join(units)}"]
        for size, key in clock.items():
            run = found[size].get(label)
            minutes = f"{np.mean(run[key]) / 60:.1f}" if run else "–"
            cells += [" · ".join(usual_errors(label, run)[2]) if run else "–", minutes]
        lines.append(cells)
    return table("test errors by size", "of energy · forces", "small", "CPU-minutes", "medium",
                 "CPU-minutes", "large", "minutes", rows=lines)


def crossing(curve: dict, key: str, goal: float) -> float | None:
    """CPU-seconds at which an error is down to the goal; None if it never is.

    Between the points of the curve, on a line in log-log.
    """
    order = np.argsort(curve["cpu_seconds"])
    seconds = np.array(curve["cpu_seconds"])[order]
    errors = np.array(curve[key])[order]
    reached = np.flatnonzero(errors <= goal)
    if not len(reached):
        return None
    i = reached[0]
    if i == 0:
        return float(seconds[0])  # the first point is enough: an upper bound
    t = np.log(seconds[i - 1 : i + 1])
    e = np.log(errors[i - 1 : i + 1])
    return float(np.exp(np.interp(-np.log(goal), -e, t)))


NEAR = 0.02  # an error this much above the best is as good as it


def against_time(name: str) -> dict[str, dict]:
    """For each error: MACE's best, when MACE and Facet are near it, and Facet's own best.

    Of Facet's trainings the one that is there first counts. gain: by what share MACE's best is
    lower with the last quarter of its epochs than without, until the end of the stage of its best.
    """
    content = read_results("accuracy")["against_time"][name]
    mace = content["mace"][M64]
    curve = mace["curve"]
    (word,) = [word for word in mace["arguments"] if word.startswith("--start_swa=")]
    second = int(word.partition("=")[2])  # epoch at which stage two begins
    runs = [run["curve"] for run in content["facet"].values()]
    found = {}
    for key in ERRORS:
        best = int(np.argmin(curve[key]))
        end = second + 1 if best <= second else len(curve[key])  # of the stage; 0 is untrained
        goal = (1 + NEAR) * curve[key][best]
        times = [crossing(run, key, goal) for run in runs]
        found[key] = {
            "mace_best": curve[key][best],
            "mace": crossing(curve, key, goal),
            "facet": min((seconds for seconds in times if seconds), default=None),
            "best": min(min(run[key]) for run in runs),
            "gain": max(0.0, 1 - curve[key][best] / min(curve[key][: end * 3 // 4])),
        }
    return found


def both_there() -> list[str]:
    """Sets of which there are curves of Facet and of the MACE that they are compared with."""
    found = read_results("accuracy").get("against_time", {})
    sets = {name: found[name] for name in SETS if name in found}
    return [name for name, one in sets.items() if one["facet"] and M64 in one["mace"]]


def share(entry: dict) -> str:
    """Facet's share of MACE's processor time, as far as it is decided."""
    if not entry["facet"]:
        return "never"
    text = f"{100 * entry['facet'] / entry['mace']:.1f} %"
    return text if entry["gain"] < NEAR else f"{text}, not decided"


def time_to_accuracy() -> list[str]:
    """How long MACE and Facet train until they are as good as MACE at its best."""
    rows = []
    for name in both_there():
        for key, entry in against_time(name).items():
            facet = f"{entry['facet']:,.0f}" if entry["facet"] else "never"
            rows.append([
                f"{name}, {ERRORS[key]}", f"{entry['mace_best']:.3g}", f"{entry['best']:.3g}",
                f"{entry['mace']:,.0f}", facet, share(entry), f"{100 * entry['gain']:.1f} %"])
    return table(
        "processor time until MACE's best error", "MACE's best", "Facet's best", "MACE (s)",
        "Facet (s)", "share", "its last quarter gains", rows=rows)


# ─── Relaxation ──────────────────────────────────────────────────────────────────────────────────


WAYS = {"mace": f"{M64}, ASE", "facet": "Facet, ASE", "batched": "Facet, tools.relax"}


def relax_totals(content: dict) -> dict[str, dict]:
    """For each way of relaxing crystals: sums over them, and the median error of volumes (%).

    Of those that converged and whose relaxed volume is known.
    """
    relaxed = content["relaxations"]
    known = [volume or np.nan for volume in relaxed["label_volume"]]
    found = {}
    for name in WAYS:
        if name not in relaxed:
            continue
        rows = relaxed[name]
        keys = ("seconds", "cpu_seconds", "model_seconds", "steps", "evaluations", "converged")
        found[name] = {key: sum(rows[key]) for key in keys if key in rows}
        found[name]["crystals"] = len(rows["steps"])
        error = np.abs(np.array(rows["volume_A3_per_atom"], float) / known - 1)
        error = error[np.isfinite(error) & rows["converged"]]
        found[name]["volume"] = 100 * np.median(error) if len(error) else None
    batched = content["batched"]
    found["batched"] |= {**batched, "evaluations": batched["steps"] + batched["crystals"]}
    return found


def relaxation(content: dict | None = None) -> list[str]:
    """Seconds, steps and milliseconds per step; of the results file unless content is given."""
    rows = []
    for name, one in relax_totals(content or read_results("relax")).items():
        model = "–"
        if "model_seconds" in one:
            model = f"{1000 * one['model_seconds'] / one['evaluations']:.1f}"
        rows.append([
            WAYS[name], f"{one['seconds']:.0f}", f"{one['cpu_seconds']:.0f}", one["steps"],
            f"{one['converged']} of {one['crystals']}",
            f"{1000 * one['seconds'] / one['evaluations']:.1f}", model,
            "–" if one["volume"] is None else f"{one['volume']:.0f} %"])
    return table(
        "relaxation by", "seconds", "CPU-seconds", "steps", "converged", "ms per step",
        "of which the model", "volumes off by", rows=rows)


def dynamics() -> list[str]:
    """Atoms times steps per second in LAMMPS, and memory."""
    runs = read_results("dynamics")["runs"]
    lines = []
    for i, atoms in enumerate(runs["atoms"]):
        rate = atoms * runs["steps"][i] / runs["seconds"][i]
        lines.append([f"{atoms:,}", runs["processes"][i], f"{rate:,.0f}", f"{runs['GB'][i]:.1f}"])
    return table("silicon atoms in LAMMPS", "processes", "atoms · steps per second",
                 "memory of a process (GB)", rows=lines)


# ─── Parts of Facet, SevenNet-0 ──────────────────────────────────────────────────────────────────


def density() -> list[str]:
    """What summing first is worth, and what the whole model takes."""
    threads = read_results("density")["threads"]
    rows = []
    for task in ("energy+forces", "training step"):
        cells = []
        for number in "12":
            one = threads[number]["layer"][task]
            cells.append(
                f"{one['edge_wise_ms']:.1f} → {one['density_ms']:.1f} ({one['ratio']:.1f} ×)")
        rows.append([f"one layer, {task.replace('+', ' and ')}", *cells])
    for atoms in ("8", "64", "512", "4096"):
        cells = [f"{threads[number]['scaling']['ms'][atoms]:,.1f}" for number in "12"]
        rows.append([f"the default model, {int(atoms):,} silicon atoms", *cells])
    return table(
        "milliseconds, edge by edge → neighbours first", "one thread", "two threads", rows=rows)


def ablation_errors(content: dict, key: str = FORCE) -> dict[str, dict[str, list[float]]]:
    """{set: {variant: errors of all seeds}}, in thousandths for forces; nan: diverged."""
    runs = content["runs"]
    factor = 1000 if key == FORCE else 1
    found = {}
    for i, variant in enumerate(runs["variant"]):
        name = runs["set"][i]
        if runs["steps"][i] == content["steps"].get(name):
            error = runs[key][i]
            errors = found.setdefault(name, {}).setdefault(variant, [])
            errors.append(np.nan if error is None else factor * error)
    return found


def ablations(name: str = "Si") -> list[str]:
    """Each variant's time and memory over the default's, and its errors, on one of SETS."""
    content = read_results("ablations")
    variants = content["timings"]["variants"]
    errors = [ablation_errors(content, key).get(name, {}) for key in (ENERGY, FORCE)]
    default = variants["variant"].index("default")
    rows = []
    for i, variant in enumerate(variants["variant"]):
        if variant not in errors[0] and variants["group"][i] != "density":
            continue
        cells = [f"{variants['parameters'][i]:,}"]
        for column in (variants["evaluation_ms"], variants["step_ms"][name],
                       variants["step_MB"][name]):
            cells.append(f"{column[i] / column[default]:.2f} ×")
        for found, digits in zip(errors, (2, 1), strict=True):
            cells.append(spread(found[variant], digits) if variant in found else "as the default")
        rows.append([variant, *cells])
    steps = content["steps"].get(name)
    length = f"{steps:,} steps" if steps else "whole trainings"
    return table(
        f"{name}, {length}", "parameters", "evaluation", "training step", "memory",
        "energy MAE (meV/atom)", "force MAE (meV/Å)", rows=rows)


def ablations_of_molecules() -> list[str]:
    """The same of acetylacetone at 300 K."""
    return ablations("AcAc")


MEASURED = ("forward_ms", "step_ms", "step_MB")  # of a node update alone


def updates_by_degree(content: dict) -> dict[int, dict[str, list[float]]]:
    """{L: {kind of node update: MEASURED}}."""
    table = content["updates"]
    found = {}
    for i, (L, kind) in enumerate(zip(table["L"], table["kind"], strict=True)):
        found.setdefault(L, {})[kind] = [table[key][i] for key in MEASURED]
    return found


def updates() -> list[str]:
    """Time and memory of the node update alone, those of others over the product grid's."""
    content = read_results("updates")
    lines = []
    for L, degree in updates_by_degree(content).items():
        own, *others = degree.values()
        cells = [f"{own[0]:.2f} · {own[1]:.2f} · {own[2]:.1f}"]
        for other in others:
            cells.append(" · ".join(f"{a / b:.2g}" for a, b in zip(other, own, strict=True)))
        lines.append([f"L = {L}", *cells])
    first, *kinds = degree
    return table(
        f"node update of {content['atoms']} atoms", f"{first}: ms · ms · MB",
        *[f"{kind}, over that" for kind in kinds], rows=lines)


def trim(rows: dict | None = None) -> list[str]:
    """SevenNet-0 with splines; of the results file unless rows are given."""
    rows = rows or read_results("sevennet_trim")["rows"]
    lines = []
    for i, name in enumerate(rows["variant"]):
        lines.append([
            name, f"{rows['parameters'][i]:,}", f"{rows['fewer_percent'][i]:.0f} %",
            f"{rows['energy_meV_per_atom'][i]:.3f}", f"{rows['force_meV_per_A'][i]:.2f}",
            f"{rows['stress_GPa'][i]:.3f}", f"{rows['molecule_force_meV_per_A'][i]:.2f}",
            f"{rows['speed'][i]:.2f} ×"])
    return table(
        "SevenNet-0 with splines", "parameters", "fewer", "energy (meV/atom)", "force (meV/Å)",
        "stress (GPa)", "force in molecules (meV/Å)", "speed", rows=lines)


def equivariance() -> list[str]:
    """Errors of each kind of grid layer, on its own grid."""
    content = read_results("equivariance")
    rows = []
    for name, model in content["models"].items():
        cells = [model["points"], f"{1000 * model[FORCE]:.1f}"]
        for when in ("before", "after"):
            column = content["rotation"][name][when]
            at = column["points"].index(model["points"])
            cells.append(f"{column['force_relative'][at]:.0e}")
        cluster = content["cluster"][f"{name} float64"]
        rows.append([name.removesuffix("-26").replace("silu", "SiLU"), *cells,
                     f"{cluster['angular_momentum_largest']:.0e}"])
    return table(
        "grid layer", "points", "force MAE (meV/Å)", "error of forces under rotation, untrained",
        "trained", "angular momentum of a cluster", rows=rows)


def short_range() -> list[str]:
    """Whether anything falls together."""
    rows = []
    for name, one in read_results("short_range")["models"].items():
        scan, hot = one["scan"], one["hot"]
        rows.append([
            name, scan["pairs"], len(scan["attracting"]),
            f"{scan['least_energy_at_0.3_A_eV']:,.0f}",
            f"{hot['structure']}, {hot['picoseconds']:g} ps",
            f"{hot['least_distance_A']:.2f}", f"{hot['largest_force_eV_per_A']:.0f}"])
    return table(
        "model", "pairs of elements", "attracting in the core", "least energy at 0.3 Å (eV)",
        "at 2,000 K", "shortest distance (Å)", "largest force (eV/Å)", rows=rows)


# ─── Beside the peers ────────────────────────────────────────────────────────────────────────────


def speed_rows() -> dict[str, list[str]]:
    """Times and memory of the same crystals."""
    runs = read_results("speed")["runs"]
    few = (M64, M128)
    four = (M64, M128, "SevenNet-0", NEQUIP)
    subjects = {
        "bare": "speed: energy, forces, stress of 64 or 512 silicon atoms (the worse case)",
        "train": "speed: a training step on 4 crystals of 64 silicon atoms"}
    rows = {}
    for job, threads, species, peers in (
            ("bare", 1, 89, four), ("bare", 2, 89, four), ("bare", 1, 4, few),
            ("train", 1, 89, few), ("train", 2, 89, few), ("train", 1, 4, few)):
        ratios = [f"{speed_ratio(runs, job, peer, threads, species):.1f}" for peer in peers]
        words = "one thread" if threads == 1 else "two threads"
        rows[job, threads, species] = [
            f"{subjects[job]}; {words}, {species} elements known", " / ".join(peers),
            f"{' / '.join(ratios)} times as fast"]
    rows["memory"] = [
        "memory: energy, forces, stress of 512 or 4,096 silicon atoms (the worse case)",
        "the one of these that needs least", f"{100 * memory_share(runs):.0f} % of that"]
    return rows


def error_rows() -> dict[str, list[str]]:
    """Test errors beside published ones, a line for each test file that has some."""
    lines = {}
    for label, found in trainings().items():
        if label not in PUBLISHED:
            continue
        kind, units, values = usual_errors(label, found)
        peers = []
        for peer, errors in PUBLISHED[label].items():
            peers.append(f"{peer}: {with_units(errors, units)}")
        mean = {"MAE": "mean absolute", "RMSE": "root mean square"}[kind]
        lines[label] = [f"test errors, {label}: {mean} error of energies, of forces",
                        "; ".join(peers), with_units(values, units)]
    return lines


def with_units(values: tuple[str, ...], units: tuple[str, ...]) -> str:
    return ", ".join(f"{value} {unit}" for value, unit in zip(values, units, strict=True))


def training_rows() -> dict[str, list[str]]:
    """Processor time until Facet's error is MACE's best."""
    rows = {}
    for name in both_there():
        for key, entry in against_time(name).items():
            error = {FORCE: "forces is {:.3g} eV/Å", ENERGY: "energies is {:.3g} meV/atom"}[key]
            ours = f"{entry['facet']:,.0f} s: {share(entry)}" if entry["facet"] else "never"
            rows[name, key] = [
                f"processor time of training on {name} until the mean absolute error of "
                f"{error.format(entry['mace_best'])}, MACE's best, to {100 * NEAR:.0f} %",
                f"{M64}: {entry['mace']:,.0f} s", ours]
    return rows


def relaxation_rows() -> dict[str, list[str]]:
    """Processor time of relaxing the same crystals."""
    total = relax_totals(read_results("relax"))
    mace, ours, many = total["mace"], total["facet"], total["batched"]
    model = [1000 * one["model_seconds"] / one["evaluations"] for one in (mace, ours)]  # ms

    def taken(one: dict) -> str:
        return f"{one['cpu_seconds']:.0f} s, {one['converged']} of them converge"

    def faster(before: float, after: float) -> str:
        return f"{before / after:.1f} times as fast"

    crystals = f"processor time of relaxing {mace['crystals']} crystals"
    return {
        "relaxing": [f"{crystals} one by one by ASE", f"{M64}: {taken(mace)}",
                     f"{taken(ours)}: {faster(mace['cpu_seconds'], ours['cpu_seconds'])}"],
        "model": ["the model's part of a step of that", f"{M64}: {model[0]:.1f} ms",
                  f"{model[1]:.1f} ms: {faster(*model)}"],
        "relaxing many": [f"{crystals}, Facet's all at once by `tools.relax`",
                          f"{M64}, one by one by ASE: {taken(mace)}",
                          f"{taken(many)}: {faster(mace['cpu_seconds'], many['cpu_seconds'])}"]}


def trim_rows() -> dict[str, list[str]]:
    """The untuned variant of SevenNet-0 with the least force error among those a quarter smaller.
    """
    rows = read_results("sevennet_trim")["rows"]
    chosen = [
        i for i, name in enumerate(rows["variant"])
        if rows["fewer_percent"][i] >= 25 and not name.endswith("tuned")]
    i = min(chosen, key=lambda i: rows["force_meV_per_A"][i])
    whole = rows["parameters"][rows["variant"].index("SevenNet-0")]
    return {"trim": [
        "parameters of SevenNet-0 with splines in place of its radial MLPs, and its matrices "
        "multiplied where that changes nothing", f"SevenNet-0: {whole:,}",
        f"{rows['parameters'][i]:,}, {rows['fewer_percent'][i]:.0f} % fewer; energies change by "
        f"{rows['energy_meV_per_atom'][i]:.2f} meV/atom, "
        f"forces by {rows['force_meV_per_A'][i]:.1f} meV/Å"]}


# Rows of the front page; the other page has all
FRONT = (("bare", 1, 89), "Si", ("Si", FORCE), "relaxing many")


def all_comparisons() -> list[str]:
    """Facet beside its peers, a line for each subject."""
    rows = speed_rows() | error_rows() | training_rows() | relaxation_rows() | trim_rows()
    return table("what", "against", "Facet", rows=list(rows.values()))


def beside_peers() -> list[str]:
    """The few lines of `all_comparisons` on the front page."""
    rows = speed_rows() | error_rows() | training_rows() | relaxation_rows()
    return table("what", "against", "Facet", rows=[rows[name] for name in FRONT])


# ─── Pages ───────────────────────────────────────────────────────────────────────────────────────


def table(*heading: str, rows: list[list]) -> list[str]:
    """Lines of a table in markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


HERE = "benchmarks/README.md"
TABLES = {  # and the page where each stands
    beside_peers: "README.md", all_comparisons: HERE, speed: HERE, accuracy: HERE,
    sizes: HERE, time_to_accuracy: HERE, relaxation: HERE, dynamics: HERE, density: HERE,
    updates: HERE, ablations: HERE, ablations_of_molecules: HERE, trim: HERE, equivariance: HERE,
    short_range: HERE}


def write(lines: list[str], page: str) -> None:
    """Put a table in place of the one with the same first line."""
    path = ROOT / page
    before, found, old = path.read_text(encoding="utf-8").partition(lines[0] + "\n")
    if not found:
        sys.exit(f"{page}: no table begins with {lines[0]}")
    _, gap, rest = old.partition("\n\n")
    path.write_text(before + "\n".join(lines) + (gap + rest or "\n"), encoding="utf-8")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    sys.stdout.reconfigure(encoding="utf-8")
    if parser.parse_args().write:
        for make, page in TABLES.items():
            write(make(), page)
    print("\n\n".join("\n".join(make()) for make in TABLES))


if __name__ == "__main__":
    main()
