"""Tests of benchmarks/: pages against results, files, commands. One of them measures, roughly."""
import ast
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = HERE / "README.md"
RESULTS = sorted((HERE / "results").glob("*.json"))
SCRIPTS = sorted({*HERE.glob("*.py")} - {*HERE.glob("*test*.py")})  # no test, no conftest.py
PEERS = ("sevennet_trim.py",)  # cannot be imported without the peer's package

sys.path.insert(0, str(HERE))
import common  # noqa: E402
import summary  # noqa: E402

# ─── Pages ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", summary.TABLES, ids=lambda make: make.__name__)
def test_table_of_the_page_is_what_the_results_say(make):
    page = ROOT / summary.TABLES[make]
    lines = make()
    assert len(lines) > 3 and len({line.count(" | ") for line in lines}) == 1
    text = page.read_text(encoding="utf-8")
    wanted = "python benchmarks/summary.py --write"
    assert "\n" + "\n".join(lines) + "\n" in text, f"{page.name} is out of date: {wanted}"


def test_page_has_no_other_tables():
    """Each is printed by summary.py, but for the list of scripts."""
    tables = re.findall(r"(?m)^(\|.*)\n\|[ -]*---", PAGE.read_text(encoding="utf-8"))
    printed = [make()[0] for make, page in summary.TABLES.items() if page == summary.HERE]
    assert tables == ["| script | measures | takes |", *printed]


def anchors(page: Path) -> set[str]:
    """What a page's headings can be linked to by."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 15
    for image, words, target in links:
        file, _, place = target.partition("#")
        assert "://" in file or (HERE / file).exists(), target
        assert not place or place in anchors(HERE / file if file else PAGE), target
        assert not image or len(words) > 40, f"{target} needs an alternative text"


def test_pictures_are_those_that_the_page_shows():
    shown = set(re.findall(r"\(figures/(\w+\.png)\)", PAGE.read_text(encoding="utf-8")))
    there = {path.name for path in (HERE / "figures").iterdir() if "_cuda" not in path.name}
    assert shown == there and len(shown) == 8


def test_page_names_every_script_and_every_requirements_file():
    text = PAGE.read_text(encoding="utf-8")
    for path in [*SCRIPTS, *HERE.glob("requirements*.txt")]:
        assert path.name in text, path.name


# ─── Results ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_compact_and_say_what_made_them(path):
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    assert text == common.compact(common.rounded(content)) + "\n"
    assert len(text) < 400_000 and text.count("\n") < 1500
    assert content["made"], "nobody knows where this comes from"
    for run in content["made"]:
        assert {"hardware", "versions", "command"} <= set(run)


def test_results_are_small_altogether():
    assert len(RESULTS) >= 8
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in RESULTS) < 3000


def test_results_are_rounded_and_written_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    content = {
        "a": 0.123456, "list": (1.00004, 12345.6, np.float32(0.5)), "none": np.nan, "yes": np.True_,
        "rows": [{"x": 1e-7 / 3}, [1, 2]], "count": 123456, 8: {}}
    common.write_results("one", content)
    assert (tmp_path / "one.json").read_text(encoding="utf-8").splitlines()[:14] == [
        '{', ' "a": 0.1235,', ' "list": [1.0, 12350.0, 0.5],', ' "none": null,', ' "yes": true,',
        ' "rows": [', '  {', '   "x": 3.333e-08', '  },', '  [1, 2]', ' ],', ' "count": 123456,',
        ' "8": {},', ' "made": [']
    first = common.read_results("one")
    assert len(first["made"]) == 1
    common.write_results("one", first)
    assert common.read_results("one") == first, "the same run is named once"


def test_columns_are_rows_again():
    table = [{"a": 1, "b": {"c": 2}}, {"a": 3, "b": {"c": 4}}, {"a": 5, "b": {"c": None}}]
    assert common.columns(table) == {"a": [1, 3, 5], "b": {"c": [2, 4, None]}}
    assert common.rows(common.columns(table)) == table
    assert common.rows({}) == common.rows(common.columns([])) == []


def test_spread_is_that_of_a_sample():
    assert summary.spread([1.0, 3.0], 1) == "2.0 ± 1.4" and summary.spread([1.0], 2) == "1.00"


def test_crossing_lies_between_two_trainings():
    facet = {"cpu_seconds": [100, 10, 1000], "error": [1.0, 10.0, 0.1]}
    assert summary.crossing(facet, "error", 20.0) == 10
    assert summary.crossing(facet, "error", 10**0.5) == pytest.approx(10**1.5)
    assert summary.crossing(facet, "error", 0.01) is None


def test_pictures_are_drawn_from_the_results(tmp_path):
    import pictures

    for name in ("relax", "sevennet_trim"):
        pictures.draw_results(name, tmp_path)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert set(pictures.known()) >= set(pictures.PICTURES)


# ─── Scripts ─────────────────────────────────────────────────────────────────────────────────────


@cache
def commands(script: str) -> list[str]:
    """The commands of a script that has several; one empty word if it is one."""
    return ["defaults", "time", "mace"] if script == "accuracy.py" else [""]


def run(script: str, *words: str) -> tuple[int, str]:
    """Run a script in this process, which has imported the packages: exit status, what it said."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    arguments, sys.argv = sys.argv, [script, *words]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            runpy.run_path(str(HERE / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = arguments
    said.seek(0)
    return status, said.read()


