"""A run beside its loop: processes, device, folder, checkpoint, log, interrupts."""
from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ase
import numpy as np
import scipy
import torch
import torch.distributed as dist

import facet
from tools import evaluate
from tools.frames import NONE, BadInput, Frames, expand, load_sets, print_to_stderr
from tools.labels import LABELS, TABLE

if TYPE_CHECKING:
    from train_small import Settings

WATCHED = 50         # validation frames that the log looks at


# ─── Processes, device, folder ────────────────────────────────────────────────────────────────────


def filled(numbers: list[float], device: torch.device) -> torch.Tensor:
    """Numbers as a float64 tensor on a device. To copy them there would make the CPU wait for it.
    """
    each = [torch.full((1,), x, dtype=torch.float64, device=device) for x in numbers]
    return torch.cat(each)


class Team(NamedTuple):
    """The processes that train together. The first one speaks and writes."""

    rank: int = 0
    size: int = 1

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, parts: torch.Tensor, gradient: torch.Tensor, seconds: float,
              stop: int) -> tuple[dict[str, float], float, float, float]:
        """What all go by: losses, length of the gradient, the first one's clock, whether to stop.

        This is the one place where a step waits for the GPU.
        """
        clock = seconds if self.rank == 0 else 0.0
        mine = filled([clock, stop], parts.device)
        news = torch.cat([parts, gradient.detach()[None] / self.size, mine])  # [6]
        *found, gradient, seconds, stop = self.sum(news).tolist()
        return dict(zip(LABELS, found, strict=True)), gradient, seconds, stop


ALONE = Team()


@contextmanager
def team_of(device: str):
    """This process' place among those that torchrun started; alone without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def device_of(asked: str) -> str:
    """The device of this process. Every process finds its own; it is stored nowhere.

    asked: cpu, cuda, …; "": a GPU if there is one.
    """
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not asked:
        return local if torch.cuda.is_available() else "cpu"
    return local if asked == "cuda" else asked


def new_folder(out: Path, name: str) -> Path:
    """runs/NAME, or runs/NAME-2 … where that holds results already."""
    for n in count(1):
        folder = out / (name if n == 1 else f"{name}-{n}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


# ─── Beginning and end ────────────────────────────────────────────────────────────────────────────


def read_sets(s: Settings, out: Path, team: Team, resumed: dict | None) -> dict[str, Frames]:
    """Training, validation and test set, by name. The first process goes ahead, so that whatever
    must be made is made once; it alone speaks, and only when a run begins.

    Raises BadInput for a resumed run whose training set is another now.
    """
    if resumed:
        check_files(s)
    for turn in (team.rank == 0, team.rank != 0):
        if turn:
            speak = team.rank == 0 and not resumed
            found = load_sets(s, out, print_to_stderr if speak else None)
        if team.size > 1:
            dist.barrier()
    sets = dict(zip(("train", "valid", "test"), found, strict=True))
    if resumed:
        check_data(sets, resumed)
    return sets


def check_files(settings) -> None:
    """Raise BadInput, which says where it was looked, if a file of a run is not there."""
    for patterns in (settings.train, settings.valid, settings.test):
        try:
            expand(() if patterns == NONE else patterns)
        except BadInput as error:
            raise BadInput(f"{error} (looked for in {Path.cwd()}; a run names its files as seen "
                           "from where it was begun)") from None


def check_data(sets: dict[str, Frames], content: dict) -> None:
    """Raise BadInput if these are not the sets of the checkpoint with this content.

    Of validation and test the files must be the same, as far as the checkpoint tells them.
    """
    if content["data"] != sets["train"].fingerprint():
        first, *more = sets["train"].files()
        gives = f" and {len(more)} more files give" if more else " gives"
        raise BadInput(f"the training set that {first}{gives} is not the one that this run began "
                       "with: the file has changed, or this version splits it in another way; give "
                       "what it began with, or begin a new run")

    begun = content.get("origin", {}).get("data", {})
    for part, what in (("valid", "validation"), ("test", "test")):
        known = {file["sha256"] for file in begun.get(part, [])}
        for path in sets[part].files() if known else ():
            if checksum(path) not in known:
                raise BadInput(f"{path}, of the {what} set, is not the file that this run began "
                               f"with; give what it began with, or begin a new run")


def introduce(sets: dict[str, Frames], model: facet.Facet, batch_atoms: int, folder: Path,
              team: Team, resumed: dict | None) -> None:
    """Say what will be trained on what."""
    config = model.config
    frames = sets["train"]
    parameters = sum(p.numel() for p in model.parameters())
    together = f"{team.size} processes, " if team.size > 1 else ""
    from_step = f" from step {resumed['step']}" if resumed else ""
    team.say(
        f"{len(frames)} structures to train on, {len(sets['valid'])} to validate, "
        f"{len(sets['test'])} to test; "
        f"{frames.atom_counts().sum()} atoms of {' '.join(config.species)}; "
        f"{config.mean_neighbours:.1f} neighbours each, splines from {config.first_knot:.2f} to "
        f"{config.cutoff:g} Å; force RMS {config.energy_scale:.2f} eV/Å\n"
        f"Facet with {parameters} parameters, on {next(model.parameters()).device}, {together}"
        f"{torch.get_num_threads()} threads, batches of {batch_atoms} atoms → {folder}/{from_step}")


def write_result(folder: Path, result: dict, began: float) -> None:
    """Write result.json, with the time since the program began."""
    result["total_seconds"] = time.perf_counter() - began
    (folder / "result.json").write_text(json.dumps(result, indent=1))


# ─── Where a model comes from ─────────────────────────────────────────────────────────────────────


UNITS = {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³, positive: tension"}


def checksum(path: str | Path) -> str:
    """SHA-256 of a file of any size."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            found.update(block)
    return found.hexdigest()


