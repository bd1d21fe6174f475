"""Tests of tools/report.py, tools/physics.py and tools/panels.py: numbers against loops by hand."""
import copy
import csv
import io
import json
import runpy
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from matplotlib.figure import Figure

import facet
from tools import emt, evaluate, physics, report
from tools.frames import read
from tools.labels import labelled

CONFIG = facet.Config(
    tuple(emt.METALS), cutoff=4.0, degree=1, channels=8, layers=2, groups=2, splines=8,
    first_knot=1.0, mean_neighbours=20.0, energy_scale=0.8, reference_energies=tuple(range(7)))
SETTINGS = {
    "train": (), "valid": (), "test": (), "seed": 0, "energy": "", "forces": "", "stress": "",
    "stress_weight": 0.1, "device": "cpu"}
COLUMNS = ("step", "seconds", "energy_mae_meV_per_atom", "force_mae_meV_per_A")


@pytest.fixture(scope="session")
def crystals(tmp_path_factory) -> Path:
    """A small embedded set in a folder of its own."""
    path = tmp_path_factory.mktemp("data") / "emt.extxyz"
    emt.write(path, count=60)
    return path


@pytest.fixture(scope="session")
def model() -> facet.Facet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return facet.Facet(CONFIG)


def run_folder(folder: Path, model, log=((1, 0.5, 20.0, 80.0), (2, 1.0, 10.0, 50.0)),
               **settings) -> Path:
    """A folder such as a training leaves, with the settings given."""
    folder.mkdir(parents=True)
    facet.save(model, folder / "model.pt")
    facet.save(model, folder / "checkpoint.pt", settings={**SETTINGS, **settings})
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *log])
    return folder


@pytest.fixture
def make_run(tmp_path, model):
    return partial(run_folder, tmp_path / "runs" / "one", model)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, crystals, model) -> tuple[Path, dict, str]:
    """Folder, result and printed text of a whole report of the embedded set.

    Ten steps of dynamics, and a relaxation that ends early, will do.
    """
    runs = tmp_path_factory.mktemp("runs")
    (runs / "emt.extxyz").write_bytes(crystals.read_bytes())
    folder = run_folder(runs / "one", model)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(physics, "STEPS", 10)
        patch.setattr(physics, "FMAX", 0.1)
        result = report.report(folder)
    return folder, result, printed.getvalue()


@pytest.fixture
def figure(whole, monkeypatch) -> list:
    """Gets the picture of a report, which is not rendered, and whose physics are those of `whole`:
    both take seconds."""
    shown = []
    found = dict(whole[1]["physics"])
    del found["relaxation"]
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: shown.append((self, path)))
    monkeypatch.setattr(physics, "all_of_it", lambda model, some: found)
    return shown


def written(path: Path, images, **options) -> str:
    ase.io.write(path, images, **options)
    return str(path)


# ─── Errors ──────────────────────────────────────────────────────────────────────────────────────


def test_force_errors_of_two_frames_by_hand():
    """Numbers that can be checked in the head."""
    frames, predictions = [], []
    for off in (0.6, -1.8):
        forces = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
        frames.append(labelled(ase.Atoms("CuAu", [[0, 0, 0], [2, 0, 0]]), forces=forces))
        predictions.append({"forces": forces + [[0, 0, 0], [0, off, 0]]})
    frames.append(labelled(ase.Atoms("Cu"), energy=1.0))
    predictions.append({"forces": np.ones((1, 3))})

    symbols, size, error = report.force_errors(predictions, frames)
    assert list(symbols) == ["Cu", "Au", "Cu", "Au"], "without the atom that has no forces"
    assert size == pytest.approx([5, 0, 5, 0]), "|F| of the labels"
    assert error == pytest.approx([0, 0.6, 0, 1.8])
    assert report.errors_by_element(symbols, error) == pytest.approx({"Au": 1.2, "Cu": 0})


