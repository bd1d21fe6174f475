"""Test errors of Facet with default settings; Facet's and MACE's errors against processor time.

    python benchmarks/accuracy.py defaults --data FOLDER       # several seeds, means and spreads
    python benchmarks/accuracy.py defaults --data FOLDER --size small --seeds 0
    envs/mace/bin/python benchmarks/accuracy.py mace --data FOLDER --set Si --model 64 \\
        --epochs 48 --out runs/mace-Si-64                      # an hour and more
    python benchmarks/accuracy.py time --data FOLDER --mace runs/mace-*/curve.json    # 15 minutes

FOLDER holds the data (SETS in common.py says under what names; JSON is converted by tools.database
into runs/benchmarks): silicon and lithium of Zuo et al., J. Phys. Chem. A 124, 731 (2020),
github.com/materialsvirtuallab/mlearn; acetylacetone, trained at 300 K, of arXiv 2205.06643,
github.com/davkovacs/BOTNet-datasets; Nb, Mo, Ta, W and their alloys of npj Comput. Mater. 6, 70
(2020), github.com/materialsvirtuallab/snap; a thousand frames of MPtrj drawn at random,
github.com/microsoft/mattersim, ten parts by material; crystals of 15 elements in MPtrj's layout,
labelled by SevenNet-0.

defaults    Whole trainings by train_small.py on the published training sets, validation off, the
            same settings for all sets, one thread, ended after 10 minutes at the latest. Settings
            were chosen on parts of the training sets. With --size small or large no clock ends
            them. Options that this script does not know go on to train_small.py.
time        Facet while it trains, for parts of the steps that a training has by default: the errors
            at twenty points, on a tenth of the training set that train_small.py holds back. Counted
            against Facet is the processor time of the whole program but for those errors: imports,
            reading, training, checkpoints.
mace        MACE's own trainer, by the Python of its environment (benchmarks/README.md), with the
            errors on the same tenth, and CPU-seconds, after every epoch in curve.json. Counted
            against MACE is training alone, at the speed of its fastest epoch on a CPU. A long curve
            can come from a GPU (--device cuda), by the same trainer with the same settings and
            seed; then two epochs on the CPU tell what an epoch costs there.

The settings of MACE are those of its documentation and of the MACE-MP-0 recipe: universal (Huber)
loss with weights 1, 10 and 100 for energy, forces and stress (molecules: squares, weights 1 and
100, E0 of the free atoms), AMSGrad at 0.01, batches of 5 or 10 structures, EMA 0.99, learning rate
× 0.8 after 5 epochs without gain, stage two (energy weight 1000, stochastic weight averaging) from
epoch --stage_two on; float32. Options that this script does not know go on to MACE. Writes
benchmarks/results/accuracy.json and its picture.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import (
    ROOT,
    SETS,
    WORK,
    columns,
    command_line,
    data_files,
    hardware,
    read_results,
    read_set,
    rows,
    run_program,
    versions,
    write_results,
)
from summary import ENERGY, FORCE, STRESS, accuracy, sizes, time_to_accuracy

import facet
import train_small
from tools import evaluate
from tools.frames import load_sets
from tools.labels import TABLE
from tools.options import SIZES

MODELS = {
    # the 64-channel model of the tables, MACE-MP-0 small, MACE-MP-0 medium
    "64": ["--hidden_irreps=64x0e + 64x1o", "--max_ell=2", "--correlation=2"],
    "128x0e": ["--hidden_irreps=128x0e", "--max_ell=3", "--correlation=3"],
    "128x0e+128x1o": ["--hidden_irreps=128x0e + 128x1o", "--max_ell=3", "--correlation=3"]}
FULL_NAMES = {"64": "MACE 64x0e+64x1o"}


# ─── Facet ───────────────────────────────────────────────────────────────────────────────────────


def training(data: Path, name: str, options: list[str]) -> dict:
    """One whole training by train_small.py, then the errors on each test file.

    cpu_seconds are those of the training program: imports, reading, training, checkpoints.
    """
    files, _ = data_files(data, name)
    command = [sys.executable, ROOT / "train_small.py", "--name", name, "--valid", "0", "--test",
               "0", "--train", *files, *options]
    with tempfile.TemporaryDirectory() as folder:
        _, cpu_seconds, _ = run_program(command, folder)
        run = Path(folder) / "runs" / name
        trained = json.loads((run / "result.json").read_text())
        model = facet.load(run / "model.pt")

    kept = ("parameters", "steps", "train_seconds", "device")
    result = {key: trained[key] for key in kept}
    result["cpu_seconds"] = cpu_seconds
    result["tests"] = {}
    for label, frames in read_set(data, name)[1].items():
        found = evaluate.errors(evaluate.predict(model, frames), frames)
        constant = evaluate.errors(evaluate.constant_baseline(frames, model.config), frames)
        atoms = float(np.mean(frames.atom_counts()))
        result["tests"][label] = {
            **found, "structures": len(frames), "atoms": atoms, "constant": constant}
        print(f"{label}, {' '.join(options)}:", ", ".join(
            f"{key} {value:.4g}" for key, value in found.items() if value is not None), flush=True)
    return result


def defaults(args: argparse.Namespace, more: list[str]) -> None:
    """Several seeds of every set; saved after each, so that hours of work outlive a stop."""
    torch.set_num_threads(1)  # of this process, which tests; trainings have their own
    for name in args.sets:
        data_files(args.data, name)  # converted once, before several trainings want it

    own = ["--minutes", "10"] if args.size == "medium" else ["--size", args.size]
    with ThreadPoolExecutor(args.parallel) as pool:
        jobs = {}
        for seed in args.seeds:
            for name in args.sets:
                options = ["--seed", str(seed), "--threads", "1", *own, *more]
                jobs[pool.submit(training, args.data, name, options)] = (name, seed)
        failed = []
        for job in as_completed(jobs):
            name, seed = jobs[job]
            if job.exception():  # the others go on, and are kept
                failed.append(f"{name}, seed {seed}: {job.exception()}")
                continue
            run = {"seed": seed, **job.result(), "hardware": hardware()}
            content = read_results("accuracy")  # as it is now: others write there, too
            content["tests"] = with_run(content.get("tests", {}), args.size, name, run)
            write_results("accuracy", content)
    print("\n".join([*accuracy(), "", *sizes(), *failed]))
    sys.exit(1 if failed else 0)


def with_run(table: dict, size: str, name: str, run: dict) -> dict:
    """The table of all sizes, a row for each test file and seed, with those of this run."""
    own = {"size": size, "set": name, "seed": run["seed"]}
    kept = [row for row in rows(table) if not own.items() <= row.items()]
    about = {key: value for key, value in run.items() if key not in ("tests", "seed")}
    for label, errors in run["tests"].items():
        kept.append({**own, "test": label, **errors, **about})
    return columns(sorted(kept, key=lambda row: (row["size"], row["set"], row["seed"])))


def nine_tenths(data: Path, name: str) -> train_small.Settings:
    """Settings that train on a set but for a tenth of it, which is validated on; no test."""
    files, _ = data_files(data, name)
    return train_small.Settings(train=tuple(str(path) for path in files), test=("0",), name=name)


def against_time(args: argparse.Namespace) -> None:
    """Facet's errors while it trains, beside MACE's; saved after each training."""
    content = read_results("accuracy")
    sets = content.setdefault("against_time", {})
    curves = mace_curves(args.mace)
    for name in (*args.sets, *(name for name, _ in curves)):
        sets.setdefault(name, {"facet": {}, "mace": {}})
    for (name, model), run in curves.items():
        sets[name]["mace"][model] = run
    for name in args.sets:
        data_files(args.data, name)  # converted once, and not at the expense of a training

    # Longest first, so that the cores end together; a process each, whose clock counts it all
    jobs = [(args.data, name, share) for share in sorted(args.shares, reverse=True)
            for name in args.sets]
    failed = []
    with get_context("spawn").Pool(args.parallel, torch.set_num_threads, [1], 1) as pool:
        for name, share, run in pool.imap_unordered(facet_curve_or_reason, jobs):
            if isinstance(run, str):  # the others go on, and are kept
                failed.append(f"{name}, {share:g} of a training: {run}")
                continue
            sets[name]["facet"][f"{share:g}"] = run
            write_results("accuracy", {**read_results("accuracy"), "against_time": sets})
    write_results("accuracy", {**read_results("accuracy"), "against_time": sets})
    print("\n".join([*time_to_accuracy(), *failed]))

    for name, one in sets.items():
        machines = {run["hardware"] for run in (*one["mace"].values(), *one["facet"].values())}
        if len(machines) > 1:
            print(f"{name}: CAUTION, shares compare machines, too: {', '.join(sorted(machines))}")
    from pictures import draw_results
    draw_results("accuracy")
    sys.exit(1 if failed else 0)


def facet_curve_or_reason(job: tuple[Path, str, float]) -> tuple[str, float, dict | str]:
    """The set and share of a job, and the curve, or why there is none."""
    data, name, share = job
    try:
        return name, share, facet_curve(nine_tenths(data, name), share)
    except Exception as error:
        return name, share, f"{type(error).__name__}: {error}"


def facet_curve(settings: train_small.Settings, share: float) -> dict:
    """One training on the CPU with so many of the steps that it has by default: the errors on the
    validation part at twenty points, and the CPU-seconds of this process until then, but for those
    of the errors.
    """
    moments = []
    evaluation = 0.0  # CPU-seconds

    class WholeLog(train_small.Log):
        def __init__(self, folder, valid, length):
            super().__init__(folder, valid, length)
            self.watched = valid  # all of them, as MACE

        def line(self, *line):
            nonlocal evaluation
            before = time.process_time()
            moments.append(before - evaluation)
            super().line(*line)
            evaluation += time.process_time() - before

    def shorter(*of, usual=train_small.length_of) -> int:
        return max(20, round(share * usual(*of)))

    settings = replace(settings, device="cpu", workers=0)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet, \
            contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), \
            mock.patch.multiple(train_small, Log=WholeLog, length_of=shorter):
        result = train_small.main(settings, out=Path(folder))
        with open(Path(folder) / settings.name / "metrics.csv", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))

    energy, forces, stress = [label.log.column(label.quantity, "mae") for label in TABLE]
    curve = []
    for cpu, line in zip(moments, lines, strict=True):
        curve.append({
            "cpu_seconds": cpu, "step": int(line["step"]), ENERGY: float(line[energy]),
            FORCE: float(line[forces]) / 1000, STRESS: float(line[stress])})
    return {"steps": result["steps"], "hardware": hardware(), "curve": columns(curve)}


def mace_curves(paths: list[Path]) -> dict[tuple[str, str], dict]:
    """Curves by set and model, with a time axis at which every epoch costs what the fastest did.

    Where several files are of one model and set, the longest is the curve, wherever it was trained.
    All that were trained on a CPU count as clocks: the fastest epoch, and its hardware. SystemExit
    if none was, or if the trainings differ in more than their length and the device.
    """
    files = {}
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        if len(run["curve"]) > 1:
            files.setdefault((run.pop("set"), run.pop("model")), []).append(run)

    curves = {}
    for (name, model), same in files.items():
        epochs = []
        if len({alike(run) for run in same}) > 1:
            sys.exit(f"{name}, {model}: the curve.json files are not of the same training")
        for run in same:
            if "--device=cpu" in run["arguments"]:
                seconds = [point["cpu_seconds"] for point in run["curve"]]
                epochs.append((float(min(np.diff(seconds))), run["hardware"]))
        if not epochs:
            sys.exit(f"{name}, {model}: no curve.json of a CPU: train two epochs there, too")
        longest = max(same, key=lambda run: len(run["curve"]))
        longest["trained_on"] = longest.pop("hardware")
        epoch, longest["hardware"] = min(epochs)
        for i, point in enumerate(longest["curve"]):
            point["cpu_seconds"] = i * epoch
        longest["curve"] = columns(longest["curve"])
        curves[name, model] = longest
    return curves


def alike(run: dict) -> str:
    """What must be the same for one training to be the clock of another."""
    free = ("--device=", "--max_num_epochs=", "--start_swa=")
    settings = [word for word in run["arguments"] if not word.startswith(free)]
    return json.dumps([run["frames"], run["threads"], settings])


# ─── MACE ────────────────────────────────────────────────────────────────────────────────────────


def converted(data: Path, name: str, out: Path) -> tuple[dict[str, Path], list[int]]:
    """The frames that Facet trains on and validates on, as extended XYZ, under the names that MACE
    expects, and how many they are.
    """
    import ase.io

    train, valid, _ = load_sets(nine_tenths(data, name), WORK, None)
    files = {}
    for part, frames in (("train", train), ("valid", valid)):
        images = []
        for frame in frames:
            labels = frame.calc.results
            atoms = frame.copy()
            atoms.info = {"REF_energy": labels["energy"]}
            if "stress" in labels:
                atoms.info["REF_stress"] = frame.get_stress(voigt=False)
            atoms.arrays["REF_forces"] = labels.get("forces", np.zeros((len(atoms), 3)))
            if len(atoms) == 1 and not atoms.pbc.any():
                atoms.info["config_type"] = "IsolatedAtom"  # its energy is E0, nothing to train on
            images.append(atoms)
        files[part] = out / f"{part}.xyz"
        ase.io.write(files[part], images, format="extxyz")
    return files, [len(train), len(valid)]


class Curve:
    """Validation errors and CPU-seconds of training after every epoch, kept in curve.json."""

    def __init__(self, path: Path, about: dict):
        self.path = path
        self.about = about
        self.points = []
        self.start = time.process_time()
        self.evaluation = 0.0  # CPU-seconds

    def go_on(self, points: int) -> None:
        """After a restart MACE evaluates once: that takes the place of the checkpoint's line."""
        kept = json.loads(self.path.read_text(encoding="utf-8"))["curve"]
        self.points = kept[:points]
        self.start -= self.points.pop()["cpu_seconds"]

    def watch(self, evaluate):
        """MACE's function, which is called after every epoch, with the curve behind it."""

        def watched(*args, **kwargs):
            before = time.process_time()
            loss, errors = evaluate(*args, **kwargs)
            self.evaluation += time.process_time() - before
            stress = errors.get("mae_stress")
            self.points.append({
                "cpu_seconds": time.process_time() - self.start - self.evaluation,
                "energy_mae_meV_per_atom": 1000 * float(errors["mae_e_per_atom"]),
                "force_mae_eV_per_A": float(errors["mae_f"]),
                "stress_mae_GPa": None if stress is None else 160.21766 * float(stress)})
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({**self.about, "curve": self.points}), encoding="utf-8")
            part.replace(self.path)
            print(f"epoch {len(self.points) - 1:3d} {self.points[-1]}", flush=True)
            return loss, errors

        return watched


