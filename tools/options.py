"""Options of train_small.py that follow another table; those of all commands that evaluate a model.

facet.Config has the defaults of the model and checks it, tools/labels.py names the labels. So
neither is said twice.
"""
from __future__ import annotations

import argparse
import math
from dataclasses import Field, field
from numbers import Real
from typing import TYPE_CHECKING

import torch

import facet
from tools.frames import BadInput
from tools.labels import TABLE, name_help

if TYPE_CHECKING:
    from train_small import Settings

MODEL = {  # the fields of facet.Config that are chosen; Config has their defaults and checks them
    "cutoff": "Å, how far an atom sees in one layer",
    "degree": "L, highest degree of the features",
    "channels": "C, copies of every feature",
    "groups": "B, groups of channels with radial functions of their own",
    "layers": "T, number of message-passing layers",
    "activation": "of the grid layer: product or silu",
}

SIZES = {  # what --size sets where it is not given; medium: nothing, the defaults stay
    "small": {"channels": 16, "groups": 4, "degree": 1, "lr": 1e-2, "muon_lr": 2e-2},
    "medium": {},
    "large": {"channels": 64, "groups": 16, "degree": 3, "lr": 2e-3, "muon_lr": 4e-3},
}


def setting(default, text: str, least: float | None = None, above: float | None = None):
    """A field of Settings, with what --help says of it.

    A number must not be below `least`, or must be larger than `above`.
    """
    return field(default=default, metadata={"help": text, "least": least, "above": above})


def check_range(f: Field, value) -> None:
    """Raise BadInput, in one sentence, for a number out of its range."""
    least = f.metadata["least"]
    above = f.metadata["above"]
    if least is None and above is None:
        return
    if not isinstance(value, Real):
        raise BadInput(f"--{f.name} {value!r}: must be a number")
    if least is not None and not least <= value < math.inf:
        raise BadInput(f"--{f.name} {value}: must be a number from {least} on")
    if above is not None and not above < value < math.inf:
        raise BadInput(f"--{f.name} {value}: must be a number above {above}")
    if type(f.default) is int and value != int(value):
        raise BadInput(f"--{f.name} {value}: must be a whole number")


def model_settings() -> list[tuple]:
    """Those fields, as Config has them."""
    kinds = {name: type(getattr(facet.Config, name)) for name in MODEL}
    return [(name, kinds[name], setting(getattr(facet.Config, name), text))
            for name, text in MODEL.items()]


def label_settings() -> list[tuple]:
    """Of each label its name in the files and, unless that is 1, the weight of its loss."""
    found = []
    for label in TABLE:
        found.append((label.name, str, setting("", name_help(label))))
        text = "; 0: labels are not used"
        limit = {"least": 0}
        if label.grows:
            text = " in the end; forces have 1"
            limit = {"above": 0}
        if label.weight is not None:
            weight = setting(label.weight, f"of the {label.name} loss{text}", **limit)
            found.append((f"{label.name}_weight", float, weight))
    return found


def chosen(s: Settings) -> dict:
    """The settings of the model that are not the defaults."""
    return {name: getattr(s, name) for name in MODEL
            if getattr(s, name) != getattr(facet.Config, name)}


def taken_from(config: facet.Config, init: str, given: dict) -> dict:
    """The settings of the model with which a run begins. Raises BadInput for others given."""
    own = {name: getattr(config, name) for name in MODEL}
    for name, value in own.items():
        if given.get(name, value) != value:
            raise BadInput(f"--{name} {given[name]}: the model {init} has {value}; leave it out")
    return own


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """--batch_atoms and --device."""
    parser.add_argument(
        "--batch_atoms", type=int, default=256,
        help="atoms evaluated at a time, which bounds the memory (default %(default)s)")
    parser.add_argument("--device", default="", help="default: cuda if there is one, else cpu")


def check_evaluation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program, with one sentence, if they cannot be; the device gets its name."""
    if args.batch_atoms < 1:
        parser.error(f"--batch_atoms {args.batch_atoms}: must be positive")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(parser, args.device)


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End the program, with one sentence, if nothing can be computed there."""
    try:
        torch.zeros(1, device=device).item()  # `meta` has tensors, but no numbers
    except (RuntimeError, AssertionError, ImportError):
        parser.error(f"--device {device}: PyTorch has no such device here; try --device cpu")
