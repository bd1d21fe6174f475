"""Relax the same perturbed crystals with Facet and with MACE, trained on the same data, and with Facet many at once.

    python benchmarks/relax.py --data FOLDER --facet runs/crystals/model.pt --mace runs/mace-crystals-64/mace.model
    python benchmarks/relax.py … --quick                              # 8 crystals, 15 steps; writes nothing
    python benchmarks/relax.py … --device cuda --batched 2000 --batch_atoms 50000     # more crystals in the batched run

Run by the Python of MACE's environment (benchmarks/README.md), with OMP_NUM_THREADS set to --threads in front: SciPy has
threads of its own. FOLDER is that of accuracy.py; the model of Facet is train_small.py's on crystals_train, that of MACE
mace_train.py's on the same. Without --mace only Facet relaxes.

The crystals: of each material of the test set the frame of lowest energy, repeated to 2 … 100 atoms, strained by up to
3 % and rattled by 0.05 Å, seeds fixed. Each is relaxed to fmax 0.02 eV/Å, cell included, in at most 300 steps, in turn by
    facet    ASE's FIRE and FrechetCellFilter with FacetCalculator
    mace     the same with MACECalculator, both in float32
and then by `facet.relax`, all at once and once more in groups of like size, for the picture. One whose cell stretches or
shrinks e-fold stops, as in facet.relax, and like one that needs more steps it counts as not converged.
All 60 take 30 to 50 minutes on one quiet core.

The two models differ, and so do their paths and steps: the ratio per step is the fair one, with the evaluations and the
time that each model itself takes beside it, for much of the rest is FrechetCellFilter's. Final energies, volumes and
lattices are compared where both converged; volumes also with the labels (SevenNet-0), for the materials whose frame of
lowest energy is all but relaxed. The energies of the two differ as their errors do. Other programs spoil the times: look
at the CPU seconds beside them. Writes benchmarks/results/relax.json and figures/relax.png (relax_cuda for a GPU).
"""
from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from common import SETS, versions, write_results

import facet
import train_small
from pictures import draw_results

FMAX, STEPS, LARGEST = 0.02, 300, 100  # eV/Å, steps, atoms
STRAIN, RATTLE = 0.03, 0.05  # largest component, Å
NEARLY_RELAXED = 0.5 / 160.21766, 0.05  # eV/Å³ and eV/Å: what the labels' largest stress and force may be, at most
GROUPS = 2, 4, 8, 16, 32, 64, LARGEST + 1  # atoms at which the groups of the picture begin
LABELS = {"facet": "Facet, ASE", "mace": "MACE, ASE", "batched": "Facet, facet.relax"}


# ─── The crystals ────────────────────────────────────────────────────────────────────────────────────────────────────

def supercell(atoms: Atoms, size: int) -> Atoms:
    """The shortest lattice vector is repeated until there are `size` atoms, or the next time would give more than LARGEST."""
    repeat = np.ones(3, int)
    while len(atoms) * repeat.prod() < size:
        longer = repeat + (np.arange(3) == np.argmin(repeat * atoms.cell.lengths()))
        if len(atoms) * longer.prod() > LARGEST:
            break
        repeat = longer
    return atoms * repeat


def perturbed(frames: list[train_small.Frame], count: int, seed: int) -> list[Atoms]:
    """`count` strained and rattled supercells of all sizes. info: material and, if known, its relaxed volume, Å³ per atom."""
    rng, lowest = np.random.default_rng(seed), {}
    for frame in sorted(frames, key=lambda frame: -frame.energy / len(frame.atoms)):
        lowest[frame.material] = frame
    crystals = []
    for i, size in enumerate(rng.permutation(np.geomspace(2, LARGEST, count).round())):
        frame = lowest[sorted(lowest)[i % len(lowest)]]
        atoms = supercell(frame.atoms, size)
        relaxed = np.abs(frame.stress).max() < NEARLY_RELAXED[0] and np.abs(frame.forces).max() < NEARLY_RELAXED[1]
        volume = frame.atoms.get_volume() / len(frame.atoms)
        atoms.info = {"material": str(frame.atoms.symbols), "volume": volume if relaxed else None}
        strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0, RATTLE, (len(atoms), 3))
        crystals.append(atoms)
    return crystals


