"""Tests of tools/files.py: what ASE would misunderstand, for every reader that it can reach.

    pytest tests/test_files.py
"""
import copy
import gzip
import json
import shutil
import tracemalloc
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from tools import database, evaluate, files, frames, suspicions
from tools.frames import USUAL, BadInput, Names

CLOSE = dict(rtol=1e-7, atol=1e-7)  # text keeps eight digits


def crystal(seed: int = 0) -> Atoms:
    """Copper, rattled, in a cell with three different edges, with EMT's labels."""
    return copy.deepcopy(labelled_by_emt(seed))


@cache
def labelled_by_emt(seed: int) -> Atoms:
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.set_cell(np.diag([3.6, 3.7, 3.8]), scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    other = atoms.copy()
    other.calc = EMT()
    atoms.calc = SinglePointCalculator(
        atoms, energy=other.get_potential_energy(), forces=other.get_forces(),
        stress=other.get_stress())
    return atoms


def crystals(count: int = 3) -> list[Atoms]:
    return [crystal(seed) for seed in range(count)]


# ─── Every reader ────────────────────────────────────────────────────────────────────────────────

def converted(path: str, say, names: Names = USUAL) -> list[Atoms]:
    """By tools.database, into the folder above, and back."""
    out = str(Path(path).resolve().parent / "converted.db")
    Path(out).unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database.Progress, "end", lambda self, line: say(line))
        database.convert([path], out, names)
    return list(frames.read([out]))


def evaluated(path: str, say, names: Names = USUAL) -> list[Atoms]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "print_to_stderr", say)
        return list(evaluate.read([path], names))


LABELLED = {  # what gives frames with labels; each of them takes names
    "iread": lambda path, say, names=USUAL: list(frames.iread(path, names, say=say)),
    "read": lambda path, say, names=USUAL: list(frames.read([path], names, say=say)),
    "database": converted,
    "evaluate": evaluated}
READERS = {"read_atoms": lambda path, say: list(files.read_atoms(path, say)), **LABELLED}

every_reader = pytest.mark.parametrize("reader", READERS)
every_labelled = pytest.mark.parametrize("reader", LABELLED)


def keep_quiet(text: str) -> None:
    pass


def told(said: list[str], kind: str) -> list[str]:
    """Lines of a kind: note, warning."""
    return [line for line in said if line.startswith(f"{kind}: ")]


def document(atoms: Atoms) -> dict:
    """A structure of pymatgen with labels, as MatPES has them."""
    sites = [{"species": [{"element": "Cu", "occu": 1}], "abc": place.tolist()}
             for place in atoms.get_scaled_positions(wrap=False)]
    stress = atoms.calc.results["stress"] / (-0.1 * units.GPa)
    return {"matpes_id": "m", "structure": {"lattice": {"matrix": atoms.cell.array.tolist()},
                                            "sites": sites},
            "energy": atoms.calc.results["energy"], "stress": stress.tolist(),
            "forces": atoms.calc.results["forces"].tolist()}


def write(path: str, images: list[Atoms]) -> None:
    """The crystals under this very name, by the way of one that nobody misunderstands."""
    if path.endswith(".json") and "ase" not in path:
        Path(path).write_text(json.dumps([document(atoms) for atoms in images]))
        return
    ending = "".join(Path(path).suffixes[-1:]) or ".extxyz"
    plain = f"written_elsewhere{ending}"
    ase.io.write(plain, images, format="extxyz" if ending in (".xyz", ".extxyz") else None)
    Path(plain).rename(path)


# ─── Names ───────────────────────────────────────────────────────────────────────────────────────

NAMES = ["a@1.extxyz", "a@1.traj", "a@0.json", "ase@0.json", "a@2.db", "a@:1.xyz", "a[1].extxyz",
         "a*.extxyz", "-a.extxyz", "--help.xyz", "-", "a b#c?.extxyz", "größe.extxyz",
         "postgresql:a.xyz", "mysql.extxyz", "train_OUTCAR.xyz", "POSCAR.extxyz"]


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_file_means_itself(name, tmp_path, monkeypatch):
    """For every reader; such JSON is converted before it is read with others."""
    monkeypatch.chdir(tmp_path)
    write("a.extxyz", crystals(1))  # what an index or a pattern would find
    write("a1.extxyz", crystals(1))
    write(name, crystals(3))
    for reader in sorted(READERS.keys() - ({"read"} if name == "a@0.json" else set())):
        assert len(READERS[reader](name, keep_quiet)) == 3, reader


def test_name_is_no_pattern_for_readers_of_ase_either(tmp_path, monkeypatch):
    """ASE's reader of .res opens all files that match."""
    monkeypatch.chdir(tmp_path)
    write("a1.res", [crystal(1)])
    write("a[1].res", [crystal(2)])
    found, = files.read_atoms("a[1].res")
    for atoms, seed in ((ase.io.read("a[1].res"), 1), (found, 2)):
        np.testing.assert_allclose(atoms.positions, crystal(seed).get_positions(wrap=True),
                                   atol=1e-5)


def test_command_takes_names_with_dashes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("-a.extxyz", crystals(3))
    assert frames.main(["--", "-a.extxyz"]) == 0
    assert "frames              3" in capsys.readouterr().out
    assert database.main(["--", "-a.extxyz", "out@1.db"]) == 0
    assert len(frames.read(["out@1.db"])) == 3


