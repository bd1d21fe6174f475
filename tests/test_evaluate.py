"""Tests of tools/evaluate.py: errors against loops by hand, the command, and what tools import."""
import io
import json
import os
import pkgutil
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
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
from tools import database, evaluate
from tools.frames import BadInput, read
from tools.labels import labelled

ROOT = Path(__file__).resolve().parent.parent
CONFIG = facet.Config(
    ("Cu", "Au"), cutoff=4.0, degree=1, channels=8, layers=2, groups=2, splines=8,
    first_knot=1.0, mean_neighbours=20.0, energy_scale=0.8, reference_energies=(-1.5, 2.25))
ORIGIN = {
    "command": "python train_small.py --train si.xyz",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "data": {"train": [{"file": "si.xyz", "sha256": "ab12", "frames": 214}], "valid": []},
    "units": {"length": "Å", "energy": "eV"},
    "date": "2026-01-02T03:04:05+00:00",
    "shortest": {"Cu-Cu": 1.1, "Cu-Au": 1.345},
    "init": {"file": "runs/old/model.pt", "sha256": "cd34"},
}


@pytest.fixture(scope="module")
def model() -> facet.Facet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return facet.Facet(CONFIG)


def crystals(count: int) -> list[ase.Atoms]:
    """Rattled crystals of two metals, of two sizes, with labels drawn at random."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        atoms = ase.build.bulk("Cu", a=3.8, cubic=True) * (1, 1, 1 + i % 2)
        atoms.symbols = rng.choice(["Cu", "Au"], len(atoms))
        atoms.positions += rng.normal(0, 0.1, (len(atoms), 3))
        labels = rng.normal(-3, 1), rng.normal(size=(len(atoms), 3)), rng.normal(0, 0.01, 6)
        group = "few" if i % 4 == 0 else "many"
        found.append(labelled(atoms, *labels, source=f"here, frame {i}", group=group))
    return found


def written(path: Path, some: list[ase.Atoms]) -> str:
    """The crystals in a file, groups under the name config_type."""
    copies = []
    for atoms in some:
        copy = atoms.copy()
        copy.calc = atoms.calc
        copy.info = {"config_type": atoms.info["group"]} if atoms.info.get("group") else {}
        copies.append(copy)
    ase.io.write(path, copies)
    return str(path)


# ─── Errors ──────────────────────────────────────────────────────────────────────────────────────


def test_predictions_are_those_of_the_calculator(model):
    frames = crystals(7)
    for found, atoms in zip(evaluate.predict(model, frames, batch_atoms=30), frames, strict=True):
        free = atoms.copy()
        free.calc = facet.FacetCalculator(model, device="cpu")
        np.testing.assert_allclose(found["energy"], free.get_potential_energy(), rtol=1e-5)
        np.testing.assert_allclose(found["forces"], free.get_forces(), atol=1e-4)
        np.testing.assert_allclose(found["stress"], free.get_stress(voigt=False), atol=1e-4)


def test_molecule_has_no_stress(model):
    molecule = ase.build.molecule("CO")
    molecule.symbols = "CuAu"
    found, = evaluate.predict(model, [molecule])
    assert np.isfinite(found["forces"]).all() and np.isnan(found["stress"]).all()


def test_errors_are_means_over_what_is_labelled(model):
    frames = crystals(6)
    del frames[0].calc.results["energy"]
    del frames[1].calc.results["stress"]
    predictions = evaluate.predict(model, frames)

    energy, force, stress = [], [], []
    for i, (found, atoms) in enumerate(zip(predictions, frames, strict=True)):
        wanted = atoms.calc.results
        force += list((found["forces"] - wanted["forces"]).ravel())
        if i != 0:
            energy.append((found["energy"] - wanted["energy"]) / len(atoms))
        if i != 1:
            label = voigt_6_to_full_3x3_stress(wanted["stress"])
            stress += list((found["stress"] - label).ravel() / units.GPa)

    table = evaluate.errors(predictions, frames)
    assert len(table) == 6
    for name, unit, scale, differences in (
            ("energy", "meV_per_atom", 1000, energy), ("force", "eV_per_A", 1, force),
            ("stress", "GPa", 1, stress)):
        mae = scale * sum(abs(x) for x in differences) / len(differences)
        rmse = scale * (sum(x * x for x in differences) / len(differences)) ** 0.5
        assert table[f"{name}_mae_{unit}"] == pytest.approx(mae)
        assert table[f"{name}_rmse_{unit}"] == pytest.approx(rmse)


def test_errors_without_labels_are_none(model):
    atoms, = crystals(1)
    predictions = evaluate.predict(model, [atoms])
    assert None not in evaluate.errors(predictions, [atoms]).values()
    atoms.calc.results.clear()
    assert set(evaluate.errors(predictions, [atoms]).values()) == {None}
    assert set(evaluate.errors([], []).values()) == {None}


@pytest.mark.parametrize("name", ("energy", "forces", "stress"))
def test_prediction_that_is_no_number_is_not_passed_over(name, model):
    """The mean of the other frames would look as if the model were sound."""
    frames = crystals(3)
    predictions = evaluate.predict(model, frames)
    said = []
    evaluate.tell_broken(predictions, frames, said.append)
    assert not said and np.isfinite(list(evaluate.errors(predictions, frames).values())).all()

    predictions[1][name] = predictions[1][name] * np.nan
    broken = [key for key, value in evaluate.errors(predictions, frames).items() if np.isnan(value)]
    assert len(broken) == 2 and all(key.startswith(name.removesuffix("s")[:5]) for key in broken)
    evaluate.tell_broken(predictions, frames, said.append)
    assert len(said) == (name != "stress"), "a frame without a volume has none"
    assert all(f"1 of 3 frames, such as {frames[1].info['source']};" in line for line in said)

    del frames[1].calc.results[name]
    assert None not in evaluate.errors(predictions, frames).values()
    assert np.isfinite(list(evaluate.errors(predictions, frames).values())).all(), "no label there"


def test_command_tells_that_the_model_gives_no_numbers(path, tmp_path, capsys):
    model = facet.load(path)
    with torch.no_grad():
        model.splines.coefficients.fill_(np.nan)
    facet.save(model, tmp_path / "nan.pt")
    data = written(tmp_path / "a.extxyz", crystals(3))
    assert " nan (nan) " in command(tmp_path / "nan.pt", data)
    assert "warning: the model gives no numbers" in capsys.readouterr().err
    assert "nan" not in command(path, data) and not capsys.readouterr().err, "the control"


def test_lone_atom_without_labels_has_none(path, tmp_path):
    """Forces of zero are added to an energy, not to nothing."""
    lone = ase.Atoms("Cu")
    ase.io.write(tmp_path / "a.extxyz", lone)
    bare, = evaluate.read([tmp_path / "a.extxyz"], evaluate.Names())
    assert not bare.calc.results
    lone.calc = SinglePointCalculator(lone, energy=1.0)
    ase.io.write(tmp_path / "b.extxyz", lone)
    found, = evaluate.read([tmp_path / "b.extxyz"], evaluate.Names())
    assert (found.calc.results["forces"] == 0).all()


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
    assert evaluate.errors(predictions, frames) == both
    groups = evaluate.errors_by_group(predictions, frames)
    assert groups == {"a": {"structures": 1, **one}, "b": {"structures": 1, **three}}


def test_groups_come_by_size_with_the_errors_of_their_frames(model):
    frames = crystals(12)
    predictions = evaluate.predict(model, frames)
    groups = evaluate.errors_by_group(predictions, frames)
    assert list(groups) == ["many", "few"]
    assert [groups[name]["structures"] for name in groups] == [9, 3]
    few = evaluate.errors(predictions[::4], frames[::4])
    assert groups["few"] == {"structures": 3, **few}
    assert few != evaluate.errors(predictions, frames)


def test_predictions_come_in_portions_complete_and_in_order(model, monkeypatch):
    frames = [ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2 + i / 25]]) for i in range(23)]
    alone = [float(evaluate.predict(model, [atoms])[0]["energy"]) for atoms in frames]
    assert len(set(np.round(alone, 5))) > 20
    seen = []
    several = facet.evaluate
    monkeypatch.setattr(facet, "evaluate", lambda model, graphs, *more: (
        seen.append(len(graphs)), several(model, graphs, *more))[1])
    monkeypatch.setattr(evaluate, "PORTION", 10)
    found = evaluate.predict(model, frames)
    assert seen == [10, 10, 3]
    assert [float(one["energy"]) for one in found] == pytest.approx(alone, rel=1e-6)


def test_broken_geometry_is_named_by_its_frame(model):
    frames = [ase.Atoms("Cu2", [[0, 0, 0], [0, 0, d]], info={"source": f"valid.xyz, frame {i}"})
              for i, d in enumerate((2.5, 0.0))]
    evaluate.predict(model, frames[:1])
    with pytest.raises(BadInput, match="valid.xyz, frame 1: atoms . and . sit on one spot"):
        evaluate.predict(model, frames)


def test_constant_baseline_knows_the_composition_only():
    atoms = ase.Atoms("Cu3Au", np.zeros((4, 3)))
    found, = evaluate.constant_baseline([atoms], CONFIG)
    assert found["energy"] == 3 * -1.5 + 2.25
    assert found["forces"].shape == (4, 3)
    assert not found["forces"].any() and not found["stress"].any()
    found, = evaluate.constant_baseline([atoms], replace(CONFIG, reference_energies=()))
    assert found["energy"] == 0


# ─── The command ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    """model.pt, with an origin."""
    found = tmp_path_factory.mktemp("model") / "model.pt"
    model.origin = ORIGIN
    facet.save(model, found)
    return str(found)


def command(*words: str) -> str:
    """What it prints, in this process."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        evaluate.main([*map(str, words), *(("--device", "cpu") if len(words) > 1 else ())])
    return printed.getvalue()