@cache
def help_of(script: str, command: str = "") -> str:
    """What `--help` prints."""
    status, said = run(script, *filter(None, [command]), "--help")
    assert status == 0, said
    return said


def runs_alone(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_tells_what_a_script_does(path):
    if path.name in PEERS:
        ast.parse(path.read_text(encoding="utf-8"))
    elif runs_alone(path):
        for command in commands(path.name):
            assert "usage:" in help_of(path.name, command)


def test_options_in_the_page_exist():
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"(?m)benchmarks/(\w+\.py)((?: [^\s`|]+)*)", text)
    assert len(found) > 10
    for script, rest in found:
        if script in PEERS:
            continue
        words = rest.split()
        command = words[0] if words and words[0] in commands(script) else ""
        for option in re.findall(r"--\w+", rest):
            assert option in help_of(script, command), f"{script} {command}: {option}"


def test_scripts_refuse_what_they_do_not_have():
    for script, words in (
            ("relax.py", ["--data", ".", "--facet", "nowhere.pt"]), ("pictures.py", ["nothing"])):
        status, said = run(script, *words)
        assert status == 2 and "no such" in said.splitlines()[-1]


# ─── Two versions of facet.py ────────────────────────────────────────────────────────────────────


def test_slower_version_is_shown_as_slower(tmp_path, capsys):
    import speed

    slow = (ROOT / "facet.py").read_text(encoding="utf-8") + """

def forward(self, *args, usual=Facet.forward, **options):
    import time
    time.sleep(0.2)
    return usual(self, *args, **options)


Facet.forward = forward
"""
    (tmp_path / "facet.py").write_text(slow, encoding="utf-8")
    speed.compare({"old": tmp_path, "new": ROOT}, "bare", {"Si 8": "Si 8"}, 1, "cpu", 1)
    printed = capsys.readouterr().out.split()
    assert printed[:3] == ["bare,", "Si", "8"] and printed.count("→") == 3
    old, new, ratio = map(float, printed[3:6])
    assert 200 < old and new < old and ratio == pytest.approx(old / new, rel=0.01)


def test_ratio_says_how_many_times_as_fast_the_new_version_is():
    import speed

    slow = {"ms": 30.0, "cpu_ms": 29.0, "faults": 7.0, "MB": 5.0}
    fast = {"ms": 10.0, "cpu_ms": 9.0, "faults": 0.0, "MB": 3.0}
    words = "30.00 10.00 3.000 29.00 → 9.00 7 → 0 5 → 3"
    assert speed.row("bare, Si 8", slow, fast).split() == ["bare,", "Si", "8", *words.split()]
    assert speed.row("", fast, slow).split()[:3] == ["10.00", "30.00", "0.333"]


