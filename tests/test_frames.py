"""Tests of tools/frames.py and tools/emt.py: what files mean, what is refused, how sets are split.

    pytest tests/test_frames.py
"""
import copy
import gzip
import json
import re
import runpy
import shutil
import sys
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace

import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.md.verlet import VelocityVerlet

from tools import emt, frames, suspicions
from tools.frames import BadInput, Names
from tools.labels import look_up

EV_PER_A3_IN_KBAR = 1602.1766208  # CODATA 2014, as in the files' own documentation
CLOSE = dict(rtol=1e-7, atol=1e-7)  # extxyz keeps eight digits


def made_once(make):
    """A function whose results are kept; each call returns a copy of its own."""
    kept = cache(make)

    @wraps(make)
    def made(*arguments):
        return copy.deepcopy(kept(*arguments))

    return made


@made_once
def rattled(size: int, seed: int) -> Atoms:
    """A row of `size` cubic cells of copper, rattled, with EMT's labels."""
    atoms = ase.build.bulk("Cu", cubic=True) * (size, 1, 1)
    atoms.rattle(0.1, seed=seed)
    return with_emt(atoms)


def copper(count: int = 12) -> list[Atoms]:
    """Rattled copper with EMT's labels."""
    return [rattled(1, i) for i in range(count)]


def with_emt(atoms: Atoms) -> Atoms:
    """The crystal with EMT's labels, as a file has them."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    return as_labelled(atoms)


def as_labelled(atoms: Atoms) -> Atoms:
    """The crystal as it is now, with what its calculator says of it."""
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        labels["stress"] = atoms.get_stress()
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def write(path: Path, crystals: list[Atoms]) -> str:
    """The crystals in an extxyz file."""
    ase.io.write(path, crystals, format="extxyz")
    return str(path)


def structure(symbols: list[str], abc: list, matrix=((4, 0, 0), (0, 4, 0), (0, 0, 5))) -> dict:
    """A crystal as pymatgen writes it."""
    sites = []
    for symbol, place in zip(symbols, abc, strict=True):
        sites.append({"species": [{"element": symbol, "occu": 1}], "abc": place})
    return {"lattice": {"matrix": [list(row) for row in matrix]}, "sites": sites}


def silicon() -> dict:
    """One labelled frame of a list, without a stress."""
    return {"structure": structure(["Si", "Si"], [[0, 0, 0], [0, 0.25, 0.4]]), "energy": -3.0,
            "forces": [[0, 0, 1], [0, 0, -1]]}


def write_json(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def assert_same_frames(some, others, **tolerance):
    """The same geometry and labels, in the same order."""
    tolerance = tolerance or CLOSE
    for a, b in zip(some, others, strict=True):
        assert (a.numbers == b.numbers).all() and (a.pbc == b.pbc).all()
        np.testing.assert_allclose(a.positions, b.positions, **tolerance)
        np.testing.assert_allclose(a.cell.array, b.cell.array, **tolerance)
        assert a.calc.results.keys() == b.calc.results.keys()
        for name, label in a.calc.results.items():
            np.testing.assert_allclose(label, b.calc.results[name], **tolerance)


# ─── Labels and checks ───────────────────────────────────────────────────────────────────────────

def test_frame_is_an_atoms_with_labels_and_origin(tmp_path):
    crystals = copper()
    crystals[2].info["config_type"] = "hot"
    path = write(tmp_path / "a.extxyz", crystals)
    found = frames.read([path])
    assert_same_frames(found, crystals)
    assert found[2].info == {"source": f"{path}, frame 2", "material": f"{path}: Cu4, run 1",
                             "group": "hot"}
    assert found[3].info["group"] == "" and isinstance(found[3].calc.results["energy"], float)
    assert isinstance(found[3].calc, SinglePointCalculator)


def set_label(name, value):
    return lambda atoms: atoms.calc.results.update({name: value})


BAD_FRAMES = {
    "energy is NaN": set_label("energy", float("nan")),
    "force is NaN or infinite": set_label("forces", np.full((4, 3), np.inf)),
    "component of the stress is NaN": set_label("stress", np.array([1, np.nan, 0, 0, 0, 0])),
    "has no energy and no forces": lambda atoms: setattr(atoms, "calc", None),
    "position is NaN": lambda atoms: atoms.positions.fill(np.nan),
    "has no volume": lambda atoms: atoms.set_cell([[4, 0, 0], [0, 4, 0], [4, 4, 0]]),
    "has no volume; ": lambda atoms: atoms.set_cell([[4, 0, 0], [0, 4, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("message", BAD_FRAMES)
def test_bad_frame_is_refused_by_its_name(message, tmp_path):
    crystals = copper()
    path = write(tmp_path / "data.extxyz", crystals)
    assert len(frames.read([path])) == 12
    BAD_FRAMES[message](crystals[3])
    write(tmp_path / "data.extxyz", crystals)
    with pytest.raises(BadInput, match=f"data.extxyz, frame 3.*{message}"):
        frames.read([path])


def test_frame_without_atoms_or_with_too_few_forces_is_refused():
    good = frames.labelled(Atoms("Cu2"), -1.0, np.zeros((2, 3)))
    assert frames.check(good) is good
    with pytest.raises(BadInput, match="here: has no atoms"):
        frames.check(frames.labelled(Atoms(), 0.0, np.zeros((0, 3))))
    with pytest.raises(BadInput, match=r"here: 2 atoms, but forces of shape \(1, 3\)"):
        frames.check(frames.labelled(Atoms("Cu2"), 0.0, np.zeros((1, 3))))


def test_stress_of_nothing_but_nan_is_none(tmp_path):
    crystals = copper(2)
    crystals[1].calc.results["stress"] = np.full(6, np.nan)
    found = frames.read([write(tmp_path / "a.extxyz", crystals)])
    assert "stress" in found[0].calc.results and "stress" not in found[1].calc.results


def test_stress_can_be_left_unread(tmp_path):
    path = write(tmp_path / "a.extxyz", copper(2))
    assert "stress" in frames.read([path])[1].calc.results
    assert "stress" not in frames.read([path], without=["stress"])[1].calc.results


def test_broken_file_is_refused_in_one_sentence(tmp_path):
    text = Path(write(tmp_path / "whole.extxyz", copper())).read_text()
    contents = {"cut.extxyz": (text[:len(text) // 2 + 40], "cannot be read, is it complete"),
                "empty.extxyz": ("", "holds no structures"),
                "unknown.abc": ("nothing that ASE knows", "cannot be read"),
                "broken.db": ("no database", "cannot be read"),
                "OUTCAR": ("vasp.6\n nothing", "try the vasprun.xml"),
                "cut.json": ('{"mp-1": {"a": {"structure": ', "complete"),
                "none.json": ("{}", "holds no structures"),
                "list.json": ("[1, 2]", "frame 0: is no structure with labels, but '1'"),
                "text.json": ('"word"', "begins with"),
                "flat.json": ('{"mp-1": 1}', "MPtrj has")}
    for name, (content, message) in contents.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(BadInput, match=f"{name}.*{message}") as caught:
            list(frames.iread(tmp_path / name))
        assert "\n" not in str(caught.value)
    for absent in ("absent.xyz", "absent*"):
        with pytest.raises(BadInput, match="no such file"):
            frames.read([str(tmp_path / absent)])


@pytest.mark.parametrize("name", ["data.traj", "data.db", "data.extxyz.gz", "data.json.extxyz"])
def test_every_format_gives_the_same_frames(name, tmp_path):
    """Constraints, which set ASE's forces to zero, do not."""
    crystals = copper(3)
    for atoms in crystals:
        atoms.set_constraint(FixAtoms([0]))
    assert not crystals[1].get_forces()[0].any(), "the control: ASE applies constraints"
    ase.io.write(tmp_path / name, crystals)
    found = frames.read([str(tmp_path / name)])
    assert_same_frames(found, crystals)
    assert not found[1].constraints and found[1].get_forces()[0].any()