def origin(command: str, sets: dict[str, Frames], config: facet.Config,
           shortest: dict[tuple[int, int], float], init: str = "",
           base: facet.Facet | None = None) -> dict:
    """What a model.pt says of its training: plain numbers and words, fit to be saved.

    sets: frames by the name of their part, train, valid, test; shortest: {pair of species: Å} in
    the training set; init and base: file and model that it was begun from, if any.
    """
    sums = {}  # parts are often of the same file
    data = {}
    for part, frames in sets.items():
        data[part] = []
        for path, size in frames.files().items():
            sums[path] = sums.get(path) or checksum(path)
            data[part].append({"file": path, "sha256": sums[path], "frames": size})
    found = {
        "command": command,
        "versions": {
            "python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "scipy": scipy.__version__, "ase": ase.__version__},
        "data": data,
        "units": dict(UNITS),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shortest": {}}
    for (i, j), distance in sorted(shortest.items()):
        found["shortest"][f"{config.species[i]}-{config.species[j]}"] = distance
    if base is None:
        return found

    # Begun from a model: it has seen what that one has seen
    found["init"] = {"file": init, "sha256": checksum(init)}
    for pair, distance in getattr(base, "origin", {}).get("shortest", {}).items():
        found["shortest"][pair] = min(distance, found["shortest"].get(pair, distance))
    return found


# ─── Progress ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Progress:
    """What a training counts; a checkpoint keeps its steps and seconds."""

    steps: int             # of the whole training
    minutes: float         # after which it ends by the clock; 0: never
    step: int = 0          # those that are done
    share: float = 0.0     # how much of the training is over, 0 … 1
    earlier: float = 0.0   # seconds of the lives before this one, if the run was resumed
    start: float = 0.0     # of this life, by the clock
    saved: float = 0.0     # seconds at the last checkpoint
    mark: tuple[float, float] = (0.0, 0.0)  # seconds and share from where time left is reckoned
    seen: int = 0          # structures in this life
    edges: int = 0         # their neighbours
    slots: int = 0         # the same with padding
    waited: float = 0.0    # seconds of this life, for data
    watching: float = 0.0  # and for tests and checkpoints

    def begin(self) -> None:
        """From here on the clock counts."""
        self.start = time.perf_counter()
        self.saved = self.earlier
        self.share = self.share_at(self.earlier)
        self.mark = self.earlier, self.share

    def seconds(self) -> float:
        """Of all lives together."""
        return self.earlier + time.perf_counter() - self.start

    def share_at(self, seconds: float) -> float:
        """How much is over, by the steps or by the clock."""
        clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, clock))

    def stepped(self, structures: int, seconds: float) -> bool:
        """One step more; whether another twentieth of the training is over."""
        twentieths = int(20 * self.share)
        self.step += 1
        self.seen += structures
        self.share = self.share_at(seconds)
        return int(20 * self.share) > twentieths

    def left(self, seconds: float) -> float:
        """Seconds to the end, at the pace since the mark."""
        return (seconds - self.mark[0]) * (1 - self.share) / max(self.share - self.mark[1], 1e-9)

    def rate(self, seconds: float) -> float:
        """Structures per second in this life, without the time for tests and checkpoints."""
        return self.seen / (seconds - self.earlier - self.watching)

    def summary(self) -> dict:
        """What result.json says of it."""
        spent = self.seconds() - self.earlier or 1.0
        return {
            "train_seconds": self.seconds(),
            "steps": self.step,
            "padding": 1 - self.edges / self.slots if self.slots else 0.0,
            "time": {
                "model and optimisers": 1 - (self.waited + self.watching) / spent,
                "waiting for data": self.waited / spent,
                "tests and checkpoints": self.watching / spent}}


# ─── Log ──────────────────────────────────────────────────────────────────────────────────────────