def test_lines_of_the_table_of_two_versions(tmp_path, monkeypatch):
    import argparse

    import speed

    asked = []
    monkeypatch.setattr(speed, "batches_of", lambda *_: asked.append(_) or f"{tmp_path}/0 69")
    args = argparse.Namespace(device="cpu", sizes=[8, 64], frames="some/my.xyz")
    jobs = speed.jobs_of(args, tmp_path)
    assert [files for files, _ in asked] == [(), (str(Path("some/my.xyz").resolve()),)]
    assert {job: list(crystals) for job, crystals in jobs.items()} == {
        "bare": ["Si 8", "Si 64"], "calculator": ["Si 8", "Si 64"],
        "train": ["5 x 69 of EMT metals", "5 x 69 of my.xyz", "4 x Si 64", "1 x Si 64"]}


def test_batches_of_a_training_set_come_back_as_they_were_drawn(tmp_path, monkeypatch):
    import ase.build
    import ase.io
    import peers
    import speed
    from ase.calculators.singlepoint import SinglePointCalculator

    def in_this_process(command, **_):
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                exec(command[2])
            return subprocess.CompletedProcess(command, 0, said.getvalue(), "")
        except SystemExit as end:
            return subprocess.CompletedProcess(command, 1, "", f"a warning\n{end.code}\n")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    frames = []
    for a in np.linspace(3.5, 4.0, 20):
        atoms = ase.build.bulk("Cu", a=a, cubic=True)
        forces = np.zeros((4, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=float(a), forces=forces)
        frames.append(atoms)
    ase.io.write(tmp_path / "set.extxyz", frames)
    name = speed.batches_of((str(tmp_path / "set.extxyz"),), tmp_path / "batches.extxyz")
    found = peers.batches(name)
    sizes = [sum(map(len, batch)) for batch in found]
    assert len(found) == speed.BATCHES and round(np.mean(sizes)) == common.atoms_in(name) > 4

    known = {round(atoms.cell[0, 0], 6) for atoms in frames}
    first = [round(atoms.cell[0, 0], 6) for atoms in found[0]]
    assert set(first) <= known and len(set(first)) == len(first)
    with pytest.raises(SystemExit, match="nowhere.xyz: no such file$"):
        speed.batches_of((str(tmp_path / "nowhere.xyz"),), tmp_path / "batches.extxyz")


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"),
                    reason="this is no repository of git, or git is not installed")
def test_tree_of_a_commit_is_that_of_git(tmp_path):
    import speed

    speed.export("HEAD", tmp_path)
    wanted = subprocess.check_output(["git", "show", "HEAD:facet.py"], cwd=ROOT)
    assert (tmp_path / "facet.py").read_bytes() == wanted
    assert (tmp_path / "tools" / "frames.py").exists()

    for commit, reason in (("no-such-name", "not a valid object name"), ("", "object name"),
                           ("HEAD:tools", "has no facet.py"), ("--list", "has such a name")):
        status, _ = run("speed.py", f"--against={commit}")
        assert status.startswith(f"--against {commit}: ") and reason in status
        assert "\n" not in status


def test_options_of_two_versions_are_checked_before_anything_is_measured():
    for words, reason in (
            (["--against", "HEAD", "--frames", "nowhere.xyz"], "nowhere.xyz: no such file"),
            (["--frames", "README.md"], "no --against"), (["--sizes", "9"], "there are 8 64 512")):
        status, said = run("speed.py", *words)
        assert status == 2 and reason in said.splitlines()[-1]


# ─── Training compute ────────────────────────────────────────────────────────────────────────────


