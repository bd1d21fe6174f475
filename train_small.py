"""Train a Facet on a laptop in minutes, or leave it running on GPUs overnight.

    python train_small.py                       # embedded data (EMT metals), 3 to 5 minutes
    python train_small.py --train si_train.extxyz --test si_test.extxyz --name si    # your own data
    python -m tools.database MPtrj_2022.9_full.json mptrj.db    # large sets become an ASE database
    python train_small.py --train mptrj.db --species all --channels 64 --minutes 6000 --name mptrj
    torchrun --nproc_per_node=4 train_small.py --train …         # four processes, the same batches
    python train_small.py --resume runs/si     # goes on after a kill, Ctrl-C or a full disk
    python train_small.py --init runs/si/model.pt --train new.extxyz    # from a trained model

Reads what ASE reads (extxyz, traj, db, OUTCAR, vasprun.xml, …, .gz, globs): energy in eV, forces in
eV/Å and, where there is one, stress in eV/Å³. JSON in other layouts is converted by tools.database.
Writes to runs/<name>/: model.pt, checkpoint.pt, metrics.csv, result.json, report.png.

A run is a number of epochs: the same seed and number of threads give the same model on the same
machine, however busy it is. A tenth of the frames is held back for validation, which the log
watches, and a tenth for the test, once, in the end. --minutes makes a run end by the clock.
"""
from __future__ import annotations

import argparse
import copy
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import smooth_l1_loss

import facet
from tools import report
from tools.batches import (
    Samples,
    check_outputs,
    endless_batches,
    fetch,
    length_of,
    loader,
    ten_structures,
)
from tools.frames import BadInput, Frames, load_model
from tools.labels import LABELS, TABLE
from tools.options import (
    MODEL,
    SIZES,
    check_device,
    check_range,
    chosen,
    label_settings,
    model_settings,
    setting,
    taken_from,
)
from tools.replay import ReplayedGradient
from tools.run import (
    ALONE,
    Log,
    Progress,
    Team,
    checkpoint,
    device_of,
    duration,
    filled,
    interruptible,
    introduce,
    new_folder,
    origin,
    read_sets,
    restore,
    save,
    team_of,
    write_result,
)
from tools.statistics import check_species, statistics, statistics_of

WEIGHT_DECAY = 1e-3  # of AdamW
CLIP = 1.0           # longest gradient allowed
SAVE_SECONDS = 300   # a checkpoint at least this often, and with every line of the log


# ─── Settings ─────────────────────────────────────────────────────────────────────────────────────


SHARED = make_dataclass("Shared", label_settings() + model_settings(), frozen=True)


@dataclass(frozen=True)
class Settings(SHARED):
    """Every hyperparameter, and what the command line shows of it.

    Besides those below: those of the model, MODEL in tools/options.py, and of each label in
    tools/labels.py its name in the files and its weight (energy, forces, stress, energy_weight,
    stress_weight).
    """

    # Data
    train: tuple[str, ...] = setting((), "files to train on; none: an embedded set of EMT metals")
    valid: tuple[str, ...] = setting((), "files to validate on; none: a tenth of train; 0: nothing")
    test: tuple[str, ...] = setting((), "files to test on; none: a tenth of train; 0: nothing")
    E0: str = setting("", "eV of free atoms, such as Si=-0.79,O=-1.56; others are fitted")
    species: str = setting("", "elements to know, such as Si,O, or all; by default those of train")
    strict: bool = setting(False, "warnings about the data are errors")
    init: str = setting("", "model.pt to begin from: all of it but E0, which is fitted to the rest")

    # Run
    name: str = setting("", "results go to runs/NAME; by default the name of the first file")
    epochs: float = setting(0.0, "times through the data; 0: 40, more for molecules", 0)
    steps: int = setting(0, "number of steps, instead of epochs", 0)
    minutes: float = setting(0.0, "end by the clock, if epochs do not end before; 0: never", 0)
    seed: int = setting(0, "of the weights, the order of the data and the splits", 0)
    device: str = setting("", "cpu, cuda, cuda:1, …; by default cuda if there is one")
    threads: int = setting(0, "CPU threads; 0: as PyTorch chooses", 0)
    workers: int = setting(-1, "processes that make neighbour lists; -1: as many as it takes", -1)

    # Optimisation
    batch_atoms: int = setting(0, "atoms per step; 0: those of ten structures, at most 256", 0)
    lr: float = setting(5e-3, "highest learning rate of AdamW", above=0)
    muon_lr: float = setting(1e-2, "highest learning rate of Muon, for matrices that mix", above=0)
    muon_decay: float = setting(5.0, "weight decay of Muon over a whole run, in powers of e", 0)
    ema: float = setting(0.99, "averaging of the weights that are tested and saved, below 1", 0)
    huber: float = setting(0.1, "errors count linearly beyond this times the force RMS", above=0)

    def __post_init__(self):
        """Raise BadInput, in one sentence, for a value out of range."""
        for f in fields(self):
            check_range(f, getattr(self, f.name))
        if self.ema >= 1:
            raise BadInput(f"--ema {self.ema}: must be below 1")
        if self.seed >= 2 ** 63:
            raise BadInput(f"--seed {self.seed}: must be below 2⁶³")
        self.config(("H",))

    def config(self, species: tuple[str, ...]) -> facet.Config:
        """Of a model of these species before it knows its training set. Raises BadInput."""
        try:
            return facet.Config(species, **{name: getattr(self, name) for name in MODEL})
        except ValueError as error:
            raise BadInput(str(error)) from None


