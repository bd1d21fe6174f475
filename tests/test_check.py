"""Tests of tools/check.py and tools/properties.py: does the table find what is wrong with any
calculator, and does its command say so?"""
import sys

import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT

import facet
from tests.test_bugs import with_bug
from tools import check
from tools.check import NOTHING, PROPERTIES, TRICLINIC, build, line, property_row, same
from tools.properties import conservation, random_crystal


class Crooked(EMT):
    """Wrong in every respect: it depends on place, direction, order and cell, and jumps."""

    def calculate(self, atoms=None, *arguments):
        super().calculate(atoms, *arguments)
        x = atoms.positions
        self.results["energy"] += 0.1 * (x[:, 0] * np.arange(len(x))).sum() + 0.1 * x[0, 2]
        self.results["energy"] += atoms.cell.array[0, 0] + float(np.ptp(x) < 4)
        self.results["forces"] = self.results["forces"] + 0.1 * x
        self.results["stress"] = self.results["stress"] + 0.1 * np.arange(6) + 0.1 * x[0, 0]


class Forceful(EMT):
    """Energy and forces, but no stress."""

    implemented_properties = ["energy", "free_energy", "forces"]


ANY = [name for name in PROPERTIES if name != "alone or in a batch"]


@pytest.mark.parametrize("name", ANY)
def test_row_of_the_table_finds_what_is_wrong_with_any_calculator(name):
    """EMT has the property, a crooked EMT has not; where there is no stress, a dash."""
    atoms = random_crystal(("Cu", "Al"))
    right = property_row(name, EMT(), atoms, "float32")
    assert not right.wrong and right.errors != NOTHING, line(right)
    wrong = property_row(name, Crooked(), atoms, "float32")
    assert wrong.wrong or "not applicable" in wrong.note, line(wrong)
    without = property_row(name, Forceful(), atoms, "float32")
    assert not without.wrong and without.errors[2] is None, line(without)


def test_row_that_says_nothing_about_a_calculator_says_so():
    row = property_row("alone or in a batch", EMT(), random_crystal(("Cu", "Al")))
    assert not row.wrong and "not applicable" in row.note


def test_conservation_reports_time_energy_and_drift():
    class Leaking(EMT):  # loses 1 meV per atom each femtosecond, whatever the atoms do
        steps = 0

        def calculate(self, atoms=None, *arguments):
            super().calculate(atoms, *arguments)
            self.results["energy"] -= 0.001 * len(atoms) * self.steps
            self.steps += 1
    atoms = ase.build.bulk("Cu", cubic=True)
    for calculator, drift in ((EMT(), 0.0), (Leaking(), -1000.0)):
        found = conservation(calculator, atoms, kelvin=50, steps=20, femtoseconds=1.0)
        same("time", found["time_ps"], np.arange(21) / 1000, "formula")
        assert len(found["energy_meV_per_atom"]) == 21 and found["energy_meV_per_atom"][0] == 0
        assert abs(found["drift_meV_per_atom_per_ps"] - drift) < 2  # meV/atom/ps
    assert atoms.calc is None and not atoms.get_momenta().any(), "the crystal was changed"


def run_main(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["check.py", *words])
    code = check.main()
    return code, capsys.readouterr().out


def test_command_prints_the_table_of_a_trained_model(monkeypatch, capsys, tmp_path):
    """In both precisions, each with its limits."""
    model = build(energy_scale=0.2, layers=2, degree=1)  # forces as those of a crystal
    facet.save(model, tmp_path / "model.pt")
    code, text = run_main(monkeypatch, capsys, "--calculator", str(tmp_path / "model.pt"))
    assert code == 0 and "all is right" in text and "WRONG" not in text
    for name in PROPERTIES:
        assert text.count(f"\n{name} ") == 2


def test_command_says_what_is_wrong_and_takes_every_option(monkeypatch, capsys, tmp_path):
    """With a bug, of a crystal in a file; of a calculator with options, for some elements."""
    few = {name: PROPERTIES[name] for name in ("rotation", "slope of the energy")}
    monkeypatch.setattr(check, "PROPERTIES", few)
    facet.save(build(), tmp_path / "model.pt")
    ase.io.write(tmp_path / "crystal.xyz", TRICLINIC)
    words = ("--calculator", str(tmp_path / "model.pt"), "--dtype", "float64",
             "--atoms", str(tmp_path / "crystal.xyz"))
    code, text = run_main(monkeypatch, capsys, *words)
    assert code == 0 and "WRONG" not in text and text.count("rotation ") == 1
    with with_bug("bias_on_every_degree"):
        code, text = run_main(monkeypatch, capsys, *words)
    assert code == 1 and "SiOCuSiO" in text and text.count("WRONG") == 1 and "1 wrong" in text

    code, text = run_main(monkeypatch, capsys, "--calculator", "ase.calculators.lj:LennardJones",
                          "sigma=2.3", "rc=6.0", "smooth=True", "--species", "Ar", "Kr")
    assert code == 0 and "Kr" in text and "WRONG" not in text


@pytest.mark.parametrize("words, message", (
    (["nothing"], "neither a .pt file nor module:callable"),
    (["nothing:x"], "cannot be made: ModuleNotFoundError"),
    (["ase.calculators.emt:EMX"], "has no attribute 'EMX'"),
    (["ase.calculators.emt:EMT", "fast"], "fast is not key=value"),
    (["os:getcwd"], "makes no ASE calculator"),
    (["absent.pt"], "absent.pt: no such checkpoint"),
    (["ase.calculators.emt:EMT", "--species", "Xe"], "no energy of a crystal of Xe"),
    (["ase.calculators.emt:EMT", "--atoms", "absent.cif"], "no energy of absent.cif"),
), ids=str)
def test_bad_calculator_gets_one_sentence(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=message) as error:
        run_main(monkeypatch, capsys, "--calculator", *words)
    assert "\n" not in str(error.value)


def test_command_is_that_of_test_facet(monkeypatch, capsys):
    """Help names the command that was given."""
    for program in ("python -m tools.check", "python test_facet.py"):
        monkeypatch.setattr(sys, "argv", ["", "--help"])
        with pytest.raises(SystemExit) as end:
            check.main(program)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {program} ") and text.count(f"    {program}") == 4
        for option in ("--calculator", "--atoms", "--species", "--dtype"):
            assert option in text