def test_errors_by_size_go_by_the_size():
    """Large forces with small errors, small ones with large errors."""
    size = np.array([9.0, 1.0, 5.0, 3.0])
    error = np.array([0.1, 0.7, 0.3, 0.5])
    assert report.errors_by_size(size, error) == [(1, 0.7), (3, 0.5), (5, 0.3), (9, 0.1)]
    many = report.errors_by_size(np.arange(24.0), 24 - np.arange(24.0))
    assert many[0] == (0.5, 23.5) and many[-1] == (22.5, 1.5) and len(many) == 12


def test_elements_and_sizes_add_up(crystals, model):
    frames = list(read([str(crystals)])[:20])
    predictions = evaluate.predict(model, frames)
    symbols, size, error = report.force_errors(predictions, frames)
    assert len(symbols) == len(size) == len(error) == sum(len(atoms) for atoms in frames)
    elements = report.errors_by_element(symbols, error)
    assert list(elements.values()) == sorted(elements.values(), reverse=True)
    total = sum((symbols == name).sum() * mean for name, mean in elements.items())
    assert total == pytest.approx(error.sum())
    sizes = report.errors_by_size(size, error)
    assert len(sizes) == 12 and sizes == sorted(sizes)
    assert np.mean([mean for _, mean in sizes]) == pytest.approx(error.mean(), rel=0.2)


# ─── Baselines ───────────────────────────────────────────────────────────────────────────────────


def test_pair_potential_finds_a_pair_potential(crystals):
    """Labels that one spline can give are found exactly: energies, forces and stresses."""
    frames = read([str(crystals)])[:12]
    pair = report.PairPotential(CONFIG)
    with torch.no_grad():
        coefficients = np.random.default_rng(0).normal(size=8)
        pair.spline.coefficients[:, 0] = torch.from_numpy(coefficients)
    pair.fitted = np.concatenate([np.arange(7.0), coefficients])
    truth = pair.predict(frames)

    # the energy is the sum over pairs; forces and stress are its slopes
    atoms = frames[0]
    graph = facet.find_neighbours(atoms, CONFIG)
    r = torch.from_numpy(np.linalg.norm(graph.vectors, axis=1))
    energy = float(pair.spline(r).detach().sum()) / 2 + np.arange(7)[graph.species].sum()
    assert truth[0]["energy"] == pytest.approx(energy)
    step = 1e-5
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[2, 1] += sign * step
        energies.append(pair.predict([moved])[0]["energy"])
    slope = (energies[0] - energies[1]) / (2 * step)
    assert truth[0]["forces"][2, 1] == pytest.approx(-slope, abs=1e-6)
    energies = []
    for sign in (1, -1):
        strained = atoms.copy()
        cell = atoms.cell.array.copy()
        cell[:, 0] *= 1 + sign * step
        strained.set_cell(cell, scale_atoms=True)
        energies.append(pair.predict([strained])[0]["energy"])
    slope = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
    assert truth[0]["stress"][0, 0] == pytest.approx(slope, abs=1e-6)

    class Labelled(list):
        def atom_counts(self):
            return np.array([len(atoms) for atoms in self])

    labelled = Labelled()
    for atoms, one in zip(frames, truth, strict=True):
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, energy=one["energy"], forces=one["forces"])
        labelled.append(copy)
    del labelled[3].calc.results["energy"]
    found = report.PairPotential(CONFIG).fit(labelled).predict(frames)
    for one, other in zip(found, truth, strict=True):
        np.testing.assert_allclose(one["energy"], other["energy"], atol=1e-6)
        np.testing.assert_allclose(one["forces"], other["forces"], atol=1e-6)
        np.testing.assert_allclose(one["stress"], other["stress"], atol=1e-6)


# ─── Physics ─────────────────────────────────────────────────────────────────────────────────────


def test_calmest_structure_is_a_crystal_of_thirty_atoms(crystals):
    frames = list(read([str(crystals)]))
    molecule = ase.build.molecule("CO")
    molecule.symbols = "CuAu"
    molecule.calc = SinglePointCalculator(molecule, energy=0, forces=np.zeros((2, 3)))
    atoms = physics.calmest([molecule, *frames], CONFIG)
    assert atoms.pbc.all() and 30 <= len(atoms) < 60
    del frames[0].calc.results["stress"]
    del frames[1].calc.results["forces"]
    assert physics.calmest(frames, CONFIG).pbc.all()


