"""Tests of tools/report.py, tools/physics.py and tools/panels.py: numbers against loops by hand."""
import copy
import csv
import io
import json
import re
import runpy
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from matplotlib.figure import Figure

import facet
from tools import emt, evaluate, panels, physics, properties, report
from tools.frames import load_sets, read
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
    settings = {**SETTINGS, **settings}
    folder.mkdir(parents=True)
    train, _, _ = load_sets(SimpleNamespace(**settings), folder.parent, say=None)
    facet.save(model, folder / "model.pt")
    facet.save(model, folder / "checkpoint.pt", settings=settings, data=train.fingerprint())
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

    predictions[1]["forces"][1] = np.nan
    symbols, _, error = report.force_errors(predictions, frames)
    assert len(error) == 4 and np.isnan(error).tolist() == [False, False, False, True]
    assert np.isnan(report.errors_by_element(symbols, error)["Au"]), "not that of the others"


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


def test_pair_potential_is_fitted_to_the_training_set_alone(make_run, crystals, tmp_path,
                                                            monkeypatch):
    """All of it, and no frame of the validation or test set."""
    images = ase.io.read(crystals, ":30")
    files = {name: (written(tmp_path / f"{name}.extxyz", images[first:last]),)
             for name, first, last in (("train", 0, 20), ("valid", 20, 25), ("test", 25, 30))}
    seen = []

    def watched(self, frames):
        seen.extend(atoms.info["source"] for atoms in frames)
        raise KeyboardInterrupt
    monkeypatch.setattr(report.PairPotential, "fit", watched)
    with pytest.raises(KeyboardInterrupt):
        report.report(make_run(**files))
    assert seen == [f"{files['train'][0]}, frame {i}" for i in range(20)]


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


class Springs(Calculator):
    """Every atom on a spring of 20 eV/Å² to its place."""

    implemented_properties = ("energy", "forces")
    places = None

    def calculate(self, atoms, *more):
        if self.places is None:
            self.places = atoms.positions.copy()
        moved = atoms.positions - self.places
        self.results = {"energy": 10 * (moved ** 2).sum(), "forces": -20 * moved}


def test_dynamics_have_the_temperature_that_is_printed(model, monkeypatch):
    """On average, once half of the kinetic energy has gone; springs in place of the model."""
    found = []

    class Watched(VelocityVerlet):
        def __init__(self, atoms, *arguments):
            super().__init__(atoms, *arguments)
            self.attach(lambda: found.append(atoms.get_temperature()))
    monkeypatch.setattr(properties, "VelocityVerlet", Watched)
    monkeypatch.setattr(physics, "calculator_of", lambda model: Springs())
    table = physics.energy_drift(model, ase.build.bulk("Cu", cubic=True) * (5, 5, 5))
    assert len(found) == 401 and found[0] == pytest.approx(2 * table["kelvin"], rel=0.1)
    assert np.mean(found) == pytest.approx(table["kelvin"], rel=0.1)
    assert table["time_ps"][-1] == pytest.approx(0.4)


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


def test_physics_are_printed_with_their_signs_and_units(capsys):
    """Numbers that can be checked in the head: a falling energy, a lattice 2 % too small."""
    found = {
        "energy_drift": {"kelvin": 300.0, "drift_meV_per_atom_per_ps": -0.25,
                         "energy_meV_per_atom": [0.0, 7.0]},
        "equivariance_error": {"float32": [1e-6, 3e-6, 2e-6], "float64": [4e-15, 5e-16]},
        "relaxation": {"structure": "Cu3Au",
                       "emt": {"lattice_constant_A": 4.0, "steps": 11},
                       "facet": {"lattice_constant_A": 3.92, "steps": 22}}}
    report.print_physics(found)
    assert capsys.readouterr().out == (
        "\ntotal energy in molecular dynamics at 300 K: -0.25 meV/atom/ps; "
        "equivariance error of forces: 3e-06 (float32), 4e-15 (float64)\n"
        "\nCu3Au, relaxed by FIRE with FrechetCellFilter: EMT a = 4.0000 Å in 11 steps, "
        "Facet a = 3.9200 Å in 22 steps (-2.00 %)\n")


