"""Tests of tools/relax.py: its steps are ASE's, in batches; and the command."""
import copy
import os
import pty
import re
import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from scipy.linalg import logm

import facet
from tools.relax import Fire, main, relax

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


CONSTRAINED = Atoms("Si", cell=[3, 3, 3], pbc=True, constraint=FixAtoms([0]))
REFUSED = {
    "crystal 1 has constraints": CONSTRAINED,
    "crystal 1 lacks the three lattice vectors": MOLECULE,
    "crystal 1: element Xe is not among": Atoms("Xe", cell=[3, 3, 3], pbc=True),
    "crystal 1: atoms 0 and 1 sit on one spot": Atoms("Si2", cell=[3, 3, 3], pbc=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_relaxation_is_refused_in_one_sentence(message):
    with pytest.raises(ValueError, match=message) as error:
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


WRONG = {  # what is done to the folder, options; and the sentence
    "no model": (["model.pt"], [], "model.pt: no such checkpoint"),
    "no crystals": (["start.extxyz"], [], "start.extxyz: there is no such file"),
    "negative fmax": ([], ["--fmax", "-1"], "--fmax -1: must be positive"),
    "negative steps": ([], ["--steps", "-1"], "--steps -1: must not be negative"),
    "empty batches": ([], ["--batch_atoms", "0"], "--batch_atoms 0: must be positive"),
    "no such device": ([], ["--device", "abacus"], "--device abacus: PyTorch has no such device"),
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


@pytest.mark.parametrize("content, sentence", (
    ("not a crystal at all", "start.extxyz: ASE cannot read it"),
    ("", "start.extxyz: "),
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
    assert end.value.code.endswith("--no-cell keeps the cell as it is")


@pytest.mark.parametrize("output, sentence", (
    ("nowhere/out.extxyz", "there is no folder"),
    ("out.cif", "the output is extended XYZ"),
    ("start.extxyz", "is the input, which would be lost"),
))
def test_output_is_checked_before_the_work(output, sentence, folder, capsys):
    with pytest.raises(SystemExit):
        main([str(folder / name) for name in ("model.pt", "start.extxyz", output)])
    assert sentence in capsys.readouterr().err


def test_failed_write_leaves_the_old_file(folder, monkeypatch):
    (folder / "out.extxyz").write_text("old")

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit, match="No space left"):
        command(folder, "--steps", "1")
    assert (folder / "out.extxyz").read_text() == "old"
    assert not list(folder.glob("*.part"))