def test_database_of_others_may_keep_labels_in_its_data(tmp_path):
    crystals = copper(2)
    with ase.db.connect(tmp_path / "data.db") as database:
        for atoms in crystals:
            labels = dict(atoms.calc.results)
            atoms = atoms.copy()
            database.write(atoms, key_value_pairs={"pbe": labels["energy"]},
                           data={"grad": labels["forces"]})
    found = frames.read([str(tmp_path / "data.db")], Names("pbe", "grad"))
    for a, b in zip(found, crystals, strict=True):
        assert a.calc.results["energy"] == b.calc.results["energy"]
        assert (a.calc.results["forces"] == b.calc.results["forces"]).all()


# ─── Names of labels ─────────────────────────────────────────────────────────────────────────────

def renamed(crystals: list[Atoms]) -> list[Atoms]:
    """The crystals with labels under names of another program, a virial for the stress."""
    others = []
    for atoms in crystals:
        other = atoms.copy()
        other.info["REF_energy"] = atoms.calc.results["energy"]
        other.arrays["REF_forces"] = atoms.calc.results["forces"]
        if "stress" in atoms.calc.results:
            other.info["REF_virial"] = -atoms.get_volume() * atoms.get_stress(voigt=False)
        others.append(other)
    return others


@pytest.mark.parametrize("names", [Names("REF_energy", "REF_forces", "REF_virial"),
                                   Names("ref_Energy", "Ref_Forces", "REF_VIRIAL")])
def test_labels_are_found_under_their_names_in_any_capitals(names, tmp_path):
    crystals = copper(3)
    path = write(tmp_path / "ref.extxyz", renamed(crystals))
    assert_same_frames(frames.read([path], names), crystals)
    with pytest.raises(BadInput, match="frame 0: has no energy and no forces; it has .*REF_for"
                                       "ces.*--energy"):
        frames.read([path])


def test_exact_name_goes_before_other_capitals():
    assert look_up({"Energy": 1, "energy": 2}, "energy") == 2
    assert look_up({"Energy": 1, "energy": None}, "energy") == 1
    assert look_up({"Energies": 1}, "energy") is None


def test_virial_of_a_frame_without_volume_is_no_stress(tmp_path):
    crystals = [*copper(1), with_emt(Atoms("Cu2", [[0, 0, 0], [0, 0, 2.4]]))]
    others = renamed(crystals)
    others[1].info["REF_virial"] = np.eye(3)
    path = write(tmp_path / "ref.extxyz", others)
    found = frames.read([path], Names("REF_energy", "REF_forces", "REF_virial"))
    np.testing.assert_allclose(found[0].get_stress(), crystals[0].get_stress(), **CLOSE)
    assert "stress" not in found[1].calc.results


@pytest.mark.parametrize("what, name", [("stress", "strss"), ("stress", "virials"),
                                        ("energy", "enrgy"), ("forces", "frces")])
def test_name_that_no_frame_has_is_refused(what, name, tmp_path):
    path = write(tmp_path / "a.extxyz", copper(2))
    assert len(frames.read([path], Names(**{what: what.upper()}))) == 2
    with pytest.raises(BadInput, match=f"no frame of .*a.extxyz has {what} under the name "
                                       f"'{name}'.*the first has .*forces.*--{what}"):
        frames.read([path], Names(**{what: name}))


@pytest.mark.parametrize("what", ["energy", "forces"])
def test_label_under_another_name_is_not_overlooked(what, tmp_path):
    crystals = renamed(copper(3))
    plain = {"energy": {"energy": "REF_energy", "forces": "forces"},
             "forces": {"energy": "energy", "forces": "REF_forces"}}[what]
    for atoms in crystals:
        atoms.info[plain["energy"]] = atoms.info.pop("REF_energy")
        atoms.arrays[plain["forces"]] = atoms.arrays.pop("REF_forces")
    path = write(tmp_path / "a.extxyz", crystals)
    with pytest.raises(BadInput, match=f"has {what} under the name '{what}'.*REF_{what}"):
        frames.read([path])
    assert len(frames.read([path], Names(plain["energy"], plain["forces"]))) == 3


def test_lone_atom_needs_no_forces(tmp_path):
    alone = Atoms("H", info={"energy": -13.6, "config_type": "isolated_atom"})
    atom, = frames.read([write(tmp_path / "atom.xyz", [alone])])
    assert atom.calc.results["energy"] == -13.6 and not atom.get_forces().any()


def test_frame_trains_with_the_labels_it_has(tmp_path):
    crystals = copper(14)
    del crystals[3].calc.results["forces"]
    del crystals[5].calc.results["energy"]
    del crystals[6].calc.results["energy"]
    path = write(tmp_path / "a.extxyz", crystals)
    some = frames.read([path])
    assert_same_frames(some, crystals)
    assert np.flatnonzero(np.isnan(some.energies())).tolist() == [5, 6]
    assert some.labels().sum(0).tolist() == [12, 13, 14]
    assert "energy              in 12 of 14 frames" in frames.report(some)

    said = []
    frames.load_sets(settings(train=(path,), valid=("0",), test=("0",)), tmp_path, said.append)
    assert said == [f"note: 2 of 14 frames of the training set have no energy, the first of them "
                    f"{path}, frame 5; their other labels count",
                    f"note: 1 of 14 frames of the training set have no forces, the first of them "
                    f"{path}, frame 3; their other labels count"]

    # nor is a set refused of which no frame has the one or the other
    for name in ("energy", "forces"):
        crystals = copper(3)
        for atoms in crystals:
            del atoms.calc.results[name]
        some = frames.read([write(tmp_path / "b.extxyz", crystals)])
        assert all(name not in atoms.calc.results for atoms in some)
        assert "no warnings" in frames.report(some)


def test_columns_of_weights_are_named_as_ignored(tmp_path, capsys):
    crystals = copper(3)
    said = []
    frames.read([write(tmp_path / "a.xyz", crystals)], say=said.append)
    assert said == []
    crystals[1].info.update(config_weight=2.0, Energy_Weight=0.1)
    path = write(tmp_path / "a.xyz", crystals)
    frames.read([path], say=said.append)
    assert said == [f"note: Energy_Weight, config_weight of {path} are ignored: every frame counts "
                    f"the same"]
    assert frames.main([path]) == 0 and said[0] in capsys.readouterr().err


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    frame = silicon()
    for name, value in (("energy", "low"), ("forces", [["a", 0, 0]] * 2), ("energy", [1.0, 2.0])):
        path = write_json(tmp_path / "a.json", [{**frame, name: value}])
        with pytest.raises(BadInput, match="a.json, frame 0: (the energy|forces)"):
            list(frames.iread(path))


