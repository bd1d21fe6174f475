"""Convert data sets of any size to one ASE database, for training on what does not fit in memory.

    python -m tools.database MPtrj_2022.9_full.json mptrj.db
    python -m tools.database run*.xyz all.db --energy REF_energy --forces REF_forces
    python train_small.py --train mptrj.db
    ase db mptrj.db natoms=8 -c material,formula,energy       # ASE's own tool looks into it

Reads whatever tools.frames reads, MPtrj's, MatPES' and mlearn's JSON included, frame after frame
in little memory, and checks every frame. After a kill, give the same command again: what is in the
database stays. Later files may be added the same way. Names of labels are given here and hold for
the whole database.

A row holds the geometry, energy, forces and stress where ASE keeps them, labels that ASE has no
column for in the row's data, and as key-value pairs `source` (file and frame), `material` and, if
there is one, `group`.
"""
from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from itertools import islice

import ase.db
from ase import Atoms

from tools import frames
from tools.frames import LABELS, USUAL, BadInput, Names, Unread
from tools.sets import COLUMNS

BLOCK = 1000            # frames that are written at a time: what a kill loses at most
SECONDS_PER_LINE = 10   # between lines of progress in a file


def connect(path: str) -> ase.db.core.Database:
    """The database, without ASE's lock file, which a killed process would leave behind."""
    return ase.db.connect(path, type="db", use_lock_file=False, serial=True)


def metadata_now(connection: sqlite3.Connection) -> dict:
    """What the metadata of a database say at this moment; ase.db remembers what they once said."""
    found = connection.execute("SELECT value FROM information WHERE name = 'metadata'").fetchone()
    return json.loads(found[0]) if found else {}


class Writer:
    """An ASE database that is filled in blocks.

    A block of frames is one transaction with the metadata that say what is there: names of the
    labels, frames of each input. A kill leaves whole blocks. Another process that writes at the
    same time is noticed, because it has changed the metadata.
    """

    def __init__(self, path: str, names: Names):
        """Open a database, or begin one. Raises BadInput if it is not of this kind."""
        self.path = path
        try:
            self.known = connect(path).metadata.get("facet")  # as this process found or wrote it
        except TypeError as error:  # of ASE, where another process is about to fill new tables
            raise BadInput(f"{path}: another process is writing into it, or was killed when it had "
                           f"just begun; wait, or remove the file") from error
        if self.known is None and connect(path).count():
            raise BadInput(f"{path}: is a database that this command has not made; give another "
                           f"name for the result")

        if self.known is None:
            self.write([], {"names": list(names), "complete": False,
                            "labels": [0] * len(LABELS), "inputs": {}})
        begun = Names(*self.known["names"])  # without labels that came into the table since
        if begun != names:
            before = ", ".join(name or "the usual" for name in begun)
            raise BadInput(f"{path}: was begun with other names of {', '.join(LABELS)} "
                           f"({before}); give the same, or another name for the result")

    def write(self, block: list[Atoms], known: dict) -> None:
        """Write frames and the new metadata: both, or nothing. Raises BadInput if somebody else
        writes too."""
        database = connect(self.path)
        with database:
            database.connection.execute("BEGIN IMMEDIATE")  # from here on, others wait
            if metadata_now(database.connection).get("facet") != self.known:
                raise BadInput(f"{self.path}: another process is writing into it; let that one "
                               f"end, then give the command again")
            for atoms in block:
                info = dict(atoms.info)
                if not info["group"]:
                    del info["group"]
                beside = {name: value for name, value in atoms.calc.results.items()
                          if name not in COLUMNS}
                database.write(atoms, key_value_pairs=info, data=beside)
            database.metadata = {"facet": known}
        self.known = known

    def add(self, path: str, block: list[Atoms], count: int, whole: bool) -> None:
        """Write frames of an input, of which `count` are there then; whole: these are the last."""
        stat = os.stat(path)
        state = {"bytes": stat.st_size, "modified": stat.st_mtime, "frames": count, "whole": whole}
        inputs = {**self.known["inputs"], os.path.realpath(path): state}
        labels = {**dict.fromkeys(LABELS, 0), **self.labels()}
        for atoms in block:
            for name in atoms.calc.results:
                labels[name] += 1
        self.write(block, {**self.known, "complete": False, "inputs": inputs,
                           "labels": list(labels.values())})

    def labels(self) -> dict[str, int]:
        """How many frames have each label."""
        return dict(zip(LABELS, self.known["labels"]))

    def state(self, path: str) -> dict:
        """How far an input has come. Raises BadInput if it has changed since it was begun."""
        nothing = {"frames": 0, "whole": False}
        state = self.known["inputs"].get(os.path.realpath(path), nothing)
        if state == nothing:
            return nothing

        stat = os.stat(path)
        if (state["bytes"], state["modified"]) != (stat.st_size, stat.st_mtime):
            raise BadInput(f"{path}: has changed since {self.path} was begun with it; give another "
                           f"name for the result")
        return state

    def finish(self) -> None:
        """Say that the database is complete. Raises BadInput if it is not."""
        for path, state in self.known["inputs"].items():
            if not state["whole"]:
                raise BadInput(f"{self.path}: holds a part of {path}; give that file too")
        if self.known["inputs"]:
            found = {name for name, count in self.labels().items() if count}
            frames.check_labels(Names(*self.known["names"]), found, list(self.known["inputs"]))
        if not self.known["complete"]:
            self.write([], {**self.known, "complete": True})


