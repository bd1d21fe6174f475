"""How fast Facet and its peers are on the same crystals: per call, per training step; and memory.

    python benchmarks/speed.py --mace envs/mace/bin/python --sevenn envs/sevenn/bin/python \
        --nequip envs/nequip/bin/python
    python benchmarks/speed.py --mace … --quick         # 2 rounds, 8 and 64 atoms; writes nothing
    python benchmarks/speed.py --mace … --device cuda   # the same on a GPU
    python benchmarks/speed.py --against main           # facet.py beside a commit's: 2 minutes
    python benchmarks/speed.py --against main --quick   # few rounds, 8 and 64 atoms: 45 seconds

benchmarks/README.md tells how to make the environments; a peer without one is left out. Measured
at one thread and at two, with 89 species (the cost of MACE depends on their number, and SevenNet-0
has 89) and, in a shorter table, with 4; all in float32, cutoff 5 Å:

    bare         ms for energy, forces and stress of the model alone, neighbours given
    calculator   the same through each package's ASE calculator, new positions every time
    train        ms for a training step: 4 cells of 64 silicon atoms, Adam
    memory       GB that a fresh process holds at most, bare model

Each model sits in a process of its own (peers.py). In every round each is asked in turn for one
call, so that only one works at a time and all see the same state of the machine. Where a call takes
less than a second it is asked for two, and the second counts: in dynamics and in training calls
follow each other, and the caches are not full of another model. Numbers are medians of 9 rounds
after a warm-up: of 3 where one takes more than 7 s or the crystal has more than 512 atoms, of 1,
the first, where it takes more than 15 s. Left out is what would need more than 30 s or 16 GB, on a
GPU 0.9 of its memory. There Facet runs twice, as it is and replayed (tools/replay.py).

--against compares facet.py of a commit (old) and of the working tree (new) in the same way, at one
thread unless --threads says otherwise, by the present scripts, and writes no results. Besides, it
trains on five batches in turn as `python train_small.py` makes them, of its own data and of
--frames FILE, and on 512 atoms. "Times as fast" is old ms over new ms. Page faults are the pages of
memory that a call is the first to touch: fresh memory is slow to get. MB is by how much the process
has grown at most so far since the model and the first crystal were there, as density.py --sums
measures it: the last "bare" line tells that of a call, the last "train" line that of a step. Bare
and calculator take three times as many rounds as training.

At two threads any other program spoils the times, of small operations most of all: the load is
kept beside them. Writes benchmarks/results/speed.json and its picture (speed_cuda for a GPU).
"""
from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import ExitStack, closing, suppress
from itertools import islice, product
from pathlib import Path

import numpy as np
from common import ROOT, atoms_in, command_line, environment, read_results, write_results
from summary import M64, M128, NEQUIP, memory_share, speed_ratio

# The option that names a Python, by a model's first word
PYTHONS = {"Facet": "facet", "MACE": "mace", "SevenNet-0": "sevenn", "NequIP": "nequip"}
MODELS = ["Facet", M128, "MACE 128x0e+128x1o", M64, "SevenNet-0", "NequIP", NEQUIP]
ON_GPU = ["Facet", "Facet replayed", M128, f"{M128} cuequivariance", M64, f"{M64} cuequivariance",
          "SevenNet-0", "NequIP"]
FEW = ["Facet", M128, M64, "NequIP"]  # with 4 species; NequIP's cost does not depend on them

# Growing: a process's peak memory never falls
CRYSTALS = {
    "cpu": ["Si 8", "Si 64", "Si 512", "Si 4096"],
    "cuda": ["Si 8", "Si 64", "Si 512", "Si 4096", "Si 32768", "Si 110592"]}
STEP = "4 x Si 64"
BATCHES = 5  # of a training set, for --against


# ─── The workers ─────────────────────────────────────────────────────────────────────────────────


class Worker:
    """A model in its own process. about: what it said of itself; error: why it is of no use."""

    def __init__(self, python: str, model: str, species: int, threads: int, device: str,
                 tree: Path = ROOT):
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        command = [python, "benchmarks/peers.py", model, "--species", str(species)]
        command += ["--threads", count, "--device", device, "--tree", str(tree)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.about = self.reply()
        self.error = self.about.get("error")

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"its process ended with status {self.process.wait()}"}
        return json.loads(line)

    def ask(self, job: str, crystal: str) -> dict:
        with suppress(BrokenPipeError):  # reply tells that
            request = json.dumps({"job": job, "crystal": crystal})
            print(request, file=self.process.stdin, flush=True)
        return self.reply()

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def start(pythons: dict, names: list[str], species: int, threads: int, device: str) -> dict:
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