# ─── Names of files ──────────────────────────────────────────────────────────────────────────────

def test_globs_are_recursive_and_a_file_counts_once(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "deep", tmp_path / "deep" / "deeper"):
        write(folder / "a.xyz", copper(2))
    assert len(frames.read([str(tmp_path / "*.xyz")])) == 2
    assert len(frames.read([str(tmp_path / "**" / "*.xyz")])) == 6
    assert len(frames.read([str(tmp_path / "a.xyz"), str(tmp_path / "deep" / ".." / "*.xyz")])) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_file_and_a_link_to_it_are_one_file(tmp_path):
    write(tmp_path / "a.xyz", copper(2))
    (tmp_path / "link.xyz").symlink_to(tmp_path / "a.xyz")
    (tmp_path / "folder").symlink_to(tmp_path)
    write(tmp_path / "copy.xyz", copper(2))
    names = ("a.xyz", "link.xyz", "folder/a.xyz")
    assert len(frames.read([str(tmp_path / name) for name in names])) == 2
    assert len(frames.read([str(tmp_path / "*.xyz")])) == 4, "a copy is a file of its own"


# ─── JSON ────────────────────────────────────────────────────────────────────────────────────────

def test_mptrj_has_its_names_its_units_and_its_sign(tmp_path):
    stress = np.array([[10.0, 1, 2], [1, 20, 3], [2, 3, 30]])  # kbar
    frame = {"structure": silicon()["structure"], "corrected_total_energy": -3.0, "energy": 7.0,
             "uncorrected_total_energy": 8.0, "force": [[0, 0, 1], [0, 0, -1]],
             "stress": stress.tolist()}
    path = write_json(tmp_path / "m.json", {"mp-1": {"mp-1-0": frame, "mp-1-1": frame},
                                            "mp-2": {"mp-2-0": frame}})
    first, second, third = frames.iread(path)
    np.testing.assert_allclose(first.get_stress(voigt=False), -stress / EV_PER_A3_IN_KBAR)
    assert first.get_potential_energy() == -3 and first.get_volume() == pytest.approx(80)
    assert first.pbc.all() and first.get_forces()[1].tolist() == [0, 0, -1]
    np.testing.assert_allclose(first.positions[1], [0, 1, 2])
    assert first.info["source"] == f"{path}, frame mp-1-0"
    assert [a.info["material"] for a in (first, second, third)] == ["mp-1", "mp-1", "mp-2"]
    other, = {a.get_potential_energy() for a in frames.iread(path, Names("energy"))}
    assert other == 7


@pytest.mark.parametrize("layout, key, more, order", [
    ("MatPES", "stress", {"matpes_id": "matpes-1"}, ["xx", "yy", "zz", "yz", "xz", "xy"]),
    ("mlearn", "virial_stress", {"group": "MD"}, ["xx", "yy", "zz", "xy", "yz", "xz"])])
def test_each_layout_has_its_own_order_of_stress(layout, key, more, order, tmp_path):
    kbar = {"xx": 10.0, "yy": 20.0, "zz": 30.0, "yz": 1.0, "xz": 2.0, "xy": 3.0}
    right = [-kbar[pair] / EV_PER_A3_IN_KBAR for pair in ("xx", "yy", "zz", "yz", "xz", "xy")]
    labels = {"energy": -3.0, "forces": [[0, 0, 0]] * 2, key: [kbar[pair] for pair in order]}
    inside = {"structure": silicon()["structure"], "outputs": labels, **more}
    beside = {"structure": silicon()["structure"], **labels, **more}
    for atoms in frames.iread(write_json(tmp_path / "l.json", [inside, beside])):
        np.testing.assert_allclose(atoms.get_stress(), right)
        assert atoms.info["group"] == more.get("group", "")


def test_order_of_a_layout_is_not_that_of_another_name(tmp_path):
    """MatPES has one of its own stress alone; a column that somebody added may have another."""
    six = [10.0, 20.0, 30.0, 1.0, 2.0, 3.0]
    frame = {**silicon(), "matpes_id": "m", "stress": six, "vasp_stress": six}
    path = write_json(tmp_path / "a.json", [frame])
    for name in ("", "stress"):
        found, = frames.iread(path, Names(stress=name))
        assert found.calc.results["stress"][3] == pytest.approx(-1 / EV_PER_A3_IN_KBAR)
    with pytest.raises(BadInput, match="six numbers of stress in an order that the file does not"):
        list(frames.iread(path, Names(stress="vasp_stress")))


def test_nine_numbers_of_stress_say_what_they_are(tmp_path):
    matrix = [[10.0, 3, 2], [3, 20, 1], [2, 1, 30]]
    for value in (matrix, np.ravel(matrix).tolist()):
        atoms, = frames.iread(write_json(tmp_path / "a.json", [{**silicon(), "stress": value}]))
        np.testing.assert_allclose(atoms.get_stress(),
                                   np.array([10, 20, 30, 1, 2, 3]) / -EV_PER_A3_IN_KBAR)


@pytest.mark.parametrize("stress, message", [([1.0, 2, 3], "has 3 numbers"),
                                             ([1.0] * 18, "has 18 numbers"),
                                             ([1.0, 2, 3, 4, 5, 6], "order that the file does not"),
                                             ("none", "not made of numbers")])
def test_stress_that_does_not_say_what_it_is_is_refused(stress, message, tmp_path):
    path = write_json(tmp_path / "a.json", [silicon(), {**silicon(), "stress": stress}])
    with pytest.raises(BadInput, match=f"a.json, frame 1: .*{message}"):
        list(frames.iread(path))


def test_virial_in_json_is_in_ev(tmp_path):
    path = write_json(tmp_path / "a.json", [{**silicon(), "virial": np.eye(3).tolist()}])
    atoms, = frames.iread(path, Names(stress="virial"))
    np.testing.assert_allclose(atoms.get_stress(), np.array([1, 1, 1, 0, 0, 0]) / -80)


def test_json_is_read_whatever_its_dress(tmp_path):
    """A byte-order mark, capitals in the name, gzip; outputs: null; the frames are the same."""
    text = json.dumps([{**silicon(), "outputs": None}])
    (tmp_path / "plain.json").write_text(text)
    (tmp_path / "mark.json").write_text(text, encoding="utf-8-sig")
    (tmp_path / "CAPITALS.JSON").write_text(text)
    with gzip.open(tmp_path / "small.json.gz", "wt") as file:
        file.write(text)
    plain = list(frames.iread(tmp_path / "plain.json"))
    for name in ("mark.json", "CAPITALS.JSON", "small.json.gz"):
        assert_same_frames(frames.iread(tmp_path / name), plain)


def test_pymatgen_structures_keep_their_meaning(tmp_path):
    slab = silicon()
    slab["structure"]["lattice"]["pbc"] = [True, True, False]
    oxide = silicon()
    oxide["structure"]["sites"][0]["species"][0]["oxidation_state"] = 4
    heavy = silicon()
    heavy["structure"]["sites"][0]["species"][0]["element"] = "D"
    molecule = silicon()
    molecule["structure"] = {"@class": "Molecule", "sites": [
        {"species": [{"element": "Si", "occu": 1}], "xyz": [0, 0, z]} for z in (0.0, 2.0)]}
    found = list(frames.iread(write_json(tmp_path / "a.json", [slab, oxide, heavy, molecule])))
    assert [atoms.pbc.tolist() for atoms in found] == [[True, True, False], [True] * 3, [True] * 3,
                                                       [False] * 3]
    assert [atoms.get_chemical_formula() for atoms in found] == ["Si2", "Si2", "HSi", "Si2"]
    assert found[3].cell.rank == 0 and found[3].positions[1].tolist() == [0, 0, 2]


