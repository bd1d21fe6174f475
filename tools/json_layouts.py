"""JSON as MPtrj, MatPES and mlearn have it, to frames: streamed, whatever the size of the file.

Each layout has its own small table of names and orders (see Layout). A file is a list of documents,
JSON Lines (a document on each line), or MPtrj's object of objects. tools.frames.iread calls this.
"""
from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import NamedTuple

from ase import Atoms
from ase.data import atomic_numbers

from tools.labels import (
    ASE_ORDER,
    KBAR,
    MATERIAL_KEYS,
    VASP_ORDER,
    BadInput,
    Names,
    Runs,
    Unread,
    find_labels,
    group_of,
    labelled,
    read_labels,
    word,
)


class Layout(NamedTuple):
    """What a JSON file calls its labels, where that is not the usual name, the first that is there
    counts; and the order of a stress of six numbers. Stresses are in kbar with VASP's sign in every
    layout."""
    names: dict[str, tuple[str, ...]]
    order: str


# {material: {frame: {structure, corrected_total_energy, force, stress 3 × 3}}}
MPTRJ = Layout({"energy": ("corrected_total_energy", "energy"), "forces": ("force", "forces")}, "")

# [{structure, energy, forces, stress of six, matpes_id}]
MATPES = Layout({}, ASE_ORDER)

# [{structure, group, description, outputs: {energy, forces, virial_stress of six}}]
MLEARN = Layout({"stress": ("virial_stress",)}, VASP_ORDER)

# a list of structures with labels; only a stress of nine numbers says what it means
LIST = Layout({}, "")

ORDERED_ONLY = "only ordered crystals can be read"

# hydrogen under names that ASE does not know: an isotope has the same forces
ISOTOPES = {"D": "H", "T": "H"}


def layout_of(keys: list[str], labels: dict) -> Layout:
    """The layout, from what sets it apart."""
    if keys:
        return MPTRJ
    if "matpes_id" in labels:
        return MATPES
    if "virial_stress" in labels:
        return MLEARN
    return LIST


class Text:
    """JSON text of a file of any size: a buffer that is filled as it is read."""

    def __init__(self, file, size: int):
        self.file = file
        self.size = size
        self.text = ""
        self.at = 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, comma or colon. Raises EOFError."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n,:":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            self.text = self.file.read(self.size)
            self.at = 0
            if not self.text:
                raise EOFError("the file ends too early")

    def more(self) -> bool:
        """Whether the file goes on."""
        try:
            return bool(self.peek())
        except EOFError:
            return False

    def is_lines(self) -> bool:
        """Whether the first line, if the buffer holds it, is a structure by itself."""
        if not self.more():
            return False
        line = self.text[self.at:].partition("\n")[0]
        try:
            first = json.loads(line) if line[0] == "{" else {}
        except json.JSONDecodeError:
            return False
        return not {"structure", "sites"}.isdisjoint(first)

    def skip(self) -> None:
        """Go on behind the next character."""
        self.peek()
        self.at += 1

    def value(self):
        """The next value, whole. One that the buffer cuts off is tried again with twice the text.

        Raises json.JSONDecodeError.
        """
        self.peek()
        more = self.size
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # a mistake far from the end of the buffer is no cut
                far = len(self.text) - error.pos > 2 ** 20
                new = "" if far else self.file.read(more)
                if not new:
                    raise
                self.text = self.text[self.at:] + new
                self.at = 0
                more *= 2


def stream(file, size: int = 2 ** 22) -> Iterator[tuple[list[str], dict]]:
    """The objects of [{…}, …], or of {key: {key: {…}, …}, …} with their two keys, one by one.

    Or those of JSON Lines: a document on each line. Never is the whole text in memory. Raises
    EOFError, ValueError.
    """
    text = Text(file, size)
    if text.is_lines():
        while text.more():
            yield [], text.value()
        return
    if text.peek() == "[":
        text.skip()
        while text.peek() != "]":
            yield [], text.value()
        return

    if text.peek() != "{":
        raise ValueError(f"begins with {text.peek()!r}, not with a list or an object")
    text.skip()
    while text.peek() != "}":
        material = text.value()
        if text.peek() != "{":
            raise ValueError(f"{material} holds no frames; MPtrj has "
                             f"{{material: {{frame: {{…}}}}}}")
        text.skip()
        while text.peek() != "}":
            frame = text.value()
            if text.peek() != "{":
                raise ValueError(f"{material}, {frame} is no structure; MPtrj has "
                                 f"{{material: {{frame: {{…}}}}}}")
            yield [material, frame], text.value()
        text.skip()


