"""Relax many crystals at once: atoms and lattice vectors, down to the forces that are wanted.

    python -m tools.relax runs/si/model.pt start.extxyz relaxed.extxyz
    python -m tools.relax runs/si/model.pt slabs.traj relaxed.extxyz --no-cell --fmax 0.01

IN is any file that ASE reads, labels not needed. OUT gets the same crystals, relaxed, with energy,
forces and stress, and with `steps` and `converged` in each frame's first line. In Python:

    from tools.relax import relax
    relaxed = relax(facet.load("runs/si/model.pt"), crystals)
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from scipy.linalg import expm, expm_frechet

import facet
from tools.frames import BadInput, write_whole
from tools.options import add_evaluation, check_evaluation

# ─── The relaxation of one crystal ───────────────────────────────────────────────────────────────


class Fire:
    """One crystal on its way down, by the steps of ASE's FIRE(FrechetCellFilter(atoms)).

        cell = cell₀ Dᵀ,   positions = X Dᵀ,   D = exp U       the deformation gradient D [3, 3]
        −∂E/∂X      = forces D
        −∂E/∂(N U)  = −(∂D/∂U)ᵀ [virial D⁻ᵀ] / N

    ASE's FIRE moves (X, N U) as if they were N + 3 atoms. ASE's own filter gives the same numbers,
    in ten times the time. N is the number of atoms; without `cell` U stays zero: FIRE(atoms).

        atoms      where the crystal is now, to be evaluated next
        relaxed    where it was evaluated last, with the results; at first the crystal itself
    """

    def __init__(self, atoms: ase.Atoms, fmax: float, steps: int, cell: bool):
        N = len(atoms)
        self.fmax = fmax
        self.steps = steps
        self.cell = cell
        self.first_cell = atoms.cell.array  # [3, 3]
        self.deformation = np.eye(3)  # D
        self.moved = ase.Atoms(f"X{N + 3}", np.concatenate([atoms.positions, np.zeros((3, 3))]))
        self.optimizer = FIRE(self.moved, logfile=None)
        self.atoms = atoms.copy()
        self.atoms.info.update(steps=0, converged=False)
        self.relaxed = self.atoms

    def advance(self, results: dict) -> bool:
        """Take the results of `atoms` (ASE's names and units), and a step. True: there is more.

        False when no force, and no row of the cell's, reaches fmax; when the steps are spent; and
        when the cell would be stretched or shrunk e-fold: that is no relaxation any more.
        """
        self.relaxed = self.atoms
        self.relaxed.calc = SinglePointCalculator(self.relaxed)
        self.relaxed.calc.results.update(results)

        # have we arrived?
        forces = self.generalized_forces(results)  # [N+3, 3]
        converged = np.linalg.norm(forces, axis=1).max() < self.fmax
        self.relaxed.info["converged"] = bool(converged)
        if converged or self.relaxed.info["steps"] == self.steps:
            return False

        # one step of FIRE
        self.moved.calc = SinglePointCalculator(self.moved, forces=forces)
        self.optimizer.step()

        # from the N + 3 moved points back to a crystal
        N = len(self.atoms)
        log_deformation = self.moved.positions[N:] / N  # [3, 3] U
        if np.abs(log_deformation).max() > 1:
            return False
        self.deformation = expm(log_deformation)  # [3, 3]
        self.atoms = self.relaxed.copy()
        self.atoms.set_cell(self.first_cell @ self.deformation.T)
        self.atoms.positions = self.moved.positions[:N] @ self.deformation.T  # [N, 3]
        self.atoms.info.update(steps=self.relaxed.info["steps"] + 1, converged=False)
        return True

    def generalized_forces(self, results: dict) -> np.ndarray:
        """What FIRE sees as forces on the N atoms and the 3 rows of the cell: [N+3, 3] eV/Å."""
        N = len(self.atoms)
        pull = np.zeros((3, 3))
        if self.cell:
            log_deformation = self.moved.positions[N:] / N  # [3, 3]
            stress = voigt_6_to_full_3x3_stress(results["stress"])  # [3, 3] eV/Å³
            virial = self.atoms.get_volume() * stress  # [3, 3] eV
            slope = virial @ np.linalg.inv(self.deformation.T)  # [3, 3]
            pull = -expm_frechet(log_deformation.T, slope, compute_expm=False) / N  # [3, 3]
        return np.concatenate([results["forces"] @ self.deformation, pull])  # [N+3, 3]


# ─── The relaxation of many ──────────────────────────────────────────────────────────────────────


def relax(
    model: facet.Facet,
    crystals: Iterable[ase.Atoms],
    fmax: float = 0.02,
    steps: int = 500,
    cell: bool = True,
    batch_atoms: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[ase.Atoms]:
    """Relax many crystals at once, atoms and, if `cell`, lattice vectors; fmax is in eV/Å.

    Returns copies with energy, forces and stress, and "steps" and "converged" in atoms.info.
    Converged crystals leave the batch. One that breaks (NaN, two atoms on one spot, a cell
    stretched or shrunk e-fold) stops where it was last sound, and the others do not notice.
    progress(step, moving) is called after each step with the number of crystals still moving.
    Raises ValueError for constraints, for a cell that cannot relax and for what find_neighbours
    refuses.
    """
    runs = []
    for s, atoms in enumerate(crystals):
        if atoms.constraints:
            raise ValueError(f"crystal {s} has constraints; remove them: del atoms.constraints")
        if cell and atoms.cell.rank < 3:
            raise ValueError(
                f"crystal {s} lacks the three lattice vectors that a relaxation of the cell needs"
            )
        runs.append(Fire(atoms, fmax, steps, cell))

    moving = list(range(len(runs)))
    step = 0
    while moving:
        # neighbours of all that still move; one whose atoms met on the way stops
        sound = []
        graphs = []
        for s in moving:
            try:
                graphs.append(facet.find_neighbours(runs[s].atoms, model.config))
                sound.append(s)
            except ValueError as error:
                if step == 0:
                    raise ValueError(f"crystal {s}: {error}") from None

        # all at once; one whose results are not numbers stops
        moving = []
        for s, results in zip(sound, facet.evaluate(model, graphs, batch_atoms), strict=True):
            finite = all(np.isfinite(value).all() for value in results.values())
            if finite and runs[s].advance(results):
                moving.append(s)

        if progress:
            progress(step, len(moving))
        step += 1
    return [run.relaxed for run in runs]


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> list[ase.Atoms]:
    """The crystals of a file. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    try:
        crystals = list(ase.io.iread(path, index=":"))
    except Exception as error:  # whatever ASE's many readers stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: ASE cannot read it ({reason})") from error
    if not crystals:
        raise BadInput(f"{path}: holds no crystal")
    return crystals


def write(path: Path, crystals: list[ase.Atoms]) -> None:
    """The crystals and their results, as extended XYZ."""
    for atoms in crystals:
        # what the input file said under the same names would be in the way
        for name in atoms.calc.results if atoms.calc else ():
            atoms.info.pop(name, None)
            atoms.arrays.pop(name, None)
    write_whole(path, crystals)


def show_progress(step: int, moving: int) -> None:
    """A line that rewrites itself on a terminal; plain lines, every 50 steps, in a file."""
    line = f"step {step:4d}: {moving} crystals still move"
    if sys.stdout.isatty():
        end = "\r" if moving else "\n"
        print(line.ljust(60), end=end, flush=True)
    elif step % 50 == 0 or not moving:
        print(line, flush=True)


def print_table(before: list[ase.Atoms], after: list[ase.Atoms]) -> None:
    """One line per crystal, and how many arrived."""
    print("\ncrystal  formula               steps  converged  energy (eV/atom)  volume change (%)")
    for s, (start, atoms) in enumerate(zip(before, after, strict=True)):
        converged = "yes" if atoms.info["converged"] else "no"
        energy = "broken"  # no results at all: the model did not give numbers
        if atoms.calc:
            energy = f"{atoms.get_potential_energy() / len(atoms):.4f}"
        volume = "–"
        if start.cell.rank == 3:
            volume = f"{100 * (atoms.get_volume() / start.get_volume() - 1):+.2f}"
        print(
            f"{s:7d}  {atoms.symbols.get_chemical_formula():20s} {atoms.info['steps']:6d}"
            f"  {converged:>9s}  {energy:>16s}  {volume:>17s}"
        )
    arrived = sum(atoms.info["converged"] for atoms in after)
    print(f"\n{arrived} of {len(after)} converged")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.relax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model.pt of train_small.py")
    parser.add_argument("input", metavar="IN", type=Path, help="any file that ASE reads")
    parser.add_argument("output", metavar="OUT.extxyz", type=Path)
    parser.add_argument("--fmax", type=float, default=0.02, help="eV/Å (default %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="at most (default %(default)s)")
    parser.add_argument("--no-cell", action="store_true", help="keep the lattice vectors")
    add_evaluation(parser)
    args = parser.parse_args(arguments)

    if not args.fmax > 0:
        parser.error(f"--fmax {args.fmax:g}: must be positive")
    if args.steps < 0:
        parser.error(f"--steps {args.steps}: must not be negative")
    check_evaluation(parser, args)
    if args.output.suffix != ".extxyz":
        parser.error(f"{args.output}: the output is extended XYZ; name it something.extxyz")
    if not args.output.parent.is_dir():
        parser.error(f"{args.output}: there is no folder {args.output.parent}")
    if args.output.resolve() == args.input.resolve():
        parser.error(f"{args.output}: is the input, which would be lost")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        model = facet.load(args.model, args.device).requires_grad_(False)
        crystals = read(args.input)
        try:
            cell = not args.no_cell
            relaxed = relax(
                model, crystals, args.fmax, args.steps, cell, args.batch_atoms, show_progress
            )
        except ValueError as error:
            hint = "; --no-cell keeps the cell as it is" if "lattice vectors" in str(error) else ""
            raise BadInput(f"{args.input}: {error}{hint}") from error
        write(args.output, relaxed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_table(crystals, relaxed)
    print(f"{args.output}: relaxed crystals with energy, forces, stress")


if __name__ == "__main__":
    main()
