"""One frame: its labels, their names and orders, and what is checked of it.

A frame is an ase.Atoms with labels in atoms.calc.results: "energy" (eV), "forces" (eV/Å), "stress"
(six numbers in ASE's order and sign, eV/Å³). tools.frames is where files become frames.

TABLE is the one place that names the labels: reader, database, losses, log and report follow it. A
new label is one entry there, and an output of that name in Facet.atomic_outputs.
"""
from __future__ import annotations

from collections import deque, namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from tools import suspicions

# VASP writes the pressure on the cell, in kbar; ASE the tension, in eV/Å³
KBAR = -0.1 * units.GPa

# a lone atom whose images are all farther away than this is a free atom, Å
FREE = 10.0

# info of a frame that names its material or its group, if a file has it
MATERIAL_KEYS = ("mp_id", "mptrj_traj_id", "material_id", "material")
GROUP_KEYS = ("config_type", "group")

# columns that ask for weights: there are none here, every frame counts the same
WEIGHTS = ("config_weight", "config_energy_weight", "config_forces_weight", "config_stress_weight",
           "config_virials_weight", "energy_weight", "force_weight", "forces_weight",
           "stress_weight", "virial_weight", "virials_weight", "weight")


class BadInput(ValueError):
    """Input that cannot be used: one sentence with the file, the frame and the cure."""


# ─── The table of labels ──────────────────────────────────────────────────────────────────────────


class Unit(NamedTuple):
    """How errors of a label are shown."""

    text: str            # such as eV/Å; in names of columns it is eV_per_A
    factor: float = 1.0  # a number of the frames times this is in the unit
    digits: int = 4      # after the point
    width: int = 8       # of the number, in characters

    def column(self, quantity: str, kind: str) -> str:
        """("force", "mae") → force_mae_eV_per_A."""
        unit = self.text.replace("/", "_per_").replace("Å", "A").replace(" ", "_")
        return f"{quantity}_{kind}_{unit}"


@dataclass
class Label:
    """What there is to know of a label."""

    name: str                    # in atoms.calc.results, in files unless --NAME says otherwise
    unit: str                    # in frames and files
    per_atom: bool = False       # a row for each atom, else one for each crystal
    shape: tuple[int, ...] = ()  # of a row; (6,): a symmetric tensor, in ASE's order
    expected: bool = False       # a frame has one of those expected; if it lacks another: a note
    also: tuple[str, ...] = ()   # other usual names in files

    # What the model makes of it
    output: str = ""             # name among the outputs of the model; "": as above
    extensive: bool = False      # the label grows with the crystal: errors count per atom
    per_volume: bool = False     # the output is the label times the volume, errors count per atom

    # Its loss
    weight: float | None = 1.0   # --NAME_weight by default; None: 1, and no such option
    grows: bool = False          # the weight grows, from a twentieth to all of it in the end
    scaled: bool = False         # errors are divided by the force RMS of the training set
    sharper: float = 1.0         # --huber is divided by this
    loss_digits: int = 4         # of the loss on the screen

    # Its errors
    quantity: str = ""           # in names of columns; "": as the name
    log: Unit | None = None      # in metrics.csv and on the screen; None: as in frames
    report: Unit | None = None   # in the report and result.json; None: as in the log

    def __post_init__(self):
        self.output = self.output or self.name
        self.quantity = self.quantity or self.name
        self.log = self.log or Unit(self.unit)
        self.report = self.report or self.log._replace(width=25)

    def array(self, results: dict, atoms: int) -> np.ndarray:
        """The label of a frame, [N, …] or […], nan if it has none; a tensor with all nine numbers.

        results: of a calculator; atoms: N.
        """
        value = results.get(self.name)
        if value is None:
            value = np.full(self.full_shape(atoms), np.nan)
        return voigt_6_to_full_3x3_stress(value) if self.shape == (6,) else np.asarray(value, float)

    def full_shape(self, atoms: int) -> tuple[int, ...]:
        """Of the label of so many atoms."""
        return (atoms, *self.shape) if self.per_atom else self.shape


