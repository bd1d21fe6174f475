"""Relax many crystals at once: atoms and lattice vectors, down to the forces that are wanted.

    python -m tools.relax runs/si/model.pt start.extxyz relaxed.extxyz
    python -m tools.relax runs/si/model.pt slabs.traj relaxed.extxyz --no-cell --fmax 0.01

IN is any file that tools.frames reads, labels not needed. OUT gets the same crystals, relaxed, with
energy, forces and stress, and with `steps` and `converged` in each frame's first line. A file that
exists is never replaced. Until OUT is written, OUT.extxyz.journal keeps every crystal that has been
relaxed: after a kill the same command goes on. Atoms that the file fixes stay where they are, or,
if the cell relaxes, at their place in the cell. In Python:

    from tools.relax import relax
    relaxed = relax(facet.load("runs/si/model.pt"), crystals)
"""
from __future__ import annotations

import argparse
import hashlib
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane, FixScaled
from ase.io.jsonio import decode, encode
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from scipy.linalg import expm, expm_frechet, null_space

import facet
from tools.files import read_atoms
from tools.frames import BadInput, leave_out, load_model, print_to_stderr, write_whole
from tools.options import add_evaluation, check_evaluation
from tools.replay import Replayed

# ─── The relaxation of one crystal ───────────────────────────────────────────────────────────────


def freedom(atoms: ase.Atoms) -> np.ndarray:
    """Where each atom may go: [N, 3, 3], projectors on the directions that constraints leave it.

    Raises BadInput for a constraint that does not fix atoms, or directions of them.
    """
    # the directions in which each atom is fixed
    normals = {}
    for constraint in atoms.constraints:
        match constraint:
            case FixAtoms():
                fixed = np.eye(3)
            case FixCartesian():
                fixed = np.eye(3)[constraint.mask]  # [fixed, 3]
            case FixScaled():
                fixed = np.linalg.inv(atoms.cell.array).T[constraint.mask]  # [fixed, 3]
            case FixedPlane():
                fixed = constraint.dir[None]  # [1, 3]
            case FixedLine():
                fixed = null_space(constraint.dir[None]).T  # [2, 3]
            case _:
                raise BadInput(
                    f"{type(constraint).__name__} cannot be kept, only what fixes atoms, or "
                    "directions of them; remove it, on the command line by ase convert IN "
                    "free.extxyz"
                )
        for i in np.arange(len(atoms))[constraint.index]:
            normals[i] = np.concatenate([normals.get(i, np.zeros((0, 3))), fixed])  # [fixed, 3]

    # what is left
    free = np.tile(np.eye(3), (len(atoms), 1, 1))  # [N, 3, 3]
    for i, fixed in normals.items():
        basis = null_space(fixed) if len(fixed) else np.eye(3)  # [3, free]
        free[i] = basis @ basis.T
    return free


class Fire:
    """One crystal on its way down, by the steps of ASE's FIRE(FrechetCellFilter(atoms)).

        cell = cell₀ Dᵀ,   positions = X Dᵀ,   D = exp U       the deformation gradient D [3, 3]
        −∂E/∂X      = forces D
        −∂E/∂(N U)  = −(∂D/∂U)ᵀ [virial D⁻ᵀ] / N

    ASE's FIRE moves (X, N U) as if they were N + 3 atoms. ASE's own filter gives the same numbers,
    in ten times the time. N is the number of atoms; without `cell` U stays zero: FIRE(atoms).
    Of the forces on X, what constraints forbid is left out: fixed atoms keep X, their place in the
    cell. Raises BadInput for constraints that cannot be kept.

        atoms      where the crystal is now, to be evaluated next
        relaxed    where it was evaluated last, with the results; at first the crystal itself
    """

    def __init__(self, atoms: ase.Atoms, fmax: float, steps: int, cell: bool):
        N = len(atoms)
        self.fmax = fmax
        self.steps = steps
        self.cell = cell
        self.free = freedom(atoms)  # [N, 3, 3]
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
        forces = results["forces"] @ self.deformation  # [N, 3]
        forces = np.einsum("nab,nb->na", self.free, forces)  # [N, 3]
        return np.concatenate([forces, pull])  # [N+3, 3]


# ─── The relaxation of many ──────────────────────────────────────────────────────────────────────


