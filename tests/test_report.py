"""Tests of tools/report.py, tools/physics.py and tools/panels.py: numbers against loops by hand."""
import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress

import facet
from tools import emt, physics, report
from tools.frames import BadInput, read

ROOT = Path(__file__).resolve().parent.parent
CONFIG = facet.Config(
    tuple(emt.METALS), cutoff=4.0, degree=1, channels=8, layers=2, groups=2, splines=8,
    first_knot=1.0, mean_neighbours=20.0, energy_scale=0.8, reference_energies=tuple(range(7)))
SETTINGS = {
    "train": (), "valid": (), "test": (), "seed": 0, "energy": "", "forces": "", "stress": "",
    "stress_weight": 0.1, "device": "cpu"}
COLUMNS = ("step", "seconds", "energy_mae_meV_per_atom", "force_mae_meV_per_A")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


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


@pytest.fixture
def make_run(tmp_path, model):
    """A folder such as a training leaves, with the settings given."""
    def make(log=((1, 0.5, 20.0, 80.0), (2, 1.0, 10.0, 50.0)), **settings) -> Path:
        folder = tmp_path / "runs" / "one"
        folder.mkdir(parents=True)
        facet.save(model, folder / "model.pt")
        facet.save(model, folder / "checkpoint.pt", settings={**SETTINGS, **settings})
        with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *log])
        return folder
    return make


@pytest.fixture(autouse=True)
def short_dynamics(monkeypatch):
    """Ten steps will do."""
    monkeypatch.setattr(physics, "STEPS", 10)


def written(path: Path, images, **options) -> str:
    ase.io.write(path, images, **options)
    return str(path)


# ─── Errors ──────────────────────────────────────────────────────────────────────────────────────


def test_predictions_are_those_of_the_calculator(crystals, model):
    frames = read([str(crystals)])[:12]
    for found, atoms in zip(report.predict(model, frames, batch_atoms=30), frames, strict=True):
        free = atoms.copy()
        free.calc = facet.FacetCalculator(model, device="cpu")
        np.testing.assert_allclose(found["energy"], free.get_potential_energy(), rtol=1e-5)
        np.testing.assert_allclose(found["forces"], free.get_forces(), atol=1e-4)
        np.testing.assert_allclose(found["stress"], free.get_stress(voigt=False), atol=1e-4)


def test_molecule_has_no_stress(model):
    molecule = ase.build.molecule("CO")
    molecule.symbols = "CuAu"
    found, = report.predict(model, [molecule])
    assert np.isfinite(found["forces"]).all() and np.isnan(found["stress"]).all()


def test_errors_are_means_over_what_is_labelled(crystals, model):
    frames = list(read([str(crystals)])[:6])
    del frames[0].calc.results["energy"]
    del frames[1].calc.results["stress"]
    predictions = report.predict(model, frames)

    energy, force, stress = [], [], []
    for i, (found, atoms) in enumerate(zip(predictions, frames, strict=True)):
        wanted = atoms.calc.results
        force += list((found["forces"] - wanted["forces"]).ravel())
        if i != 0:
            energy.append((found["energy"] - wanted["energy"]) / len(atoms))
        if i != 1:
            label = voigt_6_to_full_3x3_stress(wanted["stress"])
            stress += list((found["stress"] - label).ravel() / units.GPa)

    table = report.errors(predictions, frames)
    assert len(table) == 6
    for name, unit, scale, differences in (
            ("energy", "meV_per_atom", 1000, energy), ("force", "eV_per_A", 1, force),
            ("stress", "GPa", 1, stress)):
        mae = scale * sum(abs(x) for x in differences) / len(differences)
        rmse = scale * (sum(x * x for x in differences) / len(differences)) ** 0.5
        assert table[f"{name}_mae_{unit}"] == pytest.approx(mae)
        assert table[f"{name}_rmse_{unit}"] == pytest.approx(rmse)


def test_errors_without_labels_are_none(crystals, model):
    atoms = read([str(crystals)])[0]
    atoms.calc.results.clear()
    assert set(report.errors(report.predict(model, [atoms]), [atoms]).values()) == {None}
    assert set(report.errors([], []).values()) == {None}


def test_errors_of_two_frames_by_hand():
    """Numbers that can be checked in the head; 1 eV/Å³ is 160.21766 GPa."""
    frames, predictions = [], []
    for group, off in (("a", 1.0), ("b", -3.0)):
        atoms = ase.Atoms("CuAu", [[0, 0, 0], [2, 0, 0]], cell=[4, 4, 4], pbc=True)
        wanted = {"energy": -7.0, "forces": np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]),
                  "stress": np.array([0.01, 0, 0, 0.02, 0, 0])}
        atoms.calc = SinglePointCalculator(atoms, **wanted)
        atoms.info["group"] = group
        frames.append(atoms)

        # energy off by 0.02 eV times `off`, one force by 0.6 eV/Å, xy (twice among nine) by 0.009
        stress = wanted["stress"] + [0, 0, 0, 0, 0, 0.009 * off]
        predictions.append({"energy": -7.0 + 0.02 * off,
                            "stress": voigt_6_to_full_3x3_stress(stress),
                            "forces": wanted["forces"] + [[0, 0, 0], [0, 0.6 * off, 0]]})

    def table(energy, force, stress):
        names = ("energy_{}_meV_per_atom", "force_{}_eV_per_A", "stress_{}_GPa")
        return {name.format(kind): pytest.approx(value) for name, values in
                zip(names, (energy, force, stress), strict=True)
                for kind, value in zip(("mae", "rmse"), values, strict=True)}

    GPa = 160.21766
    one = table((10, 10), (0.1, 0.6 / 6 ** 0.5), (0.002 * GPa, 0.009 * (2 / 9) ** 0.5 * GPa))
    three = table((30, 30), (0.3, 1.8 / 6 ** 0.5), (0.006 * GPa, 0.027 * (2 / 9) ** 0.5 * GPa))
    both = table((20, 500 ** 0.5), (0.2, 0.6 * (10 / 12) ** 0.5),
                 (0.004 * GPa, 0.009 * (10 * 2 / 18) ** 0.5 * GPa))
    assert report.errors(predictions, frames) == both
    groups = report.errors_by_group(predictions, frames)
    assert groups == {"a": {"structures": 1, **one}, "b": {"structures": 1, **three}}

    symbols, size, error = report.force_errors(predictions, frames)
    assert list(symbols) == ["Cu", "Au", "Cu", "Au"]
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


