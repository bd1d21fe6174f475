"""Tests of tools/check.py and tools/properties.py: does the table find what is wrong with any
calculator, and does its command say so?"""
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

import facet
import reference_numpy
from tests.test_bugs import row_without_bugs, with_bug
from tools import check
from tools.check import (
    NOTHING,
    PARTS,
    PROPERTIES,
    TOL,
    TRICLINIC,
    Row,
    build,
    differ,
    guard_row,
    largest,
    line,
    property_row,
    same,
    table,
)
from tools.properties import conservation, conservation_error, random_alloy, random_crystal

ROOT = Path(__file__).resolve().parents[1]

# ─── Comparisons ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("place", ((0,), (6,), (0, 0), (1, 2), (0, 0, 0), (1, 2, 2)), ids=str)
def test_largest_error_is_found_in_every_place_and_nan_is_one(place):
    """Of the first number and of the last; relative to the largest wanted number, if above 1."""
    want = np.zeros((2, 3, 3)[:len(place)] if len(place) > 1 else 7)
    got = want.copy()
    assert largest(got, want) == (0, (0,) * len(place)), "the control"
    for error in (0.5, -0.5, np.nan, np.inf):
        got[place] = error
        size = 0.5 if np.isfinite(error) else np.inf
        for one, other in ((got, want), (want, got), (torch.from_numpy(got), want.tolist())):
            assert largest(one, other) == (size, place)
            with pytest.raises(AssertionError, match=r"numbers: off by"):
                same("numbers", one, other, "moment")
    assert largest(got, got) == (np.inf, place), "what is no number equals nothing"
    assert largest(want + 4.0, want + 5.0)[0] == 0.2


def test_control_fails_where_nothing_differs_and_for_nan():
    differ("numbers", [0.0, 0.02], [0.0, 0.0])
    for got in ([0.0, 0.0], [0.0, 0.005], [0.0, np.nan], [1.0, np.inf]):
        with pytest.raises(AssertionError, match="proves nothing"):
            differ("numbers", got, [0.0, 0.0])


@pytest.mark.parametrize("place", range(3))
def test_row_with_one_large_error_or_nan_is_wrong(place):
    for error, limit, wrong in ((0.5, 1.0, False), (1.5, 1.0, True), (np.nan, 1.0, True),
                                (np.inf, 1.0, True), (0.5, np.nan, True), (0.5, -1.0, True)):
        errors = [None, 1e-3, 1e-3]
        errors[place] = error
        row = Row("a row", tuple(errors), limit)
        assert row.wrong == wrong and ("WRONG" in line(row)) == wrong, line(row)
    assert Row("", NOTHING, -1.0).wrong and not Row("", NOTHING, 0.0).wrong


def test_table_counts_every_wrong_row(capsys):
    right = Row("a row", (0.0, 0.0, 0.0), 1.0)
    wrong = Row("a row", (0.0, 0.0, np.nan), 1.0)
    for rows in ([], [right], [wrong], [wrong, right, wrong, right], [right, wrong]):
        assert table("a title", iter(rows)) == rows.count(wrong)
        assert capsys.readouterr().out.count("WRONG") == rows.count(wrong)


# ─── Rows ───────────────────────────────────────────────────────────────────────────────────────


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


class Unsound(EMT):
    """The last number of one result is nan."""

    unsound = "energy"

    def calculate(self, *arguments):
        super().calculate(*arguments)
        self.results[self.unsound] = with_wrong_end(self.results[self.unsound], np.nan)


def with_wrong_end(values, error: float):
    """A number, or an array, to whose last element an error is added."""
    wrong = np.array(values, float)
    wrong.flat[-1] += error
    return wrong if wrong.ndim else float(wrong)


ANY = [name for name in PROPERTIES if name != "alone or in a batch"]