def relax(
    model: facet.Facet,
    crystals: Iterable[ase.Atoms],
    fmax: float = 0.02,
    steps: int = 500,
    cell: bool = True,
    batch_atoms: int = 256,
    progress: Callable[[int, int], None] | None = None,
    known: Mapping[int, ase.Atoms] | None = None,
    keep: Callable[[dict[int, ase.Atoms]], None] | None = None,
) -> list[ase.Atoms]:
    """Relax many crystals at once, atoms and, if `cell`, lattice vectors; fmax is in eV/Å.

    Returns copies with energy, forces and stress, and "steps" and "converged" in atoms.info.
    Converged crystals leave the batch. One that breaks (NaN, two atoms on one spot, a cell
    stretched or shrunk e-fold) stops where it was last sound, and the others do not notice.
    Fixed atoms (FixAtoms, FixCartesian, FixScaled, FixedPlane, FixedLine) stay at their place in
    the cell.

    progress(step, moving) is called after each step with the number of crystals still moving,
    keep({place: crystal}) with those that have arrived; known: {place: crystal} need no relaxation.
    Raises BadInput for other constraints, for a cell that cannot relax and for what
    find_neighbours refuses.
    """
    found = dict(known or {})
    runs = {}
    for s, atoms in enumerate(crystals):
        if s in found:
            continue
        if cell and atoms.cell.rank < 3:
            raise BadInput(
                f"crystal {s} lacks the three lattice vectors that a relaxation of the cell "
                "needs; --no-cell (cell=False) keeps the cell as it is"
            )
        try:
            runs[s] = Fire(atoms, fmax, steps, cell)
        except BadInput as error:
            raise BadInput(f"crystal {s}: {error}") from None

    moving = list(runs)
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
                    raise BadInput(f"crystal {s}: {error}") from None

        # all at once; one whose results are not numbers stops
        before = moving
        moving = []
        for s, results in zip(sound, facet.evaluate(model, graphs, batch_atoms), strict=True):
            finite = all(np.isfinite(value).all() for value in results.values())
            if finite and runs[s].advance(results):
                moving.append(s)

        arrived = {s: runs[s].relaxed for s in set(before).difference(moving)}
        found.update(arrived)
        if keep and arrived:
            keep(arrived)
        if progress:
            progress(step, len(moving))
        step += 1
    return [found[s] for s in sorted(found)]


# ─── What is relaxed, on the disk ────────────────────────────────────────────────────────────────


class Journal:
    """Relaxed crystals in a small database, from when they arrive until the output has them all.

    Each has a key, that of its place, its input, the model and the settings: what another command
    has left is not taken. A kill leaves the crystals that were there. One process uses it at a
    time. Raises BadInput if another does, and for a file that is no journal.
    """

    def __init__(self, path: Path, keys: list[str]):
        self.path = path
        self.keys = keys
        try:
            self.table = sqlite3.connect(path, timeout=0, isolation_level=None)
            self.table.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.table.execute("BEGIN EXCLUSIVE")
            self.table.execute("CREATE TABLE IF NOT EXISTS relaxed (key PRIMARY KEY, crystal)")
            self.table.execute("COMMIT")
        except sqlite3.Error as error:
            raise BadInput(
                f"{path}: cannot be used ({error}); another command works with it now, or it is no "
                "journal of tools.relax"
            ) from error

    def known(self, crystals: list[ase.Atoms]) -> dict[int, ase.Atoms]:
        """Those of the crystals that are relaxed already, by place."""
        records = dict(self.table.execute("SELECT key, crystal FROM relaxed"))
        found = {}
        for s, key in enumerate(self.keys):
            if key in records:
                found[s] = crystals[s].copy()
                record = decode(records[key])
                found[s].set_cell(record["cell"])
                found[s].positions = record["positions"]
                found[s].info.update(record["info"])
                if record["results"]:
                    found[s].calc = SinglePointCalculator(found[s])
                    found[s].calc.results.update(record["results"])
        return found

    def keep(self, arrived: dict[int, ase.Atoms]) -> None:
        """Add crystals, by place. They are on the disk when this returns."""
        rows = []
        for s, atoms in arrived.items():
            record = {
                "cell": atoms.cell.array,
                "positions": atoms.positions,
                "info": {name: atoms.info[name] for name in ("steps", "converged")},
                "results": atoms.calc.results if atoms.calc else {},
            }
            rows.append((self.keys[s], encode(record)))
        self.table.execute("BEGIN")
        self.table.executemany("INSERT OR REPLACE INTO relaxed VALUES (?, ?)", rows)
        self.table.execute("COMMIT")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, *_) -> None:
        """Remove it if all went well, or if it holds nothing."""
        (count,) = self.table.execute("SELECT COUNT(*) FROM relaxed").fetchone()
        self.table.close()
        if kind is None or count == 0:
            self.path.unlink()
            Path(f"{self.path}-journal").unlink(missing_ok=True)  # SQLite's own, after a kill
        else:
            print_to_stderr(f"{self.path} keeps {count} relaxed crystals: the same command goes on")