# ─── Disordered crystals ─────────────────────────────────────────────────────────────────────────

CIF = """data_t
_cell_length_a 3.66
_cell_length_b 3.66
_cell_length_c 3.66
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_space_group_name_H-M_alt 'F m -3 m'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""
SITES = {"full": ("Cu1 Cu 0 0 0 1.0\n", ""),
         "half": ("Cu1 Cu 0 0 0 0.5\n", "occupied to 0.5"),
         "shared": ("Cu1 Cu 0 0 0 0.7\nAg1 Ag 0 0 0 0.3\n", "shared by several elements")}


@every_reader
@pytest.mark.parametrize("ending", ["cif", "traj", "extxyz"])
@pytest.mark.parametrize("kind", SITES)
def test_site_that_is_occupied_in_part_is_refused(kind, ending, reader, tmp_path):
    """As CIF, and in files of ASE to which its reader has handed the occupancies on."""
    text, message = SITES[kind]
    path = str(tmp_path / f"a.{ending}")
    (tmp_path / "a.cif").write_text(CIF + text)
    if ending != "cif":
        atoms = ase.io.read(tmp_path / "a.cif")
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((4, 3)))
        ase.io.write(path, atoms)
    elif reader in ("iread", "read", "database"):
        pytest.skip("a CIF has no labels")

    if kind == "full":
        assert len(READERS[reader](path, keep_quiet)) == 1
        return
    with pytest.raises(BadInput, match=f"a.{ending}, frame 0: a site is {message}; only ordered"):
        READERS[reader](path, keep_quiet)


@pytest.mark.parametrize("values, refused", [([1, 1, 1, 1], False), ([0, 0, 0, 0], False),
                                             ([1, 1, 1, 0.97], True), ([1, 1, 1.5, 1], True)])
@pytest.mark.parametrize("name", ["occupancy", "occupancies"])
def test_occupancies_of_atoms_count_too(name, values, refused, tmp_path):
    """As ASE's readers of PDB and muSTEM have them; zero is what programs write for nothing."""
    atoms = crystal()
    atoms.arrays[name] = np.array(values, float)
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    if not refused:
        assert len(list(frames.iread(tmp_path / "a.xyz"))) == 1
        return
    with pytest.raises(BadInput, match="occupied to (0.97|1.5)"):
        list(frames.iread(tmp_path / "a.xyz"))


# ─── What ASE fills in ───────────────────────────────────────────────────────────────────────────

def dump(path: Path, images: list[Atoms], columns: str = "id type element", head: str = "") -> str:
    """Trajectory of LAMMPS with forces."""
    with open(path, "w") as out:
        for step, atoms in enumerate(images):
            out.write(f"{head}ITEM: TIMESTEP\n{step}\nITEM: NUMBER OF ATOMS\n{len(atoms)}\n"
                      f"ITEM: BOX BOUNDS pp pp pp\n")
            for edge in atoms.cell.lengths():
                out.write(f"0 {edge}\n")
            out.write(f"ITEM: ATOMS {columns} xu yu zu fx fy fz\n")
            for i, (place, force) in enumerate(zip(atoms.positions, atoms.calc.results["forces"])):
                known = {"id": i + 1, "type": 1, "element": "Cu", "mass": 63.546}
                words = [known[name] for name in columns.split()] + [*place, *force]
                out.write(" ".join(map(str, words)) + "\n")
    return str(path)


@every_labelled
def test_dump_has_forces_and_no_energy(reader, tmp_path):
    path = dump(tmp_path / "cu.lammpstrj", crystals())
    assert ase.io.read(path).get_potential_energy() == 0, "the control: ASE fills it in"
    found = LABELLED[reader](path, keep_quiet)
    for atoms, right in zip(found, crystals(), strict=True):
        assert "energy" not in atoms.calc.results and (atoms.numbers == 29).all()
        np.testing.assert_allclose(atoms.calc.results["forces"], right.calc.results["forces"])


@every_reader
def test_elements_that_are_types_are_a_warning(reader, tmp_path):
    for columns in ("id type", "id type element", "id type mass"):
        said = []
        path = dump(tmp_path / "a.lammpstrj", crystals(), columns)
        numbers = {z for atoms in READERS[reader](path, said.append) for z in atoms.numbers}
        warned = told(said, "warning")
        if columns == "id type":
            assert numbers == {1} and len(warned) == 1
            assert "a.lammpstrj has no names of elements" in warned[0]
            assert "this is H4:" in warned[0]
        else:
            assert numbers == {29} and not warned


@pytest.mark.parametrize("masses", [True, False])
def test_types_of_lammps_data_are_a_warning_without_masses(masses, tmp_path):
    path = tmp_path / "a.lammps-data"
    ase.io.write(path, crystal(), format="lammps-data", masses=masses, atom_style="atomic")
    said = []
    atoms, = files.read_atoms(path, said.append)
    assert atoms.symbols[0] == ("Cu" if masses else "H") and len(said) == (not masses)