# ─── Relaxing them ───────────────────────────────────────────────────────────────────────────────────────────────────

def timed(job: Callable) -> tuple[object, dict[str, float]]:
    """What the job returns; wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = job()
    return result, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def watch(calculator: Calculator) -> Calculator:
    """Makes the calculator keep count of its evaluations, and of their seconds, in `spent`."""
    calculate, calculator.spent = calculator.calculate, {"evaluations": 0, "model_seconds": 0.0}

    def watched(*args, **kwargs):
        calculator.spent["evaluations"] += 1
        calculator.spent["model_seconds"] += timed(lambda: calculate(*args, **kwargs))[1]["seconds"]

    calculator.calculate = watched
    return calculator


def described(atoms: Atoms, energy: float) -> dict:
    """What is compared."""
    energy = energy / len(atoms) if np.isfinite(energy) else None  # JSON knows no nan
    return {"energy_eV_per_atom": energy, "volume_A3_per_atom": atoms.get_volume() / len(atoms),
            "lattice": atoms.cell.cellpar().tolist()}


def with_ase(start: Atoms, calculator: Calculator, steps: int) -> dict:
    """One relaxation by ASE."""
    calculator.reset()
    calculator.spent.update(evaluations=0, model_seconds=0.0)
    atoms = start.copy()
    atoms.calc = calculator
    optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)

    def run() -> tuple[bool, str | None]:
        try:
            for converged in optimizer.irun(fmax=FMAX, steps=steps):
                stretch = np.linalg.svd(np.linalg.solve(start.cell.array, atoms.cell.array), compute_uv=False)
                if np.abs(np.log(stretch)).max() > 1:
                    return False, "stretched or shrunk e-fold"
            return bool(converged), None
        except (ValueError, RuntimeError, np.linalg.LinAlgError) as error:  # the end of a bad potential: counted, and kept
            return False, f"{type(error).__name__}: {error}".splitlines()[0]

    (converged, error), seconds = timed(run)
    return {"steps": optimizer.nsteps, "converged": converged, "error": error, **seconds, **calculator.spent,
            **described(atoms, float(calculator.results.get("energy", np.nan)))}


def batched(model: facet.Facet, crystals: list[Atoms], steps: int, batch_atoms: int) -> tuple[list[dict], dict]:
    """All at once by facet.relax: a row for each crystal, and the seconds."""
    relaxed, seconds = timed(lambda: facet.relax(model, crystals, fmax=FMAX, steps=steps, batch_atoms=batch_atoms))
    energies = [atoms.get_potential_energy() if atoms.calc else np.nan for atoms in relaxed]
    return [{**atoms.info, **described(atoms, energy)} for atoms, energy in zip(relaxed, energies)], seconds


# ─── Report ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def total(rows: list[dict], name: str) -> dict:
    """Sums over the crystals that one calculator relaxed with ASE."""
    rows = [row[name] for row in rows]
    sums = {key: sum(row[key] for row in rows) for key in ("seconds", "cpu_seconds", "model_seconds", "steps", "evaluations")}
    return {**sums, "converged": sum(row["converged"] for row in rows), "crystals": len(rows),
            "errors": [row["error"] for row in rows if row["error"]],
            **{f"ms_per_evaluation{part}": 1000 * sums[f"{part[1:]}{'_' * bool(part)}seconds"] / sums["evaluations"]
               for part in ("", "_cpu", "_model")}}


def difference(rows: list[dict], one: str, other: str) -> dict:
    """Final energies, volumes and lattices of the crystals that both relaxed."""
    pairs = [(row[one], row[other]) for row in rows if row[one]["converged"] and row[other]["converged"]]
    if not pairs:
        return {"crystals": 0}
    energy = [1000 * abs(a["energy_eV_per_atom"] - b["energy_eV_per_atom"]) for a, b in pairs]
    volume = [100 * abs(a["volume_A3_per_atom"] / b["volume_A3_per_atom"] - 1) for a, b in pairs]
    length = [100 * max(abs(a["lattice"][k] / b["lattice"][k] - 1) for k in range(3)) for a, b in pairs]
    angle = [max(abs(a["lattice"][k] - b["lattice"][k]) for k in range(3, 6)) for a, b in pairs]
    units = {"energy_meV_per_atom": energy, "volume_percent": volume, "lattice_length_percent": length,
             "lattice_angle_degrees": angle}
    return {"crystals": len(pairs), "same_number_of_steps": sum(a["steps"] == b["steps"] for a, b in pairs),
            **{name: {"median": float(np.median(x)), "largest": float(np.max(x))} for name, x in units.items()}}


def against_labels(rows: list[dict], name: str) -> dict:
    """Relaxed volumes against the materials' nearly relaxed frames."""
    errors = [100 * (row[name]["volume_A3_per_atom"] / row["label_volume"] - 1) for row in rows
              if row["label_volume"] and row[name]["converged"]]
    return {"crystals": len(errors), **({"median_percent": float(np.median(errors)), "median_absolute_percent":
                                         float(np.median(np.abs(errors)))} if errors else {})}


