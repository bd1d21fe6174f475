"""A file in MPtrj's layout, larger than memory should be: frames per second converted, peak memory, training from the cache.

    python benchmarks/large_file.py                    # 2.2 GB, some minutes
    python benchmarks/large_file.py --gigabytes 11     # as large as MPtrj

Makes the file in --folder (by default a temporary one), with materials of one to some hundred atoms like those of MPtrj, then
trains for a few steps in a process of its own, once with the conversion and once with the cache that is there. Peak memory is that
of the whole process, training included. Writes benchmarks/results/large_file.json.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common import ROOT, write_results

ELEMENTS = ["H", "Li", "C", "N", "O", "F", "Na", "Mg", "Al", "Si", "P", "S", "Cl", "K", "Ca", "Ti", "Mn", "Fe", "Co", "Ni", "Cu", "Zn"]


def frame(rng: np.random.Generator) -> str:
    """One frame as MPtrj has it, with its many keys: a rattled simple-cubic arrangement of 1 to 200 atoms (mean 31), random labels."""
    n = int(np.clip(rng.lognormal(3.1, 0.8), 1, 200))
    side = int(np.ceil(n ** (1 / 3)))
    cell = 2.5 * side * np.eye(3) + rng.normal(0, 0.05, (3, 3))
    abc = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n] / side + rng.normal(0, 0.01, (n, 3))
    elements = rng.choice(rng.choice(ELEMENTS, 3), n)
    sites = [{"species": [{"element": str(e), "occu": 1}], "abc": a.tolist(), "xyz": x.tolist(), "label": str(e), "properties": {"magmom": 0.013}}
             for e, a, x in zip(elements, abc, abc @ cell)]
    forces = rng.normal(0, 0.2, (n, 3))
    return json.dumps({"structure": {"@module": "pymatgen.core.structure", "@class": "Structure", "charge": None, "sites": sites,
                                     "lattice": {"matrix": cell.tolist(), "a": 5.0, "b": 5.0, "c": 5.0, "alpha": 90.0, "volume": 125.0}},
                       "uncorrected_total_energy": -5.0 * n, "corrected_total_energy": -5.2 * n, "energy_per_atom": -5.2, "ef_per_atom": -0.5,
                       "e_per_atom_relaxed": -5.3, "bandgap": 0.0, "mp_id": "mp-1", "force": (forces - forces.mean(0)).tolist(),
                       "stress": rng.normal(0, 10, (3, 3)).tolist(), "magmom": [0.01] * n})


def make(path: Path, size: float) -> int:
    """Write at least `size` bytes; the number of frames. 2,000 different frames come again and again under new names."""
    rng, frames = np.random.default_rng(0), 0
    texts = [frame(rng) for _ in range(2000)]
    with open(path, "w") as file:
        file.write("{")
        while file.tell() < size:
            of_material = [f'"mp-{frames}-{i}-0": {texts[(frames + i) % len(texts)]}' for i in range(int(rng.integers(1, 20)))]
            file.write(("" if frames == 0 else ", ") + f'"mp-{frames}": {{{", ".join(of_material)}}}')
            frames += len(of_material)
        file.write("}")
    return frames


MEASURE = "import os, resource, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
          "finally: print('peak', max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"


def train(path: Path, folder: Path) -> dict:
    """A few steps of training: what conversion and start cost, and the peak memory in GB (of the larger of trainer and loader)."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURE, ROOT / "train_small.py", "--train", path, "--steps", "20", "--channels", "16", "--threads", "1"]
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rates = re.findall(r"(\d+) frames converted, (\d+) frames/s", done.stdout)
    waiting, padding = re.search(r"([\d.]+) % waiting for data", done.stdout)[1], re.search(r"(\d+) % of the neighbours", done.stdout)[1]
    return {"frames_per_s": int(rates[-1][1]) if rates else None, "peak_GB": int(re.search(r"peak (\d+)", done.stdout)[1]) * 1024 / 1e9,
            "seconds": time.perf_counter() - start, "waiting_percent": float(waiting), "padding_percent": int(padding)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", type=Path, help="where the file and its cache stay; by default they are removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        path = folder / "large.json"
        frames = make(path, 1e9 * args.gigabytes)
        print(f"{path}: {frames} frames, {path.stat().st_size / 1e9:.2f} GB", flush=True)
        content = {"frames": frames, "bytes": path.stat().st_size, "converted_and_trained": train(path, folder), "from_the_cache": train(path, folder)}
        cache, = (found for found in folder.glob("large.json.cache*") if found.is_dir())
        content["cache_bytes"] = sum(file.stat().st_size for file in cache.iterdir())
    for name in ("converted_and_trained", "from_the_cache"):
        print(name, content[name], flush=True)
    write_results("large_file", content)


if __name__ == "__main__":
    main()
