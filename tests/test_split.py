"""Tests of what is held back for validation and test, with many seeds on sets of all shapes.

    pytest tests/test_split.py
"""
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from tools import database, frames, sets
from tools.labels import MATERIAL_KEYS, BadInput, labelled
from tools.sets import deal, is_trajectory, shortcomings
from tools.suspicions import apart

SEEDS = range(20)
USES = ("to validate", "to test")
MLEARN = Path(__file__).resolve().parents[2] / "shared" / "data" / "mlearn"  # beside the checkout


@pytest.fixture(autouse=True, scope="module")
def judged_once():
    """What is a trajectory does not depend on the seed: it is found out once for each set."""
    known = {}

    def once(some):
        key = (*map(id, some.parts), some.rows.tobytes())
        if key not in known:
            known[key] = is_trajectory(some), some.parts  # which stay: their ids are the key
        return known[key][0]

    with mock.patch.object(sets, "is_trajectory", once):
        yield


def frame(symbols: str, shift=0.0, material: str = "", group: str = "", number: int = 0,
          file: str = "a", cell: float = 4.0) -> Atoms:
    """Atoms on a line, periodic if there is a cell, moved by `shift` [N, 3] Å."""
    atoms = Atoms(symbols)
    atoms.positions[:, 2] = 2.0 * np.arange(len(atoms))
    atoms.positions += shift
    atoms.set_cell(np.diag([cell, cell, 2.0 * len(atoms)]))
    atoms.pbc = cell > 0
    return labelled(atoms, -1.0, np.zeros((len(atoms), 3)), source=f"{file}, frame {number}",
                    material=material or f"{file}: {atoms.symbols}, run 1", group=group)


def numbered(crystals: list[Atoms], file: str = "a") -> list[Atoms]:
    """The crystals, as frames of a file in this order."""
    for number, atoms in enumerate(crystals):
        atoms.info["source"] = f"{file}, frame {number}"
    return crystals


def motion(count: int, symbols: str = "Cu2", **more) -> list[Atoms]:
    """A trajectory: two atoms that swing, forty frames to a period."""
    phase = np.arange(6).reshape(2, 3)
    return numbered([frame(symbols, 0.3 * np.sin(2 * np.pi * k / 40 + phase), **more)
                     for k in range(count)])


def rattled(count: int, symbols: str = "Cu2", seed: int = 0, **more) -> list[Atoms]:
    """Frames that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    atoms = len(Atoms(symbols))
    return [frame(symbols, rng.normal(0, 0.1, (atoms, 3)), **more) for _ in range(count)]


# ─── Sets of all shapes ──────────────────────────────────────────────────────────────────────────

def one_element() -> list[Atoms]:
    """As mlearn's silicon: cells of several sizes, two kinds of dynamics, few surfaces."""
    crystals = rattled(57, "Si3", group="Vacancy") + rattled(55, "Si4", group="Elastic")
    crystals += [frame(f"Si{size + 5}", group="Surface") for size in range(12)]
    return numbered(crystals + motion(90, "Si2", group="AIMD"))


def two_formulas() -> list[Atoms]:
    """By turns, of one file."""
    pairs = zip(rattled(60, "NaCl"), rattled(60, "KCl"), strict=True)
    return numbered([atoms for pair in pairs for atoms in pair])


def trajectory() -> list[Atoms]:
    return motion(230)


def named(sizes: np.ndarray) -> list[Atoms]:
    """So many frames of each material, whose names the file has."""
    crystals = []
    for material, size in enumerate(sizes):
        crystals += rattled(size, "Si2", seed=material, material=f"mp-{material}")
    return numbered(crystals)


def many_materials() -> list[Atoms]:
    """Two thousand, of one frame to fifty."""
    return named(np.clip(np.random.default_rng(0).geometric(0.3, 2000), 1, 50))


def unequal_materials() -> list[Atoms]:
    """Nine have a tenth of the frames each, eleven others what is left."""
    return named(np.array([50] * 9 + [5] * 11))


def formulas() -> list[Atoms]:
    """Thirty, each in cells of two sizes."""
    crystals = []
    for number in range(30):
        crystals += rattled(2, f"Cu{number + 1}Au") + rattled(2, f"Cu{2 * number + 2}Au2")
    return numbered(crystals)


def free_atoms() -> list[Atoms]:
    """Three of them, one in the middle, in a group of their own."""
    loose = [frame(symbol, group="isolated", cell=0.0) for symbol in ("H", "C", "O")]
    crystals = rattled(70, "CO", group="pairs")
    return numbered([loose[0], *crystals[:30], loose[1], *crystals[30:], loose[2]])