# New ones come last: databases hold lists in this order
TABLE = (
    Label("energy", "eV", expected=True, extensive=True,
          weight=3.2, grows=True, scaled=True, sharper=3.2, loss_digits=5,
          log=Unit("meV/atom", 1000, 2), report=Unit("meV/atom", 1000, 2, 21)),
    Label("forces", "eV/Å", per_atom=True, shape=(3,), expected=True, also=("force",),
          weight=None, scaled=True,
          quantity="force", log=Unit("meV/Å", 1000, 1, 7), report=Unit("eV/Å", 1, 4, 27)),
    Label("stress", "eV/Å³", shape=(6,), output="virial", per_volume=True,
          weight=0.3, scaled=True,
          log=Unit("GPa", 1 / units.GPa, 3), report=Unit("GPa", 1 / units.GPa, 3, 18)),
)
LABELS = tuple(label.name for label in TABLE)


class Names(namedtuple("Names", LABELS, defaults=[""] * len(LABELS))):
    """Names of the labels in the files, compared without regard to case; "": the usual ones.

    A stress with "virial" in its name (but not "stress") is a virial in eV.
    """

    def virial(self) -> bool:
        """Whether the name of the stress is that of a virial."""
        name = self.stress.lower()
        return "virial" in name and "stress" not in name


USUAL = Names()


def name_help(label: Label) -> str:
    """What --help says of the option that names a label."""
    virial = "; if virial is in the name: of the virial, eV" if label.name == "stress" else ""
    return f"name of the {label.name} in the files ({label.unit}{virial}); by default {label.name}"


# ─── Frames ───────────────────────────────────────────────────────────────────────────────────────


def labelled(atoms: Atoms, *labels, source: str = "here", material: str = "", group: str = "",
             **more) -> Atoms:
    """A frame: the geometry of `atoms`, and nothing else of it, with labels.

    labels: in the order of LABELS, or by name; units and shapes as in TABLE; None where there is
    none. Constraints are dropped: they would set forces to zero. Without a material, the frame is
    one of its own. Raises TypeError for a label that is not in the table.
    """
    values = {**dict(zip(LABELS, labels)), **more}
    if len(labels) > len(LABELS) or not set(values) <= set(LABELS):
        raise TypeError(f"labels are {', '.join(LABELS)}, not {labels} {', '.join(more)}")
    frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    frame.calc = SinglePointCalculator(frame)  # which itself takes only labels that ASE knows
    for name, value in values.items():
        if value is not None:
            value = np.array(value, float)
            frame.calc.results[name] = value if value.ndim else float(value)
    frame.info = {"source": source, "material": material or source, "group": group}
    return frame


def check(atoms: Atoms) -> Atoms:
    """The frame, if it can be trained on. Raises BadInput."""
    source = atoms.info["source"]
    results = atoms.calc.results
    if len(atoms) == 0:
        raise BadInput(f"{source}: has no atoms; remove the frame")
    if not atoms.numbers.all():
        raise BadInput(f"{source}: an atom is no element, but X; name it, or remove the frame")

    # everything is a finite number, and there are as many as there should be
    parts = [("a position", atoms.positions), ("a cell vector", atoms.cell.array)]
    for label in TABLE:
        if label.name not in results:
            continue
        shape = np.shape(results[label.name])
        wanted = label.full_shape(len(atoms))
        if shape != wanted:
            raise BadInput(f"{source}: {len(atoms)} atoms, but {label.name} of shape {shape}, not "
                           f"{wanted}")
        what = f"a component of the {label.quantity}" if wanted else f"the {label.quantity}"
        parts.append((what, results[label.name]))
    for what, value in parts:
        if not np.isfinite(value).all():
            raise BadInput(f"{source}: {what} is NaN or infinite; remove the frame or compute it "
                           f"again")

    periodic = atoms.cell.array[atoms.pbc]
    if len(periodic) and np.linalg.matrix_rank(periodic) < len(periodic):
        raise BadInput(f"{source}: periodic, but its cell has no volume; remove the frame, or "
                       f"set its pbc to F F F")
    return atoms