def crystals_of(args: argparse.Namespace) -> list[str]:
    """Those of the sizes that were asked for, the largest last."""
    return [name for name in CRYSTALS[args.device] if atoms_in(name) in args.sizes]


# ─── The measurement ─────────────────────────────────────────────────────────────────────────────


def rounds_of(seconds: float, atoms: int, most: int) -> int:
    """How many calls are timed after the warm-up, which took so many seconds."""
    if seconds > 15:
        return 0
    return min(3, most) if seconds > 7 or atoms > 512 else most


def time_all(workers: dict[str, Worker], job: str, crystal: str, most: int,
             numbers: tuple[str, ...] = ("ms", "cpu_ms")) -> dict[str, dict]:
    """Medians of these numbers for each model; one timed call of each in a round.

    Before them the warm-up, two calls for a training step: e3nn's TorchScript is slow until it has
    seen its inputs twice.
    """
    times = {name: [] for name in workers}
    for _ in range(2 if job == "train" else 1):
        warm_up = {name: workers[name].ask(job, crystal) for name in times}
        for name, answer in warm_up.items():
            if "error" in answer:
                print(f"    {name}, {job} {crystal}: {answer['error']}", flush=True)
                del times[name]

    wanted = {}
    for name in times:
        wanted[name] = rounds_of(warm_up[name]["ms"] / 1000, atoms_in(crystal), most)
    for i in range(most):
        for name in times:
            if i < wanted[name]:
                if warm_up[name]["ms"] < 1000:
                    workers[name].ask(job, crystal)
                times[name].append(workers[name].ask(job, crystal))

    result = {}
    for name, answers in times.items():
        answers = [answer for answer in answers if "ms" in answer] or [warm_up[name]]
        result[name] = {
            **{key: float(np.median([answer[key] for answer in answers])) for key in numbers},
            "rounds": len(answers),
            "peak_GB": max(answer["peak_GB"] for answer in answers)}
    return result


def affordable(workers: dict[str, Worker], bare: dict, crystal: str) -> tuple[dict, dict]:
    """The workers that can take a crystal of more than 512 atoms, and why others cannot.

    They would need too much memory, as their growth for 512 atoms tells, or more than 30 s a call.
    """
    scale = atoms_in(crystal) / 512
    able = {}
    left_out = {}
    for name, worker in workers.items():
        known = bare.get("Si 512", {}).get(name)
        if known is None or scale <= 1:
            able[name] = worker
            continue
        base = worker.about["ready_GB"]
        memory = base + scale * (known["peak_GB"] - base)
        seconds = scale * known["ms"] / 1000
        if memory > worker.about["limit_GB"]:
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
        cells = [f"{row[name]['ms']:.1f}" if name in row else "-" for row in table.values()]
        print(f"  {name:28s}" + "".join(f"{cell:>12s}" for cell in cells), flush=True)


def measure(workers: dict[str, Worker], crystals: list[str], most: int, calculators: bool) -> dict:
    """The tables of one number of threads and species, by job, crystal and model."""
    result = {"bare": {}, "left_out": {}, "calculator": {}, "train": {}}
    for crystal in crystals:
        able, left_out = affordable(workers, result["bare"], crystal)
        if left_out:
            result["left_out"][crystal] = left_out
        for name, reason in left_out.items():
            print(f"    {crystal}, {name}: {reason}, left out")
        result["bare"][crystal] = time_all(able, "bare", crystal, most)
    show("bare", result["bare"], list(workers))

    for crystal in crystals if calculators else []:
        if atoms_in(crystal) <= 512:
            result["calculator"][crystal] = time_all(workers, "calculator", crystal, most)
    if result["calculator"]:
        show("calculator", result["calculator"], list(workers))

    eager = {name: worker for name, worker in workers.items()
             if "compiled" not in name and "replayed" not in name}
    result["train"][STEP] = time_all(eager, "train", STEP, most)
    show("train", result["train"], list(eager))
    return result


def title(run: dict) -> str:
    if run["device"] == "cuda":
        return "GPU"
    return "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"


def run_all(args: argparse.Namespace, names: list[str], pythons: dict, crystals: list) -> dict:
    """Every number of threads, with 89 species and with 4."""
    runs = {}
    for threads, species in product(args.threads, args.species):
        few = species != 89
        chosen = [name for name in names if name in FEW] if few else names
        sizes = [crystal for crystal in crystals if crystal in ("Si 64", "Si 512") or not few]

        workers = start(pythons, chosen, species, threads, args.device)
        run = {"species": species, "threads": threads, "device": args.device}
        run["load_before"] = os.getloadavg()[0]
        name = f"{species} species, {title(run)}"
        print(f"{name}, load {run['load_before']:.1f}", flush=True)
        run |= measure(workers, sizes, 2 if args.quick else 9, calculators=not few)
        run["load_after"] = os.getloadavg()[0]
        run["models"] = {n: worker.about for n, worker in workers.items()}
        for worker in workers.values():
            worker.close()
        runs[name] = run
    return runs