class Log:
    """A line per interval on the screen and in metrics.csv; on a terminal, a line of progress."""

    columns = ("step", "seconds", "loss", *[f"loss_{name}" for name in LABELS],
               *[label.log.column(label.quantity, "mae") for label in TABLE],
               "lr", "gradient", "structures_per_s")

    def __init__(self, folder: Path, valid: Frames, length: int):
        """length: bytes of metrics.csv that a resumed run keeps; what follows is done again."""
        self.path = folder / "metrics.csv"
        self.watched = valid.take(np.random.default_rng(0).permutation(len(valid))[:WATCHED])
        self.shown = 0.0
        self.path.touch()
        os.truncate(self.path, length)
        if length == 0:
            self.append(self.columns)
        parts = " ".join(f"{name:>7}" for name in LABELS).lstrip()
        maes = "".join(f"{label.quantity + ' MAE':>13}" for label in TABLE)
        print(f"{'step':>7} {'loss':>7}  ({parts}){maes}{'lr':>10}{'structures/s':>14}{'left':>10}",
              flush=True)

    def write(self, row: dict) -> None:
        """A line that is on the disk when this returns. Raises ValueError for other columns."""
        if set(row) != set(self.columns):
            raise ValueError(f"columns {sorted(row)}, not {sorted(self.columns)}")
        self.append([row[name] for name in self.columns])

    def append(self, cells: list) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(cells)
            file.flush()
            os.fsync(file.fileno())

    def length(self) -> int:
        """Bytes of metrics.csv."""
        return os.path.getsize(self.path)

    def errors(self, model: facet.Facet) -> dict[str, float]:
        """MAE of each label on the watched frames; nan where there are no labels."""
        found = evaluate.errors(evaluate.predict(model, self.watched), self.watched)
        columns = {}
        for label in TABLE:
            mae = found[label.report.column(label.quantity, "mae")]
            scale = label.log.factor / label.report.factor
            name = label.log.column(label.quantity, "mae")
            columns[name] = math.nan if mae is None else scale * mae
        return columns

    def line(self, model: facet.Facet, left: float, row: dict) -> None:
        """Write and show a row, to which the errors of the model are added; left: seconds."""
        row = {**row, **self.errors(model)}
        parts = []
        maes = []
        for label in TABLE:
            parts.append(f"{row['loss_' + label.name]:7.{label.loss_digits}f}")
            mae = row[label.log.column(label.quantity, "mae")]
            unit = label.log.text.removesuffix("/atom")
            maes.append(f"{mae:{label.log.width}.{label.log.digits}f} {unit}")
        self.show(f"{row['step']:7d} {row['loss']:7.4f} ({' '.join(parts)}) {' '.join(maes)} "
                  f"{row['lr']:9.1e} {row['structures_per_s']:13.1f} {duration(left):>9}")
        row["seconds"] = f"{row['seconds']:.1f}"
        row["structures_per_s"] = f"{row['structures_per_s']:.1f}"
        self.write(row)

    def progress(self, step: int, steps: int, left: float) -> None:
        """On a terminal only, twice a second: a line that the next one overwrites."""
        if sys.stdout.isatty() and time.perf_counter() > self.shown + 0.5:
            self.shown = time.perf_counter()
            self.show(f"step {step} of {steps}, {duration(left)} left", end="")

    def show(self, text: str, end: str = "\n") -> None:
        over = "\r\033[K" if sys.stdout.isatty() else ""
        print(over + text, end=end, flush=True)


def duration(seconds: float) -> str:
    """90 → 1.5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ─── Checkpoint ───────────────────────────────────────────────────────────────────────────────────


def restore(resumed: dict, model: facet.Facet, averaged: facet.Facet,
            optimisers: list[torch.optim.Optimizer], p: Progress) -> None:
    """Put everything into the state of a checkpoint."""
    model.load_state_dict(resumed["state"])
    averaged.load_state_dict(resumed["averaged"])
    for optimizer, state in zip(optimisers, resumed["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    p.step = resumed["step"]
    p.earlier = resumed["seconds"]


def save(folder: Path, log: Log | None, model: facet.Facet, averaged: facet.Facet,
         optimisers: list[torch.optim.Optimizer], p: Progress, kept: dict) -> None:
    """Write model.pt, and checkpoint.pt with all it takes to go on. The first process does."""
    if log:
        facet.save(averaged, folder / "model.pt")
        facet.save(
            model, folder / "checkpoint.pt", averaged=averaged.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimisers],
            step=p.step, seconds=p.seconds(), log=log.length(), **kept)
    p.saved = p.seconds()


def checkpoint(folder: Path, settings_class: type) -> dict:
    """What `train` left in a folder, with settings that fit their class. Raises BadInput."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        there = "" if folder.exists() else "; there is no such folder"
        raise BadInput(f"{folder.absolute()}: holds no checkpoint.pt of a training{there}")
    try:
        content = facet.read_checkpoint(path)
    except ValueError as error:
        raise BadInput(str(error)) from error
    try:
        settings = content["settings"]
        for name in ("train", "valid", "test"):
            settings[name] = tuple(settings[name])
        settings_class(**settings)
        facet.Config(**content["config"])
        content["data"]  # a fingerprint
        return content
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: was written by another version of train_small.py "
                       f"({type(error).__name__})") from error


# ─── Interrupts ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def interruptible():
    """Ctrl-C and SIGTERM (a batch system's notice) fill a list, so that a step can be ended.

    A second one ends at once.
    """
    caught = []

    def notice(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, notice)
    except ValueError:
        pass  # not the main thread, which alone gets signals
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
