"""Tests of tools/relax.py: its steps are ASE's, in batches; and the command."""
import copy
import os
import pty
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
from functools import cache
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixScaled,
    Hookean,
)
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from scipy.linalg import logm

import facet
from tools import relax as module
from tools.frames import BadInput
from tools.relax import Fire, Journal, freedom, main, prepare, relax

SAME = 1e-8  # some twenty steps of FIRE multiply the rounding; float64
CONFIG = facet.Config(
    ("Si", "O", "Cu"), cutoff=3.5, channels=6, groups=3, splines=12, mean_neighbours=8.0,
    energy_scale=1.5, reference_energies=(-1.0, 2.0, 0.5),
)


@cache
def build() -> facet.Facet:
    """A tiny model: copy it before you change it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)  # with it, strained crystals reach their minima
        model = facet.Facet(CONFIG, torch.float64)
        with torch.no_grad():
            for weights in model.parameters():  # biases and splines too
                weights += 0.1 * torch.randn(weights.shape, dtype=torch.float64)
    return model


def strained(symbols: str, repeat=(1, 1, 1), a=3.6) -> Atoms:
    """A face-centred crystal, rattled and pulled in all directions. Takes build() to a minimum."""
    rng = np.random.default_rng(1)
    crystal = ase.build.bulk("Cu", a=a, cubic=len(Atoms(symbols)) > 1)
    crystal.symbols = symbols
    crystal *= repeat
    strain = rng.uniform(-0.03, 0.03, (3, 3))
    crystal.set_cell(crystal.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    crystal.positions += rng.normal(0, 0.05, (len(crystal), 3))
    return crystal


MOVING = (
    strained("Si3O", (2, 1, 1)),
    strained("Si", (2, 1, 1)),
    strained("Si3O", a=4.8),
    strained("Si", a=4.2),
)
MOLECULE = Atoms("SiO", [[0, 0, 0], [0.2, 0.1, 1.9]])
SLAB = Atoms("SiO", [[0, 0, 0], [1.8, 0.1, 0.2]], cell=[4, 4, 0], pbc=(True, True, False))


def close(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=SAME, atol=SAME)


# ─── The function ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps", (0, 20))
@pytest.mark.parametrize("cell", (True, False), ids=("cell", "fixed cell"))
def test_steps_are_those_of_ase(cell, steps):
    crystals = [*MOVING]
    if not cell:
        crystals += [SLAB, MOLECULE]
    before = [atoms.copy() for atoms in crystals]
    relaxed = relax(build(), iter(crystals), fmax=0.05, steps=steps, cell=cell, batch_atoms=10)

    for got, start, atoms in zip(relaxed, before, crystals, strict=True):
        want = start.copy()
        want.calc = facet.FacetCalculator(build(), device="cpu", dtype=torch.float64)
        optimizer = FIRE(FrechetCellFilter(want) if cell else want, logfile=None)
        converged = optimizer.run(fmax=0.05, steps=steps)
        assert got.info == {"steps": optimizer.nsteps, "converged": converged}
        close(got.positions, want.positions)
        close(got.cell.array, want.cell.array)
        close(got.get_potential_energy(), want.get_potential_energy())
        close(got.get_forces(), want.get_forces())
        if start.cell.rank == 3:
            close(got.get_stress(), want.get_stress())
        assert atoms == start and atoms.info == {}, "the crystals themselves do not change"

    if steps > 0:
        assert len({atoms.info["steps"] for atoms in relaxed}) > 2, "some finish before others"
        assert np.abs(relaxed[0].positions - before[0].positions).max() > 0.01
        if cell:
            assert np.abs(relaxed[0].cell.array - before[0].cell.array).max() > 0.01


@pytest.mark.parametrize("batch_atoms", (6, 1000))
def test_converged_crystals_leave_the_batch(batch_atoms, monkeypatch):
    seen = []
    make_batch = facet.make_batch

    def counted(graphs, *more):
        seen.append([len(graph.species) for graph in graphs])
        return make_batch(graphs, *more)

    monkeypatch.setattr(facet, "make_batch", counted)
    relaxed = relax(build(), MOVING, fmax=0.05, steps=20, batch_atoms=batch_atoms)
    steps = [atoms.info["steps"] for atoms in relaxed]
    evaluations = sum(len(batch) for batch in seen)
    assert evaluations == sum(steps) + len(steps) < len(steps) * (max(steps) + 1)
    assert max(sum(batch) for batch in seen) < batch_atoms + max(len(atoms) for atoms in MOVING)
    if batch_atoms == 1000:
        assert len(seen) == max(steps) + 1, "one batch a step"


def test_progress_counts_what_still_moves():
    told = []
    relaxed = relax(build(), MOVING, 0.05, 12, progress=lambda *words: told.append(words))
    assert [step for step, _ in told] == list(range(max(a.info["steps"] for a in relaxed) + 1))
    moving = [count for _, count in told]
    assert moving == sorted(moving, reverse=True) and moving[-1] == 0


def test_nothing_relaxes_to_nothing():
    assert relax(build(), []) == []


@pytest.mark.parametrize("breaks", ("at first", "later"))
def test_broken_crystal_stops_and_the_others_do_not_notice(breaks, monkeypatch):
    """It comes first: were padding to point at its first atom, everybody would get its NaN."""
    model = copy.deepcopy(build())
    find = facet.find_neighbours
    seen = []

    def find_and_break(atoms, config):
        if "Cu" in atoms.symbols:
            seen.append(atoms.positions)
            if breaks == "later" and len(seen) > 3:
                raise ValueError("atoms 0 and 1 sit on one spot")
        return find(atoms, config)

    others = MOVING[:3]
    want = relax(model, others, fmax=0.05, steps=6)
    monkeypatch.setattr(facet, "find_neighbours", find_and_break)
    if breaks == "at first":
        with torch.no_grad():
            model.repulsion.pairs[:, CONFIG.species.index("Cu")] = np.nan
    bad, *got = relax(model, [strained("CuSi3"), *others], fmax=0.05, steps=6)
    for one, other in zip(got, want, strict=True):
        assert one.info == other.info
        close(one.positions, other.positions)
        close(one.get_potential_energy(), other.get_potential_energy())

    assert not bad.info["converged"]
    if breaks == "at first":
        assert bad.calc is None and bad.info["steps"] == 0
    else:
        assert bad.info["steps"] == 2 and np.isfinite(bad.get_forces()).all()
        assert (bad.positions == seen[2]).all() and np.abs(bad.positions - seen[0]).max() > 1e-4


@pytest.mark.parametrize("name", ("energy", "forces", "stress"))
def test_crystal_with_any_result_that_is_no_number_stops(name, monkeypatch):
    evaluate = facet.evaluate

    def spoil_the_first(*arguments):
        first, *others = evaluate(*arguments)
        return [{**first, name: first[name] * np.nan}, *others] if others else [first]

    monkeypatch.setattr(facet, "evaluate", spoil_the_first)
    bad, good = relax(build(), MOVING[:2], fmax=0.05, steps=1)
    assert bad.calc is None and bad.info["steps"] == 0 and not bad.info["converged"]
    assert good.info["steps"] == 1


@pytest.mark.parametrize("sign", (1, -1))
def test_cell_shrinks_or_grows_e_fold_at_most(sign):
    """Under a stress that never ends."""
    start = strained("Si3O")
    run = Fire(start, fmax=0.02, steps=300, cell=True)
    results = {"forces": np.zeros((4, 3)), "stress": sign * np.array([1, 1, 1, 0, 0, 0])}
    while run.advance(results):
        pass
    assert not run.relaxed.info["converged"] and 10 < run.relaxed.info["steps"] < 300
    log_deformation = logm(np.linalg.solve(start.cell.array, run.relaxed.cell.array).T)
    assert 0.1 < np.abs(log_deformation).max() <= 1
    assert np.sign(log_deformation[0, 0]) == -sign


def test_results_keep_names_that_ase_does_not_know():
    class Charged(facet.Facet):
        def atomic_outputs(self, batch):
            out = super().atomic_outputs(batch)
            return {**out, "partial_charges": out["energies"] / 2}

    model = Charged(CONFIG, torch.float64)
    model.load_state_dict(build().state_dict())
    found, *_ = relax(model, MOVING, steps=3)
    close(2 * found.calc.results["partial_charges"], found.calc.results["energies"])


def held(*constraints) -> Atoms:
    """A strained crystal with constraints."""
    atoms = MOVING[0].copy()
    atoms.set_constraint(constraints)
    return atoms


CONSTRAINTS = {  # and whether ASE's steps are the same with a cell that relaxes
    "atoms": ([FixAtoms([0, 3])], True),
    "components": ([FixCartesian([1], (True, False, True)), FixAtoms([2])], False),
    "planes": ([FixedPlane([0, 1], (1, 2, 0)), FixAtoms([5])], False),
    "lines": ([FixedLine([0, 4], (1, -1, 3))], False),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("cell", (True, False), ids=("cell", "fixed cell"))
def test_fixed_atoms_stay_by_the_steps_of_ase(kind, cell):
    constraints, same = CONSTRAINTS[kind]
    start = held(*constraints)
    got, free = relax(build(), [start, MOVING[0]], fmax=0.05, steps=10, cell=cell)
    assert np.abs(got.positions - free.positions).max() > 0.01, "a control: they would move"
    assert str(got.constraints) == str(start.constraints)
    if same or not cell:
        want = start.copy()
        want.calc = facet.FacetCalculator(build(), device="cpu", dtype=torch.float64)
        optimizer = FIRE(FrechetCellFilter(want) if cell else want, logfile=None)
        converged = optimizer.run(fmax=0.05, steps=10)
        assert got.info == {"steps": optimizer.nsteps, "converged": converged}
        close(got.positions, want.positions)
        close(got.cell.array, want.cell.array)

    # exactly where they were; in the cell, if that relaxes
    where = got.positions if not cell else got.cell.scaled_positions(got.positions)
    was = start.positions if not cell else start.cell.scaled_positions(start.positions)
    if kind == "atoms":
        assert np.abs(where - was)[[0, 3]].max() <= 1e-14 * cell
        assert np.abs(where - was)[1].max() > 1e-4
        assert np.abs(got.get_forces(apply_constraint=False)[0]).max() > 0.05, "their own forces"
    if kind == "components" and not cell:
        assert (where == was)[1].tolist() == [True, False, True]


def test_scaled_components_stay():
    """As in a POSCAR with selective dynamics; the force along what is free vanishes."""
    start = strained("Si3O")
    start.set_cell(start.cell.array + [[0, 0, 0], [0.5, 0, 0], [0.2, 0.4, 0]], scale_atoms=True)
    start.set_constraint(
        [FixScaled([1], (True, False, False)), FixScaled([0, 2], (False, True, True))])
    got, = relax(build(), [start], fmax=0.01, steps=200, cell=False)
    assert got.info["converged"] and got.info["steps"] > 5
    moved = np.abs(got.cell.scaled_positions(got.positions - start.positions))
    assert moved[1, 0] < 1e-12 < 1e-4 < moved[1, 1:].max()
    assert moved[[0, 2], 1:].max() < 1e-12 < 1e-4 < moved[[0, 2], 0].min()
    forces = got.get_forces(apply_constraint=False)
    along = forces @ (got.cell.array / got.cell.lengths()[:, None]).T  # [N, 3]
    assert np.abs(along[1, 1:]).max() < 0.011 and np.abs(along[[0, 2], 0]).max() < 0.011
    assert np.abs(forces[:3]).max() > 0.05, "a control: the others do not vanish"


def test_several_constraints_of_one_atom_leave_what_all_of_them_leave():
    free = freedom(held(FixedPlane([0], (1, 1, 0)), FixedPlane([0, 1], (1, 0, 0)),
                        FixCartesian([2], (False,) * 3)))
    close(free[0], np.diag([0, 0, 1]))
    close(free[1], np.diag([0, 1, 1]))
    assert (free[2:] == np.eye(3)).all()
    with pytest.raises(BadInput, match="FixCom cannot be kept"):
        freedom(held(FixAtoms([0]), FixCom()))


REFUSED = {
    "crystal 1: FixBondLengths cannot be kept": held(FixBondLengths([(0, 1)])),
    "crystal 1: Hookean cannot be kept": held(FixAtoms([2]), Hookean(0, 1, 5.0, 1.0)),
    "crystal 1 lacks the three lattice vectors": MOLECULE,
    "crystal 1: element Xe is not among": Atoms("Xe", cell=[3, 3, 3], pbc=True),
    "crystal 1: atoms 0 and 1 sit on one spot": Atoms("Si2", cell=[3, 3, 3], pbc=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_relaxation_is_refused_in_one_sentence(message):
    with pytest.raises(BadInput, match=message) as error:
        relax(build(), [MOVING[0], REFUSED[message]])
    assert "\n" not in str(error.value)


# ─── The command ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with model.pt and start.extxyz, to be copied."""
    path = tmp_path_factory.mktemp("files")
    model = facet.Facet(CONFIG)
    model.load_state_dict(build().state_dict())
    facet.save(model, path / "model.pt")
    crystals = [atoms.copy() for atoms in MOVING]
    crystals[0].info["energies"] = "a name that the results have, too"
    ase.io.write(path / "start.extxyz", crystals)
    return path


