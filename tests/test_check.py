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
from ase.neighborlist import neighbor_list

import facet
import reference_numpy
from tests.test_bugs import row_without_bugs, with_bug
from tools import check
from tools.check import (
    BLIND,
    BROKE,
    HISTORY,
    NOT_ASKED,
    NOTHING,
    OK,
    PARTS,
    PROPERTIES,
    TOL,
    TRICLINIC,
    WRONG,
    Row,
    build,
    differ,
    guard_row,
    largest,
    line,
    noise_in,
    property_row,
    same,
    sentence,
    table,
)
from tools.potentials import SUITABLE, Watched, boxed, candidates, crystal_of, maker, shaken
from tools.properties import (
    ALL,
    NO_METALS,
    conservation,
    conservation_error,
    leaving,
    random_alloy,
    random_crystal,
    value,
)

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
        for told in ("", BLIND):
            row = Row("a row", tuple(errors), limit, told=told)
            assert row.wrong == wrong and ("WRONG" in line(row)) == wrong, line(row)
            assert row.verdict == ("WRONG" if wrong else told or OK)


R, W, B, S, N = (Row("a row", told=told) for told in (OK, WRONG, BROKE, BLIND, NOT_ASKED))


@pytest.mark.parametrize("rows, text, code", (
    ([R], "all is right", 0),
    ([R, N, R], "all is right", 0),
    ([R, N, N], "2 of 3 not asked: this says little", 1),
    ([W, R, W], "2 wrong", 1),
    ([R, R, B], "1 broke", 1),
    ([R, R, S], "1 with nothing to see", 1),
    ([W, B, S, N], "1 wrong, 1 broke, 1 with nothing to see", 1),
), ids=str)
def test_last_line_counts_every_verdict(rows, text, code, capsys):
    """Only where every row that was asked is right, and most were asked, is all right."""
    verdicts = table("a title", iter(rows))
    assert sentence(verdicts) == (text, code)
    printed = capsys.readouterr().out
    for row in (R, W, B, S, N):
        assert printed.count(f" {row.verdict}") == rows.count(row)


# ─── Rows ───────────────────────────────────────────────────────────────────────────────────────


class Crooked(EMT):
    """Wrong in every respect: it depends on place, direction, order, cell and past, and jumps."""

    calls = 0

    def calculate(self, atoms=None, *arguments):
        super().calculate(atoms, *arguments)
        x = atoms.positions
        self.results["energy"] += 0.1 * (x[:, 0] * np.arange(len(x))).sum() + 0.1 * x[0, 2]
        self.results["energy"] += atoms.cell.array[[0, 2], [0, 2]].sum() + float(np.ptp(x) < 4)
        self.results["energy"] += 0.01 * self.calls
        self.calls += 1
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
    assert right.verdict == OK and right.errors != NOTHING, line(right)
    wrong = property_row(name, Crooked(), atoms, "float32")
    assert wrong.wrong or "beyond 27 Å" in wrong.note, line(wrong)
    without = property_row(name, Forceful(), atoms, "float32")
    assert without.verdict == OK and without.errors[2] is None, line(without)

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
    if tolerance == "self-consistent":  # not for a Facet
        tolerance = "rounding"
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
    assert row.verdict == NOT_ASKED and "one crystal at a time" in row.note