@every_reader
@pytest.mark.parametrize("lines", [0, -1, -3, -4, -5, -7, -9, -10])
def test_dump_that_is_cut_off_is_refused(lines, reader, tmp_path):
    """Of its last frame four lines are atoms, one names their columns, three tell the box."""
    path = Path(dump(tmp_path / "a.lammpstrj", crystals()))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines or None]))
    if lines == 0:
        assert len(READERS[reader](str(path), keep_quiet)) == 3
        return
    with pytest.raises(BadInput, match="a.lammpstrj, frame .: cannot be read, is it complete"):
        READERS[reader](str(path), keep_quiet)


VASPRUN = """<modeling><kpoints><varray name="kpointlist"><v>0 0 0</v></varray></kpoints>
<parameters></parameters><atominfo><atoms>1</atoms><array name="atoms"><set>
<rc><c>Cu</c><c>1</c></rc></set></array></atominfo>
{structure}{step}{step}
</modeling>
"""
PLACE = """<structure name="{name}"><crystal><varray name="basis">
<v>4 0 0</v><v>0 4 0</v><v>0 0 4</v>
</varray></crystal><varray name="positions"><v>0 0 0</v></varray></structure>
"""
STEP = """<calculation>{structure}<varray name="forces"><v>0 0 0</v></varray><scstep><energy>
<i name="e_fr_energy">-3</i><i name="e_0_energy">-3</i></energy></scstep>
<energy><i name="e_fr_energy">-3</i><i name="e_0_energy">-3</i></energy></calculation>
"""


@every_reader
@pytest.mark.parametrize("cut", ["", "</modeling>", "<scstep>"])
def test_calculation_that_was_stopped_is_noted(cut, reader, tmp_path):
    step = STEP.format(structure=PLACE.format(name=""))
    text = VASPRUN.format(structure=PLACE.format(name="initialpos"), step=step)
    (tmp_path / "vasprun.xml").write_text(text[:text.rindex(cut) if cut else None])
    said = []
    found = READERS[reader](str(tmp_path / "vasprun.xml"), said.append)
    assert len(found) == (1 if cut == "<scstep>" else 2)
    assert len([line for line in said if "ends before its calculation has" in line]) == bool(cut)


def test_outcar_that_was_stopped_is_noted(tmp_path):
    for words, count in (("General timing and accounting informations for this job:", 0), ("", 1)):
        (tmp_path / "OUTCAR").write_text(f"vasp\n{words}\n" + "Elapsed time (sec): 1\n" * 20)
        said = []
        files.tell_early_end("vasp-out", str(tmp_path / "OUTCAR"), said.append)
        assert len(said) == count


@every_reader
@pytest.mark.parametrize("most, unconverged", [(3, 0), (2, 1), (1, 0)])
def test_electrons_that_did_not_converge_are_a_warning(most, unconverged, reader, tmp_path):
    """The second step takes two iterations; where one is all that is asked for, all is well."""
    step = STEP.format(structure=PLACE.format(name=""))
    first, energy, last = step.partition("<scstep>")
    energy += last[:last.index("</scstep>") + len("</scstep>")]
    text = VASPRUN.format(structure=PLACE.format(name="initialpos"), step="{}")
    text = text.format(step, first + energy + "\n" + energy + last[last.index("</scstep>") + 9:])
    text = text.replace("<parameters>", f'<parameters><i type="int" name="NELM">   {most}</i>')
    (tmp_path / "vasprun.xml").write_text(text)
    said = []
    assert len(READERS[reader](str(tmp_path / "vasprun.xml"), said.append)) == 2
    found = [line for line in said if "had not converged" in line]
    assert len(found) == unconverged
    assert all(line.startswith("warning") and "in 1 of 2 steps" in line for line in found)


def test_electrons_of_an_outcar_that_did_not_converge_are_a_warning(tmp_path):
    head = "vasp\n   NELM   =     {};   NELMIN=  2; NELMDL= -5     # of ELM steps\n"
    iterations = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    lines = "".join(f"---- Iteration {step:6}({n:4})  ----\n" for step, n in iterations)
    for most, count in ((4, 0), (3, 1), (2, 2), (1, 0)):
        text = head.format(most) + lines + "General timing and accounting informations\n"
        (tmp_path / "OUTCAR").write_text(text)
        said = []
        files.tell_early_end("vasp-out", str(tmp_path / "OUTCAR"), said.append)
        assert len(said) == bool(count)
        assert all(f"in {count} of 2 steps" in line for line in said)


@every_reader
@pytest.mark.parametrize("unit", ["metal", "real", "lj"])
def test_dump_in_other_units_is_refused(unit, reader, tmp_path):
    path = dump(tmp_path / "a.lammpstrj", crystals(1), head=f"ITEM: UNITS\n{unit}\n")
    if unit == "metal":
        assert len(READERS[reader](path, keep_quiet)) == 1
        return
    with pytest.raises(BadInput, match=f"a.lammpstrj: is a dump in units {unit}"):
        READERS[reader](path, keep_quiet)


def test_forces_that_ase_does_not_convert_are_a_warning(tmp_path):
    for level, count in ((0, 0), (2, 1)):
        ase.io.write(tmp_path / "a.config", crystal(), format="dlp4", levcfg=level)
        said = []
        atoms, = files.read_atoms(tmp_path / "a.config", said.append)
        assert (atoms.calc is not None) == (level == 2)
        assert len(said) == count and all("10 J/mol/Å" in line for line in said)


