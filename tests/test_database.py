"""Tests of tools/database.py: what is converted, what a kill leaves, and how much memory it takes.

    pytest tests/test_database.py
    python tests/test_database.py --gigabytes 2         # a file in MPtrj's layout: frames/s, memory

The second command prints the speed of the conversion, its peak memory, and how fast frames are
read again in random order.
"""
import argparse
import io
import json
import multiprocessing
import operator
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path

import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # as a script, Python looks only beside this file
    sys.path.insert(0, str(ROOT))

from tools import database, frames  # noqa: E402
from tools.frames import BadInput, Names  # noqa: E402

ELEMENTS = ["H", "Li", "C", "N", "O", "F", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "K", "Ca", "Ti",
            "Mn", "Fe", "Co", "Ni", "Cu", "Zn"]


# ─── A file like MPtrj's ─────────────────────────────────────────────────────────────────────────

def frame(rng: np.random.Generator, mean_log: float) -> dict:
    """A frame with all of MPtrj's keys: a rattled simple cubic arrangement with random labels."""
    n = int(np.clip(rng.lognormal(mean_log, 0.8), 1, 200))
    side = int(np.ceil(n ** (1 / 3)))
    cell = 2.5 * side * np.eye(3) + rng.normal(0, 0.05, (3, 3))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    abc = grid[:n] / side + rng.normal(0, 0.01, (n, 3))

    sites = []
    elements = rng.choice(ELEMENTS, 3)
    for place, point in zip(abc, abc @ cell, strict=True):
        symbol = str(rng.choice(elements))
        sites.append({"species": [{"element": symbol, "occu": 1}], "abc": place.tolist(),
                      "xyz": point.tolist(), "label": symbol, "properties": {"magmom": 0.013}})
    forces = rng.normal(0, 0.2, (n, 3))
    lattice = {"matrix": cell.tolist(), "a": 5.0, "b": 5.0, "c": 5.0, "alpha": 90.0}
    return {"structure": {"@module": "pymatgen.core.structure", "@class": "Structure",
                          "charge": None, "sites": sites, "lattice": lattice},
            "uncorrected_total_energy": -5.0 * n, "corrected_total_energy": -5.2 * n - rng.random(),
            "energy_per_atom": -5.2, "ef_per_atom": -0.5, "e_per_atom_relaxed": -5.3,
            "bandgap": 0.0, "mp_id": "mp-1", "force": (forces - forces.mean(0)).tolist(),
            "stress": rng.normal(0, 10, (3, 3)).tolist(), "magmom": [0.01] * n}


def mptrj_like(path: Path, size: float, different: int = 40, mean_log: float = 1.0) -> Path:
    """Write at least `size` bytes; the `different` frames come again and again under new names.

    mean_log: of the logarithm of the number of atoms; 3.1 gives 31 on average, as in MPtrj.
    """
    rng = np.random.default_rng(0)
    texts = [json.dumps(frame(rng, mean_log)) for _ in range(different)]
    count = 0
    with open(path, "w") as file:
        file.write("{")
        while file.tell() < size:
            some = []
            for i in range(int(rng.integers(1, 6))):
                some.append(f'"mp-{count}-{i}": {texts[(count + i) % different]}')
            comma = ", " if count else ""
            file.write(f'{comma}"mp-{count}": {{{", ".join(some)}}}')
            count += len(some)
        file.write("}")
    return path


def assert_holds(path: Path, wanted: list[Atoms]) -> None:
    """The database has exactly these frames, to the last bit, and their names."""
    found = frames.read([str(path)])
    for a, b in zip(found, wanted, strict=True):
        assert a == b and a.info == b.info
        assert a.calc.results.keys() == b.calc.results.keys()
        for name, label in a.calc.results.items():
            assert np.array_equal(label, b.calc.results[name])


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> tuple[Path, list[Atoms]]:
    """A file of about 60 frames, and these frames."""
    path = mptrj_like(tmp_path_factory.mktemp("mptrj") / "m.json", 120_000)
    wanted = list(frames.iread(path))
    assert 50 < len(wanted) < 150
    return path, wanted