def test_row_that_ends_in_an_exception_broke():
    """In a property, in a part, in the reference that does not know the model."""
    failing = mock.Mock(side_effect=KeyError("a name"))
    with mock.patch.dict(PROPERTIES, rotation=(failing, ("energy",), "rounding")):
        noted = property_row("rotation", EMT(), random_crystal(("Cu", "Al")), "float32")
        assert noted.verdict == BROKE and noted.note == "KeyError: 'a name'", line(noted)
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
    facet.save(build(), tmp_path / "model.pt")
    ase.io.write(tmp_path / "crystal.xyz", TRICLINIC)
    words = ("--calculator", str(tmp_path / "model.pt"), "--atoms", str(tmp_path / "crystal.xyz"),
             "--rows", "rotation,slope")
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
    (["absent.py:x"], "cannot be made: FileNotFoundError: absent.py: no such file"),
    (["ase.calculators.emt:EMX"], "has no attribute 'EMX'"),
    (["ase.calculators.emt:EMT", "fast"], "fast is not key=value"),
    (["os:getcwd"], "makes no ASE calculator"),
    (["absent.pt"], "absent.pt: no such checkpoint"),
    (["absent.pt", "a=1"], "a checkpoint takes no a=1"),
    (["ase.calculators.emt:EMT", "--species", "Xe"], "no energy and forces of a crystal of Xe"),
    (["ase.calculators.emt:EMT", "--species", "Cu,Al"], "'Cu,Al' is no element"),
    (["ase.calculators.emt:EMT", "--species", "X"], "'X' is no element"),
    (["sys:exit"], "sys:exit cannot be made: SystemExit"),
    (["tests.test_check:Ends"], "it ends the program with 0"),
    (["ase.calculators.emt:EMT", "--atoms", "absent.cif"], "no energy and forces of absent.cif"),
    (["ase.calculators.emt:EMT", "--rows", "rot,up"], "no row begins with 'up'; there are: rotat"),
    (["ase.calculators.emt:EMT", "--device", "cpu"], "--device is for Facet"),
), ids=str)
def test_what_cannot_begin_gets_one_sentence(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--calculator", *words])
    assert check.main() == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text and text.count("\n") == 1


def test_command_is_that_of_test_facet(monkeypatch, capsys):
    """Help names the command that was given."""
    for program in ("python -m tools.check", "python test_facet.py"):
        monkeypatch.setattr(sys, "argv", ["", "--help"])
        with pytest.raises(SystemExit) as end:
            check.main(program)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {program} ") and text.count(f"    {program}") == 9
        for option in ("--calculator", "--atoms", "--species", "--dtype", "--rows", "--all",
                       "--device", "exit code"):
            assert option in text


# ─── Faults of potentials ───────────────────────────────────────────────────────────────────────
#
# Each calculator has a fault that was found in a published one, or looks as if it had one.


class Changed(EMT):
    """EMT, and after it `change(atoms)`."""

    def calculate(self, atoms=None, *arguments):
        super().calculate(atoms, *arguments)
        self.change(atoms)


class Ends(Changed):
    def change(self, atoms):
        sys.exit(0)


class SignOfTheVolume(Changed):
    def change(self, atoms):
        self.results["stress"] = np.sign(np.linalg.det(atoms.cell)) * self.results["stress"]


class ForcesWithoutOneTerm(Changed):
    """A term of the energy that the forces lack, and as invariant as the rest."""

    def change(self, atoms):
        self.results["energy"] += 1e-3 * self.results["energy"] ** 2


class WeakForces(Changed):
    def change(self, atoms):
        self.results["forces"] = 0.99 * self.results["forces"]


class LargestSoFar(Changed):
    """Remembers the densest crystal."""

    densest = 0.0

    def change(self, atoms):
        self.densest = max(self.densest, len(atoms) / max(atoms.cell.volume, 1))
        self.results["energy"] += 0.1 * self.densest * len(atoms)


class SelfConsistent(Changed):
    """Iterations that end a little elsewhere each time: energy and forces are noisy."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def change(self, atoms):
        self.results["energy"] += 1e-9 * self.rng.uniform(-1, 1)
        for name in ("forces", "stress"):
            noise = self.rng.uniform(-1, 1, self.results[name].shape)
            self.results[name] = self.results[name] + 1e-6 * noise


class StepOfTheEnergy(Changed):
    """1 meV more where the first two atoms are 5e-5 Å farther apart than in the crystal."""

    def change(self, atoms):
        self.results["energy"] += 1e-3 * (atoms.get_distance(0, 1) > self.where)


class Through:
    """EMT of what the atoms are taken for."""

    def emt(self, atoms):
        atoms = atoms.copy()
        self.change(atoms)
        atoms.calc = EMT()
        return atoms

    def get_potential_energy(self, atoms):
        return self.emt(atoms).get_potential_energy()

    def get_forces(self, atoms):
        return self.emt(atoms).get_forces()


class AtomsOutsideLost(Through):
    """Atoms more than a cell away have no bonds."""

    def change(self, atoms):
        place = atoms.get_scaled_positions(wrap=False)
        lost = ((place < -1) | (place > 2)).any(1)
        atoms.positions[lost] += 1e3 * np.arange(1, 1 + lost.sum())[:, None]
        atoms.pbc = not lost.any()


class AlwaysOpen(Through):
    def change(self, atoms):
        atoms.pbc = False


class AlwaysPeriodic(Through):
    def change(self, atoms):
        atoms.pbc = bool(atoms.cell.volume)


class Pairs:
    """Σ φ(r) over pairs closer than `reach`, and nothing but what ASE asks for."""

    def __init__(self, phi, slope, reach=4.0):
        self.phi, self.slope, self.reach = phi, slope, reach

    def get_potential_energy(self, atoms):
        return self.phi(np.linalg.norm(self.pairs(atoms)[1], axis=1)).sum() / 2

    def pairs(self, atoms):
        i, _, _, vectors = facet.neighbour_list(
            atoms.positions, atoms.cell.array, atoms.pbc, self.reach)
        return i, vectors

    def get_forces(self, atoms):
        i, vectors = self.pairs(atoms)
        r = np.linalg.norm(vectors, axis=1)
        pulls = (self.slope(r) / r)[:, None] * vectors
        return np.array([np.bincount(i, pulls[:, x], len(atoms)) for x in range(3)]).T


class OfItsAtoms(Pairs):
    """Learns of the atoms when it is attached to them, and takes large cells only."""

    def set_atoms(self, atoms):
        assert atoms.cell.lengths().min() > 5
        self.atoms = atoms.copy()

    def get_potential_energy(self, atoms):
        assert self.atoms == atoms
        return super().get_potential_energy(atoms)


def power(k: float, n: int, reach: float = 4.0) -> Pairs:
    """φ = k (reach − r)ⁿ: a step of the force for n = 1, steep for large k and n = 2."""
    return Pairs(lambda r: k * (reach - r) ** n, lambda r: -n * k * (reach - r) ** (n - 1), reach)


CUAL = random_crystal(("Cu", "Al"))
CU = shaken(ase.build.bulk("Cu", cubic=True))
WATER = shaken(ase.build.molecule("H2O"))


def verdict(calculator, atoms, name: str) -> str:
    """Of one row at float64, with the calculator's noise."""
    row = property_row(HISTORY, calculator, atoms)
    if name != HISTORY:
        row = property_row(name, calculator, atoms, "float64", noise_in(row))
    print(line(row))
    return row.verdict


@pytest.mark.parametrize("calculator, atoms, name", (
    (SignOfTheVolume(), CUAL, "reflection"),
    (SignOfTheVolume(), CUAL, "another cell of the lattice"),
    (ForcesWithoutOneTerm(), CUAL, "slope of the energy"),
    (WeakForces(), CU, "slope of the energy"),
    (LargestSoFar(), CUAL, "before and after another"),
    (AtomsOutsideLost(), CUAL, "atoms folded or not"),
    (AlwaysOpen(), CUAL, "axis that does not repeat"),
    (AlwaysPeriodic(), CUAL, "axis that does not repeat"),
    (EMT(asap_cutoff=True), CU, "strangers 30 Å apart"),
    (EMT(asap_cutoff=True), CUAL, "strangers 30 Å apart"),
), ids=str)
def test_fault_of_a_potential_is_found(calculator, atoms, name):
    """Control: EMT has none of them."""
    assert verdict(calculator, atoms, name) == WRONG
    assert verdict(EMT(), atoms, name) == OK


def test_stranger_is_found_by_a_second_calculator_where_the_first_one_knows_better():
    """Its reach is that of the elements that it saw first, and stays."""
    class FirstSeen(Pairs):
        def get_potential_energy(self, atoms):
            self.reach = self.reach or 3.0 + 0.02 * atoms.numbers.max()
            return super().get_potential_energy(atoms)

    def make():
        return FirstSeen(lambda r: 0.1 * (5 - r), lambda r: 0 * r - 0.1, 0.0)
    for makes, right in ((make, WRONG), (None, OK)):
        row = property_row("strangers 30 Å apart", Watched(make(), makes), CU)
        assert row.verdict == right, line(row)


def test_sign_of_the_volume_is_no_fault_of_other_rows():
    for name in ("rotation", "permutation", "slope of the energy"):
        assert verdict(SignOfTheVolume(), CUAL, name) == OK


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name[:4] not in ("alon", "jump")])
def test_noise_of_a_self_consistent_field_is_no_fault(name):
    """Without the noise, as it was measured, most rows would be wrong: the control."""
    assert verdict(SelfConsistent(), CU, name) == OK
    if name in ("rotation", "supercell", "atoms folded or not"):
        assert property_row(name, SelfConsistent(), CU).verdict == WRONG