def headline(results: dict, rows: list[dict]) -> dict:
    """Ratios wanted and reached."""
    table, ours, theirs = {}, results["facet"], results.get("mace")

    def add(name: str, value: float, goal: float):
        table[name] = {"value": value, "goal": f"at least {goal:g}", "reached": bool(value >= goal)}
        print(f"{name:58s} {value:7.2f}   at least {goal:g}: {'reached' if value >= goal else 'not reached'}")

    if theirs:
        add("wall time of all relaxations, MACE / Facet", theirs["seconds"] / ours["seconds"], 5)
        for part, text in (("", "wall time"), ("_cpu", "CPU time"), ("_model", "the model's part")):
            key = f"ms_per_evaluation{part}"
            add(f"per step, {text}, MACE / Facet", theirs[key] / ours[key], 5)
        each = [[row[name]["seconds"] / row[name]["evaluations"] for name in ("mace", "facet")] for row in rows]
        add("per step, wall time, median over crystals, MACE / Facet", float(np.median([a / b for a, b in each])), 5)
    many = results["batched"]
    for name, text, goal in (("facet", "Facet", 2), ("mace", "MACE", 10)):
        if name in results:
            rates = [part["crystals"] / part["cpu_seconds"] for part in (many, results[name])]  # not run in turn: no wall time
            add(f"crystals per second of processor time, facet.relax / {text} with ASE", rates[0] / rates[1], goal)
    return table