def test_material_in_json_has_the_first_name_that_is_there(tmp_path):
    named = {"provenance": {"original_mp_id": "mp-7", "mp_id": "x"}, "description": "bulk"}
    more = [{"material_id": "mp-1", **named}, named, {"group": "MD ", "description": "bulk"},
            {"provenance": None}]
    path = write_json(tmp_path / "a.json", [{**silicon(), **one} for one in more])
    assert [atoms.info["material"] for atoms in frames.iread(path)] == [
        "mp-1", "mp-7", "MD bulk", f"{path}: Si2, run 1"]


def test_crystal_that_is_not_one_is_refused(tmp_path):
    shared, partial, over, unknown, bare, broken = (silicon() for _ in range(6))
    shared["structure"]["sites"][0]["species"].append({"element": "C", "occu": 0.5})
    partial["structure"]["sites"][0]["species"][0]["occu"] = 0.5
    over["structure"]["sites"][0]["species"][0]["occu"] = 1.2
    unknown["structure"]["sites"][0]["species"][0]["element"] = "X0+"
    del bare["structure"]
    del broken["structure"]["sites"][1]["species"]
    for frame, message in ((shared, "several elements"), (partial, "occupied to 0.5"),
                           (over, "occupied to 1.2"), (unknown, "no element"),
                           (bare, "has no structure; it has energy"),
                           (broken, "is no structure as pymatgen writes it")):
        path = write_json(tmp_path / "a.json", [silicon(), frame])
        with pytest.raises(BadInput, match=f"a.json, frame 1: .*{message}"):
            list(frames.iread(path))


def test_missing_label_in_json_is_told_with_what_is_there(tmp_path):
    bare = {"structure": silicon()["structure"], "total": -3.0}
    path = write_json(tmp_path / "l.json", [silicon(), bare])
    with pytest.raises(BadInput, match="l.json, frame 1: has no energy and no forces; it has "
                                       "total"):
        list(frames.iread(path))


def test_read_sends_json_to_the_database(tmp_path):
    path = write_json(tmp_path / "big.json", [silicon()])
    with pytest.raises(BadInput, match="convert first: python -m tools.database .* big.db"):
        frames.read([path])