def test_dispersion_that_reaches_images_is_no_fault_and_more_than_that_is():
    """Beyond 27 Å the isolated atom is allowed 0.1 meV. 5 meV is the fault of a real potential."""
    def dispersion(k):
        return Pairs(lambda r: -k / (r + 1) ** 6, lambda r: 6 * k / (r + 1) ** 7, 40.0)

    neon = crystal_of(["Ne"])
    for k, right in ((50, OK), (5e7, WRONG)):
        row = property_row("isolated atom", dispersion(k), neon)
        assert row.verdict == right and "beyond 27 Å" in row.note, line(row)
    assert property_row("jump at the cutoff", dispersion(50), neon).verdict == NOT_ASKED
    row = property_row("slope of the energy", dispersion(1e4), neon)
    assert row.verdict == OK and "beyond 27 Å" in row.note, line(row)


@pytest.mark.parametrize("factor, right", ((1.0, OK), (0.5, WRONG), (0.0, WRONG), (-1.0, WRONG)))
def test_wrong_stress_is_found_by_the_limits_of_float32(factor, right):
    class Stressed(Changed):
        def change(self, atoms):
            self.results["stress"] = factor * self.results["stress"]

    row = property_row("slope of the energy", Stressed(), CUAL, "float32")
    assert row.verdict == right and f"stress below {row.stress_limit:.0e}" in line(row)
    assert row.errors[0] is None and row.errors[1] < row.limit