def dimers() -> list[Atoms]:
    """Three kinds, a curve of forty distances each: no cell, no group."""
    crystals = []
    for symbols in ("H2", "CO", "O2"):
        for distance in np.linspace(0, 2, 40):
            crystals.append(frame(symbols, [[0, 0, 0], [0, 0, distance]], cell=0.0))
    return numbered(crystals)


def several_files() -> list[Atoms]:
    """Trajectories of one material in three files, of 63, 39 and 10 frames."""
    crystals = []
    for file, count in (("a", 63), ("b", 39), ("c", 10)):
        crystals += numbered(motion(count, material="mp-1"), file)
    return crystals


def one_large_material() -> list[Atoms]:
    """Thirty that are named, of which one has every seventh frame: too much to hold back."""
    return named(np.array([20] + [4] * 29))


SHAPES = (one_element, two_formulas, trajectory, many_materials, unequal_materials, formulas,
          free_atoms, dimers, several_files, one_large_material)


@cache
def set_of(shape) -> frames.Frames:
    """Each file is a part of its own."""
    crystals = shape()
    files = {}
    for atoms in crystals:
        files.setdefault(atoms.info["source"].split(",")[0], []).append(atoms)
    return frames.Frames([frames.InMemory(images, file) for file, images in files.items()])


@cache
def splits_of(shape) -> list[tuple[frames.Frames, ...]]:
    """Training, validation and test set by each seed."""
    return [frames.split(set_of(shape), seed, USES) for seed in SEEDS]


def sources(some) -> list[str]:
    return [atoms.info["source"] for atoms in some]


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_hold_a_tenth_of_the_frames_each_and_lose_none(shape):
    some = set_of(shape)
    tenth = (len(some) - frames.free_atoms(some).sum()) / 10
    seen = set()
    for parts in splits_of(shape):
        rows = np.concatenate([part.rows for part in parts])
        assert (rows[np.lexsort(rows.T[::-1])] == some.rows).all(), "one is lost or doubled"
        assert len(rows) == len(some)
        for part in parts[1:]:
            assert 0.8 * tenth <= len(part) <= 1.2 * tenth
        seen.add(rows.tobytes())
    assert len(seen) >= 15, "seeds split alike"


@pytest.mark.parametrize("shape", SHAPES)
def test_one_seed_always_splits_alike(shape):
    again = frames.split(set_of(shape), 7, USES)
    for one, two in zip(again, splits_of(shape)[7], strict=True):
        assert (one.rows == two.rows).all()


@pytest.mark.parametrize("shape", (many_materials, unequal_materials, formulas))
def test_whole_materials_are_held_back(shape):
    """Those that the file names, or else reduced formulas."""
    def names(part):
        if shape is formulas:
            return {atoms.symbols.formula.reduce()[0].format("hill") for atoms in part}
        return set(part.materials())

    for parts in splits_of(shape):
        train, valid, test = map(names, parts)
        assert not train & valid and not train & test and not valid & test
        if shape is not unequal_materials:
            assert len(valid) > 1 and len(test) > 1, "one material alone is a matter of luck"


def test_a_material_with_more_than_a_tenth_of_the_frames_is_divided():
    """And so are the others: frames are held back one by one, and it is where they are."""
    inside = [sum(0 in part.materials() for part in parts) for parts in splits_of(
        one_large_material)]
    assert min(inside) >= 1 and np.mean(inside) > 2
    said = []
    frames.split(set_of(one_large_material), 0, USES, said.append)
    assert "by single frames (132)" in said[0], "four happen to be near each other in turn"


@pytest.mark.parametrize("shape", (one_element, two_formulas, free_atoms))
def test_every_group_is_in_every_part_in_proportion(shape):
    """Within what a block of five frames may change."""
    whole = Counter(atoms.info["group"] for atoms in set_of(shape))
    whole.pop("isolated", None)
    for parts in splits_of(shape):
        for part in parts[1:]:
            found = Counter(atoms.info["group"] for atoms in part)
            assert set(found) == set(whole)
            assert all(abs(found[group] - count / 10) <= 5 for group, count in whole.items())


def test_split_of_a_seed_stays_what_it_is():
    """Checkpoints are refused where their training set changes: another split ends old runs."""
    held = [frames.split(frames.in_memory(crystals), 3)[1].rows[:, 1].tolist()
            for crystals in (rattled(30), named(np.full(30, 2)), motion(60))]
    assert held == PINNED