def shown(axis) -> list[tuple[list[float], list[float]]]:
    """The points of each line of a panel."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def test_panels_show_the_numbers_in_their_units(model, monkeypatch):
    """Two frames, of one and two atoms, by hand: the reference lies along x, the model along y."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    test = [ase.Atoms("Cu"), ase.Atoms("CuAu")]
    wanted, predictions = (
        [{"energy": first, "forces": np.full((1, 3), size), "stress": np.full((3, 3), size)},
         {"energy": second, "forces": np.full((2, 3), -size), "stress": np.full((3, 3), -size)}]
        for first, second, size in ((1.0, 6.0, 0.1), (1.5, 7.0, 0.2)))
    result = {
        "energy_mae_meV_per_atom": 12.345, "force_mae_eV_per_A": 0.0678, "stress_mae_GPa": 9.876,
        "by_element_eV_per_A": {"Au": 0.3, "Cu": 0.1}, "by_size_eV_per_A": [(0.5, 0.01), (2, 0.04)],
        "physics": {
            "structure": "Cu32", "equivariance_error": {"float32": [1e-6, 3e-6]},
            "equation_of_state": {"volume_A3_per_atom": [10, 11], "energy_eV_per_atom": [-3, -2]},
            "energy_drift": {"kelvin": 300.0, "time_ps": [0.0, 0.1, 0.2],
                             "energy_meV_per_atom": [0.0, 3.0, 1.0],
                             "drift_meV_per_atom_per_ps": 4.5}}}
    log = [{"step": "10", "energy_mae_meV_per_atom": "20.5", "force_mae_meV_per_A": "80.5",
            "loss_forces": "7"},
           {"step": "20", "energy_mae_meV_per_atom": "nan", "force_mae_meV_per_A": "50.5",
            "loss_forces": "6"}]
    panels.draw(Path("none.png"), model, result, test, predictions, wanted, log)
    energy, force, stress, element, size, *splines, state, drift, turned, progress = kept[0].axes

    # parity, energies per atom from the mean of the reference; the first line is the diagonal
    x, y = shown(energy)[1]
    assert x == pytest.approx([-1, 1]) and y == pytest.approx([-0.5, 1.5])
    assert energy.get_title() == "energy: MAE 12.35 meV/atom" and "(eV/atom)" in energy.get_xlabel()
    x, y = shown(force)[1]
    assert x == pytest.approx([0.1] * 3 + [-0.1] * 6) and y == pytest.approx([0.2] * 3 + [-0.2] * 6)
    assert force.get_title() == "force: MAE 67.8 meV/Å" and "(eV/Å)" in force.get_xlabel()
    x, y = shown(stress)[1]
    assert x == pytest.approx([16.0218] * 9 + [-16.0218] * 9, rel=1e-4)
    assert y == pytest.approx([32.0435] * 9 + [-32.0435] * 9, rel=1e-4)
    assert stress.get_title() == "stress: MAE 9.876 GPa" and "(GPa)" in stress.get_xlabel()
    for axis in (energy, force, stress):
        assert axis.get_xlabel().startswith("reference") and axis.get_ylabel().startswith("Facet")
        x, y = shown(axis)[0]
        assert x == y == [min(shown(axis)[1][0]), max(shown(axis)[1][0])]

    # bars and portions
    assert [bar.get_height() for bar in element.patches] == pytest.approx([300, 100])
    assert [text.get_text() for text in element.get_xticklabels()] == ["Au", "Cu"]
    assert "meV/Å" in element.get_ylabel() and shown(size) == [([0.5, 2], [0.01, 0.04])]
    assert "|F| (eV/Å)" in size.get_xlabel() and "|ΔF| (eV/Å)" in size.get_ylabel()

    # physics and the log
    assert shown(state) == [([10, 11], [-3, -2])] and "(Å³/atom)" in state.get_xlabel()
    assert shown(drift) == [([0.0, 0.1, 0.2], [0.0, 3.0, 1.0])] and "(ps)" in drift.get_xlabel()
    assert drift.get_title() == "NVE at 300 K: drift 4.5 meV/atom/ps"
    assert shown(turned) == [([0, 1], [1e-6, 3e-6])]
    assert shown(progress) == [([10], [20.5]), ([10, 20], [80.5, 50.5])]
    names = [text.get_text() for text in progress.get_legend().get_texts()]
    assert names == ["energy, meV/atom", "force, meV/Å"]


def test_spline_panels_show_what_was_learned_over_what_was_not(model, monkeypatch):
    """A line for each group: grey those before training, then each layer's; a panel a degree."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.splines.coefficients.normal_(generator=torch.Generator().manual_seed(1))
    axes = Figure().subplots(1, 3)
    panels.spline_panels(axes, trained)

    T, B, L = CONFIG.layers, CONFIG.groups, CONFIG.degree
    fresh = facet.Facet(CONFIG)
    for degree in range(L + 1):
        lines = axes[degree].lines
        assert len(lines) == B + T * B
        for k, line in enumerate(lines):
            r = torch.tensor(line.get_xdata())
            one = fresh if k < B else trained
            with torch.no_grad():
                curves = one.splines(r).view(len(r), T, B, L + 1)
            want = curves[:, 0 if k < B else k // B - 1, k % B, degree]
            np.testing.assert_allclose(line.get_ydata(), want, atol=1e-5)
        assert f"l = {degree} " in axes[degree].get_title()


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
    ("nothing", "/one: holds no checkpoint.pt of a training$"),
    ("no folder", "/one: holds no checkpoint.pt of a training; there is no such folder$"),
    ("damage", "is not a Facet checkpoint, or it is damaged"),
    ("no data", "data.extxyz: no such file .looked for in /.*elsewhere; a run names"),
    ("growth", "the training set that .*data.extxyz gives is not the one that this run began with"),
))
def test_bad_folder_ends_with_one_sentence(wrong, sentence, make_run, crystals, tmp_path,
                                           monkeypatch):
    """Also where its data are elsewhere, or have grown: another split would test what was trained.
    """
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    images = ase.io.read(crystals, ":40")
    folder = make_run(train=(written("data.extxyz", images[:30]),))
    if wrong == "nothing":
        (folder / "checkpoint.pt").unlink()
    if wrong == "no folder":
        folder.rename("gone")
    if wrong == "damage":
        (folder / "checkpoint.pt").write_bytes(b"?")
    if wrong == "no data":
        monkeypatch.chdir("elsewhere")
    if wrong == "growth":
        written("data.extxyz", images)
    with pytest.raises(SystemExit) as end:
        report.main([str(folder)])
    assert re.search(f"^error: .*{sentence}", end.value.code) and "\n" not in end.value.code


def test_mistakes_in_the_program_keep_their_traceback(make_run, crystals, monkeypatch):
    folder = make_run(train=(str(crystals),))

    def mistaken(*_, **__):
        raise ValueError("a shape is wrong")
    monkeypatch.setattr(report, "load_sets", mistaken)
    with pytest.raises(ValueError, match="^a shape is wrong$") as error:
        report.main([str(folder)])
    assert error.type is ValueError


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