@pytest.fixture(scope="module")
def converted(example, tmp_path_factory) -> str:
    """A database of the example. Copy it before you change it."""
    out = str(tmp_path_factory.mktemp("converted") / "a.db")
    database.convert([str(example[0])], out)
    return out


# ─── What is converted ───────────────────────────────────────────────────────────────────────────

def test_database_holds_what_the_file_holds(example, tmp_path, monkeypatch):
    path, wanted = example
    monkeypatch.setattr(database, "BLOCK", 7)
    database.convert([str(path)], str(tmp_path / "a.db"))
    assert_holds(tmp_path / "a.db", wanted)
    assert [a.info["source"] for a in frames.iread(tmp_path / "a.db")] == \
           [a.info["source"] for a in wanted]
    with ase.db.connect(tmp_path / "a.db") as plain:
        row = plain.get(material=wanted[5].info["material"], source=wanted[5].info["source"])
    assert row.energy == wanted[5].calc.results["energy"], "ASE's own tools see the same"


def test_columns_of_the_database_are_those_of_the_frames(example, converted, tmp_path):
    _, wanted = example
    atom = frames.labelled(Atoms("Xe"), -1.0, np.zeros((1, 3)), group="7")
    ase.io.write(tmp_path / "atom.xyz", [atom], format="extxyz")
    alone = [str(tmp_path / "atom.xyz")]
    mixed = frames.read([converted, *alone])
    plain = frames.Frames([frames.InMemory(wanted), *frames.read(alone).parts])
    numbers = plain.elements()
    assert 54 in numbers and 54 not in mixed[:-1].elements()

    rng = np.random.default_rng(0)
    for rows in (np.arange(len(plain)), rng.integers(0, len(plain), 20), [len(plain) - 1]):
        a = mixed.take(rows)
        b = plain.take(rows)
        for column in ("atom_counts", "energies", "volumes", "materials", "elements"):
            assert (getattr(a, column)() == getattr(b, column)()).all(), column
        assert (a.compositions(numbers) == b.compositions(numbers)).all()
        assert [x.info for x in a] == [x.info for x in b]
    for some in (mixed, plain):
        assert frames.free_atoms(some)[-1]
    for left, right in zip(frames.split(mixed, 0), frames.split(plain, 0), strict=True):
        assert [x.info for x in left] == [x.info for x in right]


def test_rows_that_were_deleted_are_not_read(example, converted, tmp_path):
    _, wanted = example
    shutil.copy(converted, tmp_path / "a.db")
    with ase.db.connect(tmp_path / "a.db") as plain:
        plain.delete([1, 5, 6])
    left = [atoms for i, atoms in enumerate(wanted) if i + 1 not in (1, 5, 6)]
    assert_holds(tmp_path / "a.db", left)
    some = frames.read([str(tmp_path / "a.db")])
    numbers = some.elements()
    assert (some.compositions(numbers) == frames.in_memory(left).compositions(numbers)).all()


def test_fingerprint_changes_with_what_is_in_the_database(example, converted, tmp_path):
    path, _ = example
    database.convert([str(path)], str(tmp_path / "b.db"))
    prints = [frames.read([name]).fingerprint() for name in (converted, str(tmp_path / "b.db"))]
    assert prints[0] == prints[1]
    assert frames.read([converted], without=["stress"]).fingerprint() != prints[0]
    for column in ("positions", "forces", "stress", "cell", "numbers"):
        with ase.db.connect(tmp_path / "b.db") as plain:
            command = f"UPDATE systems SET {column} = (SELECT {column} FROM systems WHERE id = 2) "
            plain.connection.execute(command + "WHERE id = 1")
        prints.append(frames.read([str(tmp_path / "b.db")]).fingerprint())
    with ase.db.connect(tmp_path / "b.db") as plain:
        plain.connection.execute("UPDATE systems SET pbc = 3 WHERE id = 1")
    prints.append(frames.read([str(tmp_path / "b.db")]).fingerprint())
    assert len(set(prints)) == 7