def test_predictions_of_thousands_of_frames_are_complete_and_in_order(model):
    frames = [ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2 + i / 2500]]) for i in range(2003)]
    found = report.predict(model, frames)
    assert len(found) == 2003
    for i in (0, 998, 999, 1000, 1001, 1999, 2000, 2002):
        alone, = report.predict(model, [frames[i]])
        assert found[i]["energy"] == pytest.approx(alone["energy"], rel=1e-6)
    assert found[0]["energy"] != pytest.approx(found[2002]["energy"], rel=1e-3)


def test_broken_geometry_is_named_by_its_frame(model):
    frames = [ase.Atoms("Cu2", [[0, 0, 0], [0, 0, d]], info={"source": f"valid.xyz, frame {i}"})
              for i, d in enumerate((2.5, 0.0))]
    report.predict(model, frames[:1])
    with pytest.raises(BadInput, match="valid.xyz, frame 1: atoms . and . sit on one spot"):
        report.predict(model, frames)


def test_groups_elements_and_sizes_add_up(crystals, model):
    frames = list(read([str(crystals)])[:20])
    for i, atoms in enumerate(frames):
        atoms.info["group"] = "few" if i % 4 == 0 else "many"
    predictions = report.predict(model, frames)

    groups = report.errors_by_group(predictions, frames)
    assert list(groups) == ["many", "few"]
    assert [groups[name]["structures"] for name in groups] == [15, 5]
    few = report.errors(predictions[::4], frames[::4])
    assert groups["few"] == {"structures": 5, **few}

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


def test_constant_baseline_knows_the_composition_only(crystals):
    frames = read([str(crystals)])
    atoms = frames[0]
    found, *_ = report.constant_baseline(frames, CONFIG)
    E0 = dict(zip(CONFIG.species, CONFIG.reference_energies, strict=True))
    assert found["energy"] == sum(E0[symbol] for symbol in atoms.symbols)
    assert not found["forces"].any() and not found["stress"].any()


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


def test_report_of_the_embedded_set(make_run, crystals, capsys):
    folder = make_run()
    (folder.parent / "emt.extxyz").write_bytes(crystals.read_bytes())
    result = report.report(folder)
    json.dumps(result)  # it is plain
    assert (folder / "report.png").stat().st_size > 10_000

    printed = capsys.readouterr().out
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
    assert "total energy in molecular dynamics at 300 K" in printed
    assert "Cu3Au (L1₂), strained and rattled, relaxed by FIRE" in printed
    assert result["physics"]["relaxation"]["emt"]["converged"]
    assert len(result["physics"]["equivariance_error"]["float64"]) == 6
    assert len(result["physics"]["energy_drift"]["time_ps"]) > 5


def test_report_has_a_line_per_group_and_copes_with_missing_labels(make_run, crystals, tmp_path,
                                                                   capsys):
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


@pytest.mark.parametrize("held", ("test", "valid"))
def test_physics_are_those_of_structures_that_were_not_trained_on(held, make_run, crystals,
                                                                  tmp_path, monkeypatch):
    images = ase.io.read(crystals, ":")
    other = (written(tmp_path / "held.extxyz", images[:8]),)
    settings = {"test": ("0",), "valid": ("0",), held: other}
    folder = make_run(train=(written(tmp_path / "train.extxyz", images[8:]),), **settings)
    seen = []

    def stop(model, frames):
        seen.extend(atoms.info["source"] for atoms in frames)
        raise KeyboardInterrupt
    monkeypatch.setattr(physics, "all_of_it", stop)
    with pytest.raises(KeyboardInterrupt):
        report.report(folder)
    assert len(seen) == 8 and all("held.extxyz" in source for source in seen)


def test_report_without_a_test_set_says_so(make_run, crystals, capsys):
    folder = make_run(train=(str(crystals),), test=("0",), valid=("0",),
                      log=((1, 0.5, "nan", "nan"),))
    result = report.report(folder)
    printed = capsys.readouterr().out
    assert "There is no test set" in printed and "test structures" not in printed
    assert result["energy_mae_meV_per_atom"] is None and result["baselines"] == {}
    assert "total energy in molecular dynamics" in printed
    assert (folder / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("wrong, sentence", (
    ("nothing", "holds no checkpoint.pt of a training"),
    ("damage", "checkpoint.pt: is damaged"),
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


def test_command_helps():
    words = [sys.executable, "-m", "tools.report", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "runs/NAME" in done.stdout
