"""Relax the same perturbed crystals with Facet and with MACE, trained on the same data.

    OMP_NUM_THREADS=1 envs/mace/bin/python benchmarks/relax.py --data FOLDER \\
        --facet runs/crystals/model.pt --mace runs/mace-crystals-64/mace.model
    … --quick                                             # 8 crystals, 15 steps; writes nothing
    … --device cuda --batched 2000 --batch_atoms 50000    # more crystals in the batched run

Run by the Python of MACE's environment (benchmarks/README.md), with OMP_NUM_THREADS set to
--threads in front: SciPy has threads of its own. FOLDER is that of accuracy.py; the model of Facet
is train_small.py's on the crystals, that of MACE accuracy.py's on the same. Without --mace only
Facet relaxes.

The crystals: of each material of the test set the frame of lowest energy, repeated to 2 … 100
atoms, strained by up to 3 % and rattled by 0.05 Å, seeds fixed. Each is relaxed to fmax 0.02 eV/Å,
cell included, in at most 300 steps, in turn by

    facet    ASE's FIRE and FrechetCellFilter with FacetCalculator
    mace     the same with MACECalculator, both in float32

and then by tools.relax, all at once and once more in groups of like size, for the picture. One
whose cell stretches or shrinks e-fold stops, as in tools.relax, and like one that needs more steps
it counts as not converged. All 60 take a quarter of an hour on one quiet core.

The two models differ, and so do their paths and steps: the ratio per step is the fair one, with the
evaluations and the time that each model itself takes beside it, for much of the rest is
FrechetCellFilter's. Final volumes are compared with the labels (SevenNet-0), for the materials
whose frame of lowest energy is all but relaxed. Other programs spoil the times: look at the CPU
seconds beside them. Writes benchmarks/results/relax.json and its picture (relax_cuda for a GPU).
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
from common import columns, command_line, read_set, versions, write_results
from pictures import draw_results
from summary import relaxation

import facet
from tools.relax import relax

FMAX = 0.02    # eV/Å
STEPS = 300    # at most
LARGEST = 100  # atoms
STRAIN = 0.03  # largest component
RATTLE = 0.05  # Å
NEARLY_RELAXED = 0.5 / 160.21766, 0.05  # eV/Å³ and eV/Å: largest stress and force of the labels
GROUPS = 2, 4, 8, 16, 32, 64, LARGEST + 1  # atoms at which the groups of the picture begin


# ─── The crystals ────────────────────────────────────────────────────────────────────────────────


def supercell(atoms: Atoms, size: int) -> Atoms:
    """The shortest lattice vector is repeated until there are `size` atoms, at most LARGEST."""
    repeat = np.ones(3, int)
    while len(atoms) * repeat.prod() < size:
        longer = repeat + (np.arange(3) == np.argmin(repeat * atoms.cell.lengths()))
        if len(atoms) * longer.prod() > LARGEST:
            break
        repeat = longer
    return atoms * repeat


def perturbed(frames: list[Atoms], count: int, seed: int) -> list[Atoms]:
    """`count` strained and rattled supercells of all sizes.

    info: the material and, if it is known, its relaxed volume, Å³ per atom.
    """
    # the frame of lowest energy of each material
    lowest = {}
    for frame in frames:
        energy = frame.calc.results["energy"] / len(frame)
        material = frame.info["material"]
        if material not in lowest or energy < lowest[material][0]:
            lowest[material] = (energy, frame)

    rng = np.random.default_rng(seed)
    sizes = rng.permutation(np.geomspace(2, LARGEST, count).round())
    crystals = []
    for i, size in enumerate(sizes):
        _, frame = list(lowest.values())[i % len(lowest)]
        stress, force = (np.abs(frame.calc.results[name]).max() for name in ("stress", "forces"))
        volume = None
        if stress < NEARLY_RELAXED[0] and force < NEARLY_RELAXED[1]:
            volume = frame.get_volume() / len(frame)

        atoms = supercell(frame, size)
        atoms.calc = None
        atoms.info = {"material": str(frame.symbols), "volume": volume}
        strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
        deformed = atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2)
        atoms.set_cell(deformed, scale_atoms=True)
        atoms.positions += rng.normal(0, RATTLE, (len(atoms), 3))
        crystals.append(atoms)
    return crystals


# ─── Relaxing them ───────────────────────────────────────────────────────────────────────────────


def timed(job: Callable) -> tuple[object, dict[str, float]]:
    """What the job returns; wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = job()
    seconds = time.perf_counter() - wall
    return result, {"seconds": seconds, "cpu_seconds": time.process_time() - cpu}