def test_equal_frames_of_databases_are_found(example, converted, tmp_path):
    _, wanted = example
    other = shutil.copy(converted, tmp_path / "b.db")
    once, _ = frames.twins(frames.read([converted]))
    twice, _ = frames.twins(frames.read([converted, str(other)]))
    n = len(wanted)
    assert (once[:40] < 0).all() and (twice[n:] >= 0).all() and (twice[:n] == once).all()
    for later, row in enumerate(twice):
        assert row < 0 or wanted[row % n].calc.results["energy"] == \
               wanted[later % n].calc.results["energy"]


@pytest.mark.parametrize("labels", ["energy and forces", "forces"])
@pytest.mark.parametrize("held", ["file", "database"])
def test_equal_frames_of_a_database_and_a_file_are_found(held, labels, tmp_path):
    """Of ten frames in one and ten in the other three are the same, and one only looks so."""
    wanted = list(frames.iread(copper(tmp_path / "a.xyz", ("energy", "forces", "virial"), 17)))
    for atoms in wanted:
        for name in set(atoms.calc.results) - set(labels.split(" and ")):
            del atoms.calc.results[name]
    ase.io.write(tmp_path / "train.xyz", wanted[:10], format="extxyz")
    others = [atoms.copy() for atoms in wanted[7:]]
    for atoms, right in zip(others, wanted[7:], strict=True):
        atoms.calc = right.calc
    others[3].positions[1, 2] += 1e-3
    ase.io.write(tmp_path / "other.xyz", others, format="extxyz")
    paths = {"train": str(tmp_path / "train.xyz"), "test": str(tmp_path / "other.xyz")}
    moved = "test" if held == "database" else "train"
    database.convert([paths[moved]], str(tmp_path / "a.db"))
    paths[moved] = str(tmp_path / "a.db")

    said = []
    settings = argparse.Namespace(train=(paths["train"],), test=(paths["test"],), valid=("0",),
                                  seed=0)
    train, _, test = frames.load_sets(settings, tmp_path, said.append)
    assert len(train) == 7 and len(test) == 10
    assert any("note: 3 of 10 frames to train on are also in the test set" in line for line in said)


def test_frames_of_a_database_that_only_look_like_twins_are_not_twins(converted, tmp_path):
    """The same atoms and energy, but another number somewhere."""
    out = shutil.copy(converted, tmp_path / "a.db")
    first = frames.read([converted])[0]
    others = []
    for change in (lambda atoms: atoms.positions.__setitem__((0, 0), 0.001),
                   lambda atoms: atoms.calc.results["forces"].__setitem__((0, 0), 0.5),
                   lambda atoms: atoms.calc.results["stress"].__setitem__(0, 0.5),
                   lambda atoms: atoms.cell.__setitem__((0, 0), 9.0),
                   lambda atoms: atoms.numbers.__setitem__(0, 1),
                   lambda atoms: None):
        other = frames.labelled(first, **first.calc.results, source=f"other {len(others)}")
        change(other)
        others.append(other)
    count = len(frames.read([converted]))
    with database.connect(out) as plain:
        for atoms in others:
            atoms.info.pop("group")
            plain.write(atoms, key_value_pairs=atoms.info)
    equal, _ = frames.twins(frames.read([str(out)]))
    assert equal[count:].tolist() == [-1, -1, -1, -1, -1, 0]


def test_frames_keep_the_labels_they_have(tmp_path):
    crystals = []
    for i, lacking in enumerate(("", "energy", "forces", "stress")):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(),
                  "stress": atoms.get_stress()}
        labels.pop(lacking, None)
        atoms.calc = SinglePointCalculator(atoms, **labels)
        crystals.append(atoms)
    ase.io.write(tmp_path / "a.xyz", crystals, format="extxyz")
    wanted = list(frames.iread(tmp_path / "a.xyz"))
    database.convert([str(tmp_path / "a.xyz")], str(tmp_path / "a.db"))
    assert_holds(tmp_path / "a.db", wanted)
    some = frames.read([str(tmp_path / "a.db")])
    assert some.labels().tolist() == frames.in_memory(wanted).labels().tolist()
    assert np.isnan(some.energies()).tolist() == [False, True, False, False]
    assert not frames.read([str(tmp_path / "a.db")], without=["stress"]).labels()[:, 2].any()