def test_errors_of_files_and_a_database_by_group(path, model, tmp_path):
    frames = crystals(12)
    written(tmp_path / "one.extxyz", frames[:8])
    other = written(tmp_path / "other.extxyz", frames[8:])
    database.convert([other], str(tmp_path / "other.db"))
    printed = command(path, tmp_path / "o*.extxyz").splitlines()
    assert command(path, tmp_path / "one.extxyz", tmp_path / "other.db").splitlines() == printed

    # the lines of the table, from frames as they are in the files
    frames = read([str(tmp_path / "one.extxyz"), other])
    predictions = evaluate.predict(model, frames)
    constant = evaluate.constant_baseline(frames, CONFIG)
    groups = evaluate.errors_by_group(predictions, frames)
    assert printed[1].startswith("12 labelled frames ") and "force MAE (RMSE) eV/Å" in printed[1]
    assert printed[2:] == [
        evaluate.table_line("Facet", evaluate.errors(predictions, frames)),
        evaluate.table_line("constant per species", evaluate.errors(constant, frames)),
        "Facet, by group",
        evaluate.table_line("many (9)", groups["many"]),
        evaluate.table_line("few (3)", groups["few"]),
    ]


def test_labels_have_the_names_that_are_given(path, tmp_path):
    """A virial is minus the volume times the stress."""
    frames = crystals(3)
    want = command(path, written(tmp_path / "usual.extxyz", frames))
    for atoms in frames:
        results = atoms.calc.results
        stress = voigt_6_to_full_3x3_stress(results["stress"])
        atoms.info = {"REF_energy": results["energy"], "REF_virial": -atoms.get_volume() * stress}
        atoms.arrays["REF_forces"] = results["forces"]
        atoms.calc = None
    ase.io.write(tmp_path / "named.extxyz", frames)
    names = ("--energy", "ref_energy", "--forces", "REF_forces", "--stress", "REF_virial")
    got = command(path, tmp_path / "named.extxyz", *names)
    table = [line for line in want.splitlines() if line.startswith("  Facet ")]
    assert table and table[0] in got.splitlines()