@pytest.mark.parametrize("name", ANY)
def test_row_of_the_table_finds_what_is_wrong_with_any_calculator(name):
    """EMT has the property, a crooked EMT has not; where there is no stress, a dash; what gives nan
    has no property."""
    atoms = random_crystal(("Cu", "Al"))
    right = property_row(name, EMT(), atoms, "float32")
    assert not right.wrong and right.errors != NOTHING, line(right)
    wrong = property_row(name, Crooked(), atoms, "float32")
    assert wrong.wrong or "not applicable" in wrong.note, line(wrong)
    without = property_row(name, Forceful(), atoms, "float32")
    assert not without.wrong and without.errors[2] is None, line(without)

    unsound = Unsound()
    for unsound.unsound in {*PROPERTIES[name][1], "forces"}:
        unsound.reset()
        broken = property_row(name, unsound, atoms, "float32")
        assert broken.wrong and f"{unsound.unsound}: nan" in broken.note, line(broken)


def test_every_row_of_the_table_notices_a_model_that_gives_nan():
    """For one atom, the last. Control: each row is right without it, in test_bugs.py."""
    with with_bug("last_energy_is_nan"):
        rows = [guard_row(name) for name in (*PROPERTIES, *PARTS)]
    for row in rows:
        assert row.wrong, line(row)


LAST = []
for name, (_, parts, _) in PROPERTIES.items():
    LAST += [(name, of, np.nan) for of in parts]
    if name not in ("jump at the cutoff", "conservation, part of kinetic"):  # constants are neither
        LAST += [(name, of, 1e-4 if name == "slope of the energy" else 1e-8) for of in parts]


@pytest.mark.parametrize("name, of, error", LAST)
def test_property_sees_the_last_number_of_what_it_measures(name, of, error):
    """It is nan, or off by less than the rounding of float32 (slopes: by more). That is so for
    every crystal but the first, where two are compared, for crystals in a batch, where these are,
    and else for all."""
    function, parts, tolerance = PROPERTIES[name]
    calculator = facet.FacetCalculator(build(layers=1, degree=0), "cpu", torch.float64)
    right = facet.evaluate
    crystals_seen = []

    def evaluate(model, crystals, **more):
        results = right(model, crystals, **more)
        crystals_seen.extend(crystals)
        wrong = len(crystals_seen) > 1
        if name in ("slope of the energy", "isolated atom"):
            wrong = True
        if name == "alone or in a batch":
            wrong = len(crystals) > 1
        if wrong:
            results[-1][of] = with_wrong_end(results[-1][of], error)
        return results

    with mock.patch.object(facet, "evaluate", evaluate):
        found = function(calculator, TRICLINIC, of=parts)
    assert not found[parts.index(of)] <= TOL[tolerance], f"{of}: {found}"
    assert not row_without_bugs(name).wrong, "the control"


def test_row_that_says_nothing_about_a_calculator_says_so():
    row = property_row("alone or in a batch", EMT(), random_crystal(("Cu", "Al")))
    assert not row.wrong and "not applicable" in row.note


def test_exception_is_noted_and_wrong_for_facet_alone():
    """In a property, in a part, in the reference that does not know the model."""
    failing = mock.Mock(side_effect=KeyError("a name"))
    with mock.patch.dict(PROPERTIES, rotation=(failing, ("energy",), "rounding")):
        noted = property_row("rotation", EMT(), random_crystal(("Cu", "Al")), "float32")
        assert not noted.wrong and noted.errors == NOTHING and noted.note == "KeyError: 'a name'"
        assert guard_row("rotation").wrong
    with mock.patch.dict(PARTS, {"a part": failing}):
        assert guard_row("a part").wrong
    with mock.patch.object(reference_numpy, "evaluate", failing):
        assert guard_row("equals reference_numpy.py").wrong


def test_grid_of_silu_is_allowed_its_error_where_it_makes_one():
    """Under rotation and reflection, and nowhere else; limits go with the largest force."""
    for activation in ("silu", "product"):
        model = build(activation=activation, layers=1, degree=1)
        calculator = facet.FacetCalculator(model, "cpu", torch.float64)
        size = max(1.0, np.abs(calculator.get_forces(TRICLINIC)).max())
        for name in ("rotation", "reflection", "translation", "slope of the energy"):
            allowed = PROPERTIES[name][2]
            if activation == "silu" and name in ("rotation", "reflection"):
                allowed = "silu"
            limit = property_row(name, calculator, TRICLINIC).limit
            assert abs(limit / (TOL[allowed] * size) - 1) < 1e-9, name


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
    kinetic = 1.5 * ase.units.kB * 50  # eV per atom; 20 steps lose 0.02
    error = conservation_error(Leaking(), atoms, kelvin=50, steps=20)
    same("error over the kinetic energy", error / (0.02 / kinetic), 1.0, "drift")
    assert atoms.calc is None and not atoms.get_momenta().any(), "the crystal was changed"