def test_stress_of_a_database_can_be_left_unread(converted):
    assert "stress" in frames.read([converted])[3].calc.results
    assert "stress" not in frames.read([converted], without=["stress"])[3].calc.results


def test_groups_and_numbers_for_names_are_kept(tmp_path):
    crystals = []
    for group in ("hot", "1", "True", "1e5", "nan"):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.calc = EMT()
        atoms.get_forces()
        atoms.info.update(config_type=group, material=group)
        crystals.append(atoms)
    ase.io.write(tmp_path / "a.xyz", crystals, format="extxyz")
    wanted = list(frames.iread(tmp_path / "a.xyz"))
    assert wanted[0].info["group"] == "hot"
    database.convert([str(tmp_path / "a.xyz")], str(tmp_path / "a.db"))
    assert_holds(tmp_path / "a.db", wanted)


def copper(path: Path, names: tuple[str, str, str], count: int = 3) -> str:
    """Copper in an extxyz file, with labels under these names."""
    crystals = []
    for i in range(count):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.calc = EMT()
        atoms.info[names[0]] = atoms.get_potential_energy()
        atoms.arrays[names[1]] = atoms.get_forces()
        atoms.info[names[2]] = -atoms.get_volume() * atoms.get_stress(voigt=False)
        atoms.calc = None
        crystals.append(atoms)
    ase.io.write(path, crystals, format="extxyz")
    return str(path)


def test_names_of_labels_are_given_to_the_database(tmp_path):
    names = Names("REF_energy", "REF_forces", "REF_virial")
    path = copper(tmp_path / "ref.xyz", names)
    out = str(tmp_path / "a.db")
    assert database.main([path, out, "--energy", "REF_energy", "--forces", "REF_forces",
                          "--stress", "REF_virial"]) == 0
    wanted = list(frames.iread(path, names))
    assert "stress" in wanted[0].calc.results
    assert_holds(tmp_path / "a.db", wanted)
    assert len(frames.read([out], names)) == 3
    with pytest.raises(BadInput, match="labels already; names of labels are given to tools.databa"):
        frames.read([out], Names("REF_energy"))
    with pytest.raises(BadInput, match="begun with other names .*REF_energy, REF_forces"):
        database.convert([path], out)


def test_database_of_a_time_with_fewer_labels_is_read_and_goes_on(tmp_path):
    """Its metadata list the first two of the labels that there are now."""
    one = copper(tmp_path / "one.xyz", ("energy", "forces", "my_stress"))
    two = copper(tmp_path / "two.xyz", ("energy", "forces", "my_stress"), count=4)
    out = str(tmp_path / "a.db")
    database.convert([one], out)
    with database.connect(out) as connection:
        known = connection.metadata["facet"]
        connection.metadata = {"facet": {**known, "names": ["", ""], "labels": [3, 3]}}
    assert len(frames.read([out])) == 3
    database.convert([two], out)
    assert len(frames.read([out])) == 7
    assert database.connect(out).metadata["facet"]["labels"] == [7, 7, 0]
    with pytest.raises(BadInput, match="labels already"):
        frames.read([out], Names("REF_energy"))
    with pytest.raises(BadInput, match="begun with other names"):
        database.convert([two], out, Names("REF_energy"))


def test_name_of_a_stress_that_no_frame_has_is_refused(tmp_path, capsys):
    path = copper(tmp_path / "ref.xyz", ("energy", "forces", "REF_virial"))
    arguments = [path, str(tmp_path / "a.db"), "--stress", "REF_viral"]
    assert database.main(arguments) == 1
    assert "has stress under the name 'REF_viral'" in capsys.readouterr().err
    with pytest.raises(BadInput, match="is not complete"):
        frames.read([str(tmp_path / "a.db")])


# ─── What is refused ─────────────────────────────────────────────────────────────────────────────

