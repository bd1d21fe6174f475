"""Test errors against the processor time spent on training: Facet and MACE on the same split, one thread each.

    python benchmarks/time_to_accuracy.py --data FOLDER --mace runs/mace-*/curve.json      # 40 minutes for Facet's part
    python benchmarks/time_to_accuracy.py --data FOLDER --mace … --reuse                   # only tables and figure again

MACE's curves come from mace_train.py (one run of hours per model and set; MACE's own trainer and recommended settings);
the ones in benchmarks/results/time_to_accuracy.json are used where no files are given.
Facet follows its clock, so each of its points is a whole training of its own, `--minutes` long, everything else default.

Counted against Facet is the processor time of the whole program: imports, reading, tests, plots. Counted against MACE is
training alone, at the speed of its fastest epoch, because other programs may have disturbed the others; and the test set
served as MACE's validation set, so that its best epoch is chosen with knowledge of the answers.
Writes benchmarks/results/time_to_accuracy.json and figures/time_to_accuracy.png. For Linux and macOS.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import ROOT, SETS, hardware, read_results, write_results
from pictures import ERRORS, draw_results, full_name



def facet_run(data: Path, name: str, minutes: float) -> dict:
    """One whole training by train_small.py with its defaults: test errors and the CPU-seconds of the process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train_small.py", "--name", name, "--threads", "1", "--minutes", str(minutes)]
        for part in ("train", "test"):
            command += [f"--{part}", (data / SETS[name].format(part)).resolve()]
        process = subprocess.Popen([str(word) for word in command], cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"training on {name} for {minutes:g} minutes failed")
        result = json.loads((Path(folder) / "runs" / name / "result.json").read_text())
    run = {key: result[key] for key in ("steps", "parameters", *ERRORS, "stress_mae_GPa")}
    run |= {"minutes": minutes, "cpu_seconds": usage.ru_utime + usage.ru_stime, "hardware": hardware()}
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in run.items() if key != "hardware"), flush=True)
    return run


def mace_runs(paths: list[Path]) -> list[dict]:
    """Curves of mace_train.py, their time axis put right: every epoch costs what the fastest of its kind did.

    Where several files are of one model and set, the longest is the curve; the others, undisturbed epochs or another machine,
    count as clocks: the fastest epoch of all, and its hardware.
    """
    runs = {}
    for run in (json.loads(path.read_text()) for path in paths):
        runs.setdefault((run["set"], run["model"]), []).append(run)
        for point in run["curve"]:
            point.setdefault("cpu_seconds_measured", point["cpu_seconds"])  # a curve of the results file has been put right before
    for same in runs.values():
        epochs = [(float(min(np.diff([point["cpu_seconds_measured"] for point in run["curve"]]))), run["hardware"]) for run in same]
        same.sort(key=lambda run: -len(run["curve"]))
        epoch, same[0]["hardware"] = min(epochs)
        for i, point in enumerate(same[0]["curve"]):
            point["cpu_seconds"] = i * epoch
    return [same[0] for same in runs.values()]


def crossing(facet: list[dict], key: str, goal: float) -> float | None:
    """CPU-seconds at which Facet's error is down to the goal: between its trainings, on a line in log-log; None if never."""
    before = None
    for point in sorted(facet, key=lambda p: p["cpu_seconds"]):
        if point[key] <= goal:
            if before is None:
                return point["cpu_seconds"]  # the shortest training is enough: an upper bound
            t = np.log([before["cpu_seconds"], point["cpu_seconds"]])
            e = np.log([before[key], point[key]])
            return float(np.exp(np.interp(-np.log(goal), -e, t)))
        before = point
    return None


def compare(facet: list[dict], mace: dict) -> dict:
    """For each error: the share of MACE's processor time after which Facet is as good as MACE at its best, and Facet's best."""
    rows, model = {}, full_name(mace["model"])
    if others := {run["hardware"] for run in facet} - {mace["hardware"]}:
        print(f"  {mace['set']}: CAUTION, MACE ran on {mace['hardware']}, Facet on {', '.join(others)}: the shares compare machines, too")
    for key, text in ERRORS.items():
        best = min(mace["curve"], key=lambda p: p[key])
        ours, least = crossing(facet, key, best[key]), min(p[key] for p in facet)
        rows[f"{mace['set']}, processor time to the best {text} of {model}, share"] = {
            "value": ours and ours / best["cpu_seconds"], "goal": "at most 0.1", "reached": bool(ours and ours <= 0.1 * best["cpu_seconds"]),
            "mace_cpu_seconds": best["cpu_seconds"], "facet_cpu_seconds": ours}
        rows[f"{mace['set']}, best {text}, Facet"] = {"value": least, "goal": f"at most {best[key]:.3g} ({model})", "reached": least <= best[key]}
        print(f"  {mace['set']:9s} {text:24s} {model:18s} best {best[key]:8.4g} after {best['cpu_seconds']:6.0f} CPU-s;  Facet "
              + (f"reaches it after {ours:5.0f} CPU-s, {100 * ours / best['cpu_seconds']:5.1f} %" if ours else "never reaches it")
              + f"; its best {least:.4g}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["Si", "crystals"], choices=SETS)
    parser.add_argument("--minutes", nargs="+", type=float, default=[0.75, 1.5, 3, 6, 9.5])
    parser.add_argument("--mace", nargs="*", type=Path, default=[], help="curve.json files of mace_train.py")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--reuse", action="store_true", help="take Facet's trainings from the results file")
    args = parser.parse_args()
    kept = {"facet": {}, "mace": []} | read_results("time_to_accuracy")
    mace = mace_runs(args.mace) or kept["mace"]
    facet = kept["facet"] if args.reuse else {**kept["facet"], **{name: [] for name in args.sets}}  # other sets stay as they are
    if not args.reuse:
        with ThreadPoolExecutor(args.parallel) as pool:  # longest first, so that the two cores end together
            jobs = {(minutes, name): pool.submit(facet_run, args.data, name, minutes)
                    for minutes in sorted(args.minutes, reverse=True) for name in args.sets}
        for (_, name), job in jobs.items():
            facet[name].insert(0, job.result())
    print("processor time to MACE's best error")
    headline = {name: row for run in mace if run["set"] in facet for name, row in compare(facet[run["set"]], run).items()}
    write_results("time_to_accuracy", kept | {"threads": 1, "headline": headline, "facet": facet, "mace": mace}, measured=not args.reuse)
    draw_results("time_to_accuracy")


if __name__ == "__main__":
    main()
