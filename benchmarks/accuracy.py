"""Train on real data with the default settings, several seeds; print mean and spread of the test errors.

    python benchmarks/accuracy.py --data FOLDER                          # mlearn/Si, mlearn/Li and crystals in FOLDER
    python benchmarks/accuracy.py --data FOLDER --sets Si --seeds 1      # one run of ten minutes

FOLDER holds mlearn/{Si,Li}_{train,test}.extxyz (Zuo et al., J. Phys. Chem. A 124, 731 (2020), github.com/
materialsvirtuallab/mlearn, converted to extended XYZ) and crystals/crystals_{train,test}.json.gz (MPtrj layout).
`--parallel 2 --threads 1` trains two at a time, each on one core. Writes benchmarks/results/accuracy.json.
"""
import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from common import ROOT, SETS, write_results

SHOWN = {"energy_mae_meV_per_atom": "energy MAE (meV/atom)", "force_mae_eV_per_A": "force MAE (eV/Å)",
         "stress_mae_GPa": "stress MAE (GPa)", "train_seconds": "training (s)", "steps": "steps"}


def run(data: Path, name: str, seed: int, threads: int, more: list[str]) -> dict:
    """One training in a process of its own; returns its result.json, without paths."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train_small.py", "--name", name, "--seed", str(seed), "--threads", str(threads), *more]
        for part in ("train", "test"):
            command += [f"--{part}", data / SETS[name].format(part)]
        done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: {done.stderr.strip()}")
        result = json.loads((Path(folder) / "runs" / name / "result.json").read_text())
    result["command"] = shlex.join(["python", "train_small.py", "--train", SETS[name].format("train"), "--test",
                                    SETS[name].format("test"), "--name", name, "--seed", str(seed), "--threads", str(threads), *more])
    physics = result["physics"]  # without its curves
    result["physics"] = {"drift": physics["energy_drift"]["drift_meV_per_atom_per_ps"],
                         "equivariance": {dtype: max(errors) for dtype, errors in physics["equivariance_error"].items()}}
    result["settings"].update(train=SETS[name].format("train"), test=SETS[name].format("test"))
    print(f"{name}, seed {seed}:", ", ".join(f"{text} {result[key]:.4g}" for key, text in SHOWN.items()), flush=True)
    return result


def summarize(runs: list[dict]) -> dict:
    """Mean and standard deviation over seeds of what is shown, and the runs themselves."""
    summary = {key: {"mean": float(np.mean([r[key] for r in runs])), "std": float(np.std([r[key] for r in runs]))} for key in SHOWN}
    return {"summary": summary, "baselines": runs[0]["baselines"], "runs": sorted(runs, key=lambda r: r["settings"]["seed"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=1)
    args, more = parser.parse_known_args()  # what this script does not know goes to train_small.py
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.sets if name != "crystals" or seed == 0]
    sets = {name: {"runs": []} for name in args.sets}
    with ThreadPoolExecutor(args.parallel) as pool:
        futures = {pool.submit(run, args.data, *job, args.threads, more): job for job in jobs}
        for future in as_completed(futures):  # saved after each: hours of work outlive an interruption
            sets[futures[future][0]]["runs"].append(future.result())
            write_results("accuracy", {"threads_each": args.threads, "at_a_time": args.parallel,
                                       "sets": {name: summarize(content["runs"]) for name, content in sets.items() if content["runs"]}})
    for name, content in sets.items():
        summary = summarize(content["runs"])["summary"]
        print(f"{name}, {len(content['runs'])} seeds:", ", ".join(f"{text} {summary[key]['mean']:.4g} ± {summary[key]['std']:.2g}"
                                                                 for key, text in SHOWN.items()))


if __name__ == "__main__":
    main()