def test_bad_frame_stops_the_conversion_and_is_named(tmp_path, capsys):
    content = json.loads(mptrj_like(tmp_path / "m.json", 60_000).read_text())
    material = list(content)[9]
    key, bad = list(content[material].items())[0]
    bad["force"][0][0] = float("nan")
    (tmp_path / "m.json").write_text(json.dumps(content))
    assert database.main([str(tmp_path / "m.json"), str(tmp_path / "a.db")]) == 1
    error = capsys.readouterr().err
    where = f"error: {tmp_path / 'm.json'}, frame {key}: "
    assert error.startswith(where + "a component of the force is NaN")
    assert error.count("\n") == 1


def test_changed_input_is_refused(tmp_path):
    path = mptrj_like(tmp_path / "m.json", 20_000)
    out = str(tmp_path / "a.db")
    database.convert([str(path)], out)
    database.convert([str(path)], out)
    before = path.read_text()
    for text in (before + " ", before.replace("-5.2", "-5.3", 1)):  # as long as it was, too
        path.write_text(text)
        os.utime(path, ns=(0, 10 ** 9))
        with pytest.raises(BadInput, match="m.json: has changed since .*a.db was begun"):
            database.convert([str(path)], out)


def test_files_can_be_added_and_count_once(example, converted, tmp_path):
    path, wanted = example
    other = copper(tmp_path / "b.xyz", ("energy", "forces", "virial"))
    out = str(shutil.copy(converted, tmp_path / "a.db"))
    database.convert([str(path), other, other], out)
    assert_holds(tmp_path / "a.db", [*wanted, *frames.iread(other)])


@pytest.mark.parametrize("name", ["a.db", "link.db", "*.db"])
def test_database_does_not_take_in_itself(name, converted, tmp_path):
    out = str(shutil.copy(converted, tmp_path / "a.db"))
    (tmp_path / "link.db").symlink_to(out)
    with pytest.raises(BadInput, match="a.db: is an input, too, and would hold its own frames"):
        database.convert([str(tmp_path / name)], out)
    assert len(frames.read([out])) == len(frames.read([converted]))
    database.convert([out], str(tmp_path / "b.db"))  # the control: another name
    assert len(frames.read([str(tmp_path / "b.db")])) == len(frames.read([converted]))


def test_what_is_no_database_of_ours_is_left_alone(example, tmp_path, capsys):
    path, _ = example
    ase.io.write(tmp_path / "theirs.db", ase.build.bulk("Cu"))
    (tmp_path / "text.db").write_text("no database at all, but a text that somebody wrote\n" * 99)
    for name, message in (("theirs.db", "a database that this command has not made"),
                          ("text.db", "cannot be written"), ("no/a.db", "cannot be written")):
        out = tmp_path / name
        before = out.read_bytes() if out.exists() else None
        with pytest.raises(BadInput, match=f"{name}: .*{message}"):
            database.convert([str(path)], str(out))
        assert before == (out.read_bytes() if out.exists() else None)
    with pytest.raises(SystemExit):
        database.main([str(path), str(tmp_path / "out.xyz")])
    assert "ends in .db" in capsys.readouterr().err
    with pytest.raises(BadInput, match="no such file"):
        database.convert([str(tmp_path / "absent.json")], str(tmp_path / "new.db"))
    assert not (tmp_path / "new.db").exists()


# ─── Processes ───────────────────────────────────────────────────────────────────────────────────