@pytest.fixture
def bare(tmp_path) -> str:
    """Crystals without labels, but with something else in their info, and a molecule."""
    frames = crystals(11)
    for atoms in frames:
        atoms.calc = None
        atoms.info = {"colour": "red"}
    molecule = ase.Atoms("CuAu", [[0, 0, 0], [0.2, 0.1, 2.2]])
    ase.io.write(tmp_path / "bare.extxyz", [*frames, molecule])
    return str(tmp_path / "bare.extxyz")


def test_frames_without_labels_get_them(path, bare, tmp_path):
    out = tmp_path / "out.extxyz"
    printed = command(path, bare, "--out", out)
    assert "No frame has energy or forces" in printed and "colour" in printed
    assert "MAE" not in printed and "largest component" not in printed
    assert f"{out}: 12 frames with the model's energy, forces, stress" in printed
    assert not list(tmp_path.glob("*.part"))

    calculator = facet.FacetCalculator(path, device="cpu")
    start = ase.io.read(bare, ":")
    for i, (got, atoms) in enumerate(zip(ase.io.read(out, ":"), start, strict=True)):
        assert (got.symbols == atoms.symbols).all() and (got.pbc == atoms.pbc).all()
        np.testing.assert_allclose(got.positions, atoms.positions, atol=1e-7)
        np.testing.assert_allclose(got.cell.array, atoms.cell.array, atol=1e-7)
        assert got.info["source"] == f"{bare}, frame {i}" and "material" not in got.info
        atoms.calc = calculator
        assert got.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=1e-5)
        np.testing.assert_allclose(got.get_forces(), atoms.get_forces(), atol=1e-4)
        if i < 11:
            np.testing.assert_allclose(got.get_stress(), atoms.get_stress(), atol=1e-5)
    assert "stress" not in got.calc.results, "a molecule has none"

    # what was written is a labelled file, and the model agrees with it
    again = command(path, out)
    line, = (line for line in again.splitlines() if line.startswith("  Facet "))
    numbers = [float(word.strip("()")) for word in line.split()[1:]]
    assert len(numbers) == 6 and max(numbers) < 0.02