def test_streaming_equals_reading_at_once(tmp_path):
    content = {}
    for m in range(5):
        for f in range(1 + m % 3):
            key = f"mp-{m}-{f} [}}{{\"\u00e5"
            content.setdefault(f"mp-{m}", {})[key] = {"a": [m, {"b": f}], "c": "],}{", "d": None}
    as_objects = [([m, f], frame) for m, some in content.items() for f, frame in some.items()]
    as_list = [([], frame) for _, frame in as_objects]

    for wanted, value in ((as_objects, content), (as_list, [frame for _, frame in as_list])):
        text = json.dumps(value)
        (tmp_path / "m.json").write_text(text)
        for size in (1, 7, 100, 2 ** 20):
            with open(tmp_path / "m.json", encoding="utf-8") as file:
                assert list(frames.stream(file, size)) == wanted, size
        for cut in (5, len(text) // 2, len(text) - 1):
            (tmp_path / "cut.json").write_text(text[:cut])
            with open(tmp_path / "cut.json", encoding="utf-8") as file:
                with pytest.raises((json.JSONDecodeError, EOFError)):
                    list(frames.stream(file, 50))


def test_mistake_in_json_is_found_without_reading_to_the_end(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('[{"a": wrong}' + ", 1" * 2 ** 21 + "]")
    with open(path) as file:
        with pytest.raises(json.JSONDecodeError):
            list(frames.stream(file, 2 ** 16))
        assert file.tell() < path.stat().st_size / 2


# ─── Many frames ─────────────────────────────────────────────────────────────────────────────────

def alloys(count: int = 30, seed: int = 0) -> list[Atoms]:
    """Random cells of random elements with random labels, here and there without a stress."""
    rng = np.random.default_rng(seed)
    crystals = []
    for i in range(count):
        n = int(rng.integers(2, 6))
        atoms = Atoms(rng.choice(["Li", "O", "Fe"], n), 4 * rng.random((n, 3)), cell=[4, 5, 6],
                      pbc=True)
        stress = None if i % 4 == 0 else rng.normal(0, 0.1, 6)
        crystals.append(frames.labelled(atoms, float(rng.normal()), rng.normal(size=(n, 3)), stress,
                                        source=f"here, frame {i}", material=f"material {i // 2}"))
    return crystals


def test_columns_are_those_of_the_frames():
    crystals = alloys()
    rows = [3, 0, 7, 7, 29]
    some = frames.in_memory(crystals).take(rows)
    chosen = [crystals[row] for row in rows]
    assert some.atom_counts().tolist() == [len(atoms) for atoms in chosen]
    assert some.energies().tolist() == [atoms.calc.results["energy"] for atoms in chosen]
    np.testing.assert_allclose(some.volumes(), [120] * 5)
    assert some.compositions([26, 3]).tolist() == [
        [(atoms.numbers == 26).sum(), (atoms.numbers == 3).sum()] for atoms in chosen]
    assert some.materials().tolist() == [1, 0, 3, 3, 14]
    assert some.elements().tolist() == sorted({z for atoms in chosen for z in atoms.numbers})
    assert [atoms.info["source"] for atoms in some[1:3]] == ["here, frame 0", "here, frame 7"]
    assert some[-1].info["source"] == "here, frame 29"
    with pytest.raises(IndexError):
        some[5]
    nothing = some[:0]
    assert len(nothing) == 0 and nothing.elements().tolist() == []
    assert nothing.compositions([26, 3]).shape == (0, 2) and not nothing.fingerprint()


def test_elements_are_those_of_the_chosen_frames_only():
    iron = frames.labelled(Atoms("Fe"), 0.0, np.zeros((1, 3)))
    oxygen = frames.labelled(Atoms("O"), 0.0, np.zeros((1, 3)))
    both = frames.in_memory([iron, oxygen])
    assert both.elements().tolist() == [8, 26] and both[:1].elements().tolist() == [26]


def test_changing_a_frame_does_not_change_the_set():
    some = frames.in_memory(alloys(3))
    before = some.fingerprint()
    frame = some[1]
    frame.positions += 1
    frame.calc = None
    assert some.fingerprint() == before and some[1].calc is not None


CHANGES = {
    "position": lambda atoms: atoms.positions.__setitem__((0, 0), atoms.positions[0, 0] + 1e-9),
    "cell": lambda atoms: atoms.cell.__setitem__((0, 0), 4.001),
    "pbc": lambda atoms: atoms.set_pbc([True, True, False]),
    "element": lambda atoms: atoms.numbers.__setitem__(0, 1),
    "energy": set_label("energy", 1.0),
    "forces": lambda atoms: atoms.calc.results["forces"].__setitem__((0, 0), 9.0),
    "stress": lambda atoms: atoms.calc.results["stress"].__setitem__(5, 9.0),
    "no stress": lambda atoms: atoms.calc.results.pop("stress")}


@pytest.mark.parametrize("what", CHANGES)
def test_fingerprint_changes_with(what):
    crystals = alloys(6)
    before = frames.in_memory(crystals).fingerprint()
    assert frames.in_memory(alloys(6)).fingerprint() == before
    CHANGES[what](crystals[3])
    assert frames.in_memory(crystals).fingerprint() != before


def test_fingerprint_changes_with_the_order():
    some = frames.in_memory(alloys(6))
    assert some.take([1, 0, 2, 3, 4, 5]).fingerprint() != some.fingerprint()


def test_sample_is_evenly_spread():
    some = frames.in_memory(alloys(30))
    sources = [atoms.info["source"] for atoms in frames.sample(some, 4)]
    assert sources == [f"here, frame {i}" for i in (0, 9, 19, 29)]
    assert len(frames.sample(some)) == 30


# ─── Materials, splits, sets ─────────────────────────────────────────────────────────────────────

def test_consecutive_frames_of_a_formula_are_one_material(tmp_path):
    kinds = []
    for number, symbols in enumerate(("Cu2", "Cu2", "Ni2", "Cu2", "NiCu")):
        kinds.append(Atoms(symbols, [[0, 0, 0], [0, 0, 2 + number]]))  # they do not go on
    path = write(tmp_path / "a.xyz", [with_emt(atoms) for atoms in kinds])
    assert frames.read([path]).materials().tolist() == [0, 0, 1, 2, 3]
    other = shutil.copy(path, tmp_path / "b.xyz")
    assert frames.read([path, str(other)]).materials().tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]


@made_once
def motion(element: str, count: int = 60) -> list[Atoms]:
    """A trajectory at constant energy: four atoms of a metal, every 4 fs, labelled by EMT."""
    atoms = ase.build.bulk(element, cubic=True)
    atoms.calc = EMT()
    speed = np.sqrt(units.kB * 600 / atoms.get_masses())[:, None]
    velocities = speed * np.random.default_rng(0).normal(size=(4, 3))
    atoms.set_velocities(velocities - velocities.mean(0))
    found = []
    dynamics = VelocityVerlet(atoms, 4 * units.fs)
    for _ in range(count):
        dynamics.run(1)
        found.append(as_labelled(atoms))
    return found


def interleaved(*trajectories: list[Atoms]) -> list[Atoms]:
    """A frame of each in turn."""
    return [atoms for several in zip(*trajectories, strict=True) for atoms in several]


def test_interleaved_frames_of_a_trajectory_are_one_material(tmp_path):
    crystals = interleaved(motion("Cu")[:10], motion("Ni")[:10], motion("Ag", 10))
    found = frames.read([write(tmp_path / "a.xyz", crystals)])
    assert found.materials().tolist() == [0, 1, 2] * 10

    # so they are in JSON
    carbide = silicon()
    carbide["structure"]["sites"][0]["species"][0]["element"] = "C"
    path = write_json(tmp_path / "a.json", [silicon(), carbide] * 4)
    assert frames.in_memory(frames.iread(path)).materials().tolist() == [0, 1] * 4

    # molecules that turn on the way
    molecules = []
    for i, atoms in enumerate(interleaved(*([Atoms("Cu2", [[0, 0, 0], [0, 0, 2.2]])] * 6,
                                            [Atoms("Ni2", [[0, 0, 0], [0, 0, 2.1]])] * 6))):
        atoms = atoms.copy()
        atoms.rotate(20 * i, (1, 2, 3))
        molecules.append(with_emt(atoms))
    found = frames.read([write(tmp_path / "b.xyz", molecules)])
    assert found.materials().tolist() == [0, 1] * 6

    # the control: another cell is another crystal
    for i, atoms in enumerate(crystals):
        atoms.set_cell(atoms.cell * (1 + 0.005 * i), scale_atoms=True)
    found = frames.read([write(tmp_path / "c.xyz", crystals)])
    assert len(set(found.materials())) == 30


@pytest.mark.parametrize("key", ["mp_id", "mptrj_traj_id", "material_id", "material"])
def test_material_that_a_frame_names_is_its_material(key, tmp_path):
    crystals = copper(4)
    for atoms, name in zip(crystals, ["mp-1", "mp-2", "mp-1", 12], strict=True):
        atoms.info[key] = name
    found = frames.read([write(tmp_path / "a.xyz", crystals)])
    assert found.materials().tolist() == [0, 1, 0, 2]
    assert found[3].info["material"] == "#12", "ASE's databases would refuse the text 12"


def free(symbol: str, box: float = 0.0) -> Atoms:
    """A free atom, in a periodic box if there is one."""
    atoms = Atoms(symbol, cell=[box] * 3, pbc=box > 0)
    return frames.labelled(atoms, -1.0, np.zeros((1, 3)), source=f"free {symbol}")


def settings(**more) -> SimpleNamespace:
    """What load looks at."""
    usual = dict(train=(), valid=(), test=(), seed=0, energy="", forces="", stress="",
                 stress_weight=0.1, strict=False)
    return SimpleNamespace(**{**usual, **more})


def test_load_sets_aside_what_is_not_given(tmp_path):
    paths = {}
    for number, name in enumerate(("train", "valid", "test")):
        crystals = alloys(50 - 20 * number, seed=number)
        for atoms in crystals:
            atoms.info = {"material": atoms.info["material"]}
        paths[name] = (write(tmp_path / f"{name}.xyz", crystals),)

    def sizes(**more):
        sets = frames.load_sets(settings(**more), tmp_path, say=None)
        for some, other in ((0, 1), (0, 2), (1, 2)):
            shared = ({a.info["source"] for a in sets[some]}
                      & {a.info["source"] for a in sets[other]})
            assert not shared
        return [len(some) for some in sets]

    train, valid, test = paths["train"], paths["valid"], paths["test"]
    assert sizes(train=train) == [42, 4, 4]  # of 25 materials of two frames two each
    assert sizes(train=train, test=test) == [46, 4, 10]
    assert sizes(train=train, valid=valid) == [46, 30, 4]
    assert sizes(train=train, valid=valid, test=test) == [50, 30, 10]
    assert sizes(train=train, valid=("0",), test=test) == [50, 0, 10]
    assert sizes(train=train, valid=("0",), test=("0",)) == [50, 0, 0]


def test_split_of_a_training_follows_from_its_seed(tmp_path):
    path = write(tmp_path / "a.xyz", alloys(40))

    def held(seed: int) -> list[str]:
        _, valid, test = frames.load_sets(settings(train=(path,), seed=seed), tmp_path, say=None)
        return [atoms.info["source"] for atoms in (*valid, *test)]

    assert held(1) == held(1) and len({tuple(held(seed)) for seed in range(4)}) == 4


def test_load_hands_on_names_and_weights(tmp_path):
    path = write(tmp_path / "ref.xyz", renamed(copper(12)))
    names = dict(energy="REF_energy", forces="REF_forces", stress="REF_virial")
    train, _, _ = frames.load_sets(settings(train=(path,), **names), tmp_path, say=None)
    assert "stress" in train[0].calc.results
    without = settings(train=(path,), stress_weight=0, **names)
    train, _, _ = frames.load_sets(without, tmp_path, say=None)
    assert "stress" not in train[0].calc.results


def test_equal_frames_are_trained_on_once(tmp_path):
    crystals = copper(6)
    path = write(tmp_path / "a.xyz", [*crystals, *crystals[:3]])
    other = shutil.copy(path, tmp_path / "b.xyz")
    said = []
    for paths, count in (([path], 3), ([path, str(other)], 12)):
        said.clear()
        train, valid, test = frames.load_sets(settings(train=paths), tmp_path, said.append)
        assert len(train) + len(valid) + len(test) == 6
        copies, _, _ = said  # then how they were split, and that they are few
        assert copies.startswith(f"note: {count} of {6 + count} frames to train on are there "
                                 f"twice and dropped, the first of them {path}, frame 6, which "
                                 f"equals {path}, frame 0")

    # the control: another energy, force or place is another frame
    for change in (lambda atoms: atoms.calc.results.update(energy=0.5),
                   lambda atoms: atoms.calc.results["forces"].__setitem__((0, 0), 0.5),
                   lambda atoms: atoms.positions.__setitem__((0, 0), 0.001)):
        others = copper(3)
        for atoms in others:
            change(atoms)
        assert (frames.twins(frames.read([write(tmp_path / "c.xyz", [*copper(3), *others])]))[0]
                < 0).all()


def test_frames_that_only_look_like_twins_are_not_twins():
    """The same projection of the geometry, the same numbers in another frame, another label."""
    plain, = same_material(copper(1))

    def changed(change) -> Atoms:
        other = frames.labelled(plain, **plain.calc.results)
        change(other)
        return other

    def along_nothing(atoms: Atoms):
        weights = np.cos(np.arange(2))
        atoms.positions[0, :2] += 0.01 * np.array([weights[1], -weights[0]])

    others = {"as far along": changed(along_nothing),
              "cell": changed(lambda atoms: atoms.cell.__setitem__((0, 0), 3.8)),
              "pbc": changed(lambda atoms: atoms.set_pbc([True, True, False])),
              "element": changed(lambda atoms: atoms.numbers.__setitem__(3, 28)),
              "order": changed(lambda atoms: atoms.set_positions(atoms.positions[::-1])),
              "force": changed(lambda atoms: atoms.calc.results["forces"].__setitem__((3, 2), 9)),
              "stress": changed(lambda atoms: atoms.calc.results["stress"].__setitem__(5, 9)),
              "no stress": changed(lambda atoms: atoms.calc.results.pop("stress"))}
    for what, other in others.items():
        equal, contrary = frames.twins(frames.in_memory([plain, other, plain]))
        assert equal.tolist() == [-1, -1, 0], what
        assert contrary.tolist() == [-1, -1, -1], what


def test_equal_frames_are_found_in_files_of_other_precision(tmp_path):
    ase.io.write(tmp_path / "a.traj", copper(8))
    write(tmp_path / "b.xyz", copper(8))
    both = frames.read([str(tmp_path / "a.traj"), str(tmp_path / "b.xyz")])
    assert frames.twins(both)[0].tolist() == [-1] * 8 + list(range(8))
    assert "equal frames        8 that" in frames.report(both)


@pytest.mark.parametrize("what", ["test", "valid"])
def test_frames_of_other_sets_are_not_trained_on(what, tmp_path):
    crystals = copper(12)
    train = write(tmp_path / "a.xyz", crystals)
    held = write(tmp_path / "b.xyz", crystals[4:8])
    given = settings(train=(train,), **{"test": ("0",), "valid": ("0",), what: (held,)})
    said = []
    sets = dict(zip(("train", "valid", "test"), frames.load_sets(given, tmp_path, said.append)))
    assert said == [f"note: 4 of 12 frames to train on are also in the {what} set and stay there "
                    f"alone, the first of them {train}, frame 4, which equals {held}, frame 0"]
    assert len(sets["train"]) == 8 and len(sets[what]) == 4
    assert_same_frames(sets["train"], crystals[:4] + crystals[8:])
    given.train = (held,)
    with pytest.raises(BadInput, match=f"every frame to train on is also in the {what} set"):
        frames.load_sets(given, tmp_path, said.append)


def test_free_atoms_of_a_test_file_stay_there_and_are_named(tmp_path):
    loose = [free("Cu", 20.0), free("Ni", 20.0)]
    paths = {}
    for name, crystals in (("a", [*copper(12), loose[0]]), ("b", [*copper(15)[12:], *loose])):
        for atoms in crystals:
            atoms.info = {}
        paths[name] = (write(tmp_path / f"{name}.xyz", crystals),)
    said = []
    train, _, test = frames.load_sets(
        settings(train=paths["a"], valid=("0",), test=paths["b"]), tmp_path, said.append)
    assert said == [f"note: 2 free atoms of the test set stay there and are not trained on, the "
                    f"first of them {paths['b'][0]}, frame 3"]
    assert frames.free_atoms(train).sum() == 1 and frames.free_atoms(test).sum() == 2


def test_strict_turns_warnings_into_errors_and_quiet_says_nothing(tmp_path, capsys):
    crystals = copper(15)
    path = write(tmp_path / "a.xyz", crystals)
    given = dict(train=(path,), valid=("0",), test=("0",))
    frames.load_sets(settings(**given, strict=True), tmp_path)
    assert capsys.readouterr().err == ""
    crystals[4].calc.results["energy"] = 1e6
    write(tmp_path / "a.xyz", crystals)
    frames.load_sets(settings(**given), tmp_path)
    text = capsys.readouterr().err
    assert text.startswith("warning: energies far") and f"{path}, frame 4" in text
    assert text.count("\n") == 1
    with pytest.raises(BadInput, match="1 warnings, which --strict .* frame 4"):
        frames.load_sets(settings(**given, strict=True), tmp_path)
    capsys.readouterr()
    frames.load_sets(settings(**given, strict=True), tmp_path, say=None)
    assert capsys.readouterr().err == ""


def test_split_is_told_and_parts_that_are_too_small_are_warned_of(tmp_path, capsys):
    """With --strict that is an error; nothing is said where files are given, or nobody listens."""
    path = write(tmp_path / "a.xyz", copper(15))
    frames.load_sets(settings(train=(path,)), tmp_path)
    told, warned = capsys.readouterr().err.splitlines()
    assert told == "note: held back by single frames (15): 13 to train, 1 to validate, 1 to test"
    assert warned.startswith("warning: few frames (1 to validate, 1 to test): errors of so few")
    with pytest.raises(BadInput, match="1 warnings, which --strict .* few frames .1 to test.: "):
        frames.load_sets(settings(train=(path,), valid=("0",), strict=True), tmp_path)
    capsys.readouterr()
    frames.load_sets(settings(train=(path,), strict=True), tmp_path, say=None)
    assert capsys.readouterr().err == ""


def test_load_makes_the_embedded_set_once(tmp_path, monkeypatch):
    made = []
    write_set = emt.write

    def write_few(path):
        made.append(path)
        write_set(path, count=4)

    monkeypatch.setattr(emt, "write", write_few)
    for _ in range(2):
        sets = frames.load_sets(settings(), tmp_path / "runs")
        assert sum(map(len, sets)) == 4
    assert made == [tmp_path / "runs" / "emt.extxyz"]


def test_embedded_set_is_the_same_every_time_without_what_is_held_out(tmp_path, monkeypatch):
    emt.write(tmp_path / "a.extxyz", count=6)
    emt.write(tmp_path / "b.extxyz", count=6)
    first = frames.read([str(tmp_path / "a.extxyz")])
    second = frames.read([str(tmp_path / "b.extxyz")])
    assert first.fingerprint() == second.fingerprint()
    np.testing.assert_allclose(first.energies()[:3], PINNED_EMT, atol=1e-5)
    assert not list(tmp_path.glob("*part*"))

    # a crystal of the composition that is held out is left out, whatever its size
    held_out = ase.build.bulk("Cu", cubic=True) * (2, 1, 1)
    held_out.symbols = ["Au", "Cu", "Cu", "Cu"] * 2
    queue = [held_out, *copper(1)]
    monkeypatch.setattr(emt, "random_crystal", lambda rng: queue.pop(0))
    emt.write(tmp_path / "c.extxyz", count=1)
    assert not queue and frames.read([str(tmp_path / "c.extxyz")]).elements().tolist() == [29]
    assert emt.held_out_start().get_chemical_formula() == "AuCu3"


PINNED_EMT = [0.349464, 1.134245, 2.316218]  # eV, of the first three crystals


# ─── Warnings ────────────────────────────────────────────────────────────────────────────────────

def varied() -> list[Atoms]:
    """Copper in cells of three sizes."""
    return [rattled(1 + i % 3, i) for i in range(12)]


def warned(crystals: list[Atoms], change) -> list[str]:
    """What is said of the crystals after change(number, energy, forces, stress) → labels."""
    others = []
    for i, atoms in enumerate(crystals):
        energy = atoms.calc.results["energy"] - 3.5 * len(atoms)
        labels = change(i, energy, atoms.get_forces(), atoms.get_stress())
        others.append(frames.labelled(atoms, *labels, source=f"here, frame {i}"))
    return frames.warnings(frames.in_memory(others))


@made_once
def argon() -> list[Atoms]:
    """Argon by Lennard-Jones, whose atoms are far apart for their covalent radii."""
    crystals = []
    for i in range(12):
        atoms = ase.build.bulk("Ar", a=5.3, cubic=True) * (1 + i % 2, 1, 1)
        atoms.rattle(0.1, seed=i)
        atoms.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=9.0)
        labels = (atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress())
        crystals.append(frames.labelled(atoms, *labels, source=f"here, frame {i}"))
    return crystals