def is_free(atoms: Atoms) -> bool:
    """Whether this is one atom without neighbours: no periodic image of it is near."""
    if len(atoms) != 1 or (atoms.cell.lengths()[atoms.pbc] < FREE).any():
        return False
    return len(neighbor_list("i", atoms, FREE)) == 0


def key_of(labels: dict, name: str) -> str | None:
    """This name, or the same in other capitals, if a label has it; None if none has."""
    if labels.get(name) is not None:
        return name
    for other, value in labels.items():
        if isinstance(other, str) and other.lower() == name.lower() and value is not None:
            return other
    return None


def look_up(labels: dict, name: str):
    """The label of that name, or of that name in other capitals; None if there is none."""
    return labels.get(key_of(labels, name))


class Unread:
    """Names of what files hold and nobody reads: said once."""

    def __init__(self):
        self.names = set()
        self.read = set()  # labels that are found in any frame

    def add(self, there: dict, used: set[str]) -> None:
        """All that a frame has, but what is used of it."""
        for name, value in there.items():
            known = name in used or name in MATERIAL_KEYS or str(name).lower() in GROUP_KEYS
            same = name == "free_energy" and value == there.get("energy")
            nothing = value is None or (isinstance(value, str) and not value)
            if not known and not same and not nothing:
                self.names.add(str(name))

    def notes(self, where: str, without: Sequence[str] = ()) -> list[str]:
        """What to say of the files. without: labels that nobody wants."""
        weights = []
        others = []
        for name in sorted(self.names):
            for label, key in (("stress", "virial"), ("stress", "virials"),
                               ("energy", "free_energy")):
                if name.lower() == key and not {label} & (self.read | set(without)):
                    name = f"{name} (--{label} {name} reads it)"
            stress = "virial" in name.lower() or "stress" in name.lower()
            if name.lower() in WEIGHTS:
                weights.append(name)
            elif not stress or "stress" not in without:
                others.append(name)

        found = []
        if weights:
            found.append(f"note: {', '.join(weights)} of {where} are ignored: every frame counts "
                         f"the same")
        if others:
            found.append(f"note: not read of {where}: {', '.join(others)}")
        return found


def numbers_in(value, what: str, source: str) -> np.ndarray:
    """The label as an array. Raises BadInput if it holds anything but numbers."""
    try:
        return np.array(value, float)
    except (TypeError, ValueError):
        raise BadInput(f"{source}: {what} is not made of numbers, but "
                       f"{str(value)[:40]!r}") from None


def one_number(value, what: str, source: str) -> float:
    """The label as a float. Raises BadInput if it is not one number."""
    found = numbers_in(value, what, source)
    if found.size != 1:
        raise BadInput(f"{source}: {what} has {found.size} numbers, one is needed")
    return float(found.reshape(()))


def six_numbers(value, order: str, source: str) -> np.ndarray | None:
    """A stress of nine or six numbers as [6] in ASE's order, xx yy zz yz xz xy.

    order: that of six numbers in the file; "" if nobody knows. None for a stress that is all NaN.
    Raises BadInput for any other count, and for six numbers in an unknown order.
    """
    found = numbers_in(value, "the stress", source)
    if np.isnan(found).all():
        return None
    if found.size == 9:
        return full_3x3_to_voigt_6_stress(found.reshape(3, 3))
    if found.size != 6:
        raise BadInput(f"{source}: the stress has {found.size} numbers; nine are needed, or six")
    if not order:
        raise BadInput(f"{source}: six numbers of stress in an order that the file does not tell "
                       f"(VASP's xx yy zz xy yz xz or ASE's xx yy zz yz xz xy?); give all nine, "
                       f"or, in JSON, mark MatPES' layout by matpes_id, mlearn's by the name "
                       f"virial_stress")
    components = order.split()
    found = found.ravel()
    return np.array([found[components.index(pair)] for pair in ASE_ORDER.split()])


def word(name) -> str:
    """The name as text that does not look like a number: ASE's databases refuse that as a text."""
    text = str(name)
    if text in ("True", "False"):
        return "#" + text
    try:
        float(text)
    except ValueError:
        return text
    return "#" + text


