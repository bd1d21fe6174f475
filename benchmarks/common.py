"""What the benchmark scripts share: where things are, crystals, clocks, hardware, results files."""
from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ase.build
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "figures"
sys.path.insert(0, str(ROOT))  # facet.py and train_small.py are not installed

SETS = {"Si": "mlearn/Si_{}.extxyz", "Li": "mlearn/Li_{}.extxyz", "crystals": "crystals/crystals_{}.json.gz"}  # train, test


def clock(job: Callable, now: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one run; with now=time.process_time those of the processor, which other programs disturb less."""
    start = now()
    job()
    return 1000 * (now() - start)


def in_turn(jobs: dict, seconds: float, now: Callable[[], float] = time.perf_counter) -> dict:
    """Median milliseconds of each job. All run once a round until the seconds are spent; the first is left out."""
    end, rounds = np.inf, []
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append([clock(job, now) for job in jobs.values()])
        end = time.perf_counter() + seconds if len(rounds) == 1 else end
    return dict(zip(jobs, np.median(rounds[1:], 0).tolist()))


def each_layer(model, part: str, make: Callable) -> None:
    """Replace one part of every layer of a Facet by make(l_in, l_out)."""
    l = [0] + [model.config.degree] * (model.config.layers - 1) + [0]
    for t, layer in enumerate(model.layers):
        setattr(layer, part, make(l[t], l[t + 1]))


def rattled(crystal: ase.Atoms, distance: float) -> ase.Atoms:
    crystal.positions += np.random.default_rng(0).normal(0, distance, (len(crystal), 3))
    return crystal


def silicon(n: int) -> ase.Atoms:
    """8 n³ atoms."""
    return rattled(ase.build.bulk("Si", cubic=True) * (n, n, n), 0.05)


def atoms_in(crystal: str) -> int:
    """Of a name such as "Si 512"."""
    return int(crystal.split()[-1])


def hardware() -> str:
    """Name of the processor, number of cores."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def read_results(name: str) -> dict:
    """What benchmarks/results/NAME.json holds; nothing if there is none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(name: str, content: dict, measured: bool = True) -> None:
    """benchmarks/results/NAME.json: the numbers, and hardware, versions and command of each run that measured some ("made").

    Where content keeps numbers of the file that is there, it has to keep that file's "made", too. measured=False adds no run.
    """
    RESULTS.mkdir(exist_ok=True)
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv]  # paths of one machine help nobody
    run = {"hardware": hardware(), "versions": versions("torch", "numpy", "scipy", "ase"), "command": shlex.join(["python", *words])}
    made = content.get("made", [])
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps({**content, "made": made + [run] * (measured and run not in made)}, indent=1) + "\n")
    part.replace(RESULTS / f"{name}.json")