@made_once
def strained() -> list[Atoms]:
    """Copper that is drawn out step by step: energies against stresses."""
    crystals = []
    for i in range(12):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=0)
        strain = np.diag([0.01 * i - 0.05, 0.004 * i, 0.0])
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        crystals.append(with_emt(atoms))
    return crystals


def same_material(crystals: list[Atoms]) -> list[Atoms]:
    """The crystals, as frames of one material, so that they are compared one with the next."""
    return [frames.labelled(atoms, **atoms.calc.results, source=f"here, frame {i}", material="one")
            for i, atoms in enumerate(crystals)]


def said_of(crystals: list[Atoms], change=None, scale: float = 1.0) -> list[str]:
    """The warnings after change(results) of every frame and scaling of all lengths."""
    others = []
    for atoms in same_material(crystals):
        if change:
            change(atoms.calc.results)
        atoms.set_cell(atoms.cell.array * scale, scale_atoms=True)
        others.append(atoms)
    return frames.warnings(frames.in_memory(others))


def multiply(**factors):
    """A change that multiplies labels."""
    def change(results):
        for name, factor in factors.items():
            results[name] = results[name] * factor
    return change


def test_clean_sets_give_no_warning():
    assert frames.warnings(frames.in_memory([])) == []
    molecules = [with_emt(Atoms("CuNi", [[0, 0, 0], [0, 0, 1.9 + 0.05 * i]])) for i in range(12)]
    surface = [with_emt(ase.build.fcc111("Cu", (1, 1, n), vacuum=6)) for n in range(1, 9)]
    for atoms in surface:
        atoms.calc.results.pop("stress", None)
        atoms.calc.results["energy"] -= 3.5 * len(atoms)  # EMT counts from the bulk
    for crystals in (varied(), motion("Cu")[:12], argon(), strained(), molecules, surface,
                     [*varied(), *molecules], interleaved(motion("Cu")[:12], motion("Ni")[:12])):
        assert said_of(crystals) == []