def crystal(structure: dict, source: str) -> Atoms:
    """A pymatgen Structure or Molecule, as JSON, as Atoms. Raises BadInput for a disordered one."""
    numbers = []
    for site in structure["sites"]:
        if len(site["species"]) != 1:
            raise BadInput(f"{source}: a site is shared by several elements; {ORDERED_ONLY}")
        species = site["species"][0]
        occupancy = species.get("occu", 1)
        if abs(occupancy - 1) > 1e-6:
            raise BadInput(f"{source}: a site is occupied to {occupancy:g}; {ORDERED_ONLY}")
        symbol = ISOTOPES.get(species["element"], species["element"])
        if symbol not in atomic_numbers:
            raise BadInput(f"{source}: {symbol!r} is no element")
        numbers.append(atomic_numbers[symbol])

    # a molecule has no lattice
    lattice = structure.get("lattice")
    if not lattice:
        return Atoms(numbers, [site["xyz"] for site in structure["sites"]])

    pbc = lattice.get("pbc") or [True, True, True]
    if all("xyz" in site for site in structure["sites"]):
        positions = [site["xyz"] for site in structure["sites"]]
        return Atoms(numbers, positions, cell=lattice["matrix"], pbc=pbc)
    positions = [site["abc"] for site in structure["sites"]]
    return Atoms(numbers, scaled_positions=positions, cell=lattice["matrix"], pbc=pbc)


def material_of(keys: list[str], frame: dict, source: str) -> str:
    """MPtrj's key, a name in the frame, or mlearn's group and description; else the frame's own."""
    if keys:
        return word(keys[0])
    for key in MATERIAL_KEYS:
        if frame.get(key) not in (None, ""):
            return word(frame[key])
    original = (frame.get("provenance") or {}).get("original_mp_id")
    if original is not None:
        return word(original)
    if "description" in frame:
        return word(f"{frame.get('group', '')}{frame['description']}")
    return source


def frame_of_json(keys: list[str], frame: dict, atoms: Atoms, names: Names, source: str,
                  unread: Unread, bare: bool) -> Atoms:
    """One frame of a JSON file with its labels. Raises BadInput."""
    labels = {**frame, **(frame.get("outputs") or {})}
    layout = layout_of(keys, labels)
    for name in ("structure", "outputs", "provenance", "description"):
        labels.pop(name, None)
    for name in ((frame.get("structure") or {}).get("sites") or [{}])[0].get("properties") or {}:
        labels[f"{name} of the sites"] = True
    found = find_labels(labels, names, layout.names, source, unread, bare)

    # the layout tells the order of its own stress, not that of another name
    own = layout.names.get("stress", ("stress",))
    order = layout.order if not names.stress or names.stress in own else ""
    results = read_labels(found, atoms, names.virial(), source, unread, order, KBAR)
    return labelled(atoms, **results, source=source, material=material_of(keys, frame, source),
                    group=group_of(frame))


def open_text(path: str):
    """A JSON file as text, perhaps compressed."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: a byte-order mark is skipped


def documents(path: str) -> Iterator[tuple[str, list[str], dict, Atoms]]:
    """Source, keys, all that is there, and structure of every frame of a JSON file, streamed.

    Raises BadInput for what is no structure.
    """
    with open_text(path) as file:
        for i, (keys, frame) in enumerate(stream(file)):
            source = f"{path}, frame {keys[1] if keys else i}"
            if not isinstance(frame, dict):
                raise BadInput(f"{source}: is no structure with labels, but {str(frame)[:40]!r}")
            structure = frame if "sites" in frame else frame.get("structure")
            if structure is None:
                raise BadInput(f"{source}: has no structure; it has {', '.join(frame)}")
            try:
                atoms = crystal(structure, source)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise BadInput(f"{source}: is no structure as pymatgen writes it "
                               f"({type(error).__name__}: {error})") from error
            yield source, keys, frame, atoms


def structures_of_json(path: str) -> Iterator[Atoms]:
    """Structures of a JSON file, with their material and group in info. Raises BadInput."""
    for source, keys, frame, atoms in documents(path):
        atoms.info = {"material": material_of(keys, frame, source), "group": group_of(frame)}
        yield atoms


def frames_of_json(path: str, names: Names, unread: Unread, bare: bool) -> Iterator[Atoms]:
    """Frames of a JSON file; bare: they may lack labels. Raises BadInput for what is no frame."""
    runs = Runs()
    for source, keys, frame, structure in documents(path):
        atoms = frame_of_json(keys, frame, structure, names, source, unread, bare)
        if atoms.info["material"] == source and not bare:  # no name of it
            atoms.info["material"] = f"{path}: {atoms.symbols}, run {runs.number(atoms)}"
        yield atoms