def mace(args: argparse.Namespace, more: list[str]) -> None:
    """MACE's own training."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    files, frames = converted(args.data, args.set, args.out)

    # after the conversion: importing MACE changes settings of the process
    from mace.cli import run_train
    from mace.tools.arg_parser import build_default_arg_parser
    trainer = importlib.import_module("mace.tools.train")  # the package has a function of that name

    arguments = [
        "--model=MACE", *MODELS[args.model], "--r_max=5.0", "--num_interactions=2",
        "--scaling=rms_forces_scaling", "--energy_weight=1", "--lr=0.01", "--amsgrad",
        f"--batch_size={5 if args.set == 'Si' else 10}", "--ema", "--ema_decay=0.99",
        "--scheduler_patience=5", "--lr_factor=0.8", "--swa",
        f"--start_swa={args.stage_two or round(0.75 * args.epochs)}",
        f"--max_num_epochs={args.epochs}", "--default_dtype=float32", "--seed=0",
        "--error_table=PerAtomMAE", "--num_workers=0", "--pin_memory=False", "--plot=False",
        "--valid_batch_size=10", "--name=mace", f"--device={args.device}", "--save_cpu",
        "--keep_checkpoints"]
    if args.set == "AcAc":
        arguments += ["--loss=weighted", "--forces_weight=100"]
    else:
        arguments += ["--E0s=average", "--loss=universal", "--forces_weight=10",
                      "--stress_weight=100", "--compute_stress=True"]
    arguments += more
    curve = Curve(args.out / "curve.json", {
        "set": args.set, "model": FULL_NAMES.get(args.model, f"MACE {args.model}"),
        "threads": args.threads, "frames": frames,
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else hardware(),
        "versions": versions("torch", "mace-torch", "e3nn"), "arguments": arguments})

    paths = [
        f"--train_file={files['train']}", f"--valid_file={files['valid']}",
        f"--work_dir={args.out}", f"--model_dir={args.out}"]
    if args.restart:
        steps = []
        for path in (args.out / "checkpoints").glob("*.pt"):
            steps.append(int(path.stem.split("epoch-")[1].removesuffix("_swa")))
        curve.go_on(max(steps) + 2)  # it begins with the untrained model
        paths.append("--restart_latest")
    trainer.evaluate = curve.watch(trainer.evaluate)
    run_train.run(build_default_arg_parser().parse_args(arguments + paths))
    print(f"{time.process_time() - curve.start:.0f} CPU-seconds in all", flush=True)


# ─── Command line ────────────────────────────────────────────────────────────────────────────────


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("defaults", allow_abbrev=False,
                              help="Facet's test errors with default settings",
                              epilog="Other options, as --device cuda, go on to train_small.py.")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                     help="the stored runs of other seeds stay")
    one.add_argument("--size", default="medium", choices=SIZES,
                     help="only medium, the default, ends after 10 minutes at the latest")
    one.add_argument("--parallel", type=int, default=1, help="trainings at a time")

    one = commands.add_parser("time", allow_abbrev=False,
                              help="errors against processor time, Facet and MACE")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--sets", nargs="*", default=["Si", "AcAc", "crystals"], choices=SETS,
                     help="to train on; none: only the tables and the picture")
    one.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.5],
                     help="of the steps that a training has by default")
    one.add_argument("--mace", nargs="*", type=Path, default=[], help="curve.json files of `mace`")
    one.add_argument("--parallel", type=int, default=1, help="trainings at a time")

    one = commands.add_parser("mace", allow_abbrev=False, help="MACE's own training")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--set", choices=SETS, required=True)
    one.add_argument("--model", choices=MODELS, default="64")
    one.add_argument("--epochs", type=int, required=True)
    one.add_argument("--stage_two", type=int, default=0,
                     help="first epoch of stage two; 0: after three quarters")
    one.add_argument("--restart", action="store_true",
                     help="go on from the last checkpoint, with other --epochs if wanted")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--device", default="cpu")
    one.add_argument("--out", type=Path, required=True)
    args, more = parser.parse_known_args()
    if more and args.command == "time":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return args, more


def main() -> None:
    args, more = parse()
    if args.command == "time":
        against_time(args)
    else:
        {"defaults": defaults, "mace": mace}[args.command](args, more)


if __name__ == "__main__":
    main()