def test_energies_per_atom_and_net_forces_are_named():
    crystals = varied()
    assert warned(crystals, lambda i, e, f, s: (e, f, s)) == []
    text, = warned(crystals, lambda i, e, f, s: (e / len(f), f, s))
    assert "here, frame 0" in text and "per atom" in text

    def pushed(i, energy, forces, stress):
        forces[0, 0] += 1.0 * (i == 5)
        return energy, forces, stress

    text, = warned(crystals, pushed)
    assert "1 of 12 frames" in text and "here, frame 5" in text and "sum to zero" in text


@pytest.mark.parametrize("off", [1e6, 42.0, -42.0])
def test_absurd_energy_is_named(off):
    """One million, and the difference that a calculation which has not converged makes."""
    crystals = varied()
    crystals[7].calc.results["energy"] += off
    text, = said_of(crystals)
    assert "1 of 12 frames: here, frame 7 (by" in text and "eV/atom" in text


@pytest.mark.parametrize("factor", [200, 1e5])
def test_absurd_forces_are_named(factor):
    crystals = varied()
    crystals[7].calc.results["forces"] *= factor
    text, = said_of(crystals)
    assert "very large forces in 1 of 12 frames: here, frame 7 (up to" in text


@pytest.mark.parametrize("scale, unit", [(0.1, "nm"), (1 / 1.8897, "twice"), (1.8897, "Bohr"),
                                         (100.0, "pm")])
def test_unit_of_length_is_told_from_covalent_radii(scale, unit):
    found = [text for text in said_of(copper(2), scale=scale) if "covalent radii" in text]
    assert len(found) == 1 and unit in found[0] and "here, frame" in found[0]


def test_atoms_on_each_other_are_named():
    crystals = copper(12)
    crystals[3].positions[1] = crystals[3].positions[0] + [0, 0, 0.4]
    text, = said_of(crystals)
    assert "almost on each other in 1 of 12 frames: here, frame 3" in text


@pytest.mark.parametrize("change, words", [
    (multiply(forces=-1), "forces tell.*sign"),
    (multiply(forces=1 / 51.42), "forces tell.*Hartree/Bohr"),
    (multiply(forces=23.06), "forces tell.*kcal/mol/Å"),
    (multiply(energy=23.06), "forces tell.*energies in kcal/mol"),
    (multiply(energy=1 / 27.21), "forces tell.*energies in Hartree")])
def test_forces_are_compared_with_differences_of_energies(change, words):
    text, = said_of(motion("Cu")[:12], change)
    assert re.search(words, text) and "here, frame 0" in text


@pytest.mark.parametrize("change, words", [
    (multiply(stress=-1), "stresses tell.*sign"),
    (multiply(stress=1602.18), "stresses tell.*kbar"),
    (multiply(stress=-1602.18), "stresses tell.*kbar, with VASP's sign"),
    (multiply(stress=160.218), "stresses tell.*GPa")])
def test_stresses_are_compared_with_differences_of_energies(change, words):
    assert any(re.search(words, text) for text in said_of(strained(), change))