def show_ratios(runs: dict) -> None:
    """Peers over Facet, at the worst crystal."""
    for species, threads in sorted({(run["species"], run["threads"]) for run in runs.values()}):
        print(f"{species} species, {threads} threads: peers' times over Facet's, the least ratio")
        for job, peer in (("bare", M128), ("bare", M64), ("bare", "SevenNet-0"), ("bare", NEQUIP),
                          ("train", M128), ("train", M64)):
            with suppress(ValueError):  # that peer was left out
                ratio = speed_ratio(runs, job, peer, threads, species)
                print(f"  {job:6s} {peer:20s} {ratio:6.2f}")
        with suppress(ValueError):
            print(f"  memory, of the most frugal peer's {memory_share(runs, species):6.2f}")


# ─── Two versions of facet.py ────────────────────────────────────────────────────────────────────


def export(commit: str, folder: Path) -> None:
    """The tree of a commit. SystemExit, in one sentence, for what git cannot give."""
    if commit.startswith("-"):  # git would take it for an option
        sys.exit(f"--against {commit}: no commit has such a name")
    command = ["git", "-C", str(ROOT), "archive", "--format=zip", commit]
    try:
        packed = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        sys.exit("--against: git is not installed")
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode().splitlines()[0]
        sys.exit(f"--against {commit}: git cannot give that commit ({reason})")
    zipfile.ZipFile(io.BytesIO(packed)).extractall(folder)
    if not (folder / "facet.py").exists():
        sys.exit(f"--against {commit}: has no facet.py")


def write_batches(files: tuple[str, ...], path: str) -> None:
    """The first batches of a training on these files, or on the embedded set, to an extxyz file.

    Prints how many atoms they have on average. In a process of its own, for what Linux counts as
    the peak memory of a worker begins with that of the process which starts it.
    """
    import ase.io

    from tools.batches import Samples, endless_batches
    from tools.frames import BadInput, load_sets
    from tools.statistics import statistics
    from train_small import Settings

    # The order in which the trainer takes the frames
    settings = Settings(train=files)
    try:
        frames, _, _ = load_sets(settings, ROOT / "runs", None)
        config, _ = statistics(frames, settings)
        batches, _ = endless_batches(Samples(frames, config), settings)
    except BadInput as error:
        sys.exit(str(error))

    # Its first batches, without labels
    chosen = []
    for number, rows in enumerate(islice(batches, BATCHES)):
        for row in rows:
            atoms = frames[int(row)].copy()
            atoms.info = {"batch": number}
            chosen.append(atoms)
    ase.io.write(path, chosen, format="extxyz")
    print(round(sum(map(len, chosen)) / BATCHES))


def batches_of(files: tuple[str, ...], path: Path) -> str:
    """What a worker knows the batches of a training set by. SystemExit if it cannot be read."""
    code = f"import speed; speed.write_batches({files!r}, {str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks",
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.splitlines()[-1])
    return f"{path} {done.stdout.split()[-1]}"


def jobs_of(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, str]]:
    """The crystals of each job, by what the table calls them, the largest last.

    Writes the batches of training sets to the folder.
    """
    sizes = crystals_of(args)
    sets = {"EMT metals": ()}
    if args.frames:
        sets[Path(args.frames).name] = (os.path.abspath(args.frames),)
    train = {}
    for number, (name, files) in enumerate(sets.items()):
        crystal = batches_of(files, folder / f"{number}.extxyz")
        train[f"{BATCHES} x {atoms_in(crystal)} of {name}"] = crystal

    same = {name: name for name in sizes}
    train |= {name: name for name in (STEP, f"1 x {sizes[-1]}")}
    return {"bare": same, "calculator": same, "train": train}


def line(title: str, *cells: str) -> str:
    """A line of the table: old and new ms, times as fast, and old → new of the others."""
    padded = [cell.rjust(width) for cell, width in zip(cells, (9, 9, 15, 19, 15, 12), strict=True)]
    return title.ljust(32) + "".join(padded)


def row(title: str, old: dict, new: dict) -> str:
    """The line of one crystal. Above 1 times as fast: the new version takes less time."""
    cells = [f"{old['ms']:.2f}", f"{new['ms']:.2f}", f"{old['ms'] / new['ms']:.3f}"]
    for key, digits in (("cpu_ms", 2), ("faults", 0), ("MB", 0)):
        cells.append(f"{old[key]:.{digits}f} → {new[key]:.{digits}f}")
    return line(title, *cells)