def test_warning_of_a_file_is_an_error_with_strict(tmp_path, capsys):
    path = dump(tmp_path / "a.lammpstrj", crystals(12), "id type")
    usual = dict(train=(path,), valid=(), test=(), seed=0)
    said = []
    frames.load_sets(SimpleNamespace(**usual), tmp_path, said.append)
    assert len([line for line in said if "no names of elements" in line]) == 1
    with pytest.raises(BadInput, match="--strict turns into errors; the first: .*no names of elem"):
        frames.load_sets(SimpleNamespace(**usual, strict=True), tmp_path, keep_quiet)
    assert frames.main([path]) == 0
    page = capsys.readouterr().out
    assert "warning: " in page and "no names of elements" in page and "no warnings" not in page


@every_labelled
def test_atom_that_is_no_element_is_refused(reader, tmp_path):
    atoms = crystal()
    atoms.numbers[2] = 0
    ase.io.write(tmp_path / "a.extxyz", atoms)
    with pytest.raises(BadInput, match="a.extxyz, frame 0: an atom is no element"):
        LABELLED[reader](str(tmp_path / "a.extxyz"), keep_quiet)


# ─── Extended XYZ as others write it ─────────────────────────────────────────────────────────────

def extxyz(path: Path, keys: str, columns: str = "species:S:1:pos:R:3:force:R:3",
           properties: str = "properties") -> str:
    """Copper by hand: a comment line of these keys, in which {cell} and {energy} are filled in."""
    atoms = crystal()
    cell = " ".join(map(str, atoms.cell.array.ravel()))
    keys = keys.replace("{cell}", f'"{cell}"')
    keys = keys.replace("{energy}", str(atoms.calc.results["energy"]))
    lines = [str(len(atoms)), f"{keys} {properties}={columns}"]
    for place, force in zip(atoms.positions, atoms.calc.results["forces"]):
        known = {"species": ["Cu"], "pos": place, "force": force}
        lines.append(" ".join(str(x) for name in columns.split(":")[::3] for x in known[name]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@every_reader
@pytest.mark.parametrize("columns", ["species:S:1:pos:R:3:force:R:3",
                                     "species:S:1:force:R:3:pos:R:3"])
@pytest.mark.parametrize("lattice, properties, pbc", [
    ("lattice", "properties", ""), ("LATTICE", "Properties", 'PBC="T T F"'),
    ("Lattice", "PROPERTIES", 'pbc="T T F"')])
def test_keys_in_other_capitals_are_understood(lattice, properties, pbc, columns, reader, tmp_path):
    path = extxyz(tmp_path / "train.xyz", f"{lattice}={{cell}} energy={{energy}} {pbc}", columns,
                  properties)
    right = crystal()
    found, = READERS[reader](path, keep_quiet)
    np.testing.assert_allclose(found.cell.array, right.cell.array)
    np.testing.assert_allclose(found.positions, right.positions)
    assert found.pbc.tolist() == [True, True, not pbc]
    if reader != "read_atoms":
        assert found.calc.results["energy"] == right.calc.results["energy"]
        np.testing.assert_allclose(found.calc.results["forces"], right.calc.results["forces"])


def test_columns_in_other_capitals_are_understood(tmp_path):
    path = extxyz(tmp_path / "a.xyz", "energy={energy} Lattice={cell}")
    right, = frames.iread(path)
    Path(path).write_text(Path(path).read_text().replace("species:S:1:pos:R:3:force:R:3",
                                                         "Species:S:1:Pos:R:3:Force:R:3"))
    found, = frames.iread(path)
    assert found == right
    assert (found.calc.results["forces"] == right.calc.results["forces"]).all()


def test_key_that_is_there_in_its_capitals_is_the_one(tmp_path):
    keys = 'lattice=fcc Lattice={cell} energy={energy} comment="pbc = F, lattice=a"'
    found, = files.read_atoms(extxyz(tmp_path / "a.xyz", keys))
    np.testing.assert_allclose(found.cell.array, crystal().cell.array)
    assert found.info["lattice"] == "fcc" and found.info["comment"] == "pbc = F, lattice=a"
    with pytest.raises(BadInput, match="a.xyz, frame 0: cannot be read.*Lattice"):
        list(files.read_atoms(extxyz(tmp_path / "a.xyz", "lattice=fcc")))


@every_labelled
def test_key_without_a_value_does_not_take_the_next_one(reader, tmp_path):
    for key in ("config_type", "material", "mp_id", "comment"):
        for nothing in ("", '""', "{}") if reader == "iread" else ("",):
            path = extxyz(tmp_path / "a.xyz", f"{key}={nothing} energy={{energy}} Lattice={{cell}}")
            bare, = ase.io.iread(path)
            assert bare.calc is None or "energy" not in bare.calc.results, "the control: it is lost"
            found, = LABELLED[reader](path, keep_quiet)
            assert found.calc.results["energy"] == crystal().calc.results["energy"]
            assert found.info["group"] == "" and "energy" not in found.info["material"]


def test_comment_lines_mean_what_their_writers_mean():
    """Spaces around =, text in quotes, addresses, brackets; the last key without a value."""
    for line, right in {
            "energy = -1.5 config_type = bulk": {"energy": -1.5, "config_type": "bulk"},
            "a=1 b= c=3": {"a": 1, "b": "", "c": 3},
            "a=1 config_type= ": {"a": 1, "config_type": ""},
            'x="a b= c=d" pbc="T F T"': {"x": "a b= c=d", "pbc": [True, False, True]},
            "url=http://x?a=b&c=d e=2": {"url": "http://x?a=b&c=d", "e": 2},
            "flag {a b}=3": {"flag": True, "a b": 3},
            "i = 0, E = -17.5": {"i": 0, "E": -17.5}}.items():
        assert files.comment_line(line) == right


@pytest.mark.parametrize("ending", ["traj", "extxyz"])
@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("key", ["material", "mp_id", "config_type"])
def test_name_that_is_nothing_is_no_name(key, value, ending, tmp_path):
    images = crystals()
    for atoms in images:
        atoms.info[key] = value
    path = str(tmp_path / f"a.{ending}")
    ase.io.write(path, images)
    for atoms in frames.read([path]):
        assert atoms.info["material"] == f"{path}: Cu4, run 1"
        assert "energy" in atoms.calc.results


@every_reader
@pytest.mark.parametrize("place", ["begin", "between", "end", "comment"])
def test_frames_behind_an_empty_line_are_not_lost(place, reader, tmp_path):
    """ASE ends at an empty line where the number of atoms should be, and says nothing."""
    path = tmp_path / "a.xyz"
    ase.io.write(path, crystals(), format="extxyz")
    lines = path.read_text().splitlines()
    at = {"begin": 0, "between": 12, "end": 18, "comment": 19}[place]
    if place == "comment":  # of a last frame without labels, which readers of labels refuse
        lines += ["1", "", "Cu 0 0 0"]
    else:
        lines.insert(at, "  ")
    path.write_text("\n".join(lines) + "\n")
    if place in ("begin", "between"):
        assert len(ase.io.read(path, ":", format="extxyz")) < 3, "the control: ASE reads a part"
        with pytest.raises(BadInput, match=f"a.xyz, frame {at // 6}: stands behind an empty line"):
            READERS[reader](str(path), keep_quiet)
    elif place == "end":
        assert len(READERS[reader](str(path), keep_quiet)) == 3
    else:
        assert len(list(files.read_atoms(path))) == 4


@every_reader
@pytest.mark.parametrize("key", ["Lattice", "cell", "Box"])
def test_cell_under_another_name_is_a_warning(key, reader, tmp_path):
    said = []
    path = extxyz(tmp_path / "a.xyz", f"{key}={{cell}} energy={{energy}}")
    atoms, = READERS[reader](path, said.append)
    assert atoms.cell.rank == (3 if key == "Lattice" else 0)
    warned = told(said, "warning")
    assert len(warned) == (key != "Lattice")
    assert all(f"has {key}, but no Lattice" in line for line in warned)


@every_labelled
def test_six_numbers_of_stress_in_extxyz_are_refused_with_a_cure(reader, tmp_path):
    """ASE has one order, VASP another, and the file does not tell."""
    six = '"1 2 3 4 5 6"'
    nine = '"1 4 5 4 2 6 5 6 3"'
    keys = "energy={energy} Lattice={cell}"
    for key, names, refused in (("stress", Names(), True), ("REF_stress", Names(), False),
                                ("REF_stress", Names(stress="REF_stress"), True),
                                ("virial", Names(), False),
                                ("virial", Names(stress="virial"), True)):
        path = extxyz(tmp_path / "a.xyz", f"{key}={six} {keys}")
        if refused:
            with pytest.raises(BadInput, match="six numbers of stress in an order.*give all nine"):
                LABELLED[reader](path, keep_quiet, names)
        else:
            found, = LABELLED[reader](path, keep_quiet, names)
            assert "stress" not in found.calc.results
        found, = LABELLED[reader](extxyz(tmp_path / "b.xyz", f"{key}={nine} {keys}"), keep_quiet,
                                  names)
        assert ("stress" in found.calc.results) == (refused or key == "stress")


# ─── JSON and databases ──────────────────────────────────────────────────────────────────────────

@every_reader
@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz"])
def test_json_of_ase_is_read(name, reader, tmp_path):
    ase.io.write(tmp_path / "plain.json", crystals())
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress((tmp_path / "plain.json").read_bytes()))
    else:
        shutil.copy(tmp_path / "plain.json", path)
    found = READERS[reader](str(path), keep_quiet)
    for atoms, right in zip(found, crystals(), strict=True):
        np.testing.assert_array_equal(atoms.positions, right.positions)
        if reader != "read_atoms":
            assert atoms.calc.results["energy"] == right.calc.results["energy"]


@pytest.mark.parametrize("name, joined", [
    ("a.jsonl", "\n".join), ("a.json", "\n".join), ("a.ndjson", "\r\n".join),
    ("a.jsonl.gz", "\n".join), ("a.json", lambda lines: "\n\n" + "\n".join(lines) + "\n\n")])
@pytest.mark.parametrize("count", [1, 3])
def test_json_lines_are_read_as_a_list_is(name, joined, count, tmp_path):
    documents = [document(atoms) for atoms in crystals(count)]
    (tmp_path / "list.json").write_text(json.dumps(documents))
    text = joined([json.dumps(one) for one in documents]).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    as_list = list(frames.iread(tmp_path / "list.json"))
    for reader in ("iread", "database", "evaluate"):
        found = LABELLED[reader](str(tmp_path / name), keep_quiet)
        for atoms, right in zip(found, as_list, strict=True):
            assert atoms == right
            assert atoms.calc.results["energy"] == right.calc.results["energy"]
            assert (atoms.calc.results["stress"] == right.calc.results["stress"]).all()
    assert len(list(files.read_atoms(tmp_path / name))) == count
    with pytest.raises(BadInput, match="convert first"):
        frames.read([str(tmp_path / name)])


def test_broken_line_of_json_is_refused(tmp_path):
    lines = [json.dumps(document(atoms)) for atoms in crystals()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, lines[0][:-40]]))
    with pytest.raises(BadInput, match="a.jsonl, frame 3: cannot be read"):
        list(frames.iread(tmp_path / "a.jsonl"))