# ─── Losses ───────────────────────────────────────────────────────────────────────────────────────


def losses(out: dict, target: dict, count: torch.Tensor, scale: float,
           huber: float) -> dict[str, torch.Tensor]:
    """The Huber loss of each label: energy per atom, forces, virial per atom, over the scale.

    out: of the model; target: as Samples gives it; count [3]: how many labels all processes have.
    Each is a sum over this process' share, divided by what all have: summed over the processes it
    is the mean. Where there is no label the error counts as zero.
    """
    parts = {}
    for label, labels in zip(TABLE, count.clamp(min=1), strict=True):
        labelled = target[label.output].isfinite()
        error = out[label.output] - target[label.output].nan_to_num()  # [N, …] or [S, …]
        if label.extensive or label.per_volume:
            error = (error.movedim(0, -1) / target["atoms"]).movedim(-1, 0)  # [S, …]
        if label.scaled:
            error = error / scale
        beta = huber / label.sharper
        loss = smooth_l1_loss(error, torch.zeros_like(error), beta=beta, reduction="none")
        parts[label.name] = (loss * labelled).sum().float() / labels
    return parts


def loss_weights(s: Settings, share: float) -> dict[str, float]:
    """Of each label; that of the energy grows from a twentieth to the end of the training."""
    weights = {}
    for label in TABLE:
        weight = 1.0 if label.weight is None else getattr(s, f"{label.name}_weight")
        weights[label.name] = weight * 0.05 ** (1 - share) if label.grows else weight
    return weights


def weighted(weights: dict[str, float], parts: dict):
    """The loss that is minimised. Raises KeyError for a part without a weight."""
    return sum(weights[name] * part for name, part in parts.items())


def gradient_of(engine: torch.nn.Module, batch: facet.Batch, target: dict, scale: float,
                huber: float, size: int = 1) -> torch.Tensor:
    """The losses, [3]; the gradient of their weighted sum goes to .grad of the weights.

    engine: the model, or what wraps it for `size` processes; target: as Samples gives it, and the
    weights of the losses, [3]; the others as in `losses`.
    """
    out = engine(batch, differentiable=True)
    parts = losses(out, target, target["count"], scale, huber)
    loss = weighted(dict(zip(LABELS, target["weights"], strict=True)), parts)

    # For the weights alone and not for the positions of the atoms, too.
    # DistributedDataParallel takes the mean over processes, and we want the sum
    engine.zero_grad()
    trained = [weights for weights in engine.parameters() if weights.requires_grad]
    (size * loss).backward(inputs=trained)
    return torch.stack([parts[name] for name in LABELS]).detach()  # [3]


# ─── Optimisers ───────────────────────────────────────────────────────────────────────────────────