def test_calculator_that_changes_the_atoms_is_at_fault():
    class Moves(EMT):
        by = 0.0

        def get_potential_energy(self, atoms=None, force_consistent=False):
            energy = super().get_potential_energy(atoms, force_consistent)
            atoms.positions[-1, 2] += self.by
            return energy

    moves = Moves()
    for moves.by, right in ((0.0, OK), (1e-6, WRONG)):
        watched = Watched(moves)
        for _ in range(3):  # what was at fault once is not kept
            row = property_row("rotation", watched, CU)
            assert row.verdict == right and ("changes the atoms" in row.note) == (right == WRONG)


@pytest.mark.parametrize("copied", (False, True))
def test_forces_that_overwrite_those_before_are_a_fault(copied):
    class OneBuffer(EMT):
        buffer = np.zeros((100, 3))

        def get_forces(self, atoms=None):
            forces = self.buffer[:len(atoms)]
            forces[:] = super().get_forces(atoms)
            return forces.copy() if copied else forces

    row = property_row("rotation", OneBuffer(), CU)
    assert row.verdict == (OK if copied else WRONG), line(row)
    assert copied or "its next forces overwrite" in row.note


@pytest.mark.parametrize("shape, right", (((-1, 3), OK), ((3, -1), WRONG), ((-1,), WRONG)), ids=str)
def test_forces_of_another_shape_are_a_fault(shape, right):
    class Shaped(Changed):
        def change(self, atoms):
            self.results["forces"] = self.results["forces"].reshape(shape)

    row = property_row("translation", Shaped(), CUAL)
    assert row.verdict == right and ("not (8, 3)" in row.note) == (right == WRONG), line(row)


def test_one_atom_may_have_the_noise_of_all():
    """Noise is measured per atom: ten times that of four atoms is allowed, and not more."""
    class OfTheCell(Changed):
        def change(self, atoms):
            self.results["energy"] += self.error * (atoms.cell.volume > 20000)

    calculator = OfTheCell()
    for calculator.error, right in ((3e-5, OK), (5e-5, WRONG)):
        row = property_row("isolated atom", calculator, CU, noise=dict.fromkeys(ALL, 1e-6))
        assert row.verdict == right, line(row)


def test_calculator_that_takes_no_cluster_has_slopes_all_the_same():
    class OfCrystals(EMT):
        def calculate(self, atoms=None, *arguments):
            if atoms.cell.volume > 1e5:
                raise ValueError("this is no crystal")
            super().calculate(atoms, *arguments)

    assert verdict(OfCrystals(), CUAL, "slope of the energy") == OK
    assert verdict(OfCrystals(), CUAL, "jump at the cutoff") == BROKE


@pytest.mark.parametrize("k, n, right", (
    (0.02, 3, OK), (25.0, 2, OK), (300.0, 2, OK), (1e-3, 1, WRONG), (1.0, 1, WRONG)), ids=str)