# ─── The command ────────────────────────────────────────────────────────────────────────────────

def run_main(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["check.py", *words])
    code = check.main()
    return code, capsys.readouterr().out


def run_program(monkeypatch, capsys, program: str, *words) -> tuple[int, str]:
    """The exit code that a shell sees, and the text."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as end:
        return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_command_prints_every_row_of_a_trained_model(monkeypatch, capsys, tmp_path):
    """In float32, which has limits of its own; float64 is that of the planted bugs. A model that
    gives nan has no row that is right, and the exit code says so."""
    model = build(energy_scale=0.2, layers=2, degree=1)  # forces as those of a crystal
    facet.save(model, tmp_path / "model.pt")
    words = ("--calculator", str(tmp_path / "model.pt"), "--dtype", "float32")
    code, text = run_program(monkeypatch, capsys, "tools/check.py", *words)
    assert code == 0 and "all is right" in text and "WRONG" not in text
    for name in PROPERTIES:
        assert text.count(f"\n{name} ") == 1

    broken = facet.load(tmp_path / "model.pt")
    with torch.no_grad():
        broken.readout[-1] = np.nan
    facet.save(broken, tmp_path / "model.pt")
    for program in ("tools/check.py", "test_facet.py"):
        code, text = run_program(monkeypatch, capsys, program, *words)
        assert code == 1 and f"{len(PROPERTIES)} wrong" in text


@pytest.mark.parametrize("bug, code, verdict", (
    (None, 0, "all is right"), ("bias_on_every_degree", 1, "2 wrong")), ids=str)
def test_exit_code_of_test_facet_says_whether_a_row_is_wrong(bug, code, verdict, monkeypatch,
                                                             capsys):
    """A row that is right comes last; the table is of two properties and one part."""
    few = {name: PROPERTIES[name] for name in ("rotation", "reflection")}
    monkeypatch.setattr(check, "PROPERTIES", few)
    monkeypatch.setattr(check, "PARTS", {"empty places": PARTS["empty places"]})
    monkeypatch.setattr(check, "random_alloy", lambda atoms: random_alloy(8))
    with with_bug(bug) if bug else nullcontext():
        found, text = run_program(monkeypatch, capsys, "test_facet.py")
    assert found == code and f"\n{verdict}\n" in text and text.count("WRONG") == 2 * code


def test_command_says_what_is_wrong_and_takes_every_option(monkeypatch, capsys, tmp_path):
    """Of a checkpoint in both precisions or in one, with a bug, of a crystal in a file; of a
    calculator with options, for some elements."""
    few = {name: PROPERTIES[name] for name in ("rotation", "slope of the energy")}
    monkeypatch.setattr(check, "PROPERTIES", few)
    facet.save(build(), tmp_path / "model.pt")
    ase.io.write(tmp_path / "crystal.xyz", TRICLINIC)
    words = ("--calculator", str(tmp_path / "model.pt"), "--atoms", str(tmp_path / "crystal.xyz"))
    code, text = run_main(monkeypatch, capsys, *words)
    assert code == 0 and "WRONG" not in text and text.count("rotation ") == 2
    with with_bug("grid_of_seven_digits"):  # which the second table, of float32, does not notice
        code, text = run_main(monkeypatch, capsys, *words)
    assert code == 1 and text.count("WRONG") == 1 and "1 wrong" in text
    with with_bug("bias_on_every_degree"):
        code, text = run_main(monkeypatch, capsys, *words, "--dtype", "float64")
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
        assert text.startswith(f"usage: {program} ") and text.count(f"    {program}") == 5
        for option in ("--calculator", "--atoms", "--species", "--dtype", "--device"):
            assert option in text