class Progress:
    """A line that rewrites itself on a terminal, a line now and then in a file."""

    def __init__(self):
        self.start = time.monotonic()
        self.last = self.start
        self.written = 0

    def show(self, path: str, count: int, written: int) -> None:
        """count: frames of this file that are in the database; written: those new just now."""
        self.written += written
        now = time.monotonic()
        rate = self.written / max(now - self.start, 1e-9)
        line = f"{path}: {count} frames, {rate:.0f} frames/s"
        if sys.stdout.isatty():
            print(f"\r{line}\033[K", end="", flush=True)
        elif now - self.last > SECONDS_PER_LINE:
            print(line, flush=True)
            self.last = now

    def end(self, line: str) -> None:
        """The last word on a file."""
        print(f"\r{line}\033[K" if sys.stdout.isatty() else line, flush=True)


def convert(inputs: Sequence[str], out: str, names: Names = USUAL) -> None:
    """Write every frame of the inputs (files or globs) into the database `out`, or go on with it.

    Raises BadInput: for what frames.iread refuses, for an input that changed or that is `out`, for
    other names of labels than before, for a database that somebody else is writing.
    """
    paths = frames.expand(inputs)
    if os.path.realpath(out) in map(os.path.realpath, paths):
        raise BadInput(f"{out}: is an input, too, and would hold its own frames twice; give "
                       f"another name for the result")
    unread = Unread()
    try:
        writer = Writer(out, names)
        progress = Progress()
        for path in paths:
            state = writer.state(path)
            count = state["frames"]
            if state["whole"]:
                progress.end(f"{path}: {count} frames, all there")
                continue
            if count:
                progress.end(f"{path}: {count} frames are there; going on")

            # frames that are there are read over; then block after block
            found = islice(frames.iread(path, names, unread, say=progress.end), count, None)
            while block := list(islice(found, BLOCK)):
                count += len(block)
                writer.add(path, block, count, whole=False)
                progress.show(path, count, len(block))
            writer.add(path, [], count, whole=True)
            progress.end(f"{path}: {count} frames")
        writer.finish()
        for text in unread.notes(", ".join(paths)):
            progress.end(text)
    except sqlite3.Error as error:
        raise BadInput(f"{out}: cannot be written, or another process is writing into it "
                       f"({error})") from error


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, or 1 for bad input, which is said in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m tools.database", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or globs")
    parser.add_argument("out", metavar="OUT.db", help="the database, new or to go on with")
    frames.add_names(parser)
    options = parser.parse_args(arguments)
    if not options.out.lower().endswith(".db"):
        parser.error(f"the last file is the result, its name ends in .db; {options.out} does not")

    try:
        convert(options.inputs, options.out, frames.names_in(options))
    except BadInput as error:
        print(f"\nerror: {error}" if sys.stdout.isatty() else f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; give the same command to go on", file=sys.stderr)
        return 130
    print(f"{options.out} is complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