def test_structures_without_labels_can_be_read_from_json(tmp_path):
    labelled = {**document(crystal()), "material_id": "mp-1", "by": "__ndarray__"}
    bare = document(crystal())["structure"]
    (tmp_path / "a.jsonl").write_text(json.dumps(bare) + "\n" + json.dumps(labelled))
    assert len(list(files.read_atoms(tmp_path / "a.jsonl"))) == 2
    (tmp_path / "a.json").write_text(json.dumps([labelled, bare]))
    for found in (list(files.read_atoms(tmp_path / "a.json")),
                  list(frames.iread(tmp_path / "a.json", bare=True))):
        assert [len(atoms) for atoms in found] == [4, 4]
        assert found[0].info["material"] == "mp-1"
    with pytest.raises(BadInput, match="a.json, frame 1: has no energy and no forces"):
        list(frames.iread(tmp_path / "a.json"))


FOREIGN = {"train.cfg": ("BEGIN_CFG\n Size\n  4\n", "MLIP's configurations"),
           "coord.npy": ("x", "one array of NumPy"), "a.npz": ("x", "arrays of NumPy"),
           "a.h5": ("x", "HDF5"), "a.parquet": ("x", "a Parquet table"), "a.lmdb": ("x", "an LMDB"),
           "a.pkl": ("x", "a pickle"), "df.pckl.gzip": ("x", "a compressed pickle"),
           "a.pckl": ("x", "a pickle"), "water": (None, "a folder of deepmd")}


