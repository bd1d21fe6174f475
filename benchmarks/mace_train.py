"""MACE's own trainer on one data set, with the test errors and the CPU-seconds spent on training after every epoch.

    envs/mace/bin/python benchmarks/mace_train.py --data FOLDER --set Si --model 64 --epochs 48 --out runs/mace-Si-64

Run by the Python of MACE's environment (benchmarks/README.md); time_to_accuracy.py reads curve.json, relax.py the model.
The settings are those of MACE's documentation and of the MACE-MP-0 recipe: universal (Huber) loss with weights 1, 10 and
100 for energy, forces and stress, AMSGrad at 0.01, batches of 5 or 10 structures, EMA 0.99, learning rate × 0.8 after 5
epochs without gain, stage two (energy weight 1000, stochastic weight averaging) for the last quarter; float32.
In MACE's favour the test set is given as its validation set: schedule and choice of the checkpoint may look at it.
"""
import argparse
import importlib
import json
import os
import time
from pathlib import Path

import ase.io
import torch

from common import SETS, hardware, versions

import train_small

MODELS = {"64": ["--hidden_irreps=64x0e + 64x1o", "--max_ell=2", "--correlation=2"],  # the 64-channel model of the tables
          "128x0e": ["--hidden_irreps=128x0e", "--max_ell=3", "--correlation=3"],     # MACE-MP-0 small
          "128x0e+128x1o": ["--hidden_irreps=128x0e + 128x1o", "--max_ell=3", "--correlation=3"]}  # MACE-MP-0 medium


def convert(data: Path, name: str, out: Path) -> dict[str, Path]:
    """The frames that train_small.py reads, as extended XYZ under the names that MACE expects."""
    files = {}
    for part in ("train", "test"):
        images = []
        for frame in train_small.read((str(data / SETS[name].format(part)),)):
            atoms = frame.atoms.copy()
            atoms.info.update(REF_energy=frame.energy, REF_stress=frame.stress)
            atoms.arrays["REF_forces"] = frame.forces
            images.append(atoms)
        files[part] = out / f"{part}.xyz"
        ase.io.write(files[part], images, format="extxyz")
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("--model", choices=MODELS, default="64")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--stage_two", type=int, default=0, help="first epoch of stage two; 0: after three quarters")
    parser.add_argument("--restart", action="store_true", help="go on from the last checkpoint, with other --epochs if wanted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    files = convert(args.data, args.set, args.out)

    from mace.cli import run_train  # after the conversion: importing MACE changes settings of the process
    mace_trainer = importlib.import_module("mace.tools.train")  # the package has a function of that name
    from mace.tools.arg_parser import build_default_arg_parser

    curve, spent = [], {"evaluation": 0.0, "start": time.process_time()}
    if args.restart:  # MACE evaluates once before it goes on: that takes the place of the checkpoint's own line
        saved = max(int(path.stem.split("epoch-")[1].removesuffix("_swa")) for path in (args.out / "checkpoints").glob("*.pt"))
        curve = json.loads((args.out / "curve.json").read_text())["curve"][:saved + 2]  # it begins with the untrained model
        spent["start"] -= curve.pop()["cpu_seconds"]

    def watched(evaluate):
        def run(*a, **k):
            before = time.process_time()
            loss, e = evaluate(*a, **k)
            spent["evaluation"] += time.process_time() - before
            curve.append({"cpu_seconds": time.process_time() - spent["start"] - spent["evaluation"],
                          "energy_mae_meV_per_atom": 1000 * float(e["mae_e_per_atom"]), "force_mae_eV_per_A": float(e["mae_f"]),
                          "stress_mae_GPa": 160.21766 * float(e["mae_stress"])})
            content = {"set": args.set, "model": f"MACE {args.model}", "threads": args.threads, "hardware": hardware(),
                       "versions": versions("torch", "mace-torch", "e3nn"), "arguments": [a for a in arguments if str(args.out) not in a], "curve": curve}
            part = args.out / "curve.json.part"
            part.write_text(json.dumps(content, indent=1))
            part.replace(args.out / "curve.json")
            print(f"epoch {len(curve) - 1:3d} {curve[-1]}", flush=True)
            return loss, e
        return run

    mace_trainer.evaluate = watched(mace_trainer.evaluate)
    batch = 10 if args.set == "crystals" else 5
    arguments = ["--model=MACE", *MODELS[args.model], "--r_max=5.0", "--num_interactions=2", "--E0s=average", "--scaling=rms_forces_scaling",
                 "--loss=universal", "--energy_weight=1", "--forces_weight=10", "--stress_weight=100", "--compute_stress=True",
                 "--lr=0.01", "--amsgrad", f"--batch_size={batch}", "--ema", "--ema_decay=0.99", "--scheduler_patience=5", "--lr_factor=0.8",
                 "--swa", f"--start_swa={args.stage_two or round(0.75 * args.epochs)}", f"--max_num_epochs={args.epochs}", "--default_dtype=float32",
                 "--seed=0", "--error_table=PerAtomMAE", "--num_workers=0", "--pin_memory=False", "--plot=False", "--valid_batch_size=10",
                 f"--train_file={files['train']}", f"--valid_file={files['test']}", f"--work_dir={args.out}", "--name=mace",
                 f"--model_dir={args.out}", "--device=cpu", "--save_cpu", "--keep_checkpoints"]
    arguments += ["--restart_latest"] * args.restart
    run_train.run(build_default_arg_parser().parse_args(arguments))
    print(f"{time.process_time() - spent['start']:.0f} CPU-seconds in all", os.times(), flush=True)


if __name__ == "__main__":
    main()