def test_predictions_are_printed_where_nothing_is_written(path, bare):
    printed = command(path, bare).splitlines()
    start = ase.io.read(bare, ":")
    lines = [line for line in printed if line.startswith(f"{bare}, frame ")]
    assert len(lines) == 10 and printed[-1] == "and 2 more; --out writes them all"
    atoms = start[3]
    atoms.calc = facet.FacetCalculator(path, device="cpu")
    words = lines[3].removeprefix(f"{bare}, frame 3").split()
    assert float(words[0]) == pytest.approx(atoms.get_potential_energy(), rel=1e-4)
    assert abs(float(words[1])) == pytest.approx(np.abs(atoms.get_forces()).max(), rel=1e-3)
    assert abs(float(words[2])) == pytest.approx(np.abs(atoms.get_stress()).max(), rel=1e-3)


def test_frames_without_labels_beside_others_are_written_and_not_counted(path, bare, tmp_path):
    frames = crystals(4)
    for atoms, material in zip(frames, "pqqp", strict=True):
        atoms.info["material"] = material
    ase.io.write(tmp_path / "some.extxyz", frames)
    some = str(tmp_path / "some.extxyz")
    want = [line for line in command(path, some).splitlines() if line.startswith("  Facet ")]
    printed = command(path, some, bare, "--out", tmp_path / "out.extxyz").splitlines()
    assert printed[1].startswith("4 labelled frames") and want[0] in printed
    assert "12 frames without labels do not count" in printed
    found = ase.io.read(tmp_path / "out.extxyz", ":")
    assert len(found) == 16
    assert [atoms.info["group"] for atoms in found[:4]] == ["few", "many", "many", "many"]
    assert [atoms.info["material"] for atoms in found[:4]] == ["p", "q", "q", "p"]
    lone = ase.Atoms("Cu", [[0, 0, 0]])
    ase.io.write(tmp_path / "lone.extxyz", lone)
    assert "No frame has energy or forces" in command(path, tmp_path / "lone.extxyz")