def watch(calculator: Calculator) -> Calculator:
    """Makes the calculator keep count of its evaluations, and of their seconds, in `spent`."""
    calculate = calculator.calculate
    calculator.spent = {"evaluations": 0, "model_seconds": 0.0}

    def watched(*args, **kwargs):
        _, spent = timed(lambda: calculate(*args, **kwargs))
        calculator.spent["evaluations"] += 1
        calculator.spent["model_seconds"] += spent["seconds"]

    calculator.calculate = watched
    return calculator


def with_ase(start: Atoms, calculator: Calculator, steps: int) -> dict:
    """One relaxation by ASE."""
    calculator.reset()
    calculator.spent.update(evaluations=0, model_seconds=0.0)
    atoms = start.copy()
    atoms.calc = calculator
    optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)

    def run() -> tuple[bool, str | None]:
        converged = False
        try:
            for step_converged in optimizer.irun(fmax=FMAX, steps=steps):
                converged = bool(step_converged)
                deformation = np.linalg.solve(start.cell.array, atoms.cell.array)
                stretch = np.linalg.svd(deformation, compute_uv=False)
                if np.abs(np.log(stretch)).max() > 1:
                    return False, "stretched or shrunk e-fold"
            return converged, None
        except (ValueError, RuntimeError, np.linalg.LinAlgError) as error:
            # the end of a bad potential: counted, and kept
            return False, f"{type(error).__name__}: {error}".splitlines()[0]

    (converged, error), seconds = timed(run)
    return {
        "steps": optimizer.nsteps, "converged": converged, "error": error, **seconds,
        **calculator.spent, "volume_A3_per_atom": atoms.get_volume() / len(atoms)}


def batched(model: facet.Facet, crystals: list[Atoms], steps: int, batch_atoms: int) -> tuple:
    """All at once by tools.relax: a row for each crystal, and the seconds."""
    relaxed, seconds = timed(lambda: relax(model, crystals, FMAX, steps, batch_atoms=batch_atoms))
    rows = []
    for atoms in relaxed:
        done = {"steps": atoms.info["steps"], "converged": atoms.info["converged"]}
        rows.append({**done, "volume_A3_per_atom": atoms.get_volume() / len(atoms)})
    return rows, seconds