def curve_file(folder: Path, device: str, seconds: float, errors: list[float],
               **changes) -> Path:
    """A curve.json of MACE on silicon: so many CPU-seconds an epoch, the second one slower."""
    path = folder / f"{device}.json"
    points = [{"cpu_seconds": i * seconds + (i > 1), summary.ENERGY: 1.0, summary.FORCE: error}
              for i, error in enumerate(errors)]
    about = {"set": "Si", "model": summary.M64, "hardware": f"a {device}", "threads": 1,
             "frames": [9, 1], "arguments": ["--lr=1", f"--device={device}"]}
    path.write_text(json.dumps({**about, "curve": points, **changes}), encoding="utf-8")
    return path


def test_curve_of_a_gpu_takes_the_time_of_an_epoch_from_a_cpu(tmp_path):
    import accuracy

    gpu = curve_file(tmp_path, "cuda", 1.0, [9.0, 5.0, 3.0, 2.0])
    cpu = curve_file(tmp_path, "cpu", 80.0, [9.0, 5.0, 3.0])
    (tmp_path / "slow").mkdir()
    slow = curve_file(tmp_path / "slow", "cpu", 90.0, [9.0, 5.0, 3.0], hardware="a slow one")
    for paths in ([gpu, cpu], [slow, cpu, gpu]):
        run = accuracy.mace_curves(paths)["Si", summary.M64]
        assert run["curve"]["cpu_seconds"] == [0, 80, 160, 240]
        assert run["curve"][summary.FORCE] == [9, 5, 3, 2]
        assert (run["hardware"], run["trained_on"]) == ("a cpu", "a cuda")
    with pytest.raises(SystemExit, match="no curve.json of a CPU"):
        accuracy.mace_curves([gpu])
    for changes in ({"frames": [10, 0]}, {"threads": 2}, {"arguments": ["--device=cpu"]},
                    {"arguments": ["--lr=1", "--batch_size=5", "--device=cpu"]}):
        cpu = curve_file(tmp_path, "cpu", 80.0, [9.0, 5.0, 3.0], **changes)
        with pytest.raises(SystemExit, match="not of the same training"):
            accuracy.mace_curves([gpu, cpu])


def test_share_is_decided_where_mace_is_done(monkeypatch):
    """The last quarter of its stage decides; Facet's time is that of the faster of two runs."""
    def found(forces: list[float], second: int = 8) -> dict:
        mace = {"cpu_seconds": list(range(0, 800, 100)), summary.ENERGY: [1.0] * 8,
                summary.FORCE: forces}
        fast = {"cpu_seconds": [10, 20], summary.ENERGY: [3, 2], summary.FORCE: [3, 0.9]}
        slow = {"cpu_seconds": [50, 100], summary.ENERGY: [3, 2], summary.FORCE: [3, 0.5]}
        one = {"mace": {summary.M64: {"curve": mace, "arguments": [f"--start_swa={second}"]}},
               "facet": {"0.1": {"curve": fast}, "0.5": {"curve": slow}}}
        monkeypatch.setattr(summary, "read_results", lambda _: {"against_time": {"Si": one}})
        assert summary.both_there() == ["Si"]
        return summary.against_time("Si")

    done = found([9, 6, 4, 2, 1, 1, 1, 0.99])[summary.FORCE]
    assert done["mace_best"] == 0.99 and done["gain"] == pytest.approx(0.01)
    assert done["best"] == 0.5 and 300 < done["mace"] <= 400 and 10 < done["facet"] < 20
    assert summary.share(done) == f"{100 * done['facet'] / done['mace']:.1f} %"

    falling = found([9, 6, 4, 2, 1, 1, 1, 0.97])[summary.FORCE]
    assert summary.share(falling).endswith(" %, not decided")
    rising = [9, 6, 4, 2, 1, 3, 3, 3]
    assert found(rising)[summary.FORCE]["gain"] == 0, "stage one went on for long without a gain"
    assert found(rising, 4)[summary.FORCE]["gain"] == 0.75, "stage one was cut off"

    never = found([9, 6, 4, 2, 1, 0.4, 0.4, 0.4])[summary.FORCE]
    assert never["facet"] is None and summary.share(never) == "never"