def energy_of(atoms: Atoms) -> float:
    return atoms.calc.results["energy"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_process_reads_with_a_connection_of_its_own(method, example, converted):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    energies = [energy_of(atoms) for atoms in example[1]]
    some = frames.read([converted])
    rows = list(range(len(some)))
    assert [energy_of(some[row]) for row in rows] == energies  # the connection is open here

    with multiprocessing.get_context(method).Pool(2 if method == "fork" else 1) as pool:
        asked = pool.starmap_async(operator.getitem, [(some, row) for row in rows], chunksize=9)
        assert [energy_of(some[row]) for row in rows] == energies
        assert [energy_of(atoms) for atoms in asked.get(60)] == energies


def test_inherited_connection_is_not_used(converted):
    part, = frames.read([converted]).parts
    here = part.connection()
    assert part.connection() is here
    assert pickle.loads(pickle.dumps(part)).database is None

    others = []
    thread = threading.Thread(target=lambda: others.append(part.connection()))
    thread.start()
    thread.join()
    assert others[0] is not here
    part.owner = (os.getpid() + 1, threading.get_ident())  # as after fork
    assert part.connection() is not others[0]


def convert_slowly(path: Path, out: Path, pause: float, end: Connection) -> None:
    """The command in blocks of five frames, a word and a pause after each; then status and stderr.

    It runs in a process of its own.
    """
    write = database.Writer.write

    def slowly(*arguments):
        write(*arguments)
        end.send("block")
        time.sleep(pause)

    database.BLOCK = 5
    database.Writer.write = slowly
    with redirect_stderr(io.StringIO()) as said:
        status = database.main([str(path), str(out)])
    end.send((status, said.getvalue()))


def start(path: Path, out: Path, pause: float):
    """A process that converts slowly, and the end of the pipe on which it tells how far it is."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=convert_slowly, args=(path, out, pause, theirs))
    process.start()
    theirs.close()
    return process, ours


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(),
                                reason="this system has no fork")


@needs_fork
def test_killed_conversion_goes_on_where_it_was(example, tmp_path, monkeypatch, capsys):
    """Killed three times in the midst of it; the result is that of one conversion."""
    path, wanted = example
    out = tmp_path / "a.db"
    for blocks in (2, 4, 3):
        process, told = start(path, out, pause=0.01)
        assert [told.recv() for _ in range(blocks)] == ["block"] * blocks
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
        with pytest.raises(BadInput, match="a.db: is not complete; give the command"):
            frames.read([str(out)])

    with ase.db.connect(out) as plain:
        there = plain.count()
    assert 0 < there < len(wanted) and there % 5 == 0
    monkeypatch.setattr(database, "BLOCK", 5)
    assert database.main([str(path), str(out)]) == 0
    assert f"{there} frames are there; going on" in capsys.readouterr().out
    assert_holds(out, wanted)


@needs_fork
def test_kill_while_a_second_file_is_added_leaves_the_first_one_whole(
        example, converted, tmp_path, capsys):
    """The database, once complete, is not, until the second file is all there."""
    path, wanted = example
    out = shutil.copy(converted, tmp_path / "a.db")
    other = copper(tmp_path / "b.xyz", ("energy", "forces", "virial"), count=23)
    process, told = start(other, out, pause=0.05)
    assert [told.recv() for _ in range(2)] == ["block"] * 2
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    with ase.db.connect(out) as plain:
        there = plain.count() - len(wanted)
    assert 0 < there < 23 and there % 5 == 0

    # nobody trains on it, and the first file alone does not make it complete
    with pytest.raises(BadInput, match="a.db: is not complete"):
        frames.read([str(out)])
    with pytest.raises(BadInput, match="a.db: holds a part of .*b.xyz; give that file too"):
        database.convert([str(path)], str(out))
    assert database.main([other, str(out)]) == 0
    assert f"{there} frames are there; going on" in capsys.readouterr().out
    assert_holds(out, [*wanted, *frames.iread(other)])


@needs_fork
def test_two_at_once_do_not_hurt_each_other(example, tmp_path):
    """One of them converts, the other one ends with a sentence, at once or when it notices."""
    path, wanted = example
    out = tmp_path / "a.db"
    said = {}
    both = [start(path, out, pause=0.05) for _ in range(2)]
    for process, told in both:
        while (word := told.recv()) == "block":
            pass
        status, said[status] = word
        process.join(60)
    assert said.keys() == {0, 1}, said
    assert "another process is writing into it" in said[1]
    assert_holds(out, wanted)


def test_database_that_another_process_has_just_begun_is_refused(example, tmp_path, capsys):
    """Its tables are there, ASE's version is not yet in them."""
    out = tmp_path / "a.db"
    with sqlite3.connect(out) as begun:
        begun.execute("CREATE TABLE systems (id INTEGER)")
        begun.execute("CREATE TABLE information (name TEXT, value TEXT)")
    begun.close()
    assert database.main([str(example[0]), str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: another process is writing into it") and said[-1] == "\n"
    assert said.count("\n") == 1


def test_others_wait_from_the_look_at_the_metadata_on(example, tmp_path, monkeypatch):
    """Nobody can write between the look at what is there and the writing."""
    path, _ = example
    out = str(tmp_path / "a.db")
    look = database.metadata_now
    tried = []

    def look_while_another_tries(connection):
        found = look(connection)
        other = sqlite3.connect(out, timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()
        tried.append(out)
        return found

    monkeypatch.setattr(database, "metadata_now", look_while_another_tries)
    database.convert([str(path)], out)
    assert tried


def test_progress_is_a_line_now_and_then_in_a_file(example, tmp_path, capsys):
    path, wanted = example
    assert database.main([str(path), str(tmp_path / "a.db")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: {len(wanted)} frames",
        f"note: not read of {path}: bandgap, e_per_atom_relaxed, ef_per_atom, energy_per_atom, "
        f"magmom, magmom of the sites, uncorrected_total_energy",
        f"{tmp_path / 'a.db'} is complete"]


# ─── Memory ──────────────────────────────────────────────────────────────────────────────────────

# what getrusage calls the peak may be that of the parent: the kernel's own count is not
PEAKS = """
import json, re, sys
from tools import database
database.BLOCK = {block}
peaks = []
for path in {paths}:
    if path.endswith(".db"):
        assert database.main([path[:-3] + ".json", path]) == 0
    else:
        content = json.load(open(path))
    status = open("/proc/self/status").read()
    peaks.append(1024 * float(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]))
print("peaks", *peaks)
"""


def peak_memory(*paths: Path, block: int) -> np.ndarray:
    """Peak memory so far of a process, bytes, after each path: a database to make, a JSON to load.

    A database is made of the JSON of its name.
    """
    code = PEAKS.format(block=block, paths=[str(path) for path in paths])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return np.array(done.stdout.rsplit("peaks", 1)[1].split(), float)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_large_file_is_streamed_in_bounded_memory(tmp_path):
    """10 MB more in the file are below 25 MB more in memory; read at once, they are over 60."""
    small = mptrj_like(tmp_path / "small.json", 4e6, mean_log=4.0)
    large = mptrj_like(tmp_path / "large.json", 14e6, mean_log=4.0)
    in_turn = (small.with_suffix(".db"), large.with_suffix(".db"), small, large)
    grown = np.diff(peak_memory(*in_turn, block=50))  # the small file has several blocks, too
    print(f"{grown[0] / 1e6:.0f} MB more streamed, {grown[2] / 1e6:.0f} MB more at once")
    assert grown[0] < 25e6 < 60e6 < grown[2], grown


def measure(gigabytes: float, folder: Path) -> None:
    """Convert a large file, and read it again in random order."""
    path = mptrj_like(folder / "large.json", 1e9 * gigabytes, different=2000, mean_log=3.1)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    start = time.perf_counter()
    peak, = peak_memory(folder / "large.db", block=database.BLOCK)
    seconds = time.perf_counter() - start

    some = frames.read([str(folder / "large.db")])
    print(f"{len(some)} frames in {seconds:.0f} s, {len(some) / seconds:.0f} frames/s, "
          f"peak memory {peak / 1e6:.0f} MB, "
          f"database {(folder / 'large.db').stat().st_size / 1e9:.2f} GB")

    for column in ("atom_counts", "energies", "volumes", "materials", "elements", "fingerprint"):
        start = time.perf_counter()
        getattr(some, column)()
        print(f"{column:<12} {time.perf_counter() - start:6.2f} s")
    rows = np.random.default_rng(0).integers(0, len(some), 3000)
    start = time.perf_counter()
    for row in rows:
        some[row]
    print(f"read at random: {len(rows) / (time.perf_counter() - start):.0f} frames/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options.gigabytes, Path(temporary))