def test_steep_onset_is_told_from_a_step_at_the_cutoff(k, n, right):
    for atoms in (CU, shaken(ase.build.bulk("W", cubic=True))):
        assert verdict(power(k, n), atoms, "jump at the cutoff") == right


def test_cutoff_of_two_angstrom_is_looked_for_where_atoms_touch():
    carbon = crystal_of(["C"])
    for k, n, right in ((0.1, 3, OK), (0.1, 1, WRONG)):
        assert verdict(power(k, n, reach=2.0), carbon, "jump at the cutoff") == right


@pytest.mark.parametrize("element", ("Cu", "Al", "W", "Fe", "Mg", "Si"))
def test_leaving_atom_leaves_where_nobody_stands(element):
    """The first atom is the nearest all the way, in perfect crystals, too."""
    for atoms in (ase.build.bulk(element, cubic=element != "Mg"), crystal_of([element])):
        for distance in (2.0, 5.0, 12.0):
            others = leaving(atoms)(distance).get_distances(4, [0, 1, 2, 3])
            assert abs(others[0] - distance) < 1e-6 and (others[1:] > distance - 1e-6).all()


def test_slope_takes_the_longer_step_where_it_finds_a_step_of_the_energy():
    """And the better one where energies are rounded, which is no step."""
    calculator = StepOfTheEnergy()
    for more, right in ((5e-5, WRONG), (1.0, OK)):
        calculator.where = CU.get_distance(0, 1) + more
        assert property_row("slope of the energy", calculator, CU).verdict == right

    class Rounded(Changed):
        def change(self, atoms):
            self.results["energy"] = round(self.results["energy"], 10)
    assert property_row("slope of the energy", Rounded(), CU).verdict == OK


class Curled(facet.FacetCalculator):
    """Each atom is pushed as the one before it, a little."""

    def calculate(self, *arguments, **keywords):
        super().calculate(*arguments, **keywords)
        forces = self.results["forces"]
        self.results["forces"] = forces + 0.5 * np.roll(forces, 1, 0)


