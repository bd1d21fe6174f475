"""Tests of what tools/run.py and others do beside the training loop, each by hand."""
import hashlib
import signal

import numpy as np
import pytest
from ase.build import bulk

import facet
from tools import run
from tools.batches import loader
from tools.evaluate import read
from tools.frames import in_memory
from tools.labels import BadInput, Names, labelled
from tools.run import Progress, checksum, interruptible
from tools.statistics import statistics_of
from train_small import Settings


def test_checksum_is_that_of_the_whole_file(tmp_path):
    """Of one that is read in several pieces; control: its last byte counts."""
    content = np.random.default_rng(0).bytes(2 ** 20 + 2 ** 19)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checksum(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert checksum(tmp_path / "b") != checksum(tmp_path / "a")


def test_first_interrupt_is_noted_and_the_second_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as caught:
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_time_left_follows_from_the_pace_since_the_mark():
    """3 of 4 quarters are left; the last took 10 s, whatever the first steps took."""
    p = Progress(steps=80, minutes=0)
    p.step = 20
    p.share = p.share_at(110.0)
    p.mark = (100.0, 0.0)
    assert p.share == 0.25 and p.left(110.0) == pytest.approx(30.0)
    p.step = 60
    p.share = p.share_at(130.0)
    assert p.left(130.0) == pytest.approx(10.0)

    by_the_clock = Progress(steps=80, minutes=2)
    assert by_the_clock.share_at(30.0) == 0.25


def test_loaders_make_neighbours_only_where_they_are_not_kept(monkeypatch):
    class Samples:
        team = run.ALONE
        graphs = {}

        def __len__(self):
            return 0

    samples = Samples()
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert loader(samples, [], -1, False).num_workers == 0
    samples.graphs = None
    assert loader(samples, [], -1, False).num_workers == 2
    assert loader(samples, [], 1, False).num_workers == 1


def test_name_that_no_frame_has_is_refused_without_labels_too(tmp_path):
    (tmp_path / "bare.xyz").write_text("1\n\nSi 0 0 0\n", encoding="utf-8")
    assert len(read([str(tmp_path / "bare.xyz")], Names())) == 1
    with pytest.raises(BadInput, match="no frame of .* has energy under the name 'nope'"):
        read([str(tmp_path / "bare.xyz")], Names(energy="nope"))


def test_species_of_a_model_to_begin_from_are_its_own():
    """As many others are others."""
    atoms = bulk("Cu", cubic=True)
    frames = in_memory([labelled(atoms, 0.0, np.zeros((4, 3)))])
    base = facet.Facet(facet.Config(("Al", "Cu"), channels=8, layers=1))
    statistics_of(base, frames, Settings(species="Cu,Al"))
    with pytest.raises(BadInput, match="--species Cu,Ni: the model .* knows Al,Cu"):
        statistics_of(base, frames, Settings(species="Cu,Ni"))