def optimizers(model: facet.Facet, s: Settings, steps: int) -> list[torch.optim.Optimizer]:
    """Muon, which turns its steps into rotations, for matrices that mix paths; AdamW for others.

    What Muon's decay forgets in a run is the same for any number of steps, for short runs less: at
    2,000 steps of silicon 0.5 per unit of learning rate is best, at 10,000 of molecules 0.1.
    Weights without requires_grad are left alone. Raises BadInput if there are no others.
    """
    matrices = []
    others = []
    for name, weights in model.named_parameters():
        if weights.requires_grad:
            (matrices if ".mix.W" in name else others).append(weights)

    found = []
    if others:
        found.append(torch.optim.AdamW(others, lr=s.lr, weight_decay=WEIGHT_DECAY))
    if matrices:
        decay = min(1, s.muon_decay / (s.muon_lr * steps / 2))  # the cosine's mean is a half
        found.append(torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=decay))
    if not found:
        raise BadInput("no parameter of the model requires a gradient: there is nothing to train")
    return found


@torch.no_grad()
def follow(averaged: facet.Facet, model: facet.Facet, share: float) -> None:
    """Move the average of the weights towards them by this share of the difference."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), share)


# ─── Training ─────────────────────────────────────────────────────────────────────────────────────


def train(model: facet.Facet, frames: Frames, valid: Frames, s: Settings, folder: Path,
          team: Team = ALONE, resumed: dict | None = None) -> tuple[facet.Facet, dict]:
    """Trains; returns the model with averaged weights, and what the time went into.

    Writes model.pt, checkpoint.pt and metrics.csv. A checkpoint holds all it takes to go on as if
    nothing had happened: the order of the data follows from seed and step, nothing else is random.
    Raises BadInput when the loss is not finite, KeyboardInterrupt when it was told to stop.
    """
    device = next(model.parameters()).device
    averaged = copy.deepcopy(model).requires_grad_(False)
    samples = Samples(frames, model.config, team)
    batches, in_epoch = endless_batches(samples, s)
    steps = length_of(frames, s, in_epoch)
    optimisers = optimizers(model, s, steps)

    # A resumed run goes on where its checkpoint was written
    p = Progress(steps, s.minutes)
    if resumed:
        restore(resumed, model, averaged, optimisers, p)
    first = p.step
    engine = torch.nn.parallel.DistributedDataParallel(model) if team.size > 1 else model
    stream = iter(loader(samples, islice(batches, first, None), s.workers, device.type == "cuda"))
    find_gradient = partial(gradient_of, engine, scale=model.config.energy_scale, huber=s.huber,
                            size=team.size)
    if device.type == "cuda" and team.size == 1:
        find_gradient = ReplayedGradient(find_gradient, model)

    # Only the first process writes
    log = Log(folder, valid, resumed["log"] if resumed else 0) if team.rank == 0 else None
    kept = {"settings": asdict(s), "data": frames.fingerprint()}  # in every checkpoint
    p.begin()
    if not resumed:
        save(folder, log, model, averaged, optimisers, p, kept)

    with interruptible() as interrupted:
        while p.share < 1:
            # Losses, and their gradient
            rows, batch, target = fetch(stream, device, p)
            weights = loss_weights(s, p.share)
            target["weights"] = filled([weights[name] for name in LABELS], device)  # [3]
            target["count"] = team.sum(target["count"])  # [3]
            parts = find_gradient(batch, target)  # [3]
            gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            parts, gradient, seconds, stop = team.agree(
                parts, gradient, p.seconds(), len(interrupted))
            if not np.isfinite([*parts.values(), gradient]).all():
                give_up(model, samples, rows, s, f"at step {p.step} of {folder}", team)

            # Step: warm-up, then a cosine to zero; the average of the weights follows
            schedule = min(1, (p.step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * p.share))
            for optimizer in optimisers:
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule
                optimizer.step()
            line_due = p.stepped(len(rows), seconds)
            follow(averaged, model, 1 - min(s.ema, p.step / (p.step + 9)))

            # Log twenty times; save then, and every few minutes, and before a stop
            if p.step == first + 5:
                p.mark = seconds, p.share  # the first steps are slow
            if log:
                log.progress(p.step, steps, p.left(seconds))
            if log and p.step == first + 15:
                log.show(f"{steps} steps, {in_epoch} an epoch: about {duration(p.left(seconds))}")
            if line_due or stop or seconds > p.saved + SAVE_SECONDS:
                moment = time.perf_counter()
                if log and line_due:
                    log.line(averaged, p.left(seconds), {
                        "step": p.step, "seconds": seconds, "loss": weighted(weights, parts),
                        **{f"loss_{name}": part for name, part in parts.items()},
                        "lr": s.lr * schedule, "gradient": gradient,
                        "structures_per_s": p.rate(seconds)})
                save(folder, log, model, averaged, optimisers, p, kept)
                p.watching += time.perf_counter() - moment
            if stop and p.share < 1:
                raise KeyboardInterrupt
    return averaged, p.summary()


def give_up(model: facet.Facet, samples: Samples, rows, s: Settings, where: str, team: Team):
    """Raise BadInput with the names of the frames whose own loss or gradient is not finite."""
    alone = Samples(samples.frames, samples.config)
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    names = []
    for i in rows[team.rank::team.size]:
        _, batch, target = alone[np.array([i])]
        target = {name: label.to(device) for name, label in target.items()}
        out = model(batch.to(device), differentiable=True)
        parts = losses(out, target, target["count"], model.config.energy_scale, s.huber)
        gradient = torch.autograd.grad(sum(parts.values()), weights, allow_unused=True)
        values = [*parts.values(), *(g for g in gradient if g is not None)]
        if not all(value.isfinite().all() for value in values):
            names.append(alone.frames[int(i)].info["source"])

    everyone = [names]
    if team.size > 1:
        everyone = [None] * team.size
        dist.all_gather_object(everyone, names)
    guilty = ", ".join(chain.from_iterable(everyone))
    cause = f"because of {guilty}; look at it" if guilty else "on sound frames; lower --lr"
    raise BadInput(f"the loss became nan or infinite {where}, {cause}. model.pt holds the weights "
                   "before")


# ─── Command line ─────────────────────────────────────────────────────────────────────────────────


def main(s: Settings, out: Path = Path("runs"), resume: Path | None = None,
         command: str = "") -> dict:
    """Read, train, test, draw; returns what result.json holds (other processes: nothing).

    With `resume`, the run in that folder goes on; s are its settings. Raises BadInput.
    """
    device = device_of(s.device)
    with team_of(device) as team:
        return train_and_report(s, out, resume, command, device, team)


def train_and_report(s: Settings, out: Path, resume: Path | None, command: str, device: str,
                     team: Team) -> dict:
    """What main does, as one of a team."""
    began = time.perf_counter()
    resumed = checkpoint(resume, Settings) if resume else None
    out = resume.parent if resume else out
    out.mkdir(parents=True, exist_ok=True)
    s = replace(s, epochs=s.epochs or (0 if s.train else 25),
                name=s.name or (Path(s.train[0].replace("*", "")).stem if s.train else "emt"))
    base = load_model(s.init) if s.init and not resumed else None
    if base:
        s = replace(s, **taken_from(base.config, s.init, chosen(s)))

    # Data and model
    sets = read_sets(s, out, team, resumed)
    model = first_model(s, sets, base, resumed, command, team).to(device)
    check_outputs(model, sets["train"])
    folder = resume or (new_folder(out, s.name) if team.rank == 0 else out)
    introduce(sets, model, s.batch_atoms or ten_structures(sets["train"]), folder, team, resumed)

    # Training
    try:
        model, trained = train(model, sets["train"], sets["valid"], s, folder, team, resumed)
    except KeyboardInterrupt:
        team.say("\nstopped. model.pt holds the averaged weights; go on with: "
                 f"python train_small.py --resume {folder}")
        raise
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror or error}). What was saved "
                       "before is whole; when that is mended, go on with: python train_small.py "
                       f"--resume {folder}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        atoms = s.batch_atoms or ten_structures(sets["train"])
        raise BadInput(f"{folder}: a step needs more memory than {device} has left; begin a new "
                       f"run with a --batch_atoms below {atoms}, or with fewer --channels"
                       ) from error
    if team.rank:
        return {}

    # What was trained is kept, whatever happens in the test, which comes once
    result = {
        "parameters": sum(p.numel() for p in model.parameters()), **trained, "command": command,
        "settings": asdict(s), "config": asdict(model.config), "processes": team.size,
        "torch": torch.__version__, "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"}
    write_result(folder, result, began)
    try:
        result.update(report.report(folder))
    except (BadInput, OSError) as error:
        print(f"the report failed ({error}); the training is whole. Try again with: "
              f"python -m tools.report {folder}", file=sys.stderr)
    write_result(folder, result, began)

    shares = ", ".join(f"{100 * share:.1f} % {what}" for what, share in trained["time"].items())
    print(f"\ntime in training: {shares}; {100 * trained['padding']:.0f} % of the neighbours in "
          f"the batches are padding\n{folder}/: model.pt, checkpoint.pt, metrics.csv, result.json, "
          f"report.png; {result['total_seconds']:.0f} s in all")
    return result


def first_model(s: Settings, sets: dict[str, Frames], base: facet.Facet | None,
                resumed: dict | None, command: str, team: Team) -> facet.Facet:
    """A new model, or `base` with E0 for these data; one to put a checkpoint into. Raises BadInput.

    Config comes from the training set; validation and test must hold no other elements.
    """
    if resumed:
        config = facet.Config(**resumed["config"])
    elif base:
        config, shortest = statistics_of(base, sets["train"], s)
    else:
        config, shortest = statistics(sets["train"], s)
    for name in ("valid", "test"):
        check_species(sets[name], config, s.init)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        model = facet.Facet(config)
    if base:
        model.load_state_dict(base.state_dict())
    if resumed:
        model.origin = resumed["origin"]
    elif team.rank == 0:  # which alone saves
        model.origin = origin(command, sets, config, shortest, s.init, base)
    return model


LATER = ("minutes", "steps", "epochs", "device", "threads", "workers")  # may change when resumed


def parse(arguments: list[str]) -> tuple[Settings, Path | None]:
    """Settings from the command line, and the run to resume.

    A wrong flag ends the program with one sentence and code 2.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    own_first = sorted(fields(Settings), key=lambda f: f.name in SHARED.__dataclass_fields__)
    for f in own_first:
        shown = "" if f.default in ((), "", 0, -1) else f" (default {f.default})"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        if isinstance(f.default, tuple):
            parser.add_argument(f"--{f.name}", metavar="FILE", nargs="+", help=text)
        elif isinstance(f.default, bool):
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            metavar = f.name.upper() if f.default == "" else "X"
            parser.add_argument(f"--{f.name}", metavar=metavar, type=type(f.default), help=text)
    parser.add_argument("--size", choices=SIZES, help="sets channels, groups, degree, lr and "
                        "muon_lr, those that are not given (default medium)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER",
                        help="go on with the run in this folder, with its own settings; of them "
                        f"only {', '.join(LATER)} can be changed")

    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume", None)
    for name in ("train", "valid", "test"):
        if name in given:
            given[name] = tuple(given[name])

    if resume:
        wrong = sorted(set(given) - set(LATER))
        if wrong:
            parser.error(f"--{wrong[0]} cannot be changed when a run goes on; begin a new run")
        given = {**checkpoint(resume, Settings)["settings"], **given}
    elif "size" in given:
        size = given.pop("size")
        if "init" in given:
            rates = [f"--{name} {x}" for name, x in SIZES[size].items() if "lr" in name]
            parser.error(f"--size {size}: the model {given['init']} has its size; leave it out, "
                         f"and give its rates: {' '.join(rates) or 'those of --help'}")
        given = {**SIZES[size], **given}
    try:
        if given.get("init") and not resume:
            given.update(taken_from(load_model(given["init"]).config, given["init"], given))
        s = Settings(**given)
    except BadInput as error:
        parser.error(str(error))
    if s.test not in ((), ("0",)) and not s.train:
        parser.error("--test without --train: say what to train on")
    check_device(parser, s.device or "cpu")
    return s, resume


if __name__ == "__main__":
    try:
        settings, going_on = parse(sys.argv[1:])
        if settings.threads:
            torch.set_num_threads(settings.threads)
        words = shlex.join(["python", *sys.argv])
        main(settings, resume=going_on, command=words)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