@pytest.mark.parametrize("species, seed, scale, kind, right", (
    *[("Si", seed, 1.0, facet.FacetCalculator, OK) for seed in range(3)],
    *[("Si O", seed, 1.0, facet.FacetCalculator, OK) for seed in range(3)],
    ("Si O", 0, 5.0, facet.FacetCalculator, OK),
    ("Si O", 0, 1.0, Curled, WRONG),
), ids=str)
def test_untrained_facet_conserves_energy_and_one_with_other_forces_does_not(
        species, seed, scale, kind, right):
    """Whatever the size of its forces: the steps follow it."""
    crystal = candidates(species.split())["crystal"][0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = facet.Config(species.split(), channels=16, energy_scale=scale)
        model = facet.Facet(config, torch.float64)
    calculator = kind(model, "cpu", torch.float64)
    row = property_row("conservation, part of kinetic", calculator, crystal)
    assert row.verdict == right, line(row)


# ─── Controls ───────────────────────────────────────────────────────────────────────────────────


class Nothing:
    """No energy, no forces, no stress: nothing is wrong with it."""

    def get_potential_energy(self, atoms):
        return 0.0

    def get_forces(self, atoms):
        return np.zeros((len(atoms), 3))


@pytest.mark.parametrize("name", ANY)
def test_row_that_compares_zeros_has_nothing_to_see(name):
    found = verdict(Nothing(), CU, name)
    assert found == (WRONG if name == "axis that does not repeat" else BLIND)
    perfect = ase.build.bulk("Cu", cubic=True)
    assert verdict(EMT(), perfect, name) in (BLIND, WRONG if name.startswith("jump") else BLIND)


def test_crystal_at_rest_is_rattled_and_what_is_not_is_left_alone(monkeypatch, capsys, tmp_path):
    """Forces that are one percent too small are found in a perfect crystal, too."""
    ase.io.write(tmp_path / "perfect.cif", ase.build.bulk("Cu"))
    ase.io.write(tmp_path / "rattled.extxyz", CUAL)
    words = ("--dtype", "float64", "--rows", "slope,rot", "--atoms",
             str(tmp_path / "perfect.cif"), str(tmp_path / "rattled.extxyz"))
    for name, code, last in (("WeakForces", 1, "2 wrong"), ("Changed", 0, "all is right")):
        monkeypatch.setattr(Changed, "change", lambda self, atoms: None, raising=False)
        found, text = run_main(
            monkeypatch, capsys, "--calculator", f"tests.test_check:{name}", *words)
        assert found == code and text.endswith(f"\n{last}\n")
        assert text.count("rattled by 0.05 Å and strained by 3 %") == 1
        assert "Cu2" in text and f"{CUAL.symbols}" in text


def test_molecule_without_a_cell_is_never_given_one():
    class Open(Changed):
        def change(self, atoms):
            assert not atoms.cell.any() and not atoms.pbc.any()
    for name in ANY:
        assert verdict(Open(), WATER, name) in (OK, NOT_ASKED, WRONG)
    with pytest.raises(AssertionError):
        value(Open(), boxed(WATER), "energy")


# ─── Any calculator, and crystals that suit it ──────────────────────────────────────────────────


def test_calculator_needs_no_more_than_ase_asks_for(monkeypatch, capsys, tmp_path):
    """From a file, by a function, by a method of a class, with lists and dictionaries."""
    (tmp_path / "mine.py").write_text("""
from tests.test_check import power
class Maker:
    @classmethod
    def from_list(cls, powers, factors, title):
        assert title == "a title"
        return power(factors["k"], powers[0])
def plain(k=0.02):
    return power(k, 3)
""")
    place = str(tmp_path / "mine.py")
    for words in ([f"{place}:plain"], [f"{place}:plain", "k=0.1"],
                  [f"{place}:Maker.from_list", "powers=[3, 2]", "factors={'k': 0.02}",
                   "title=a title"],
                  ["tests.test_check:power", "k=0.02", "n=3"]):
        code, text = run_main(monkeypatch, capsys, "--calculator", *words, "--rows",
                              "rotation,slope", "--species", "Cu", "--dtype", "float64")
        assert code == 0 and "all is right" in text and " calls, " in text, text
    assert maker("ase.calculators.emt:EMT") is EMT
    monkeypatch.setattr("tests.test_check.power", lambda k: OfItsAtoms(np.square, np.negative, k))
    code, text = run_main(monkeypatch, capsys, "--calculator", "tests.test_check:power", "k=3.0",
                          "--rows", "rotation,permutation", "--species", "Cu")
    assert code == 0 and "Cu32" in text, text


def test_default_table_asks_for_few_calculations_and_tells_how_far_it_is(monkeypatch, capsys):
    """Progress is told on stderr: here every time, for a clock that hurries."""
    seconds = iter(range(0, 10 ** 6, 20))
    monkeypatch.setattr("tools.potentials.monotonic", lambda: next(seconds))
    monkeypatch.setattr(sys, "argv", ["check.py", "--calculator", "ase.calculators.emt:EMT"])
    check.main()
    said = capsys.readouterr()
    calls = int(said.out.split(" calls, ")[0].split("\n")[-1])
    assert calls < 400 and said.out.count("errors in eV per atom") == 2
    assert said.err.count("\n") == calls and "… rotation: " in said.err


def test_results_are_kept_for_a_crystal_until_they_are_forgotten():
    calculator = Watched(EMT())
    moved = CU.copy()
    moved.positions[-1, -1] += 1e-12
    for atoms, calls in ((CU, 1), (CU, 1), (moved, 2), (CU, 2)):
        for of in ("energy", "forces", "stress"):
            same(of, value(calculator, atoms, of), value(EMT(), atoms, of), "exact")
        forces = calculator.get_forces(atoms)
        forces += 1  # what is kept is not what was handed out
        assert calculator.calls == calls
    calculator.forget()
    value(calculator, CU, "energy")
    assert calculator.calls == 3


def test_crystals_suit_the_elements():
    """Near equilibrium; bonds have about the length of two radii, or of noble gases their own."""
    for elements, distance in ((["Ar"], 3.7), (["Si"], 2.35), (["W"], 2.74), (["Na", "Cl"], 2.8),
                               (["Ga", "N"], 1.95), (["Mg"], 3.2), (["Ar", "Kr"], 3.9)):
        atoms = crystal_of(elements)
        nearest = neighbor_list("d", atoms, 6.0).min()
        assert 0.85 * distance < nearest < 1.05 * distance, elements
        assert {*atoms.symbols} == {*elements} and atoms.pbc.all() and len(atoms) >= 4
    assert {*candidates([])} == {*SUITABLE}
    assert not NO_METALS & {"Cu", "Al", "W"}