PINNED = [[0, 20, 28], [0, 1, 40, 41, 56, 57], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("box", (0.0, 20.0))
def test_free_atoms_are_trained_on(box):
    """Also those of a material that is held back; others are split as if they were not there."""
    for train, valid, test in splits_of(free_atoms):
        assert frames.free_atoms(train).sum() == 3
        assert not {len(atoms) for atoms in (*valid, *test)} & {1}

    loose = labelled(Atoms("Li", cell=[box] * 3, pbc=box > 0), -1.0, material="mp-0")
    crystals = named(np.full(40, 2))
    more = frames.in_memory([loose, *crystals])
    for seed in SEEDS:
        _, *held = frames.split(more, seed, USES)
        _, *without = frames.split(frames.in_memory(crystals), seed, USES)
        assert [sources(part) for part in held] == [sources(part) for part in without]

    # the control: one atom in a small cell is a crystal like any other
    dense = frames.in_memory(numbered([frame("Li", cell=3.0) for _ in range(30)]))
    assert len(frames.split(dense, 0, USES)[2]) == 3


# ─── Trajectories ────────────────────────────────────────────────────────────────────────────────

def lengths(rows: np.ndarray) -> list[int]:
    """Of the stretches of consecutive frames."""
    return np.diff(np.flatnonzero(np.diff(rows, prepend=-9, append=10 ** 9) != 1)).tolist()


@pytest.mark.parametrize("count", (5, 19, 21, 39, 41, 50, 99, 100, 140, 1000))
def test_trajectory_is_held_back_in_blocks(count):
    """The control: the same frames in random order are held back one by one."""
    crystals = motion(count)
    some = frames.in_memory(crystals)
    for seed in SEEDS:
        train, *held = frames.split(some, seed, USES)
        for part in held:
            assert len(part) == 1 if count < 20 else 0.8 * count <= 10 * len(part) <= 1.2 * count
            assert min(lengths(part.rows[:, 1])) >= min(5, len(part))
        assert len(train) + sum(map(len, held)) == count

    if count >= 21:
        mixed = [crystals[i] for i in np.random.default_rng(0).permutation(count)]
        _, _, test = frames.split(frames.in_memory(mixed), 0, USES)
        assert len(lengths(test.rows[:, 1])) > len(test) / 2


@pytest.mark.parametrize("shape", (one_element, dimers, several_files))
def test_trajectories_among_others_are_held_back_in_blocks(shape):
    """Each file, material and group by itself, in blocks of five frames or more."""
    for parts in splits_of(shape):
        for part in parts[1:]:
            kinds = {}
            for atoms, (file, row) in zip(part, part.rows, strict=True):
                if atoms.info["group"] in ("", "AIMD"):
                    kinds.setdefault((file, atoms.info["material"]), []).append(row)
            assert kinds and min(min(lengths(rows)) for rows in kinds.values()) >= 5


def test_interleaved_trajectories_are_blocks_of_each():
    """Frames of one element by turns with those of another: every second frame of the file."""
    turns = [motion(100, symbols) for symbols in ("Cu2", "Ni2")]
    some = frames.in_memory(atoms for pair in zip(*turns, strict=True) for atoms in pair)
    for seed in SEEDS:
        _, *held = frames.split(some, seed, USES)
        for part in held:
            for first in set(part.rows[:, 1] % 2):
                here = part.rows[part.rows[:, 1] % 2 == first, 1] // 2
                assert min(lengths(here)) >= 5


def test_periodic_motion_is_a_trajectory_and_rattled_frames_are_none():
    """Also where half of the frames are a whole period, after which frames are near again."""
    swings = frames.in_memory(motion(80))
    assert apart(swings[0], swings[40]) < 1e-9 < 0.01 < apart(swings[0], swings[1])
    assert is_trajectory(swings) and not is_trajectory(frames.in_memory(rattled(80)))


# ─── Units to parts ──────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("sizes", (
    [10] * 9 + [1] * 11, [76] * 13 + [2] * 7, [50] * 20, [1] * 20, [1] * 29, [4] * 9 + [5],
    [6] * 12 + [1] * 28), ids=str)
def test_units_of_any_size_make_a_tenth(sizes):
    unit = np.repeat(np.arange(len(sizes)), sizes)
    for seed in SEEDS:
        part = deal(unit, np.zeros(len(unit), int), 2, np.random.default_rng(seed))
        counts = np.bincount(part, minlength=3)
        assert (np.abs(counts[1:] / len(unit) - 0.1) <= 0.02 + 1e-9).all()
        assert all(len(set(part[unit == one])) == 1 for one in range(len(sizes)))