def keys_of(crystals: list[ase.Atoms], settings: list) -> list[str]:
    """A name for what comes out of each crystal, if it is relaxed with these settings."""
    keys = []
    for s, atoms in enumerate(crystals):
        geometry = [atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc]
        fixed = [constraint.todict() for constraint in atoms.constraints]
        text = encode([s, settings, geometry, fixed])
        keys.append(hashlib.sha256(text.encode()).hexdigest())
    return keys


# ─── What the output can hold ────────────────────────────────────────────────────────────────────


def along_axes(atoms: ase.Atoms) -> bool:
    """Whether all directions that are fixed are x, y, z, as extended XYZ has them.

    If so, the constraints say it that way afterwards. Raises BadInput for other constraints.
    """
    if {type(constraint) for constraint in atoms.constraints} <= {FixAtoms, FixCartesian}:
        return True
    free = freedom(atoms)  # [N, 3, 3]
    axes = free.diagonal(axis1=1, axis2=2) > 0.5  # [N, 3]
    if not np.allclose(free, axes[:, :, None] * np.eye(3)):
        return False
    fixed = np.flatnonzero(~axes.all(1))
    atoms.set_constraint([FixCartesian([i], ~axes[i]) for i in fixed])
    return True


def prepare(crystals: list[ase.Atoms], path: Path, cell: bool, say: Callable[[str], None]) -> None:
    """Leave out what the output cannot hold, and say it, before anything is relaxed.

    cell: whether cells will relax. Raises BadInput for constraints that cannot be kept.
    """
    lost = set()
    straight = True
    for s, atoms in enumerate(crystals):
        # labels of the file would be in the way of those of the model
        for name in all_properties:
            atoms.info.pop(name, None)
            atoms.arrays.pop(name, None)
        try:
            straight = along_axes(atoms) and straight
        except BadInput as error:
            raise BadInput(f"{path}: crystal {s}: {error}") from None
        lost |= leave_out(atoms)

    if cell and any(atoms.constraints for atoms in crystals):
        say(
            f"note: fixed atoms of {path} stay at their place in the cell, which relaxes; "
            "--no-cell keeps them where they are"
        )
    if not straight:
        say(
            f"note: directions in which atoms of {path} are fixed are not x, y and z; that holds "
            "while they relax, but extended XYZ cannot tell it"
        )
    if lost:
        say(f"note: extended XYZ cannot hold {', '.join(sorted(lost))} of {path}: left out")


def write(path: Path, crystals: list[ase.Atoms]) -> None:
    """The crystals and their results, as extended XYZ."""
    for atoms in crystals:
        # what the input file said under the same names would be in the way
        for name in atoms.calc.results if atoms.calc else ():
            atoms.info.pop(name, None)
            atoms.arrays.pop(name, None)
    write_whole(path, crystals)


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


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
    parser.add_argument("model", metavar="MODEL", type=Path, help="model.pt of train_small.py")
    parser.add_argument("input", metavar="IN", type=Path, help="any file that tools.frames reads")
    parser.add_argument("output", metavar="OUT.extxyz", type=Path, help="must not exist")
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


def refuse_existing(path: Path) -> None:
    """Raise BadInput if there is such a file: nothing is replaced."""
    if path.exists():
        raise BadInput(f"{path}: exists already; remove it, or give another name")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        # what is to be done
        refuse_existing(args.output)
        model = load_model(args.model, args.device).requires_grad_(False)
        if next(model.parameters()).is_cuda:
            model = Replayed(model)
        crystals = list(read_atoms(args.input, print_to_stderr))
        cell = not args.no_cell
        prepare(crystals, args.input, cell, print_to_stderr)
        model_sum = hashlib.sha256(args.model.read_bytes()).hexdigest()
        keys = keys_of(crystals, [model_sum, args.fmax, args.steps, cell])

        # what of it is not done yet, and all of it in the end
        with Journal(args.output.with_name(f"{args.output.name}.journal"), keys) as journal:
            known = journal.known(crystals)
            if known:
                print(f"{journal.path}: {len(known)} of {len(crystals)} are relaxed already")
            try:
                relaxed = relax(
                    model, crystals, args.fmax, args.steps, cell, args.batch_atoms, show_progress,
                    known, journal.keep
                )
            except BadInput as error:
                raise BadInput(f"{args.input}: {error}") from error
            refuse_existing(args.output)
            write(args.output, relaxed)
    except (BadInput, MemoryError, OSError, sqlite3.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    print_table(crystals, relaxed)
    print(f"{args.output}: relaxed crystals with energy, forces, stress")


if __name__ == "__main__":
    main()