@pytest.mark.parametrize("change, words", [
    (None, None), (multiply(forces=-1), "sign"), (multiply(forces=1 / 51.42), "Hartree/Bohr"),
    (multiply(energy=23.06), "energies in kcal/mol"), (multiply(energy=1 / 27.21), "Hartree")])
def test_forces_are_compared_where_every_cell_is_another(change, words):
    """As in molecular dynamics at constant pressure."""
    rng = np.random.default_rng(0)
    crystals = []
    for i in range(24):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.08, seed=i)
        strain = rng.normal(0, 0.004, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        crystals.append(with_emt(atoms))
    found = said_of(crystals, change)
    assert len(found) == bool(change)
    assert all(re.search(f"forces tell.*{words}", text) for text in found)


@pytest.mark.parametrize("change", [None, multiply(stress=-1)])
def test_stresses_are_told_from_forces_where_atoms_move_with_the_cell(change):
    """What the forces do is of the size of what the stresses do, and is taken off first."""
    crystals = []
    for i in range(24):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.02, seed=i)
        strain = np.diag([0.002 * i - 0.02, 0.001 * i, 0.0])
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        crystals.append(with_emt(atoms))
    found = [text for text in said_of(crystals, change) if "stresses tell" in text]
    assert len(found) == bool(change) and all("sign" in text for text in found)


def test_stress_in_kbar_is_told_by_the_frames_and_real_pressure_is_not():
    crystals = varied()
    text, = said_of(crystals, multiply(stress=-1602.18))
    assert "look like kbar in 12 of 12 frames" in text and "-6.2415e-4" in text

    crystals[9].calc.results["stress"] *= 1602.18
    text, = said_of(crystals)
    assert "look like kbar in 1 of 12 frames: here, frame 9" in text

    # compressed to 1 TPa: energies, forces and stresses as Lennard-Jones has them
    dense = []
    for i in range(12):
        atoms = ase.build.bulk("Cu", cubic=True, a=2.75 + 0.02 * i)
        atoms.rattle(0.01, seed=i)
        atoms.calc = LennardJones(sigma=2.3, epsilon=0.4, rc=6.0)
        labels = (atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress())
        dense.append(frames.labelled(atoms, *labels))
    assert np.abs(dense[0].get_stress()).max() > 500 * units.GPa
    assert said_of(dense) == []


def test_equal_geometry_with_another_energy_is_named():
    crystals = copper(12)
    other = with_emt(crystals[2])
    other.calc.results["energy"] += 0.5
    found = said_of([*crystals, other])
    assert len(found) == 1 and "1 frames have the geometry of another" in found[0]
    assert "here, frame 12" in found[0] and "here, frame 2 " in found[0]


def test_robust_fit_is_least_squares_without_outliers_to_the_last_bit():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (200, 5)) + [1, 0, 0, 0, 0]
    shares = (counts / counts.sum(1)[:, None])[:, np.arange(5)]
    right = np.array([-3.0, -5, -8, 2, 0.5])
    energies = shares @ right + rng.normal(0, 0.1, 200)
    plain = np.linalg.lstsq(shares.T @ shares.copy("K"), shares.T @ energies, rcond=1e-9)[0]
    E0, error, rank = suspicions.robust_fit(shares, energies)
    assert (E0 == plain).all() and rank == 5 and (error == energies - shares @ E0).all()

    # a tenth of the frames is absurd: the others alone count
    wrong = energies.copy()
    wrong[::10] += 10.0 ** rng.uniform(2, 6, 20)
    kept = np.ones(200, bool)
    kept[::10] = False
    E0, error, _ = suspicions.robust_fit(shares, wrong)
    np.testing.assert_allclose(E0, suspicions.robust_fit(shares[kept], energies[kept])[0])
    assert (np.abs(error[::10]) > 50).all()
    assert np.abs(np.linalg.lstsq(shares, wrong, rcond=None)[0] - right).max() > 100, "the control"

    # an element that only outliers hold is not lost, and equal compositions have the smallest E0
    rare = np.vstack([np.eye(2)[[0] * 30], [[0.5, 0.5], [0.9, 0.1]]])
    _, _, rank = suspicions.robust_fit(rare, np.array([1.0] * 30 + [90.0, -90.0]))
    assert rank == 2
    E0, _, rank = suspicions.robust_fit(np.full((9, 2), 0.5), np.full(9, 3.0))
    assert rank == 1 and E0 == pytest.approx([3, 3])


def test_robust_scale_is_the_rms_without_absurd_frames_to_the_last_bit():
    rng = np.random.default_rng(0)
    forces = [rng.normal(0, 10 ** rng.uniform(-3, 1), (n, 3)) for n in rng.integers(1, 9, 100)]
    plain = np.sqrt(np.mean(np.concatenate(forces) ** 2))
    assert suspicions.robust_scale(forces) == plain
    assert suspicions.robust_scale([*forces, np.full((4, 3), 1e6)]) == plain
    assert suspicions.robust_scale([*[0.002 * of for of in forces], *forces]) > 0.5 * plain
    relaxed = [1e-14 * of for of in forces]
    assert suspicions.robust_scale([*relaxed, *forces]) == pytest.approx(plain / np.sqrt(2))
    assert suspicions.robust_scale([np.zeros((1, 3))]) == 0


# ─── Command ─────────────────────────────────────────────────────────────────────────────────────

def test_command_reports_on_a_data_set(tmp_path, capsys):
    crystals = copper(3)
    crystals[0].info["config_type"] = "hot"
    molecule = with_emt(Atoms("CuNi", [[0, 0, 0], [0, 0, 2.125]]))
    path = write(tmp_path / "a.extxyz", [*crystals, molecule])
    assert frames.main([path]) == 0
    page = capsys.readouterr().out
    assert "equal frames" not in page
    for words in ("frames              4, of 2 materials", "2 to 4, median 4 per frame, 14 in all",
                  "  Ni                     1         1", "  Cu                     4        13",
                  "  hot                    1", "1 along 0 axes, 3 along 3 axes",
                  "stress              in 3 of 4 frames", "no warnings",
                  f"shortest distance   2.125 Å, in {path}, frame 3"):
        assert words in page, page
    energies = [atoms.calc.results["energy"] / len(atoms) for atoms in [*crystals, molecule]]
    assert f"{min(energies):.3f} to {max(energies):.3f}" in page
    largest = max(np.abs(atoms.get_stress()).max() for atoms in crystals) / units.GPa
    assert f"to {largest:.2f}, median" in page


def test_command_takes_names_and_json(tmp_path, capsys):
    path = write(tmp_path / "ref.extxyz", renamed(copper(2)))
    assert frames.main([path, "--energy", "REF_energy", "--forces", "REF_forces"]) == 0
    assert "in 0 of 2 frames" in capsys.readouterr().out
    assert frames.main([write_json(tmp_path / "a.json", [silicon()])]) == 0


def test_command_ends_in_one_sentence(monkeypatch, capsys):
    for arguments, status in (["absent.xyz"], 1), (["--help"], 0):
        monkeypatch.setattr(sys, "argv", ["tools/frames.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(frames.__file__, run_name="__main__")
        said = capsys.readouterr()
        assert end.value.code == status
        if status:
            assert said.err == "error: absent.xyz: no such file\n"
        else:
            assert "python -m tools.frames si_train.extxyz" in said.out