def group_of(info: dict) -> str:
    """What the file calls the group of the frame."""
    for key in GROUP_KEYS:
        found = look_up(info, key)
        if found is not None and str(found):
            return word(found)
    return ""


def material_in(info: dict) -> str:
    """What the file calls the material of the frame; "" if it has no name."""
    for key in MATERIAL_KEYS:
        found = info.get(key)
        if found is not None and found is not True and str(found):  # True: a key without a value
            return word(found)
    return ""


ASE_ORDER = "xx yy zz yz xz xy"
VASP_ORDER = "xx yy zz xy yz xz"


class Runs:
    """Numbers for runs of frames: what is of one run is of one material.

    Consecutive frames of one formula are a run. A frame that goes on where an earlier run of its
    formula ended (suspicions.alike: same cell, atoms near) belongs to that: trajectories may be
    written alternately. Only the last hundred runs are remembered.
    """

    def __init__(self):
        self.count = 0
        self.recent = deque(maxlen=100)  # formula, number and last frame of each run, latest last

    def number(self, atoms: Atoms) -> int:
        """The number of the run that the next frame of a file belongs to."""
        formula = str(atoms.symbols)
        found = None
        for run in reversed(self.recent):
            if run[0] == formula and (run is self.recent[-1] or suspicions.alike(run[2], atoms)):
                found = run
                break

        if found is None:
            self.count += 1
            number = self.count
        else:
            number = found[1]
            self.recent.remove(found)
        self.recent.append((formula, number, atoms))
        return number


def find_labels(there: dict, names: Names, usual: dict, source: str, unread: Unread,
                bare: bool = False) -> dict:
    """What a file says of each label of the table, under the name given or the first usual one.

    there: all that the frame has, by name; usual: {label: names}, its own names where there are
    none; unread: gets the names of all the rest. Raises BadInput if there is none of the labels
    that are expected, unless the frame may be bare.
    """
    found = {}
    used = set()
    for label in TABLE:
        given = getattr(names, label.name)
        usually = usual.get(label.name, (label.name, *label.also))
        keys = [key_of(there, name) for name in ([given] if given else usually)]
        key = next((key for key in keys if key is not None), None)
        found[label.name] = there.get(key)
        used.add(key)
        if key is not None:
            unread.read.add(label.name)
    unread.add(there, used)

    expected = [label.name for label in TABLE if label.expected]
    if bare or any(found[name] is not None for name in expected):
        return found
    lacking = " and no ".join(getattr(names, name) or name for name in expected)
    options = " and ".join(f"--{name}" for name in expected)
    there = ", ".join(map(str, there)) or "nothing else"
    raise BadInput(f"{source}: has no {lacking}; it has {there}. Tell names "
                   f"by {options}, or remove the frame")


def read_labels(found: dict, atoms: Atoms, virial: bool, source: str, unread: Unread,
                order: str = "", unit: float = 1.0) -> dict:
    """What a file says of the labels → what atoms.calc.results has. Raises BadInput.

    virial: what is found under stress is minus the volume times the stress, eV. A frame without a
    volume has no stress: `unread` is told. order: of six numbers of stress; unit: of the stress,
    in eV/Å³. One atom alone needs no forces: they are zero.
    """
    results = {}
    for label in TABLE:
        value = found[label.name]
        if value is None:
            continue
        if label.shape == (6,):
            if atoms.cell.rank < 3:
                unread.names.add(f"{label.name} of frames without a volume")
                continue
            value = six_numbers(value, order, source)
        elif label.full_shape(len(atoms)) == ():
            value = one_number(value, f"the {label.name}", source)
        else:
            value = numbers_in(value, label.name, source)
        results[label.name] = value

    if len(atoms) == 1 and results:
        results.setdefault("forces", np.zeros((1, 3)))
    if results.get("stress") is not None:
        stress = results["stress"]
        results["stress"] = -stress / atoms.get_volume() if virial else stress * unit
    return results