@pytest.mark.parametrize("sizes", ([3] * 5 + [100], [50, 1, 2, 3, 4], [3] * 40, [2] * 60), ids=str)
def test_groups_are_in_as_many_parts_as_their_size_allows(sizes):
    """Of three frames one in each part, of two not both held back; if there is room for that."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    for seed in SEEDS:
        part = deal(np.arange(len(group)), group, 2, np.random.default_rng(seed))
        tenth = np.bincount(part)[1:].min()
        assert (np.abs(np.bincount(part)[1:] - len(group) / 10) <= 0.5).all()
        present = [len(set(part[group == one])) for one in range(len(sizes))]
        if len(sizes) <= tenth:
            assert present == [min(3, size) for size in sizes]
        assert all(0 in part[group == one] for one in range(len(sizes))), "nothing to train on"


def test_too_few_frames_cannot_be_split():
    loose = [frame("Li", cell=0.0), frame("O", cell=0.0)]
    for crystals in ([], rattled(2), loose, [*loose, *rattled(2)]):
        with pytest.raises(BadInput, match="cannot be split"):
            frames.split(frames.in_memory(crystals), 0, USES)
    assert [len(part) for part in frames.split(frames.in_memory(rattled(3)), 0, USES)] == [1, 1, 1]
    assert [len(part) for part in frames.split(frames.in_memory(rattled(2)), 0)] == [1, 1]


# ─── What is said of it ──────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("shape, how", (
    (one_element, "in blocks of consecutive frames (18) and by single frames (124)"),
    (two_formulas, "by single frames (120)"), (trajectory, "in blocks of consecutive frames (20)"),
    (many_materials, "by material (2000)"), (formulas, "by reduced formula (30)")))
def test_line_says_how_and_by_what_frames_were_held_back(shape, how):
    said = []
    parts = frames.split(set_of(shape), 3, USES, said.append)
    assert said[0].startswith(f"note: held back {how}: ") and len(said) == 1
    for part, use in zip(parts, ("to train", *USES), strict=True):
        assert f"{len(part)} {use}" in said[0]


def test_line_counts_the_frames_of_the_largest_groups():
    crystals = []
    for number in range(12):
        crystals += rattled(30 - number, group=f"kind {number}")
    said = []
    frames.split(frames.in_memory(numbered(crystals)), 0, ("to test",), said.append)
    assert ": 265 to train (kind 0 27, kind 1 26, " in said[0]
    assert said[0].count("4 more groups") == 2


def test_few_frames_and_groups_that_a_part_lacks_are_warned_of():
    few = frames.split(frames.in_memory(rattled(30)), 0, USES)
    text, = shortcomings(dict(zip(("to train", *USES), few, strict=True)))
    assert text.startswith("few frames (3 to validate, 3 to test): ")

    crystals = [*rattled(150, group="many"), *rattled(2, group="two"), *rattled(1, group="one"),
                frame("Si", group="free", cell=0.0)]
    parts = dict(zip(("to train", *USES), frames.split(frames.in_memory(crystals), 0, USES)))
    found = shortcomings(parts)
    assert len(found) == 2 and not any("few" in text or "free" in text for text in found)
    assert sorted(text.split(";")[0].split("groups ")[1] for text in found) == ["one", "two, one"]

    # the control: nothing is said of parts of enough frames, and of every group
    enough = frames.split(frames.in_memory([*rattled(150), *rattled(50, group="b")]), 0, USES)
    assert shortcomings(dict(zip(("to train", *USES), enough, strict=True))) == []


def test_materials_are_named_by_files_not_by_their_runs(tmp_path):
    """Also in a database; and a frame of Python has a name only if one was given."""
    for number, key in enumerate((*MATERIAL_KEYS, "")):
        crystals = []
        for i in range(6):
            atoms = ase.build.bulk("Cu") * (1, 1, 1 + i // 3)
            atoms.rattle(0.01, seed=i)
            atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
            atoms.info = {key: f"m-{i % 2}"} if key else {}
            crystals.append(atoms)
        path = str(tmp_path / f"{number}.extxyz")
        ase.io.write(path, crystals)
        database.convert([path], path + ".db")
        for some in (frames.read([path]), frames.read([path + ".db"])):
            assert some.named().tolist() == [bool(key)] * 6
            assert some.groups()[1] == [""]
    given = [labelled(crystals[0], 0.0), labelled(crystals[0], 0.0, material="this one")]
    assert frames.in_memory(given).named().tolist() == [False, True]


# ─── Real sets ───────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ("Si", "Li"))
def test_mlearn_has_every_group_in_every_part(name):
    if not MLEARN.is_dir():
        pytest.skip("mlearn's data are not here")
    some = frames.read([str(MLEARN / f"{name}_train.extxyz")])
    groups = set(some.groups()[1])
    assert len(groups) == 4
    for seed in SEEDS:
        for part in frames.split(some, seed, USES)[1:]:
            assert 0.8 * len(some) <= 10 * len(part) <= 1.2 * len(some)
            assert {atoms.info["group"] for atoms in part} == groups
