"""How fast Facet and its peers are, on the same crystals, in one run: per call, per training step, and how much memory.

    python benchmarks/speed.py --mace envs/mace/bin/python --sevenn envs/sevenn/bin/python --nequip envs/nequip/bin/python
    python benchmarks/speed.py --mace … --quick                 # 2 rounds, 8 and 64 atoms; writes nothing
    python benchmarks/speed.py --mace … --device cuda           # the same table on a GPU

benchmarks/README.md tells how to make the environments; a peer without one is left out. Prints, at one thread and at two:
    bare         ms for energy, forces and stress of the model alone, neighbours given
    calculator   the same through each package's ASE calculator, with new positions every time
    train        ms for a training step: 4 cells of 64 silicon atoms, loss on energy and forces, Adam
    memory       GB that a fresh process holds at most for 512 and 4,096 silicon atoms, bare model; and before the first call
and the ratios that were wanted beside what was reached ("headline"). All models float32, cutoff 5 Å, 89 species (the cost
of MACE depends on their number, and SevenNet-0 has 89) or, in a second and shorter table, 4.

Each model sits in a process of its own (peers.py). In every round each is asked in turn for one call, so that only one works
at a time and all see the same state of the machine; numbers are medians of 9 rounds, after a warm-up: of 3 where a call takes
more than 7 s or the crystal has more than 512 atoms, of 1, the first, where it takes more than 15 s. The count is in the
results, and so is the CPU time, which other programs on the machine disturb less. Left out is what would need more than 16 GB
or 30 s a call.
OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT=0 for all: with spinning barriers two threads suffer from any other program.
That slows the compiled NequIP, which is therefore timed at two threads with spinning barriers as well.
Writes benchmarks/results/speed.json and figures/speed.png (speed_cuda for a GPU).
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product

import numpy as np

from common import ROOT, atoms_in, read_results, write_results

PYTHONS = {"Facet": "facet", "MACE": "mace", "SevenNet-0": "sevenn", "NequIP": "nequip"}  # the option, by a model's first word
MODELS = ["Facet", "MACE 128x0e", "MACE 128x0e+128x1o", "MACE 64x0e+64x1o", "SevenNet-0", "NequIP", "NequIP compiled",
          "NequIP compiled, spinning"]
ON_GPU = [*MODELS[:-1], *(f"{name} cuequivariance" for name in MODELS if "MACE" in name)]
FEW = ["Facet", "MACE 128x0e", "MACE 64x0e+64x1o", "NequIP"]  # with 4 species; the cost of NequIP does not depend on them
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
CRYSTALS = ["Si 8", "Mo 54", "Si 64", "NaCl 128", "Si 512", "Si 1000", "Si 4096"]  # growing: a process's peak memory never falls
STEP = "4 x Si 64"
GOALS = [("bare", ("Si 64", "Si 512"), ["MACE 128x0e"], 6), ("bare", ("Si 64", "Si 512"), ["MACE 64x0e+64x1o"], 3),
         ("bare", ("Si 64", "Si 512"), ["SevenNet-0"], 15),
         ("bare", ("Si 64", "Si 512"), ["NequIP compiled", "NequIP compiled, spinning"], 5),
         ("train", (STEP,), ["MACE 128x0e"], 8), ("train", (STEP,), ["MACE 64x0e+64x1o"], 2.5)]  # the fastest of the names
MEMORY_LIMIT = 16.0  # GB


# ─── The workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

class Worker:
    """A model in its own process. `about` is what it said of itself, `error` why it cannot be used."""

    def __init__(self, python: str, model: str, species: int, threads: int, device: str):
        spinning = model.endswith(", spinning")
        environment = {k: v for k, v in os.environ.items() if k not in PASSIVE} | ({} if spinning else PASSIVE)
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [python, "benchmarks/peers.py", model.removesuffix(", spinning"), "--species", str(species),
                   "--threads", str(threads), "--device", device]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.about = self.reply()
        self.error = self.about.get("error")

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"its process ended with status {self.process.wait()}"}

    def ask(self, job: str, crystal: str) -> dict:
        with suppress(BrokenPipeError):  # reply tells that
            print(json.dumps({"job": job, "crystal": crystal}), file=self.process.stdin, flush=True)
        return self.reply()

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def start(pythons: dict[str, str], names: list[str], species: int, threads: int, device: str) -> dict[str, Worker]:
    """One worker per model, those that could be started."""
    workers = {}
    for name in names:
        worker = Worker(pythons[PYTHONS[name.split()[0]]], name, species, threads, device)
        if worker.error:
            print(f"  {name} is left out: {worker.error}", flush=True)
            worker.close()
        else:
            workers[name] = worker
    return workers


# ─── The measurement ─────────────────────────────────────────────────────────────────────────────────────────────────

def rounds_of(seconds: float, atoms: int, most: int) -> int:
    """How many calls of a model are timed after the warm-up, from the seconds that the warm-up took."""
    return 0 if seconds > 15 else min(3, most) if seconds > 7 or atoms > 512 else most


def time_all(workers: dict[str, Worker], job: str, crystal: str, most: int) -> dict[str, dict]:
    """Median ms of each model; one call of each in a round. Before them the warm-up, two calls for a training step: e3nn's
    TorchScript is slow until it has seen its inputs twice."""
    times = {name: [] for name in workers}
    for _ in range(2 if job == "train" else 1):
        warm_up = {name: workers[name].ask(job, crystal) for name in times}
        for name, answer in warm_up.items():
            if "error" in answer:
                print(f"    {name}, {job} {crystal}: {answer['error']}", flush=True)
                del times[name]
    wanted = {name: rounds_of(warm_up[name]["ms"] / 1000, atoms_in(crystal), most) for name in times}
    for i in range(most):
        for name in times:
            if i < wanted[name]:
                times[name].append(workers[name].ask(job, crystal))
    result = {}
    for name, answers in times.items():
        answers = [answer for answer in answers if "ms" in answer] or [warm_up[name]]
        result[name] = {key: float(np.median([answer[key] for answer in answers])) for key in ("ms", "cpu_ms")}
        result[name] |= {"rounds": len(answers), "peak_GB": max(answer["peak_GB"] for answer in answers)}
    return result


def affordable(workers: dict[str, Worker], bare: dict, crystal: str) -> tuple[dict[str, Worker], dict[str, str]]:
    """The workers that can take a crystal of more than 512 atoms, and why others cannot: they would need too much memory, as
    their growth for 512 atoms tells, or more than 30 s a call."""
    scale, able, left_out = atoms_in(crystal) / 512, {}, {}
    for name, worker in workers.items():
        if (known := bare.get("Si 512", {}).get(name)) is None or scale <= 1:
            able[name] = worker
            continue
        base = worker.about["ready_GB"]
        memory, seconds = base + scale * (known["peak_GB"] - base), scale * known["ms"] / 1000
        if memory > MEMORY_LIMIT:
            left_out[name] = f"would need about {memory:.0f} GB"
        elif seconds > 30:
            left_out[name] = f"would take about {seconds:.0f} s a call"
        else:
            able[name] = worker
    return able, left_out


def show(job: str, table: dict[str, dict], names: list[str]) -> None:
    """Milliseconds: a line per model, a column per crystal."""
    print(f"  {job:28s}" + "".join(f"{crystal:>12s}" for crystal in table))
    for name in names:
        numbers = (f"{row[name]['ms']:12.1f}" if name in row else f"{'-':>12s}" for row in table.values())
        print(f"  {name:28s}" + "".join(numbers), flush=True)


def measure(workers: dict[str, Worker], crystals: list[str], most: int, calculators: bool) -> dict:
    """The tables of one number of threads and species: {"bare" | "calculator" | "train": {crystal: {model: numbers}}}."""
    result = {"bare": {}, "left_out": {}, "calculator": {}, "train": {}}
    for crystal in crystals:
        able, left_out = affordable(workers, result["bare"], crystal)
        result["left_out"] |= {crystal: left_out} if left_out else {}
        for name, reason in left_out.items():
            print(f"    {crystal}, {name}: {reason}, left out")
        result["bare"][crystal] = time_all(able, "bare", crystal, most)
    show("bare", result["bare"], list(workers))
    for crystal in crystals if calculators else []:
        if crystal.startswith("Si") and atoms_in(crystal) <= 512:
            result["calculator"][crystal] = time_all(workers, "calculator", crystal, most)
    if result["calculator"]:
        show("calculator", result["calculator"], list(workers))
    eager = {name: worker for name, worker in workers.items() if "compiled" not in name}
    result["train"][STEP] = time_all(eager, "train", "Si 64", most)
    show("train", result["train"], list(eager))
    return result


def memory(workers: dict[str, Worker], bare: dict) -> dict[str, dict]:
    """GB at most, and before the first call; Python and PyTorch included."""
    table = {name: {"ready": worker.about["ready_GB"]} for name, worker in workers.items()}
    for crystal in ("Si 512", "Si 4096"):
        for name, numbers in bare.get(crystal, {}).items():
            table[name][crystal] = numbers["peak_GB"]
    for name, row in table.items():
        print(f"  {name:28s}" + "   ".join(f"{key} {value:.2f} GB" for key, value in row.items()))
    return table


# ─── What was wanted ─────────────────────────────────────────────────────────────────────────────────────────────────

def goals(runs: dict) -> dict:
    """Ratios at the worst crystal and number of threads, for each number of species."""
    table = {}
    for species in sorted({run["species"] for run in runs.values()}, reverse=True):
        chosen = [run for run in runs.values() if run["species"] == species]
        for job, crystals, peers, goal in GOALS:
            rows = [run[job][crystal] for run in chosen for crystal in crystals if crystal in run[job]]
            ratios = [min(row[peer]["ms"] for peer in peers if peer in row) / row["Facet"]["ms"]
                      for row in rows if "Facet" in row and set(peers) & set(row)]
            if ratios:
                add_goal(table, f"{job}, {peers[0]} / Facet, {species} species", min(ratios), "at least", goal)
        shares = []
        for run in chosen:
            ours = run["memory"].get("Facet", {})
            for crystal in ("Si 512", "Si 4096"):
                theirs = [row[crystal] for name, row in run["memory"].items() if name != "Facet" and crystal in row]
                shares += [ours[crystal] / min(theirs)] if theirs and crystal in ours else []
        if shares:
            add_goal(table, f"memory, Facet / smallest peer, {species} species", max(shares), "at most", 1)
    return table


def add_goal(table: dict, name: str, value: float, sign: str, goal: float) -> None:
    reached = value >= goal if sign == "at least" else value <= goal
    table[name] = {"value": value, "goal": f"{sign} {goal}", "reached": reached}
    print(f"  {name:58s} {value:7.2f}   goal: {sign} {goal}, {'reached' if reached else 'MISSED'}")


def title(run: dict) -> str:
    return "GPU" if run["device"] == "cuda" else f"{run['threads']} thread{'s' * (run['threads'] > 1)}"


def run_all(args: argparse.Namespace, names: list[str], pythons: dict[str, str], crystals: list[str]) -> dict[str, dict]:
    """Every number of threads, with 89 species and with 4."""
    runs = {}
    for threads, species in product(args.threads, args.species):
        run, few = {"species": species, "threads": threads, "device": args.device}, species != 89
        name = f"{species} species, {title(run)}"
        chosen = [n for n in names if (n in FEW if few else True) and (threads > 1 or "spinning" not in n)]
        workers = start(pythons, chosen, species, threads, args.device)
        run["load_before"] = os.getloadavg()[0]
        print(f"{name}, load {run['load_before']:.1f}", flush=True)
        sizes = [crystal for crystal in crystals if not few or crystal in ("Si 64", "Si 512")]
        run |= measure(workers, sizes, 2 if args.quick else 9, calculators=not few)
        run |= {"load_after": os.getloadavg()[0], "memory": memory(workers, run["bare"]),
                "models": {n: worker.about for n, worker in workers.items()}}
        for worker in workers.values():
            worker.close()
        runs[name] = run
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facet", default=sys.executable, metavar="PYTHON", help="by default the Python that runs this")
    for peer in ("mace", "sevenn", "nequip"):
        parser.add_argument(f"--{peer}", metavar="PYTHON", help="of the environment with that package")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[])
    parser.add_argument("--species", type=int, nargs="+", default=[89, 4], choices=(89, 4))
    parser.add_argument("--sizes", type=int, nargs="+", default=[], help="numbers of atoms, of 8 54 64 128 512 1000 4096")
    parser.add_argument("--add", action="store_true", help="keep what else the results file has: numbers of threads or species")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 8 and 64 atoms; writes nothing")
    args, begin = parser.parse_args(), time.perf_counter()
    args.threads = args.threads or ([1] if args.quick or args.device == "cuda" else [1, 2])
    pythons = {peer: os.path.abspath(path) for peer in PYTHONS.values() if (path := getattr(args, peer))}
    for peer, path in pythons.items():
        if not os.access(path, os.X_OK):
            parser.error(f"--{peer}: {path} is not a Python that can be run")
    for peer in sorted(set(PYTHONS.values()) - set(pythons)):
        print(f"{peer} is left out: no --{peer} PYTHON")
    sizes = args.sizes or ([8, 64] if args.quick else [atoms_in(crystal) for crystal in CRYSTALS])
    names = [name for name in (MODELS if args.device == "cpu" else ON_GPU) if PYTHONS[name.split()[0]] in pythons]
    runs = run_all(args, names, pythons, [crystal for crystal in CRYSTALS if atoms_in(crystal) in sizes])
    name = "speed" if args.device == "cpu" else "speed_cuda"
    kept = read_results(name) if args.add else {}
    runs = kept.get("runs", {}) | runs
    print("goals, at the worst crystal and number of threads")
    headline = goals(runs)
    if not args.quick:
        memory_settings = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
        write_results(name, {"made": kept.get("made", []), "headline": headline, "environment": PASSIVE | memory_settings, "dtype": "float32", "cutoff_A": 5.0,
                             "seconds": time.perf_counter() - begin, "runs": runs})
        from pictures import draw_results  # late: matplotlib's memory would count as that of the workers (Linux)
        draw_results(name)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
