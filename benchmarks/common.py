"""What the benchmark scripts share: where things are, crystals, clocks, hardware, results files."""
from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ase.build
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
WORK = ROOT / "runs" / "benchmarks"  # what is converted, trained or compiled on the way
sys.path.insert(0, str(ROOT))  # facet.py and train_small.py are not installed

# Files to train on, and files to test on by name, within the folder that --data names
SETS = {
    "Si": (["mlearn/Si_train.extxyz"], {"Si": "mlearn/Si_test.extxyz"}),
    "Li": (["mlearn/Li_train.extxyz"], {"Li": "mlearn/Li_test.extxyz"}),
    "AcAc": (["acac/train_300K.xyz", "acac/isolated_atoms.xyz"],
             {"AcAc, 300 K": "acac/test_MD_300K.xyz", "AcAc, 600 K": "acac/test_MD_600K.xyz"}),
    "NbMoTaW": (["nbmotaw/train_13k.xyz"],
                {"NbMoTaW, elements": "nbmotaw/test_elements.xyz",
                 "NbMoTaW, binaries": "nbmotaw/test_binaries.xyz",
                 "NbMoTaW, quaternaries": "nbmotaw/test_multinary.xyz"}),
    "MPtrj": (["mptrj_train.extxyz"], {"MPtrj": "mptrj_test.extxyz"}),  # made by `tenths`
    "crystals": (["crystals/crystals_train.json.gz"],
                 {"crystals": "crystals/crystals_test.json.gz"}),
}


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)


# ─── Data and crystals ───────────────────────────────────────────────────────────────────────────


def tenths(data: Path) -> None:
    """A thousand frames of MPtrj, whole materials at a time: 8 tenths to train on, 1 each to
    validate and to test. Written to WORK, once.
    """
    import ase.io

    if (WORK / "mptrj_test.extxyz").exists():
        return
    frames = ase.io.read(data / "mptrj1k" / "mptrj-random-1k.xyz", ":")
    material = np.array([atoms.info["mptrj_traj_id"] for atoms in frames])
    shuffled = np.random.default_rng(0).permutation(np.unique(material))
    parts = np.array_split(shuffled, 10)
    WORK.mkdir(parents=True, exist_ok=True)
    for name, members in (("train", parts[:8]), ("valid", parts[8:9]), ("test", parts[9:])):
        rows = np.flatnonzero(np.isin(material, np.concatenate(members)))
        ase.io.write(WORK / f"mptrj_{name}.extxyz", [frames[row] for row in rows])


def data_files(data: Path, name: str) -> tuple[list[Path], dict[str, Path]]:
    """Files of a set to train on, and those to test on by name.

    JSON is converted to a database once, in WORK; MPtrj is split there.
    """
    def ready(path: str) -> Path:
        if path.startswith("mptrj_"):
            tenths(data)
            return WORK / path
        if ".json" in path:
            from tools import database

            WORK.mkdir(parents=True, exist_ok=True)
            converted = WORK / Path(path).with_suffix("").with_suffix(".db").name
            database.convert([str((data / path).resolve())], str(converted))
            return converted
        return (data / path).resolve()

    train, tests = SETS[name]
    return [ready(path) for path in train], {label: ready(path) for label, path in tests.items()}


def read_set(data: Path, name: str) -> tuple:
    """The frames of a set to train on, and those to test on by name (tools.frames.Frames).

    Tests leave out frames with an element that is not in training: one of MPtrj's has actinium.
    """
    from tools import frames

    files, tests = data_files(data, name)
    train = frames.read([str(path) for path in files])
    parts = {}
    for label, path in tests.items():
        found = frames.read([str(path)])
        known = found.compositions(np.array(train.elements())).sum(1)  # [F] atoms
        parts[label] = found.take(np.flatnonzero(known == found.atom_counts()))
    return train, parts


def rattled(crystal: ase.Atoms, distance: float) -> ase.Atoms:
    rng = np.random.default_rng(0)
    crystal.positions += rng.normal(0, distance, (len(crystal), 3))
    return crystal


def silicon(n: int) -> ase.Atoms:
    """8 n³ atoms."""
    return rattled(ase.build.bulk("Si", cubic=True) * (n, n, n), 0.05)


def atoms_in(crystal: str) -> int:
    """Of a name such as "Si 512"."""
    return int(crystal.split()[-1])


def each_layer(model, part: str, make: Callable) -> None:
    """Replace one part of every layer of a Facet by make(l_in, l_out)."""
    T = model.config.layers
    l = [0] + [model.config.degree] * (T - 1) + [0]  # noqa: E741
    for t, layer in enumerate(model.layers):
        setattr(layer, part, make(l[t], l[t + 1]))