def compare(trees: dict[str, Path], job: str, crystals: dict[str, str], threads: int, device: str,
            most: int) -> None:
    """Print a line for each crystal: the facet.py in trees["old"] and in trees["new"].

    In fresh processes: what one held before changes how fast it gets memory.
    """
    with ExitStack() as stack:
        workers = {}
        for version, tree in trees.items():
            worker = Worker(sys.executable, "Facet", 89, threads, device, tree)
            workers[version] = stack.enter_context(closing(worker))
            if worker.error:
                sys.exit(f"facet.py, {version}: {worker.error}")

        for name, crystal in crystals.items():
            found = time_all(workers, job, crystal, most, ("ms", "cpu_ms", "faults", "MB"))
            if len(found) == 2:  # else time_all has said why not
                print(row(f"{job}, {name}", **found), flush=True)


def against(args: argparse.Namespace) -> None:
    """The tables of the commit's facet.py and of the working tree's, for each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {"old": Path(folder) / "old", "new": ROOT}
        export(args.against, trees["old"])
        jobs = jobs_of(args, Path(folder))
        most = 3 if args.quick else 9
        print(f"facet.py, old: {args.against}, new: the working tree's")
        for threads in args.threads:
            run = {"threads": threads, "device": args.device}
            print(f"{title(run)}, load {os.getloadavg()[0]:.1f}")
            print(line("", "old ms", "new ms", "times as fast", "processor ms", "page faults",
                       "MB so far"))
            for job, crystals in jobs.items():
                # Calls are short, and the more of them there are, the less a median wavers
                rounds = most if job == "train" else 3 * most
                compare(trees, job, crystals, threads, args.device, rounds)


# ─── Command ─────────────────────────────────────────────────────────────────────────────────────


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--facet", default=sys.executable, metavar="PYTHON",
                        help="by default the Python that runs this")
    for peer in ("mace", "sevenn", "nequip"):
        parser.add_argument(f"--{peer}", metavar="PYTHON",
                            help="of the environment with that package")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[])
    parser.add_argument("--species", type=int, nargs="+", default=[89, 4], choices=(89, 4))
    parser.add_argument("--sizes", type=int, nargs="+", default=[],
                        help="numbers of atoms, of 8 64 512 4096; on a GPU 32768 110592, too")
    parser.add_argument("--add", action="store_true",
                        help="keep the other numbers of threads or species of the results file")
    parser.add_argument("--quick", action="store_true",
                        help="2 rounds of 8 and 64 atoms; writes nothing")
    parser.add_argument("--against", metavar="COMMIT",
                        help="compare facet.py with that of another commit, and nothing else")
    parser.add_argument("--frames", metavar="FILE",
                        help="with --against: train on batches of this labelled set, too")
    args = parser.parse_args()
    alone = args.against is not None
    one_thread = args.quick or alone or args.device == "cuda"
    args.threads = args.threads or ([1] if one_thread else [1, 2])
    every = [atoms_in(name) for name in CRYSTALS[args.device]]
    args.sizes = args.sizes or every[:2 if args.quick else 3 if alone else None]
    if not set(args.sizes) <= set(every):
        parser.error(f"--sizes: there are {' '.join(map(str, every))}")
    if args.frames and not (alone and os.path.exists(args.frames)):
        parser.error(f"--frames {args.frames}: no such file" if alone else "--frames: no --against")
    return args


def main() -> None:
    args = parse()
    begin = time.perf_counter()
    if args.against is not None:
        against(args)
        print(f"{time.perf_counter() - begin:.0f} s")
        return

    # The Pythons that there are
    pythons = {}
    for peer in PYTHONS.values():
        path = getattr(args, peer)
        if not path:
            print(f"{peer} is left out: no --{peer} PYTHON")
            continue
        pythons[peer] = os.path.abspath(path)
        if not os.access(pythons[peer], os.X_OK):
            sys.exit(f"--{peer}: {path} is not a Python that can be run")

    known = MODELS if args.device == "cpu" else ON_GPU
    names = [name for name in known if PYTHONS[name.split()[0]] in pythons]
    runs = run_all(args, names, pythons, crystals_of(args))

    name = "speed" if args.device == "cpu" else "speed_cuda"
    kept = read_results(name) if args.add else {}
    runs = kept.get("runs", {}) | runs
    show_ratios(runs)
    if not args.quick:
        write_results(name, {
            "made": kept.get("made", []), "environment": environment(), "dtype": "float32",
            "cutoff_A": 5.0, "seconds": time.perf_counter() - begin, "runs": runs})

        # late: the memory of matplotlib would count as that of the workers (Linux)
        from pictures import draw_results
        draw_results(name)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