@pytest.fixture
def folder(files, tmp_path):
    """model.pt and start.extxyz."""
    return Path(shutil.copytree(files, tmp_path, dirs_exist_ok=True))


def command(folder: Path, *options: str) -> None:
    """Run it in this process."""
    files = [str(folder / name) for name in ("model.pt", "start.extxyz", "out.extxyz")]
    main([*files, "--device", "cpu", *options])


def test_command_writes_relaxed_crystals_and_prints_a_table(folder, capsys):
    command(folder, "--fmax", "0.05", "--steps", "20")
    start = ase.io.read(folder / "start.extxyz", ":")  # rounded to eight digits
    want = relax(facet.load(folder / "model.pt"), start, fmax=0.05, steps=20)
    got = ase.io.read(folder / "out.extxyz", ":")
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-4)
        np.testing.assert_allclose(one.get_forces(), other.get_forces(), atol=1e-3)
        np.testing.assert_allclose(one.get_stress(), other.get_stress(), atol=1e-4)
        assert one.info["steps"] == other.info["steps"]
        assert one.info["converged"] == other.info["converged"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.pt", "out.extxyz", "start.extxyz"
    ]

    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "step    0: 4 crystals still move" and "\r" not in "".join(printed)
    table = [line.split() for line in printed if line[:7].strip().isdigit()]
    assert [int(row[2]) for row in table] == [atoms.info["steps"] for atoms in want]
    for row, start, atoms in zip(table, MOVING, want, strict=True):
        assert row[1] == start.symbols.get_chemical_formula()
        assert float(row[4]) == pytest.approx(atoms.get_potential_energy() / len(atoms), abs=1e-4)
        change = 100 * (atoms.get_volume() / start.get_volume() - 1)
        assert float(row[5]) == pytest.approx(change, abs=0.01)
    arrived = sum(atoms.info["converged"] for atoms in want)
    assert f"{arrived} of 4 converged" in printed