def test_equation_of_state_holds_stress_against_energy(model):
    atoms = ase.build.bulk("Cu", cubic=True) * (2, 2, 2)
    found = physics.equation_of_state(model, atoms)
    volumes = found["volume_A3_per_atom"]
    assert len(volumes) == len(found["energy_eV_per_atom"]) == 31
    assert volumes[15] == pytest.approx(atoms.get_volume() / 32)
    assert volumes[-1] / volumes[0] == pytest.approx(1.15 / 0.85)
    assert 0 < found["stress_against_energy_GPa"] < 1  # differences over 1 % of the volume


def test_equivariance_error_is_rounding(model, crystals):
    found = physics.equivariance_error(model, list(read([str(crystals)])[:3]))
    assert len(found["float32"]) == len(found["float64"]) == 3
    assert max(found["float64"]) < 1e-10 < max(found["float32"]) < 1e-3


def test_silu_on_a_coarse_grid_shows_an_equivariance_error(crystals):
    config = replace(CONFIG, activation="silu", grid_degree=5, layers=3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        coarse = facet.Facet(config)
    found = physics.equivariance_error(coarse, list(read([str(crystals)])[:3]))
    assert max(found["float64"]) > 1e-4


# ─── The report ──────────────────────────────────────────────────────────────────────────────────


def test_report_prints_a_table_beside_the_baselines(whole):
    _, result, printed = whole
    assert "\n6 test structures " in printed and "energy MAE (RMSE) meV/atom" in printed
    for name in ("Facet", "mean pair potential (one spline)", "constant per species"):
        line, = (line for line in printed.splitlines() if line.startswith(f"  {name} "))
        table = result if name == "Facet" else result["baselines"][name]
        numbers = [float(word.strip("()")) for word in line.removeprefix(f"  {name} ").split()]
        wanted = [f"{quantity}_{kind}_{unit}" for quantity, unit in
                  (("energy", "meV_per_atom"), ("force", "eV_per_A"), ("stress", "GPa"))
                  for kind in ("mae", "rmse")]
        assert numbers == pytest.approx([table[key] for key in wanted], rel=1e-3, abs=6e-3)
    assert "by group" not in printed, "the files name none"


def test_report_measures_physics_and_relaxes_the_alloy_that_was_held_out(whole):
    _, result, printed = whole
    assert "total energy in molecular dynamics at 300 K" in printed
    assert "Cu3Au (L1₂), strained and rattled, relaxed by FIRE" in printed
    assert result["physics"]["relaxation"]["emt"]["converged"]
    lattice = result["physics"]["relaxation"]["emt"]["lattice_constant_A"]
    assert lattice == pytest.approx(3.71, abs=0.03)
    assert len(result["physics"]["equivariance_error"]["float64"]) == 6
    assert len(result["physics"]["energy_drift"]["time_ps"]) > 5


def test_report_draws_and_returns_plain_numbers(whole):
    folder, result, _ = whole
    json.dumps(result)
    assert (folder / "report.png").stat().st_size > 10_000


# What of the twelve panels is drawn: splines of degrees 0 and 1 of three, and three of physics
SPLINES = [True, True, False]
DRAWN = [True, True, True]


def test_report_has_a_line_per_group_and_copes_with_missing_labels(make_run, crystals, tmp_path,
                                                                   capsys, figure):
    images = ase.io.read(crystals, ":")
    test = images[:25]
    for i, atoms in enumerate(test):
        atoms.info["config_type"] = f"kind {i % 23}"
        if i % 3 == 0:
            del atoms.calc.results["stress"]
    train = written(tmp_path / "train.extxyz", images[25:])
    folder = make_run(train=(train,), valid=("0",), log=(),
                      test=(written(tmp_path / "test.extxyz", test),))
    result = report.report(folder)
    printed = capsys.readouterr().out
    assert "Facet, by group (3 smaller groups left out)" in printed
    assert len([line for line in printed.splitlines() if line.startswith("  kind ")]) == 20
    assert "  kind 1 (2) " in printed and len(result["by_group"]) == 23
    assert result["by_group"]["kind 3"]["stress_mae_GPa"] is None
    assert result["stress_mae_GPa"] is not None and "Cu3Au" not in printed

    # every panel has something to show, but that of the log, which is empty
    (picture, path), = figure
    assert path == folder / "report.png"
    assert [axis.axison for axis in picture.axes] == 5 * [True] + SPLINES + DRAWN + [False]


@pytest.mark.parametrize("held", ("test", "valid", "nothing"))
def test_physics_are_those_of_structures_that_were_not_trained_on(held, make_run, crystals,
                                                                  tmp_path, monkeypatch):
    """If there are any."""
    images = ase.io.read(crystals, ":")
    other = (written(tmp_path / "held.extxyz", images[:8]),)
    settings = {"test": ("0",), "valid": ("0",)}
    if held != "nothing":
        settings[held] = other
    folder = make_run(train=(written(tmp_path / "train.extxyz", images[8:20]),), **settings)
    seen = []

    def stop(model, frames):
        seen.extend(atoms.info["source"] for atoms in frames)
        raise KeyboardInterrupt
    monkeypatch.setattr(physics, "all_of_it", stop)
    with pytest.raises(KeyboardInterrupt):
        report.report(folder)
    count, name = (12, "train.extxyz") if held == "nothing" else (8, "held.extxyz")
    assert len(seen) == count and all(name in source for source in seen)


def test_report_without_a_test_set_says_so(make_run, crystals, capsys, figure):
    folder = make_run(train=(str(crystals),), test=("0",), valid=("0",),
                      log=((1, 0.5, "nan", "nan"),))
    result = report.report(folder)
    printed = capsys.readouterr().out
    assert "There is no test set" in printed and "test structures" not in printed
    assert result["energy_mae_meV_per_atom"] is None and result["baselines"] == {}
    assert "total energy in molecular dynamics" in printed

    # neither errors nor a log are drawn
    (picture, path), = figure
    assert path == folder / "report.png"
    assert [axis.axison for axis in picture.axes] == 5 * [False] + SPLINES + DRAWN + [False]


@pytest.mark.parametrize("wrong, sentence", (
    ("nothing", "holds no checkpoint.pt of a training"),
    ("damage", "is not a Facet checkpoint, or it is damaged"),
    ("no data", "nowhere.extxyz"),
))
def test_bad_folder_ends_with_one_sentence(wrong, sentence, make_run):
    folder = make_run(train=("nowhere.extxyz",))
    if wrong == "nothing":
        (folder / "checkpoint.pt").unlink()
    if wrong == "damage":
        (folder / "checkpoint.pt").write_bytes(b"?")
    with pytest.raises(SystemExit) as end:
        report.main([str(folder)])
    assert sentence in end.value.code and "\n" not in end.value.code


def test_mistakes_in_the_program_keep_their_traceback(make_run, monkeypatch):
    def mistaken(*_, **__):
        raise ValueError("a shape is wrong")
    monkeypatch.setattr(report, "load_sets", mistaken)
    with pytest.raises(ValueError, match="a shape is wrong"):
        report.main([str(make_run())])


def test_command_helps(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(report.__file__, run_name="__main__")
    assert end.value.code == 0 and "runs/NAME" in capsys.readouterr().out


def test_physics_does_not_warn_of_close_atoms(model, crystals):
    """A report may look at them; control: the calculator itself warns."""
    near = copy.deepcopy(model)
    near.origin = {"shortest": {f"{a}-{b}": 9.0 for a in emt.METALS for b in emt.METALS}}
    atoms = read([str(crystals)])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        physics.equivariance_error(near, [atoms])
    with pytest.warns(UserWarning, match="closer than in the training data"):
        facet.FacetCalculator(near, "cpu").get_forces(atoms)


def test_dynamics_that_fly_apart_end_in_a_sentence_with_the_crystal(model):
    """Of a model whose forces are far too large; the trained one is the control, in the report."""
    wild = copy.deepcopy(model)
    with torch.no_grad():
        wild.readout.mul_(1e30)
    with pytest.raises(physics.BadInput, match="^Cu4 in molecular dynamics of this model: "):
        physics.energy_drift(wild, ase.build.bulk("Cu", cubic=True))