# ─── Clocks ──────────────────────────────────────────────────────────────────────────────────────


def clock(job: Callable, now: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one run; with now=time.process_time those of the processor."""
    start = now()
    job()
    return 1000 * (now() - start)


def in_turn(jobs: dict, seconds: float, now: Callable[[], float] = time.perf_counter) -> dict:
    """Median milliseconds of each job.

    All run once a round until the seconds are spent; the first round is left out.
    """
    rounds = []
    end = np.inf
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append([clock(job, now) for job in jobs.values()])
        if len(rounds) == 1:
            end = time.perf_counter() + seconds
    return dict(zip(jobs, np.median(rounds[1:], 0).tolist(), strict=True))


# ─── The machine ─────────────────────────────────────────────────────────────────────────────────


def hardware() -> str:
    """Name of the processor, number of cores."""
    name = platform.processor()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(": ")[1]
                break
    return f"{name}, {os.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def environment() -> dict[str, str]:
    """The settings of memory and threads that the shell gave."""
    settings = ("MALLOC_", "OMP_", "GOMP_", "MKL_")
    return {name: value for name, value in os.environ.items() if name.startswith(settings)}


def peak_GB(usage=None) -> float:
    """What this process has held at most, Python and PyTorch included; or one whose usage is given.
    """
    import resource  # not on Windows

    usage = usage or resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return usage.ru_maxrss * unit / 1e9


def run_program(command: list, folder: Path | str, **settings: str) -> tuple[str, float, float]:
    """What a program says, its CPU-seconds, and the GB that its largest process held at most.

    settings: added to its environment. SystemExit with its last words if it fails. For Linux and
    macOS.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=folder, stdout=log, stderr=log,
            env=os.environ | settings)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        said = log.read()
    if status:
        words = " ".join(str(word) for word in command)
        sys.exit(f"{words} failed: {' '.join(said.strip().splitlines()[-1:])}")
    return said, usage.ru_utime + usage.ru_stime, peak_GB(usage)


# ─── Results ─────────────────────────────────────────────────────────────────────────────────────


def columns(rows: list[dict]) -> dict:
    """Rows of a table → columns: {"a": [1, 2], "b": {"c": [3, 4]}}; None for what is missing."""
    table = {}
    keys = dict.fromkeys(key for row in rows for key in row)
    for key in keys:
        values = [row.get(key) for row in rows]
        nested = any(isinstance(value, dict) for value in values)
        table[key] = columns([value or {} for value in values]) if nested else values
    return table


def rows(table: dict) -> list[dict]:
    """Columns of a table → its rows; the inverse of `columns`."""
    plain = {key: rows(column) if isinstance(column, dict) else column
             for key, column in table.items()}
    count = len(next(iter(plain.values()), []))
    return [{key: column[i] for key, column in plain.items()} for i in range(count)]


def rounded(x):
    """Floats to four significant digits, at any depth; NaN, which JSON lacks, to None."""
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [rounded(value) for value in x]
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    if isinstance(x, (float, np.floating)):
        return float(f"{x:.4g}") if np.isfinite(x) else None
    return x


def compact(x, indent: str = "") -> str:
    """JSON with a line for each entry of a dict, and one for each list of numbers or words."""
    inner = indent + " "
    if isinstance(x, dict) and x:
        entries = []
        for key, value in x.items():
            name = json.dumps(key, ensure_ascii=False)
            entries.append(f"{inner}{name}: {compact(value, inner)}")
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(x, list) and any(isinstance(value, (dict, list)) for value in x):
        entries = [f"{inner}{compact(value, inner)}" for value in x]
        return "[\n" + ",\n".join(entries) + f"\n{indent}]"
    return json.dumps(x, ensure_ascii=False)


def read_results(name: str) -> dict:
    """What benchmarks/results/NAME.json holds; nothing if there is none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(name: str, content: dict) -> None:
    """benchmarks/results/NAME.json: the numbers, and what measured them.

    "made" has hardware, versions and command of each run. Where content keeps numbers of the file
    that is there, it has to keep that file's "made", too.
    """
    # paths of one machine help nobody
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv]
    run = {
        "hardware": hardware(),
        "versions": versions("torch", "numpy", "scipy", "ase"),
        "command": shlex.join(["python", *words]),
    }
    made = content.get("made", [])
    if run not in made:
        made = [*made, run]
    save(name, {**content, "made": made})


def save(name: str, content: dict) -> None:
    """Write a results file as it is, compactly."""
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"{name}.json.part"
    part.write_text(compact(rounded(content)) + "\n", encoding="utf-8")
    part.replace(RESULTS / f"{name}.json")