def test_command_leaves_the_cell_alone_if_asked(folder):
    command(folder, "--no-cell", "--steps", "5")
    for atoms, start in zip(ase.io.read(folder / "out.extxyz", ":"), MOVING, strict=True):
        np.testing.assert_allclose(atoms.cell.array, start.cell.array, atol=1e-6)
        assert np.abs(atoms.positions - start.positions).max() > 1e-3 or len(atoms) < 3


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_rewrites_itself_on_a_terminal(folder, monkeypatch):
    terminal, other_end = pty.openpty()
    paths = [str(folder / name) for name in ("model.pt", "start.extxyz", "out.extxyz")]
    monkeypatch.setattr(sys, "argv", ["tools/relax.py", *paths, "--steps", "3"])
    with open(other_end, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        runpy.run_path(sys.modules["tools.relax"].__file__, run_name="__main__")
        monkeypatch.undo()
        text = b""
        while b"converged\r\n" not in text[-2000:].partition(b"volume change")[2]:
            text += os.read(terminal, 100_000)
    os.close(terminal)
    assert b"step    0: 4 crystals still move" in text
    before = text.partition(b"crystal  formula")[0]
    assert len(re.findall(rb"\r(?!\n)", before)) == 3, "a terminal ends its lines with \\r\\n"


WRONG = {  # what is missing in the folder, options; and the sentence
    "no model": (["model.pt"], [], "model.pt: no such checkpoint"),
    "no crystals": (["start.extxyz"], [], "start.extxyz: no such file"),
    "negative fmax": ([], ["--fmax", "-1"], "--fmax -1: must be positive"),
    "negative steps": ([], ["--steps", "-1"], "--steps -1: must not be negative"),
    "empty batches": ([], ["--batch_atoms", "0"], "--batch_atoms 0: must be positive"),
    "no such device": ([], ["--device", "abacus"], "--device abacus: PyTorch has no such device"),
    "device without numbers": ([], ["--device", "meta"], "--device meta: PyTorch has no such"),
    "threads": ([], ["--threads", "100000"], "unrecognized arguments: --threads 100000"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_ends_with_one_sentence(wrong, folder, capsys):
    missing, options, sentence = WRONG[wrong]
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(SystemExit) as end:
        command(folder, *options)
    said = capsys.readouterr().err + str(end.value.code)
    assert sentence in said and end.value.code != 0
    assert not (folder / "out.extxyz").exists()


@pytest.mark.parametrize("name", ("model.pt", "start.extxyz", "out.extxyz"))
def test_folder_in_the_place_of_a_file_ends_with_one_sentence(name, folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(SystemExit) as end:
        command(folder)
    assert str(folder / name) in end.value.code and "\n" not in end.value.code
    assert list((folder / name).iterdir()) == []


@pytest.mark.parametrize("content, sentence", (
    ("not a crystal at all", "start.extxyz, frame 0: cannot be read"),
    ("", "start.extxyz"),
))
def test_unreadable_file_ends_with_one_sentence(content, sentence, folder):
    (folder / "start.extxyz").write_text(content)
    with pytest.raises(SystemExit) as end:
        command(folder)
    assert sentence in end.value.code and "\n" not in end.value.code


def test_crystal_that_cannot_relax_ends_with_one_sentence(folder):
    ase.io.write(folder / "start.extxyz", [MOVING[0], MOLECULE])
    with pytest.raises(SystemExit) as end:
        command(folder)
    assert "start.extxyz: crystal 1 lacks the three lattice vectors" in end.value.code
    assert end.value.code.endswith("--no-cell (cell=False) keeps the cell as it is")
    assert not list(folder.glob("out*")), "there is nothing to be kept"


@pytest.mark.parametrize("output, sentence", (
    ("nowhere/out.extxyz", "there is no folder"),
    ("out.cif", "the output is extended XYZ"),
    ("start.extxyz", "is the input, which would be lost"),
))
def test_output_is_checked_before_the_work(output, sentence, folder, capsys):
    with pytest.raises(SystemExit):
        main([str(folder / name) for name in ("model.pt", "start.extxyz", output)])
    assert sentence in capsys.readouterr().err


def test_output_that_exists_is_never_replaced(folder, monkeypatch):
    (folder / "out.extxyz").write_text("old")
    with pytest.raises(SystemExit, match="out.extxyz: exists already; remove it, or give"):
        command(folder, "--steps", "1")
    assert (folder / "out.extxyz").read_text() == "old"

    # nor is one that somebody writes while the crystals relax
    (folder / "out.extxyz").unlink()
    monkeypatch.setattr(module, "relax", lambda *_: (folder / "out.extxyz").write_text("new"))
    with pytest.raises(SystemExit, match="out.extxyz: exists already; remove it, or give"):
        command(folder, "--steps", "1")
    assert (folder / "out.extxyz").read_text() == "new"


@pytest.mark.parametrize("name", ("@1.extxyz", "start@1.extxyz", "[ab]*.extxyz", "-s.extxyz"))
def test_file_has_its_very_name(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    ase.io.write(folder / "copy.extxyz", MOVING[:3])
    os.rename("copy.extxyz", name)
    main(["--steps", "0", "--device", "cpu", "--", "model.pt", name, "out.extxyz"])
    assert len(ase.io.read("out.extxyz", ":")) == 3


# ─── Fixed atoms in files ────────────────────────────────────────────────────────────────────────

POSCAR = """Si2O with selective dynamics
1.0
3.7 0.0 0.0
1.1 3.6 0.0
0.0 0.0 3.9
Si O
2 1
Selective dynamics
Direct
0.02 0.00 0.01 F F F
0.48 0.51 0.03 T T F
0.55 0.05 0.47 T T T
"""


@pytest.mark.parametrize("kind", ("traj", "extxyz", "extxyz with components", "POSCAR"))
def test_atoms_that_a_file_fixes_stay_and_are_fixed_in_the_output(kind, folder, capsys):
    path = folder / {"traj": "in.traj", "POSCAR": "POSCAR"}.get(kind, "in.extxyz")
    atoms = held(FixAtoms([0, 3]))
    if kind == "extxyz with components":
        atoms = held(FixAtoms([0]), FixCartesian([1], (False, False, True)))
    if kind == "POSCAR":
        path.write_text(POSCAR)
    else:
        ase.io.write(path, atoms)
    start = ase.io.read(path)
    paths = [str(path), str(folder / "out.extxyz"), "--no-cell", "--steps", "5"]
    main([str(folder / "model.pt"), *paths, "--device", "cpu"])
    assert "note" not in capsys.readouterr().err
    got = ase.io.read(folder / "out.extxyz")
    stays = np.abs(got.positions - start.positions) < 1e-7  # [N, 3]
    allowed = np.ones((len(got), 3))
    for constraint in got.constraints:
        constraint.adjust_forces(got, allowed)
    assert (stays == (allowed == 0)).all()
    assert 3 <= stays.sum() <= 6, "a control"


def test_what_cannot_be_kept_of_fixed_atoms_is_said_before_it_begins(folder, capsys):
    slanted = held(FixedPlane([0], (1, 2, 0)), FixAtoms([1]))
    ase.io.write(folder / "in.traj", [slanted, MOVING[1]])
    words = [str(folder / name) for name in ("model.pt", "in.traj", "out.extxyz")]
    main([*words, "--device", "cpu", "--steps", "0"])
    said = capsys.readouterr().err
    assert "in.traj stay at their place in the cell, which relaxes; --no-cell keeps them" in said
    assert "that holds while they relax, but extended XYZ cannot tell it" in said

    # what is refused, and its cure
    ase.io.write(folder / "in.traj", [MOVING[1], held(FixBondLengths([(0, 1)]))])
    (folder / "out.extxyz").unlink()
    with pytest.raises(SystemExit, match="in.traj: crystal 1: FixBondLengths cannot be kept"):
        main([*words, "--device", "cpu", "--steps", "0"])
    cure = [sys.executable, "-m", "ase", "convert", words[1], str(folder / "free.extxyz")]
    subprocess.run(cure, check=True)
    main([words[0], str(folder / "free.extxyz"), words[2], "--device", "cpu", "--steps", "0"])
    assert len(ase.io.read(words[2], ":")) == 2


# ─── Kills, and what is kept ─────────────────────────────────────────────────────────────────────


class Dying(Journal):
    """Its process is killed when two crystals have been kept, or are about to be."""

    when = "after"

    def keep(self, arrived):
        if self.when == "before" and self.rows() + len(arrived) >= 2:
            self.table.set_trace_callback(self.kill_at_commit)
        super().keep(arrived)
        if self.when == "after" and self.rows() >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_at_commit(self, statement):
        if statement == "COMMIT":
            os.kill(os.getpid(), signal.SIGKILL)

    def rows(self) -> int:
        return self.table.execute("SELECT COUNT(*) FROM relaxed").fetchone()[0]


def killed(folder: Path, when: str, *options: str) -> None:
    """The command, in another process, which is killed."""
    child = os.fork()
    if child == 0:
        try:
            Dying.when = when
            module.Journal = Dying
            if when == "writing":
                module.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            command(folder, *options)
        finally:
            os._exit(7)  # it should not have come so far
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


LIMITS = "--fmax", "0.05", "--steps", "20"


def kept(folder: Path) -> int:
    """Crystals in the journal."""
    table = sqlite3.connect(folder / "out.extxyz.journal")
    count, = table.execute("SELECT COUNT(*) FROM relaxed").fetchone()
    table.close()
    return count


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """Atoms of all crystals that are evaluated from now on."""
    found = []
    evaluate = facet.evaluate
    monkeypatch.setattr(facet, "evaluate", lambda model, graphs, *more: (
        found.extend(len(graph.species) for graph in graphs), evaluate(model, graphs, *more))[1])
    return found


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(),
                    reason="needs fork, of a process that used no GPU")
@pytest.mark.parametrize("when", ("before", "after", "writing"))
def test_killed_command_goes_on(when, folder, capsys, evaluated):
    crystals = ase.io.read(folder / "start.extxyz", ":")
    crystals = [crystals[0], crystals[2], crystals[1], crystals[3]]  # others arrive first
    for i, atoms in enumerate(crystals):
        atoms.info["name"] = f"crystal {i}"
    ase.io.write(folder / "start.extxyz", crystals)
    command(folder, *LIMITS)
    os.rename(folder / "out.extxyz", folder / "whole.extxyz")
    want = ase.io.read(folder / "whole.extxyz", ":")
    steps = [atoms.info["steps"] for atoms in want]
    assert steps != sorted(steps), "a control: they do not arrive in order"

    # what has arrived is there, and is not done again
    killed(folder, when, *LIMITS)
    assert not (folder / "out.extxyz").exists()
    count = kept(folder)
    assert {"before": 0 < count < 2, "after": 2 <= count < 4, "writing": count == 4}[when]
    evaluated.clear()
    capsys.readouterr()
    command(folder, *LIMITS)
    assert f"out.extxyz.journal: {count} of 4 are relaxed already" in capsys.readouterr().out
    rest = sorted(steps)[count:]
    assert len(evaluated) == sum(rest) + len(rest)

    # the output is that of a command that was not killed
    got = ase.io.read(folder / "out.extxyz", ":")
    assert [atoms.info["name"] for atoms in got] == [f"crystal {i}" for i in range(4)]
    for one, other in zip(got, want, strict=True):
        assert (one.info["steps"], one.info["converged"]) == (
            other.info["steps"], other.info["converged"])
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-4)
        np.testing.assert_allclose(one.cell.array, other.cell.array, atol=1e-4)
        np.testing.assert_allclose(one.get_forces(), other.get_forces(), atol=1e-3)
        np.testing.assert_allclose(one.get_stress(), other.get_stress(), atol=1e-4)
        assert one.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=1e-4)
    if when == "writing":
        assert (folder / "out.extxyz").read_bytes() == (folder / "whole.extxyz").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.pt", "out.extxyz", "start.extxyz", "whole.extxyz"]


CHANGES = {  # and how many of the four crystals are known then
    "nothing": 4, "one crystal": 3, "its order": 2, "its cell": 3, "a fixed atom": 3, "fmax": 0,
    "steps": 0, "no-cell": 0, "the model": 0, "info": 4,
}


@pytest.mark.parametrize("change", CHANGES)
def test_journal_is_that_of_the_same_input_model_and_settings(change, folder, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write", full)
        with pytest.raises(SystemExit, match="No space left"):
            command(folder, "--steps", "1")
    assert "out.extxyz.journal keeps 4 relaxed crystals: the same" in capsys.readouterr().err

    crystals = ase.io.read(folder / "start.extxyz", ":")
    options = {"fmax": ("--fmax", "0.03"), "steps": ("--steps", "2"), "no-cell": ("--no-cell",)}
    if change == "one crystal":
        crystals[1].positions[0, 0] += 1e-3
    if change == "its order":
        crystals[1:3] = crystals[2], crystals[1]
    if change == "its cell":
        crystals[3].cell[0, 0] += 1e-3
    if change == "a fixed atom":
        crystals[2].set_constraint(FixAtoms([0]))
    if change == "info":
        crystals[2].info["other"] = 1
    ase.io.write(folder / "start.extxyz", crystals)
    if change == "the model":
        model = facet.load(folder / "model.pt")
        model.origin = {"date": "another"}
        facet.save(model, folder / "model.pt")
    command(folder, "--steps", "1", *options.get(change, ()))
    said = re.findall(r"journal: (\d) of 4 are relaxed", capsys.readouterr().out)
    assert said == ([str(CHANGES[change])] if CHANGES[change] else [])
    assert len(ase.io.read(folder / "out.extxyz", ":")) == 4


def test_journal_keeps_every_number(folder):
    """Also of crystals that broke, and of outputs that ASE does not know."""
    relaxed = relax(build(), MOVING, steps=2)
    relaxed[1].calc.results["charges_of_ours"] = np.arange(2) / 3
    relaxed[2].calc = None
    with pytest.raises(KeyboardInterrupt), Journal(folder / "journal", list("abcd")) as journal:
        journal.keep({1: relaxed[1], 2: relaxed[2]})
        raise KeyboardInterrupt
    with Journal(folder / "journal", list("abcd")) as journal:
        known = journal.known(list(MOVING))
    assert set(known) == {1, 2} and known[2].calc is None and not (folder / "journal").exists()
    for s, got in known.items():
        assert got == relaxed[s] and got.info == relaxed[s].info
    for name, value in relaxed[1].calc.results.items():
        assert (known[1].calc.results[name] == value).all()


def test_journal_has_one_user_at_a_time(folder):
    with Journal(folder / "out.extxyz.journal", ["a"] * 4):
        with pytest.raises(SystemExit, match="journal: cannot be used .database is locked.; anot"):
            command(folder)
    (folder / "out.extxyz.journal").write_text("Dear diary, " * 100)
    with pytest.raises(SystemExit, match="it is no journal of tools.relax"):
        command(folder)
    assert (folder / "out.extxyz.journal").read_text() == "Dear diary, " * 100


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_mistakes_in_the_program_keep_their_traceback_and_what_is_relaxed(
        error, folder, monkeypatch, capsys):
    show = module.show_progress

    def failing(step, moving):
        show(step, moving)
        if moving < 4:
            raise error("a shape is wrong")

    monkeypatch.setattr(module, "show_progress", failing)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else ValueError) as end:
        command(folder, *LIMITS)
    assert str(end.value) == ("interrupted" if error is KeyboardInterrupt else "a shape is wrong")
    assert kept(folder) > 0 and "the same command goes on" in capsys.readouterr().err


# ─── Entries of info that cannot be written ──────────────────────────────────────────────────────


class Something:
    """An object that has no place in a file of text."""


BAD = {"two lines": "a\nb", "nothing": None, "empty": "", "object": Something(), "a=b": 1, 3: 1,
       "ragged": [[1, 2], [3]], "complex": 1j, "quotes": 'say "x" \\', "x\ny": 2, "tabs": "a\tb"}
GOOD = {"words": "a b", "number": 1.5, "flag": True, "list": [1, 2, 3], "digits": "007",
        "matrix": np.eye(2), "dictionary": {"a": 1}, "with space": 4}


@pytest.mark.parametrize("name", [*BAD, *GOOD])
def test_what_extended_xyz_cannot_hold_is_left_out_and_said(name, tmp_path):
    atoms = SLAB.copy()
    atoms.info = {name: {**BAD, **GOOD}[name], "kept": 7}
    atoms.arrays["column"] = np.array([1, 2])
    told = []
    prepare([MOLECULE.copy(), atoms], Path("in.traj"), False, told.append)
    left_out = [f"note: extended XYZ cannot hold {name} of in.traj: left out"]
    assert told == (left_out if name in BAD else [])
    assert set(atoms.info) == {"kept", *([] if name in BAD else [name])}
    ase.io.write(tmp_path / "out.extxyz", [atoms, MOLECULE])
    got, _ = ase.io.read(tmp_path / "out.extxyz", ":")
    assert got.info["kept"] == 7 and (got.pbc == SLAB.pbc).all() and "column" in got.arrays


def test_columns_that_extended_xyz_cannot_hold_are_left_out():
    atoms = SLAB.copy()
    atoms.arrays.update(large=np.array([2**40, 1]), fine=np.eye(3)[:2], tensor=np.zeros((2, 2, 2)))
    told = []
    prepare([atoms], Path("in.traj"), False, told.append)
    assert told == ["note: extended XYZ cannot hold large, tensor of in.traj: left out"]
    assert set(atoms.arrays) == {"numbers", "positions", "fine"}


def test_command_writes_all_but_an_entry_that_cannot_be_written(folder, capsys):
    crystals = [atoms.copy() for atoms in MOVING]
    crystals[2].info["remark"] = "over two\nlines"
    crystals[3].info["name"] = "last"
    ase.io.write(folder / "in.traj", crystals)
    words = [str(folder / name) for name in ("model.pt", "in.traj", "out.extxyz")]
    main([*words, "--device", "cpu", "--steps", "0"])
    assert "cannot hold remark of" in capsys.readouterr().err
    assert [atoms.info.get("name") for atoms in ase.io.read(words[2], ":")] == [
        None, None, None, "last"]