@every_reader
@pytest.mark.parametrize("name", FOREIGN)
def test_file_of_others_is_called_what_it_is(name, reader, tmp_path):
    content, message = FOREIGN[name]
    if content is None:
        (tmp_path / name / "set.000").mkdir(parents=True)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=f"{name}: is (a file of )?{message}.*extxyz"):
        READERS[reader](str(tmp_path / name), keep_quiet)


@every_labelled
@pytest.mark.parametrize("size", [3, 4, 12])  # odd, even, and one whose stress has as many bytes
@pytest.mark.parametrize("width", [np.float32, np.float64])
def test_database_with_numbers_of_32_bits_is_read(width, size, reader, tmp_path):
    path = str(tmp_path / "a.db")
    rng = np.random.default_rng(0)
    forces = rng.normal(size=(size, 3)).astype(width)
    stress = rng.normal(size=6).astype(width)
    with ase.db.connect(path) as there:
        for _ in range(2):
            atoms = (ase.build.bulk("Cu", cubic=True) * (3, 1, 1))[:size]
            atoms.calc = SinglePointCalculator(atoms)  # which would widen what it is given
            atoms.calc.results.update(energy=1.5, forces=forces, stress=stress)
            if not size % 2:  # else ASE's own reader cannot make anything of it
                atoms.calc.results["magmoms"] = np.ones(size, width)
            there.write(atoms)
        stored, = there.connection.execute("SELECT length(forces) FROM systems").fetchone()
    assert stored == 3 * size * width().itemsize
    for atoms in LABELLED[reader](path, keep_quiet):
        assert atoms.calc.results["energy"] == 1.5
        assert (atoms.calc.results["forces"] == forces).all()
        assert (atoms.calc.results["stress"] == stress).all()


def test_database_that_is_not_complete_is_not_opened(tmp_path):
    write_to = str(tmp_path / "a.db")
    ase.io.write(tmp_path / "a.xyz", crystals(), format="extxyz")
    database.convert([str(tmp_path / "a.xyz")], write_to)
    assert len(list(files.read_atoms(write_to))) == 3
    with database.connect(write_to) as there:
        there.metadata = {"facet": {**there.metadata["facet"], "complete": False}}
    for reader in ("read_atoms", "read", "evaluate"):
        with pytest.raises(BadInput, match="a.db: is not complete"):
            READERS[reader](write_to, keep_quiet)


def test_constraints_stay_where_no_labels_are_asked_for(tmp_path):
    atoms = crystal()
    atoms.set_constraint(FixAtoms([1]))
    for name in ("a.traj", "a.db", "a.json"):
        ase.io.write(tmp_path / name, atoms)
        found, = files.read_atoms(tmp_path / name)
        assert found.constraints[0].index.tolist() == [1]


# ─── What is there and is not read ───────────────────────────────────────────────────────────────