def test_curve_of_facet_counts_what_training_takes_and_not_its_errors(tmp_path, monkeypatch):
    """Twenty points; on the whole validation part, which is slow to look at here."""
    import time

    import accuracy
    import ase.build
    import ase.io
    from ase.calculators.emt import EMT

    from tools import evaluate

    frames = []
    for seed in range(20):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        atoms.get_potential_energy()
        frames.append(atoms)
    path = tmp_path / "cu.extxyz"
    ase.io.write(path, frames)
    monkeypatch.setattr(accuracy, "data_files", lambda *_: ([path], {}))
    settings = accuracy.nine_tenths(tmp_path, "cu")
    files, counts = accuracy.converted(tmp_path, "cu", tmp_path)
    assert counts == [18, 2] and len(ase.io.read(files["valid"], ":")) == 2
    seen, errors, moments = [], [], []

    def slow(model, frames, usual=evaluate.predict):
        moments.append(time.process_time())
        seen.append(sorted(atoms.get_potential_energy() for atoms in frames))
        while time.process_time() < moments[-1] + 0.1:
            pass
        found = usual(model, frames)
        errors.append(evaluate.errors(found, frames)[summary.FORCE])
        return found

    small = accuracy.replace(settings, channels=8, groups=2, degree=1, epochs=20)
    monkeypatch.setattr("tools.run.WATCHED", 1)
    monkeypatch.setattr(evaluate, "predict", slow)
    run = accuracy.facet_curve(small, 0.5)
    curve = run["curve"]
    assert run["steps"] == curve["step"][-1] == 20 and len(curve["cpu_seconds"]) == 20
    assert (np.diff(curve["cpu_seconds"]) > 0).all()
    counted = curve["cpu_seconds"][-1] - curve["cpu_seconds"][0]
    assert counted < moments[19] - moments[0] - 19 * 0.1, "errors are counted"
    assert curve["cpu_seconds"][0] > 0.9 * moments[0], "imports are not counted"
    assert curve[summary.FORCE] == pytest.approx(errors[:20])
    wanted = sorted(atoms.info["REF_energy"] for atoms in ase.io.read(files["valid"], ":"))
    assert seen[0] == pytest.approx(wanted), "not the frames that MACE is validated on"


def test_run_takes_the_place_of_that_of_its_size_and_seed(monkeypatch):
    import accuracy

    def run(seed: int, error: float) -> dict:
        tests = {"AcAc, 600 K": {summary.FORCE: 2 * error, "constant": {summary.FORCE: 9.0}},
                 "AcAc, 300 K": {summary.FORCE: error, "constant": {summary.FORCE: 9.0}}}
        return {"seed": seed, "steps": 10 * seed, "tests": tests}

    table = {}
    for size, seed, error in (("small", 1, 0.5), ("small", 0, 0.4), ("large", 0, 0.2),
                              ("small", 1, 0.3)):
        table = accuracy.with_run(table, size, "AcAc", run(seed, error))
    monkeypatch.setattr(summary, "read_results", lambda _: {"tests": table})
    small = summary.trainings("small")
    assert list(small) == ["AcAc, 300 K", "AcAc, 600 K"], "in the order of SETS"
    assert small["AcAc, 300 K"][summary.FORCE] == [0.4, 0.3]
    assert small["AcAc, 600 K"][summary.FORCE] == [0.8, 0.6]
    assert small["AcAc, 600 K"]["steps"] == [0, 10] and small["AcAc, 600 K"]["seed"] == [0, 1]
    assert small["AcAc, 300 K"]["constant"] == {summary.FORCE: [9.0, 9.0]}
    assert summary.trainings("large")["AcAc, 300 K"][summary.FORCE] == [0.2]
    assert summary.trainings() == {}


# ─── The property table of other potentials ──────────────────────────────────────────────────────