# ─── Command line ────────────────────────────────────────────────────────────────────────────────────────────────────

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with crystals/")
    parser.add_argument("--facet", type=Path, required=True, help="model.pt of train_small.py")
    parser.add_argument("--mace", type=Path, help="model of mace_train.py; without it only Facet relaxes")
    parser.add_argument("--count", type=int, default=60, help="crystals (default 60)")
    parser.add_argument("--batched", type=int, default=0, help="crystals in the batched run, if more than --count")
    parser.add_argument("--batch_atoms", type=int, default=256, help="atoms evaluated at a time in the batched run (default 256)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for path in filter(None, (args.facet, args.mace)):
        if not path.is_file():
            parser.error(f"{path}: no such model")
    return args


def models(args: argparse.Namespace) -> tuple[facet.Facet, dict[str, Calculator]]:
    """Facet, and the calculators by name."""
    model = facet.load(args.facet, args.device).requires_grad_(False)
    calculators = {"facet": watch(facet.FacetCalculator(model, args.device))}
    if args.mace:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about packages that speed up other things
            from mace.calculators import MACECalculator
            calculators["mace"] = watch(MACECalculator(model_paths=str(args.mace), device=args.device, default_dtype="float32"))
    return model, calculators


def in_groups(model: facet.Facet, crystals: list[Atoms], steps: int, batch_atoms: int) -> list[dict]:
    """The batched run once more, like sizes together."""
    groups = []
    for smallest, beyond in zip(GROUPS, GROUPS[1:]):
        group = [atoms for atoms in crystals if smallest <= len(atoms) < beyond]
        if group:
            rows, seconds = batched(model, group, steps, batch_atoms)
            evaluations = sum(row["steps"] + 1 for row in rows)
            groups.append({"crystals": len(group), "mean_atoms": float(np.mean([len(atoms) for atoms in group])), **seconds,
                           "seconds_per_crystal": seconds["seconds"] / len(group),
                           "ms_per_evaluation": 1000 * seconds["seconds"] / evaluations})
    return groups


def show(results: dict, names: list[str]) -> None:
    print("\n                      seconds  CPU s   steps  converged   ms per step, of which the model")
    for name in names:
        t = results[name]
        print(f"{LABELS[name]:20s} {t['seconds']:8.1f} {t['cpu_seconds']:6.1f} {t['steps']:7d} {t['converged']:4d} of "
              f"{t['crystals']:3d} {t['ms_per_evaluation']:10.2f} {t.get('ms_per_evaluation_model', np.nan):10.2f}")
    print()
    for name, values in (results["differences"] | results["volume_against_labels"]).items():
        print(f"{name}:", values)


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="logm result may be inaccurate")  # by 1e-13, FrechetCellFilter, at every step
    count, steps = (8, 15) if args.quick else (args.count, STEPS)
    frames = train_small.read((str(args.data / SETS["crystals"].format("test")),))
    crystals = [atoms for seed in range(-(-max(count, args.batched) // count)) for atoms in perturbed(frames, count, seed)]
    model, calculators = models(args)
    sizes, load = [len(atoms) for atoms in crystals[:count]], os.getloadavg()[0]
    print(f"{count} crystals of {min(sizes)} to {max(sizes)} atoms; {args.device}, {args.threads} thread(s), "
          f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}, load {load:.1f}")
    for calculator in calculators.values():  # the first calls compile
        for atoms in sorted(crystals[:count], key=len)[::max(1, count // 4)]:
            with_ase(atoms, calculator, 2)
    rows = []
    for i, atoms in enumerate(crystals[:count]):
        row = {"material": atoms.info["material"], "atoms": len(atoms), "label_volume": atoms.info["volume"]}
        for name in sorted(calculators, reverse=bool(i % 2)):  # neither is always first
            row[name] = with_ase(atoms, calculators[name], steps)
        rows.append(row)
        print(f"{i:3d} {row['material']:10s} {len(atoms):4d} atoms", *(
            f"  {name} {row[name]['seconds']:7.2f} s, {row[name]['steps']:3d} steps"
            f"{'' if row[name]['converged'] else ' (not converged)'}" for name in calculators), flush=True)
    found, seconds = batched(model, crystals[:max(count, args.batched)], steps, args.batch_atoms)
    for row, one in zip(rows, found):
        row["batched"] = one
    evaluations = sum(row["steps"] + 1 for row in found)
    results = {"device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu", "threads": args.threads,
               "omp_num_threads": os.environ.get("OMP_NUM_THREADS"), "load": load, "packages": versions("mace-torch", "e3nn"),
               "fmax": FMAX, "steps": steps, **{name: total(rows, name) for name in calculators},
               "batched": {"crystals": len(found), "converged": sum(row["converged"] for row in found),
                           "steps": evaluations - len(found), "batch_atoms": args.batch_atoms, **seconds,
                           "ms_per_evaluation": 1000 * seconds["seconds"] / evaluations,
                           "crystals_per_second": len(found) / seconds["seconds"]}}
    if "cuda" in args.device:
        results["batched"]["peak_memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
    results["groups"] = in_groups(model, crystals[:count], steps, args.batch_atoms)
    results["differences"] = {f"{one}, {other}": difference(rows, one, other)
                              for one, other in (("facet", "mace"), ("facet", "batched")) if other in rows[0]}
    results["volume_against_labels"] = {name: against_labels(rows, name) for name in calculators}
    show(results, [*calculators, "batched"])
    results["headline"] = headline(results, rows)
    if not args.quick:
        name = "relax_cuda" if "cuda" in args.device else "relax"
        write_results(name, results | {"relaxations": rows})
        draw_results(name)


if __name__ == "__main__":
    main()