def test_stress_alone_is_a_label(path, model, tmp_path):
    """Frames with nothing else are compared; energies and forces stay out of the table."""
    frames = crystals(4)
    for atoms in frames:
        atoms.calc.results = {"stress": atoms.calc.results["stress"]}
    printed = command(path, written(tmp_path / "stresses.extxyz", frames)).splitlines()
    assert printed[1].startswith("4 labelled frames")
    table = evaluate.errors(evaluate.predict(model, frames), frames)
    assert table["energy_mae_meV_per_atom"] is None and table["stress_mae_GPa"] > 0.1
    assert printed[2] == evaluate.table_line("Facet", table)


def test_group_that_cannot_be_written_does_not_spoil_the_file(path, tmp_path, capsys):
    frames = [atoms.copy() for atoms in crystals(3)]
    for atoms, group in zip(frames, ("one", "over\ntwo lines", "three"), strict=True):
        atoms.info = {"config_type": group}
    ase.io.write(tmp_path / "in.traj", frames)
    command(path, tmp_path / "in.traj", "--out", tmp_path / "out.extxyz")
    assert "note: extended XYZ cannot hold the group of a frame: left" in capsys.readouterr().err
    found = ase.io.read(tmp_path / "out.extxyz", ":")
    assert [atoms.info.get("group") for atoms in found] == ["one", None, "three"]


def as_json(atoms: ase.Atoms, **labels) -> dict:
    """A document of pymatgen's structure, with labels."""
    sites = []
    for symbol, place in zip(atoms.symbols, atoms.get_scaled_positions()):
        sites.append({"species": [{"element": symbol, "occu": 1}], "abc": place.tolist()})
    return {"structure": {"lattice": {"matrix": atoms.cell.tolist()}, "sites": sites}, **labels}


@pytest.mark.parametrize("kind", ("list", "lines", "ASE's own"))
def test_json_needs_no_labels(kind, path, tmp_path):
    frames = [atoms.copy() for atoms in crystals(3)]
    for atoms in frames:
        atoms.info = {}
    name = tmp_path / ("bare.jsonl" if kind == "lines" else "bare.json")
    documents = [as_json(atoms) for atoms in frames]
    if kind == "list":
        name.write_text(json.dumps(documents))
    elif kind == "lines":
        name.write_text("\n".join(map(json.dumps, documents)))
    else:
        ase.io.write(name, frames)
    out = tmp_path / "out.extxyz"
    assert "No frame has energy or forces" in command(path, name, "--out", out)
    calculator = facet.FacetCalculator(path, device="cpu")
    for got, atoms in zip(ase.io.read(out, ":"), frames, strict=True):
        atoms.calc = calculator
        assert got.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=1e-5)

    # a control: with labels they are labelled, one by one
    if kind == "list":
        documents[1]["energy"] = -7.0
        name.write_text(json.dumps(documents))
        printed = command(path, name)
        assert "1 labelled frames" in printed
        assert "2 frames without labels do not count" in printed


@pytest.mark.parametrize("name", ("@1.extxyz", "bare@1.extxyz", "[ab]*.extxyz", "./-s.extxyz"))
def test_file_has_its_very_name(name, path, bare, monkeypatch):
    monkeypatch.chdir(Path(bare).parent)
    ase.io.write("five.extxyz", ase.io.read(bare, ":5"))
    os.rename("five.extxyz", name)
    found = [line for line in command(path, name).splitlines() if ", frame " in line]
    assert len(found) == 5 and found[4].startswith(f"{name}, frame 4 ")