def in_groups(model: facet.Facet, crystals: list[Atoms], steps: int, batch_atoms: int) -> dict:
    """The batched run once more, like sizes together; columns."""
    groups = []
    for smallest, beyond in zip(GROUPS, GROUPS[1:], strict=False):
        group = [atoms for atoms in crystals if smallest <= len(atoms) < beyond]
        if not group:
            continue
        rows, spent = batched(model, group, steps, batch_atoms)
        evaluations = sum(row["steps"] + 1 for row in rows)
        groups.append({
            "crystals": len(group), "mean_atoms": np.mean([len(atoms) for atoms in group]),
            **spent, "seconds_per_crystal": spent["seconds"] / len(group),
            "ms_per_evaluation": 1000 * spent["seconds"] / evaluations})
    return columns(groups)


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with crystals/")
    parser.add_argument("--facet", type=Path, required=True, help="model.pt of train_small.py")
    parser.add_argument("--mace", type=Path, help="model of accuracy.py; without it only Facet")
    parser.add_argument("--count", type=int, default=60, help="crystals (default 60)")
    parser.add_argument("--batched", type=int, default=0,
                        help="crystals in the batched run, if more than --count")
    parser.add_argument("--batch_atoms", type=int, default=256,
                        help="atoms evaluated at a time in the batched run (default 256)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    args = parser.parse_args()
    for path in (args.facet, args.mace):
        if path and not path.is_file():
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

            calculators["mace"] = watch(MACECalculator(
                model_paths=str(args.mace), device=args.device, default_dtype="float32"))
    return model, calculators


def one_by_one(crystals: list[Atoms], calculators: dict, steps: int) -> list[dict]:
    """A row for each crystal: its relaxations by ASE."""
    rows = []
    for i, atoms in enumerate(crystals):
        row = {
            "material": atoms.info["material"], "atoms": len(atoms),
            "label_volume": atoms.info["volume"]}
        for name in sorted(calculators, reverse=bool(i % 2)):  # neither is always first
            row[name] = with_ase(atoms, calculators[name], steps)
        rows.append(row)

        words = []
        for name in calculators:
            done = "" if row[name]["converged"] else " (not converged)"
            words.append(f"{name} {row[name]['seconds']:7.2f} s, {row[name]['steps']} steps{done}")
        print(f"{i:3d} {row['material']:10s} {len(atoms):4d} atoms  ", "  ".join(words), flush=True)
    return rows


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    # by 1e-13, FrechetCellFilter, at every step
    warnings.filterwarnings("ignore", message="logm result may be inaccurate")

    # Crystals: the same ones again, perturbed anew, where the batched run has more
    count, steps = (8, 15) if args.quick else (args.count, STEPS)
    many = max(count, args.batched)
    _, tests = read_set(args.data, "crystals")
    frames = list(tests["crystals"])
    crystals = []
    for seed in range(-(-many // count)):
        crystals += perturbed(frames, count, seed)
    model, calculators = models(args)
    sizes = [len(atoms) for atoms in crystals[:count]]
    load = os.getloadavg()[0]
    omp_threads = os.environ.get("OMP_NUM_THREADS")
    print(
        f"{count} crystals of {min(sizes)} to {max(sizes)} atoms; {args.device}, {args.threads} "
        f"thread(s), OMP_NUM_THREADS={omp_threads or 'not set'}, load {load:.1f}")

    # One by one; the first calls compile
    for calculator in calculators.values():
        for atoms in sorted(crystals[:count], key=len)[:: max(1, count // 4)]:
            with_ase(atoms, calculator, 2)
    rows = one_by_one(crystals[:count], calculators, steps)

    # All at once
    found, seconds = batched(model, crystals[:many], steps, args.batch_atoms)
    for row, one in zip(rows, found, strict=False):
        row["batched"] = one
    evaluations = sum(row["steps"] + 1 for row in found)
    cuda = "cuda" in args.device
    results = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "threads": args.threads,
        "omp_num_threads": omp_threads, "load": load, "packages": versions("mace-torch", "e3nn"),
        "fmax": FMAX, "steps": steps,
        "batched": {
            "crystals": len(found), "converged": sum(row["converged"] for row in found),
            "steps": evaluations - len(found), "batch_atoms": args.batch_atoms, **seconds,
            "ms_per_evaluation": 1000 * seconds["seconds"] / evaluations,
            "crystals_per_second": len(found) / seconds["seconds"]}}
    if cuda:
        results["batched"]["peak_memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
    results["groups"] = in_groups(model, crystals[:count], steps, args.batch_atoms)

    results["relaxations"] = columns(rows)
    print("\n".join(relaxation(results)))
    if not args.quick:
        name = "relax_cuda" if cuda else "relax"
        write_results(name, results)
        draw_results(name)


if __name__ == "__main__":
    main()