def test_page_of_potentials_is_what_its_results_say():
    import potentials

    found = common.read_results("potentials")["potentials"]
    lines, missing = potentials.tables(found)
    text = (ROOT / "lesson" / "potentials.md").read_text(encoding="utf-8")
    assert "\n" + "\n".join(lines) + "\n" in text and "\n" + "\n".join(missing) + "\n" in text
    assert len(lines) >= 27 and set(found) == set(potentials.POTENTIALS)


def test_rows_of_the_property_table_are_read_as_it_prints_them():
    import potentials

    from tools import check

    wrong = check.Row("slope of the energy", (None, 2.5e-3, 1e-5), 1e-6, "", (None, 0.4, 0.1))
    nan = check.Row("rotation", (np.nan, np.inf, None), 1e-10)
    broke = check.Row("supercell", note="ValueError: it is below 3", told="BROKE")
    asked = check.Row("alone or in a batch", note="one at a time", told="not asked")
    fine = check.Row("conservation, part of kinetic", (0.0, None, None), 0.02)
    said = "\n".join(check.line(row) for row in (wrong, nan, broke, asked, fine))
    found = potentials.rows_of(f"title\n{check.HEADER}\n{said}\n\n134 calls, 2.0 s\n2 wrong\n")
    assert [(one.row, one.verdict, one.limit) for one in found] == [
        ("slope of the energy", "WRONG", "1e-06"), ("rotation", "WRONG", "1e-10"),
        ("supercell", "BROKE", ""), ("alone or in a batch", "not asked", ""),
        ("conservation, part of kinetic", "ok", "2e-02")]
    assert [one.errors for one in found[:2]] == ["– · 2.5e-03 · 1.0e-05", "nan · inf · –"]
    assert found[2].note == "ValueError: it is below 3"


def test_every_call_and_every_crystal_of_the_potentials_exists():
    import calls
    import potentials

    for name, potential in potentials.POTENTIALS.items():
        spec = potential.call.split()[0]
        assert ":" in spec and potential.environment in potentials.ENVIRONMENTS, name
        if spec.startswith("benchmarks/calls.py:"):
            assert callable(getattr(calls, spec.partition(":")[2])), name
        for crystal in potential.crystals.split():
            atoms = potentials.CRYSTALS[crystal]()
            moved = potentials.disturbed(atoms.copy())
            assert abs(moved.positions - atoms.positions).max() > 0.01, crystal


# ─── Other forms of the layers ───────────────────────────────────────────────────────────────────


def test_edge_wise_forms_give_the_same_numbers():
    import ablations
    import density
    import torch

    import facet

    config = facet.Config(("Cu",), channels=8, groups=2, splines=8)
    batch, _ = density.copper()
    batch = batch._replace(vectors=batch.vectors.double())
    torch.manual_seed(0)
    model = facet.Facet(config, torch.float64)
    wanted = model(batch)
    for kind in (density.EdgeWiseDensity, ablations.EdgeList):
        other = facet.Facet(config, torch.float64)
        other.load_state_dict(model.state_dict())
        common.each_layer(other, "density", lambda a, b, kind=kind: kind(a, b, config))
        found = other(batch)
        for name in ("energy", "forces", "stress"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9)


def test_tensor_product_by_pairs_of_degrees_gives_the_same_numbers():
    import ablations
    import torch

    import facet

    for L in (0, 1, 3):
        config = facet.Config(("Si",), degree=L)
        torch.manual_seed(0)
        dense = ablations.TensorProduct(L, config)
        pairs = ablations.SparseTensorProduct(L, config)
        pairs.load_state_dict(dense.state_dict())
        x = torch.randn(3, (L + 1) ** 2, config.channels, dtype=torch.float64)
        wanted = dense(x)
        torch.testing.assert_close(pairs(x), wanted, rtol=1e-12, atol=1e-12)
        pairs.w[0].data *= 1.01  # the control
        assert (pairs(x) - wanted).abs().max() > 1e-4


def test_swapped_parts_keep_the_symmetry_and_have_right_derivatives():
    import ablations

    for name in ("MLP, edge-wise", "MLP, shared", "gate", "tensor product", "Bessel-linear"):
        ablations.check(name)  # asserts