def test_output_is_never_replaced(path, bare, monkeypatch):
    before = Path(bare).read_bytes()
    with pytest.raises(SystemExit, match="bare.extxyz: exists already; remove it, or give"):
        command(path, bare, "--out", bare)
    assert Path(bare).read_bytes() == before

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    out = Path(bare).with_name("out.extxyz")
    with pytest.raises(SystemExit, match="error: No space left"):
        command(path, bare, "--out", out)
    assert [other.name for other in out.parent.iterdir()] == ["bare.extxyz"]


def spoilt(what: str, folder: Path) -> Path:
    """A file that cannot be evaluated."""
    frames = crystals(3)
    found = folder / "bad.extxyz"
    if what == "no such file":
        return found
    if what == "unknown element":
        frames[1].symbols[0] = "Xe"
    if what == "no volume":
        frames[2].set_cell(np.zeros((3, 3)))
    if what == "two atoms on one spot":
        frames[1].positions[1] = frames[1].positions[0]
    if what == "other name":
        for atoms in frames:
            atoms.info["my_energy"] = atoms.calc.results.pop("energy")
    written(found, frames)
    if what == "other name":
        ase.io.write(found, frames)
    if what == "cut off":
        found.write_text(found.read_text()[:-100])
    if what == "no crystal at all":
        found.write_text("These are words.\nNothing else.\n")
    return found


@pytest.mark.parametrize("what, options, sentence", (
    ("no such file", (), "bad.extxyz: no such file"),
    ("no crystal at all", (), "bad.extxyz, frame 0: cannot be read, is it complete"),
    ("cut off", (), "bad.extxyz, frame 2: cannot be read, is it complete"),
    ("unknown element", (), "bad.extxyz, frame 1: element Xe is not among those the model knows: "
                            "Cu Au; remove the frame, or take another model"),
    ("two atoms on one spot", (), "bad.extxyz, frame 1: atoms 0 and 1 sit on one spot"),
    ("no volume", (), "bad.extxyz, frame 2: periodic, but its cell has no volume"),
    ("other name", (), "has energy under the name 'energy'; the first has"),
    ("nothing", ("--energy", "enrgy"), "has energy under the name 'enrgy'; the first has"),
))
def test_bad_file_ends_with_one_sentence(what, options, sentence, path, tmp_path):
    with pytest.raises(SystemExit) as end:
        command(path, spoilt(what, tmp_path), *options)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    assert sentence in end.value.code


@pytest.mark.parametrize("name", ("model.pt", "bare.extxyz", "out.extxyz", "new.db", "new.json"))
def test_folder_in_the_place_of_a_file_ends_with_one_sentence(name, path, bare, tmp_path):
    words = {"model.pt": path, "bare.extxyz": bare, "out.extxyz": tmp_path / "out.extxyz"}
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    words["bare.extxyz" if name.startswith("new") else name] = tmp_path / name
    with pytest.raises(SystemExit) as end:
        command(words["model.pt"], words["bare.extxyz"], "--out", words["out.extxyz"])
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    assert str(tmp_path / name) in end.value.code


@pytest.mark.parametrize("words, sentence", (
    (["data.extxyz"], "data.extxyz is not a Facet checkpoint"),
    (["nowhere.pt"], "nowhere.pt: no such checkpoint"),
))
def test_file_that_is_no_model_ends_with_one_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(Path("data.extxyz"), crystals(1))
    with pytest.raises(SystemExit) as end:
        command(*words)
    assert sentence in end.value.code and "\n" not in end.value.code