def with_more(more: dict) -> list[Atoms]:
    """Three crystals, of which the second has something more, where ASE keeps it."""
    images = crystals()
    for name, value in more.items():
        if name in ("magmoms", "charges", "dipole", "energies"):
            images[1].calc.results[name] = value
        elif np.ndim(value) and len(value) == 4:
            images[1].arrays[name] = value
            images[1].calc.atoms.arrays[name] = value  # or ASE takes its results for old ones
        else:
            images[1].info[name] = value
    return images


UNREAD = {"magmoms": np.ones(4), "initial_charges": np.ones(4), "charges": np.ones(4),
          "dipole": np.ones(3), "energy_sigma": 0.1, "force_sigma": 0.1, "energies": np.ones(4),
          "virial": np.eye(3), "temperature": 300.0, "remark": "good"}


@pytest.mark.parametrize("reader", LABELLED.keys() - {"iread"})  # that hands the names on
@pytest.mark.parametrize("ending", ["extxyz", "traj"])
def test_what_is_not_read_is_said_once_by_name(ending, reader, tmp_path):
    path = str(tmp_path / f"a.{ending}")
    ase.io.write(path, crystals())
    said = []
    LABELLED[reader](path, said.append)
    assert not told(said, "note"), "the control: all of it is read"
    ase.io.write(path, with_more(UNREAD))
    LABELLED[reader](path, said.append)
    note, = told(said, "note")
    first, _, names = note.partition(": ")[2].partition(": ")
    assert first == f"not read of {path}"
    assert names.split(", ") == sorted(UNREAD)


@pytest.mark.parametrize("name", UNREAD)
def test_each_column_that_is_not_read_has_its_name_said(name, tmp_path):
    path = str(tmp_path / "a.extxyz")
    ase.io.write(path, with_more({name: UNREAD[name]}))
    said = []
    frames.read([path], say=said.append)
    assert said == [f"note: not read of {path}: {name}"]


def test_virial_that_nobody_reads_is_said_with_the_cure(tmp_path):
    path = str(tmp_path / "a.extxyz")
    for stress in (True, False):
        images = with_more({"virial": np.eye(3)})
        for atoms in images if not stress else ():
            del atoms.calc.results["stress"]
        ase.io.write(path, images)
        cure = "" if stress else " (--stress virial reads it)"
        rest = ["stress"] if stress else []
        for names, without, wanted in ((USUAL, [], ["virial" + cure]), (USUAL, ["stress"], []),
                                       (Names(stress="virial"), [], rest)):
            said = []
            frames.read([path], names, without, said.append)
            assert said == [f"note: not read of {path}: {name}" for name in wanted]


@pytest.mark.parametrize("more, note", [(0.0, None), (0.1, "free_energy")])
def test_free_energy_is_no_note_if_it_is_the_energy(more, note, tmp_path):
    atoms = crystal()
    atoms.calc.results["free_energy"] = atoms.calc.results["energy"] + more
    path = str(tmp_path / "a.traj")
    ase.io.write(path, atoms)
    said = []
    frames.read([path], say=said.append)
    assert said == ([f"note: not read of {path}: {note}"] if note else [])

    # without an energy it is what ASE's readers of CASTEP's .geom and .md have
    del atoms.calc.results["energy"]
    ase.io.write(path, atoms)
    said = []
    frames.read([path], say=said.append)
    assert said == [f"note: not read of {path}: free_energy (--energy free_energy reads it)"]


def test_columns_of_json_that_are_not_read_are_said(tmp_path, capsys):
    one = {**document(crystal()), "bandgap": 1.0, "nothing": None}
    one["structure"]["sites"][0]["properties"] = {"magmom": 0.1}
    (tmp_path / "a.json").write_text(json.dumps([one]))
    assert frames.main([str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().err == (f"note: not read of {tmp_path / 'a.json'}: bandgap, magmom "
                                       f"of the sites, matpes_id\n")


@every_labelled
@pytest.mark.parametrize("key, names", [("stress", Names()), ("virial", Names(stress="virial"))])
def test_frame_without_a_volume_has_no_stress(key, names, reader, tmp_path):
    images = [crystal(), Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]])]
    images[1].info.update(energy=-1.0)
    images[1].arrays["forces"] = np.zeros((2, 3))
    images[1].info[key] = np.eye(3)
    if key == "virial":
        images[0].info[key] = np.eye(3)
        del images[0].calc.results["stress"]
    path = str(tmp_path / "a.extxyz")
    ase.io.write(path, images, format="extxyz")
    said = []
    found = LABELLED[reader](path, said.append, names)
    assert ["stress" in atoms.calc.results for atoms in found] == [True, False]
    if reader != "iread":
        assert told(said, "note") == [f"note: not read of {path}: stress of frames without a "
                                      f"volume"]


# ─── Large frames ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("reader", ["read", "database"])
def test_many_atoms_of_an_element_are_counted(reader, tmp_path):
    atoms = Atoms("Cu33000", np.arange(99000).reshape(-1, 3) % 97, cell=[100] * 3, pbc=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    ase.io.write(tmp_path / "a.traj", atoms)
    path = str(tmp_path / "a.traj")
    if reader == "database":
        database.convert([path], str(tmp_path / "a.db"))
        path = str(tmp_path / "a.db")
    assert frames.read([path]).compositions([1, 29]).tolist() == [[0, 33000]]


def large(cluster: bool, angle: float = 0.0) -> Atoms:
    """1372 atoms of copper with forces that sum to zero, as a crystal or without a cell."""
    atoms = ase.build.bulk("Cu", cubic=True) * (7, 7, 7)
    atoms.rattle(0.05, seed=1)
    if cluster:
        atoms = Atoms(atoms.numbers, atoms.positions)
        atoms.rotate(angle, (1, 2, 3))
    return frames.labelled(atoms, -3.5 * len(atoms), np.zeros((len(atoms), 3)), material="one")


@pytest.mark.parametrize("cluster", [True, False])
def test_checks_do_not_need_a_square_of_memory(cluster):
    """N² numbers of 1372 atoms are 15 MB, and there are several."""
    several = frames.in_memory([large(cluster), large(cluster, 30)])
    tracemalloc.start()
    try:
        assert frames.warnings(several) == []
        frames.report(several)
        suspicions.alike(several[0], several[1])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        several[0].get_all_distances()
        _, square = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12e6 < 40e6 < square, (peak, square)


@pytest.mark.parametrize("seed", range(5))
def test_closest_pair_is_that_of_all_pairs(seed):
    """Over sizes of the atoms, with images; the control counts pairs one by one."""
    rng = np.random.default_rng(seed)
    atoms = Atoms(rng.choice(["H", "Cs", "Cu"], 12), 7 * rng.random((12, 3)),
                  cell=7 * np.eye(3) + rng.normal(size=(3, 3)), pbc=rng.random(3) < 0.5)
    sizes = 0.1 + rng.random(12)
    images = atoms * [3 if axis else 1 for axis in atoms.pbc]
    every = images.get_all_distances() / np.add.outer(np.tile(sizes, len(images) // 12),
                                                      np.tile(sizes, len(images) // 12))
    np.fill_diagonal(every, np.inf)
    right = every.min()
    assert suspicions.closest(atoms, sizes, [0.1, 0.5, 1, 5]) == pytest.approx(right)
    assert suspicions.closest(atoms, sizes, [1.01 * right]) == pytest.approx(right)
    assert suspicions.closest(atoms, sizes, [0.5 * right, 0.99 * right]) == np.inf
    atoms.positions[4] = atoms.positions[7]
    assert suspicions.closest(atoms, sizes, [0.1]) == 0


def test_cell_vectors_along_which_nothing_repeats_do_not_matter():
    """A slab whose third vector lies in its plane is sound; two atoms on one spot are not."""
    slab = Atoms("Cu2", [[0, 0, 0], [0, 0, 2]], cell=[[5, 0, 0], [0, 5, 0], [5, 5, 0]],
                 pbc=[True, True, False])
    assert suspicions.closest(slab, np.full(2, 0.5), [1, 3]) == pytest.approx(2)


def test_frames_between_those_that_tell_the_unit_are_looked_at():
    """Sixty frames tell the unit of lengths; atoms on each other are looked for in all."""
    images = [frames.labelled(crystal(), source=f"frame {i}") for i in range(140)]
    assert suspicions.distances(images) == []
    images[1].positions[1] = images[1].positions[0] + [0, 0, 0.5]
    text, = suspicions.distances(images)
    assert "almost on each other in 1 of 140 frames: frame 1 " in text


def test_turned_molecule_is_not_apart_and_its_mirror_image_is():
    rng = np.random.default_rng(0)
    molecule = Atoms("HCNOF", 2 * rng.normal(size=(5, 3)))
    turned = molecule.copy()
    turned.rotate(77, (1, 2, 3))
    turned.positions += [1, 2, 3]
    assert suspicions.apart(molecule, turned) < 1e-6
    mirror = turned.copy()
    mirror.positions[:, 0] *= -1
    assert suspicions.apart(molecule, mirror) > 0.3
    moved = turned.copy()
    moved.positions += rng.normal(0, 0.1, (5, 3))
    assert 0.02 < suspicions.apart(molecule, moved) < 0.3


@pytest.mark.parametrize("pbc", [True, False])
def test_atom_that_crosses_a_cell_has_moved_unless_it_repeats(pbc):
    a = Atoms("Cu2", [[1, 1, 1], [2, 2, 2]], cell=[9, 9, 9], pbc=(True, True, pbc))
    b = a.copy()
    b.positions[0, 2] += 8.0
    moved = suspicions.displacements(a, b)
    assert np.ptp(moved[:, 2]) == pytest.approx(1.0 if pbc else 8.0)


@pytest.mark.parametrize("slow", [True, False])
def test_checks_that_take_long_say_so(slow, monkeypatch):
    said = []
    monkeypatch.setattr(frames, "PATIENCE", 0.05 if slow else 60.0)
    monkeypatch.setattr(frames, "warnings", lambda some: frames.time.sleep(0.2) or [])
    frames.look_at({"training": frames.in_memory(crystals_labelled())}, said.append)
    assert bool(said) == slow
    assert all(line.startswith("checking 3 frames of the training set, ") for line in said)


def crystals_labelled() -> list[Atoms]:
    return [frames.labelled(atoms, **atoms.calc.results) for atoms in crystals()]