@pytest.mark.parametrize("options, sentence", (
    (["--out", "out.extxyz"], "there are no frames to write"),
    (["a.xyz", "--out", "out.cif"], "the output is extended XYZ"),
    (["a.xyz", "--out", "nowhere/out.extxyz"], "there is no folder nowhere"),
    (["a.xyz", "--batch_atoms", "0"], "--batch_atoms 0: must be positive"),
    (["a.xyz", "--device", "abacus"], "--device abacus: PyTorch has no such device"),
    (["a.xyz", "--device", "meta"], "--device meta: PyTorch has no such device"),
    (["--device", "meta"], "--device meta: PyTorch has no such device"),
    (["a.xyz", "--threads", "100000"], "unrecognized arguments: --threads"),
))
def test_wrong_options_end_with_one_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["model.pt", *options])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_mistakes_in_the_program_keep_their_traceback(path, bare, monkeypatch):
    def mistaken(*_, **__):
        raise ValueError("a shape is wrong")
    monkeypatch.setattr(facet, "evaluate", mistaken)
    with pytest.raises(ValueError, match="a shape is wrong"):
        command(path, bare)


def test_batches_hold_as_many_atoms_as_are_asked_for(path, bare, monkeypatch):
    seen = []
    make_batch = facet.make_batch
    monkeypatch.setattr(facet, "make_batch", lambda graphs, *more: (
        seen.append(sum(len(graph.species) for graph in graphs)), make_batch(graphs, *more))[1])
    command(path, bare)
    command(path, bare, "--batch_atoms", "1")
    assert len(seen) == 1 + 12 and seen[0] == sum(seen[1:])


# ─── Where a model comes from ────────────────────────────────────────────────────────────────────


def test_model_alone_says_where_it_comes_from(path):
    printed = command(path)
    for words in (
            "Cu Au", "4 Å in each layer, 8 Å through all", "2 layers of 8 channels",
            f"{sum(p.numel() for p in facet.load(path).parameters())}", "Cu -1.5000, Au 2.2500",
            ORIGIN["command"], ORIGIN["date"], "python 3.11.7, torch 2.13.0",
            "214 frames of si.xyz, SHA-256 ab12", "length Å, energy eV",
            "Cu-Cu 1.10, Cu-Au 1.34", "runs/old/model.pt, SHA-256 cd34"):
        assert words in printed, words
    assert len({line.split()[0] for line in printed.splitlines()}) == len(printed.splitlines())


def test_model_of_an_older_format_says_that_it_does_not_tell():
    printed = command(ROOT / "tests" / "format_1.pt")
    assert "does not tell" in printed and "SHA-256" not in printed and "elements " in printed


def test_origin_that_somebody_wrote_by_hand_is_printed_as_far_as_it_goes():
    lines = dict(evaluate.describe_origin({"shortest": {"Cu-Cu": 2.1}}))
    assert lines["shortest (Å)"] == "Cu-Cu 2.10" and lines["command"] == "unknown"


def test_module_is_a_command(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", path])
    runpy.run_path(evaluate.__file__, run_name="__main__")
    assert capsys.readouterr().out.rstrip("\n") == command(path).rstrip("\n")
    monkeypatch.setattr(sys, "argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(evaluate.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "MODEL [FILE" in printed
    assert "a file that exists is never replaced" in printed


# ─── What the tools import ───────────────────────────────────────────────────────────────────────

EVERY = """
import importlib, sys
import train_small
for name in sys.argv[1].split():
    importlib.import_module(f"tools.{name}")
print(*sorted(sys.modules))
importlib.import_module("tools.check")
print(*sorted(sys.modules))
"""


def test_no_tool_imports_a_test():
    """Nor does one import the table of checks: train, relax, report and drive LAMMPS without it."""
    names = [module.name for module in pkgutil.iter_modules([str(ROOT / "tools")])]
    assert {"check", "evaluate", "lammps", "physics", "relax", "report"} < set(names)
    names.remove("check")
    words = [sys.executable, "-c", EVERY, " ".join(names)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (set(line.split()) for line in done.stdout.splitlines())
    assert {f"tools.{name}" for name in names} <= before
    assert "tools.check" not in before and "tools.check" in after
    for name in after:
        assert name.split(".")[0] not in ("pytest", "hypothesis", "test_facet", "tests"), name
