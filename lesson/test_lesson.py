"""Is the lesson true? Code, links, pictures, names and shape comments, checked by running them.

    pytest lesson/test_lesson.py
    pytest -k shape               the shape comments of facet.py and reference_numpy.py

A comment such as `# [N, K, 3] Å` at the end of a statement claims the shape of what the statement
makes. The test runs the file with sizes that differ from one another and compares. A statement
without such a comment claims nothing.
"""
import ast
import io
import json
import re
import runpy
import sys
import time
import tokenize
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType

import ase.build
import draw
import notebook
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.data import chemical_symbols
from matplotlib.figure import Figure

import facet
import reference_numpy
import test_facet
import train_small
from tests import test_parts
from tests.test_bugs import PLANTED, row_without_bugs
from tools import check, properties
from tools.check import PARTS, PROPERTIES, property_row
from tools.check import line as table_line

ROOT = Path(__file__).resolve().parent.parent
FRONT = ROOT / "README.md"
LESSON = ROOT / "lesson" / "README.md"
EXERCISES = ROOT / "lesson" / "exercises" / "README.md"
TESTING = ROOT / "lesson" / "testing.md"
TOOLS = ROOT / "tools" / "README.md"
QUESTIONS = ROOT / "lesson" / "questions.md"
PAGES = [page for page in (FRONT, LESSON, EXERCISES, TESTING, QUESTIONS, TOOLS) if page.exists()]
FIGURES = ROOT / "lesson" / "figures"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ─── Code in the pages ────────────────────────────────────────────────────────────────────────────


def blocks(page: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", text_of(page), re.S)


CODE = [(page, i) for page in (FRONT, LESSON, TESTING, QUESTIONS) for i in range(len(blocks(page)))]


@pytest.mark.parametrize("page, i", CODE, ids=[f"{named(page)}-{i}" for page, i in CODE])
def test_code_in_pages_prints_what_it_says(page, i, monkeypatch, capsys):
    """What stands behind an arrow is what the block prints."""
    block = blocks(page)[i]
    for needed in re.findall(r'"(runs/[^"]*)"', block):
        if not (ROOT / needed).exists():
            pytest.skip(f"this block needs {needed}: python train_small.py")

    monkeypatch.chdir(ROOT)
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, named(page), "exec"), {"__name__": "__main__"})
    assert time.process_time() - start < 10, "too slow for a lecture"  # seconds of the processor
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    promised = re.findall(r"# → (.*)", block)
    assert not promised or printed == promised
    assert promised or page == FRONT, f"prints what nobody checks:\n{block}"


def test_lines_that_the_lesson_shows_are_in_the_file():
    """Blocks marked `py` are lines of facet.py, word for word but for their indentation."""
    code = re.sub(r"(?m)^ +", "", text_of(ROOT / "facet.py"))
    shown = re.findall(r"```py\n(.*?)```", text_of(LESSON), re.S)
    assert len(shown) == 13
    for block in shown:
        for part in re.sub(r"(?m)^ +", "", block).strip().split("\n\n"):
            assert part in code, f"not in facet.py:\n{part}"


def test_notebook_is_that_of_the_page(monkeypatch, capsys):
    """As it is stored; its first cells find facet.py from the notebook's own folder."""
    stored = text_of(ROOT / "lesson" / "tour.ipynb")
    assert stored == notebook.notebook(text_of(LESSON)), "out of date: python lesson/notebook.py"

    cells = [cell for cell in json.loads(stored)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 1 + len(blocks(LESSON))
    monkeypatch.chdir(ROOT / "lesson")
    monkeypatch.setattr(sys, "path", list(sys.path))
    place = {"__name__": "__main__"}
    for cell in cells[:2]:
        exec("".join(cell["source"]), place)
    assert capsys.readouterr().out.splitlines() == cells[1]["outputs"][0]["text"]


def test_table_of_properties_is_the_one_printed(monkeypatch, capsys):
    """`python test_facet.py` prints what the page shows, but for numbers; each row is explained.

    The rows are those of the tests of planted bugs. What it says of speed, it says of few atoms.
    """
    monkeypatch.setattr(check, "guard_row", row_without_bugs)
    monkeypatch.setattr(check, "random_alloy", lambda atoms: properties.random_alloy(8))
    monkeypatch.setattr(sys, "argv", ["test_facet.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "test_facet.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    told, = re.findall(r"```text\n(Facet on .*?)```", text_of(LESSON), re.S)

    def words(text):
        lines = []
        for line in text.strip().splitlines():
            line = re.sub(r"threads: \d+|torch \S+|\d+ stages|\d+\.\d\S*|\b\d{4,}\b", "…", line)
            lines.append(re.sub(r"\s+", " ", line).strip())
        return lines

    assert words(printed) == words(told)
    section = text_of(LESSON).partition("| row | what it says |")[2].partition("\n\n")[0]
    explained = " ".join(line.split("|")[1] for line in section.splitlines() if line)
    for line in told.splitlines():
        if "below" in line:
            row = re.split(r"\s{2,}|,", line)[0]
            assert row in explained, f"{row}: what is it?"


def test_table_of_potentials_has_every_property_and_the_errors_of_emt():
    """The other columns need packages of their own, or are rounding."""
    section = text_of(TESTING).partition("## Facet beside other potentials")[2]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {}
    for line in lines[2:]:
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = dict(zip(names[1:], cells))
    assert set(rows) >= set(PROPERTIES) - {"alone or in a batch"}

    atoms = properties.random_crystal(("Cu", "Al"))
    for name in PROPERTIES:
        if name in rows:
            told = rows[name]["EMT of ASE"]
            row = property_row(name, EMT(), atoms)
            energy_only = name in ("isolated atom", "conservation, part of kinetic")
            error = row.errors[0 if energy_only else 1]
            assert row.wrong == told.startswith("**"), table_line(row)
            if error > 1e-7 or float(told.strip("*")) > 1e-7:  # else it is rounding
                assert float(told.strip("*")) == pytest.approx(error, rel=0.1), name


def test_lines_of_planted_bugs_name_bugs_and_the_rows_that_notice():
    told, = re.findall(r"```text\n(sign_of.*?)```", text_of(TESTING), re.S)
    for line in told.splitlines():
        bug, rows = line.split(maxsplit=1)
        assert PLANTED[bug][2] in rows, line
        for row in rows.split(", "):
            assert row in (*PROPERTIES, *PARTS), row


# ─── Links, anchors, pictures ─────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    without_code = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    found = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", without_code):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text_of(page)):
        file, _, place = target.partition("#")
        if "://" in file:
            continue
        path = page.parent / file if file else page
        assert path.exists(), f"{words}: {target}"
        assert not place or place in anchors(path), f"{words}: {target}"
        assert not (place and path.suffix == ".py"), f"{target}: lines of code move; name functions"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_pictures_exist_and_have_an_alternative_text(page):
    for words, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", text_of(page)):
        assert (page.parent / target).is_file(), target
        assert len(words) > 20, f"{target} needs an alternative text"


def test_every_picture_of_the_lesson_is_shown():
    shown = set()
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text_of(page)):
            shown.add((page.parent / target).resolve())
    assert {path for path in FIGURES.iterdir()} <= shown


@pytest.mark.parametrize("name", draw.PICTURES)
def test_pictures_can_be_drawn(name, monkeypatch):
    """draw.py still fits facet.py.

    The model is untrained, dynamics are short, spheres are coarse, and nothing is written.
    """
    whole = properties.conservation

    def short(calculator, atoms, **more):
        return whole(calculator, atoms, **more | {"steps": 5})

    monkeypatch.setattr(properties, "conservation", short)
    sphere = draw.sphere
    monkeypatch.setattr(draw, "sphere", lambda steps=0: sphere(10))
    paint, height, needs_model = draw.PICTURES[name]
    figure = Figure((draw.WIDTH, height))
    if needs_model:
        model = facet.Facet(facet.Config(("Cu", "Au")), torch.float64).requires_grad_(False)
        paint(figure, model)
    else:
        paint(figure)
    assert figure.axes
    assert (FIGURES / f"{name}.png").is_file(), f"python lesson/draw.py --only {name}"


# ─── Names in the pages ───────────────────────────────────────────────────────────────────────────


def words_of_the_code() -> set[str]:
    """Every name and every word of a string in the code, and what ASE's crystals have."""
    words = set(dir(Atoms))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py"),
                 *ROOT.glob("benchmarks/*.py"), *ROOT.glob("lesson/exercises/solutions/*.patch")]:
        words |= set(re.findall(r"\w+", text_of(path)))
    return words


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_in_pages_exist(page):
    """`name`, `Class.method` and `function(…)` in a page stand in the code; so do files."""
    known = words_of_the_code()
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w./]+\.py", span):
            assert (ROOT / span).exists() or (page.parent / span).exists(), span
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span):
            for word in re.findall(r"\w+", span.partition("(")[0]):
                assert word in known, f"`{span}`: there is no {word} in the code"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_options_in_pages_exist(page):
    """Of every script in a page's commands."""
    settings = {*train_small.Settings.__dataclass_fields__, "resume", "size", "help"}
    command = (r"(?:python -m ((?:tools|tests)\.\w+)|(?:python |torchrun .*?)([\w./]+)\.py)"
               r"([^\n`|#]*)")
    for module, script, rest in re.findall(command, text_of(page)):
        name = module.replace(".", "/") or script
        path = ROOT / f"{name}.py"
        assert path.exists(), f"there is no {path.name}"
        if name == "test_facet":
            path = ROOT / "tools" / "check.py"  # which it calls
        source = text_of(path)
        for option in re.findall(r"--([a-zA-Z]\w*(?:-\w+)*)", rest):
            if name == "train_small":
                assert option in settings, f"train_small.py has no --{option}"
            else:
                assert f"--{option}" in source, f"{path.name} has no --{option}"


def test_table_of_equations_names_what_exists():
    """Each equation has a function in facet.py, one in the reference, and a test; each section."""
    modules = {"facet": [facet], "reference": [reference_numpy], "test": [test_facet, test_parts]}
    table = text_of(LESSON).partition("## Equation, function, reference, test")[2]
    table = table.partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| **")]
    for row in rows:
        for kind, several in modules.items():
            names = []
            for line in re.findall(rf"{kind}: (.*?)(?:<br>| \|)", row):
                names += re.findall(r"`(\w+)`", line)
            assert names, f"no {kind} in {row}"
            for name in names:
                found = any(hasattr(module, name) for module in several)
                assert found, f"{kind}: there is no {name}"

    sections = set(re.findall(r"# ─── §(\d+)", text_of(Path(facet.__file__))))
    told = set(re.findall(r"§(\d+)", " ".join(row.split("|")[1] for row in rows)))
    use = {"9"}  # files and the ASE calculator: no equations
    assert told == sections - use


# ─── Shape comments ───────────────────────────────────────────────────────────────────────────────


class Claim:
    """What the comment at the end of a statement says of the shapes that the statement makes."""

    def __init__(self, function: str, line: int, comment: str):
        start = re.match(r"# (?:(\w+) × )?((?:\[[^\]]*\](?:, )?)+)", comment)
        rest = comment[start.end():]
        self.function = function
        self.line = line
        self.times = start[1]  # "2": so many of that shape; "l3": a list, one for each l3
        self.shapes = re.findall(r"\[([^\]]*)\]", start[2])
        self.otherwise = re.findall(r"the last \[([^\]]*)\]", rest)
        self.seen = False
        self.lie_seen = False  # a shape with its dimensions in reverse was told from the true one


def comments_of(source: str) -> dict[int, str]:
    """Line → the comment that follows code on it, if it begins with a shape."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        claim = re.match(r"# (\w+ × )?\[[^\]]*\](?!.* → \[)", token.string)
        if token.type == tokenize.COMMENT and claim and token.line.strip() != token.string:
            found[token.start[0]] = token.string
    return found


@cache
def formula_of(dimension: str) -> tuple[str, frozenset[str], CodeType]:
    """A dimension such as "2 C" as Python, the names in it, and its code."""
    formula = dimension.replace("·", "*").replace("²", "**2")
    formula = re.sub(r" (?=[\w(])", "*", formula)
    names = frozenset(re.findall(r"[A-Za-z_]\w*", formula))
    return formula, names, compile(formula, dimension, "eval")


def fits(shape: tuple, claim: str, known: dict[str, int]) -> bool:
    """Does a shape fit a claim such as "N, K, 3"? Single letters that are new get their size.

    "2 C" is a product; "≤ M" is a bound; words of several letters may be anything, but for
    those in `known`.
    """
    if "…" in claim:
        return True
    dimensions = re.split(r", (?![^(]*\))", claim)  # not at a comma between parentheses
    if dimensions[:1] == ["..."]:
        dimensions = dimensions[1:]
        shape = shape[len(shape) - len(dimensions):]
    if len(dimensions) != len(shape):
        return False

    for dimension, size in zip(dimensions, shape):
        at_most = dimension.startswith("≤ ")
        formula, names, code = formula_of(dimension.removeprefix("≤ "))
        if names <= known.keys():
            value = eval(code, {}, dict(known))
            if size > value or (size != value and not at_most):
                return False
        elif re.fullmatch(r"[A-Za-z]", formula) and not at_most:
            known[formula] = size
    return True


class Instrument(ast.NodeTransformer):
    """Insert a look at the values after every statement with a claim, and at the arguments.

    A function gets `known = enter(…)` at its start, the sizes of letters in this call.
    """

    def __init__(self, source: str):
        self.comments = comments_of(source)
        self.claims = []
        self.functions = []

    def visit_FunctionDef(self, node):
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()
        doc = ast.get_docstring(node) or ""
        start = ast.parse(f"shape_known = shape_enter({node.name!r}, {doc!r}, locals())").body
        first = 1 if ast.get_docstring(node) is not None else 0
        node.body[first:first] = start
        return node

    def claim_of(self, node):
        """Number of the claim at a statement's last line or its first; tuples may have several."""
        lines = range(node.lineno, node.end_lineno + 1)
        comments = [self.comments[line] for line in lines if line in self.comments]
        comment = self.comments.get(node.end_lineno) or self.comments.get(node.lineno)
        if not comment or not self.functions:
            return None
        if isinstance(node.value, ast.Tuple) and len(comments) > 1:
            comment = "# " + ", ".join(comment.removeprefix("# ") for comment in comments)
        self.claims.append(Claim(self.functions[-1], node.lineno, comment))
        return len(self.claims) - 1

    def look(self, number: int, values: list[str]):
        values = ", ".join(values)
        code = f"shape_look({number}, [{values}], shape_known, locals())"
        return ast.parse(code).body[0]

    def visit_Assign(self, node):
        number = self.claim_of(node)
        if number is None:
            return node
        target = node.targets[0]
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        return [node, self.look(number, [ast.unparse(one) for one in targets])]

    def visit_AugAssign(self, node):
        number = self.claim_of(node)
        if number is None:
            return node
        return [node, self.look(number, [ast.unparse(node.target)])]

    def visit_Expr(self, node):
        call = node.value
        buffer = isinstance(call, ast.Call) and ast.unparse(call.func) == "self.register_buffer"
        number = self.claim_of(node) if buffer else None
        if number is None:
            return node
        return [node, self.look(number, [f"self.{call.args[0].value}"])]

    def visit_Return(self, node):
        number = self.claim_of(node) if node.value is not None else None
        if number is None:
            return node
        values = ["shape_value"]
        if isinstance(node.value, ast.Tuple):
            values = [f"shape_value[{i}]" for i in range(len(node.value.elts))]
        keep = ast.Assign([ast.Name("shape_value", ast.Store())], node.value)
        return [keep, self.look(number, values), ast.Return(ast.Name("shape_value", ast.Load()))]


def instrumented(source: str, run, seeds: dict[str, int]) -> list[Claim]:
    """Run `run(module)` on a module made from source; AssertionError where a shape is not right."""
    instrument = Instrument(source)
    tree = ast.fix_missing_locations(instrument.visit(ast.parse(source)))
    claims = instrument.claims
    wrong = {}

    def sizes_in(names: dict) -> dict[str, int]:
        """Integers of a function that may stand in a shape: N, M1, l_in, fan_out, count …"""
        sizes = {}
        for name, value in names.items():
            if type(value) is int and re.fullmatch(r"[A-Z]\d?|l\d?|l_\w+|fan_\w+|count", name):
                sizes[name] = value
        if "L" in sizes:
            sizes["M"] = (sizes["L"] + 1) ** 2
        elif "l_out" in sizes:
            sizes["M"] = (sizes["l_out"] + 1) ** 2
        return sizes

    def enter(function: str, doc: str, arguments: dict) -> dict[str, int]:
        known = dict(seeds) | sizes_in(arguments)
        if "L" not in known:
            known.pop("M", None)  # the arguments may tell better than l_out
        told = re.findall(r"(\w+) \[([^\]]*)\]", doc)
        alone = re.match(r"\[([^\]]*)\] →", doc)
        if alone:
            first = [name for name in arguments if name not in ("self", "ctx")][0]
            told.append((first, alone[1]))
        for name, shape in told:
            value = arguments.get(name)
            if hasattr(value, "shape") and not fits(tuple(value.shape), shape, known):
                wrong[function, name] = f"{function}: {name} [{shape}], but {tuple(value.shape)}"
        known["told_M"] = "M" in known
        return known

    def look(number: int, values: list, known: dict[str, int], names: dict) -> None:
        claim = claims[number]
        sizes = sizes_in(names)
        if "L" not in sizes and known["told_M"]:
            sizes.pop("M", None)
        known.update(sizes)
        shapes = claim.shapes
        each = claim.times is not None and not claim.times.isdigit()
        if each:
            values = list(values[0])
        if each or claim.times is not None:
            shapes = claim.shapes * len(values)

        for value, shape in zip(values, shapes):
            if isinstance(value, (list, tuple)) and all(np.isscalar(one) for one in value):
                value = np.array(value)
            if not hasattr(value, "shape"):
                continue
            claim.seen = True
            size = tuple(value.shape)
            reverse = ", ".join(reversed(shape.split(", ")))
            if "..." not in shape and not fits(size, reverse, dict(known)):
                claim.lie_seen = True

            bound = dict(known) if each or claim.otherwise else known
            if not any(fits(size, one, bound) for one in (shape, *claim.otherwise)):
                sizes = {name: known[name] for name in re.findall(r"\w+", shape) if name in known}
                wrong[number] = (f"{claim.function}, line {claim.line}: [{shape}], but {size} "
                                 f"with {sizes}")

    module = ModuleType("facet")
    module.__dict__.update(shape_enter=enter, shape_look=look)
    exec(compile(tree, "with looks at shapes", "exec"), module.__dict__)
    run(module)
    assert not wrong, "wrong shape comments: " + "; ".join(wrong.values())
    return claims


TRICLINIC = Atoms("SiOSi", [[0.1, 0.2, 0.0], [1.9, 0.3, 0.4], [0.4, 2.1, 0.3]], pbc=True,
                  cell=[[4.1, 0.3, -0.2], [1.1, 3.9, 0.4], [-0.7, 0.9, 4.4]])
SEEDS = dict(B=7, R=13, Z=17, T=4)


def run_facet(module) -> None:
    """All of facet.py but files, with sizes that differ; a warning of close atoms included."""
    species = tuple(chemical_symbols[1:SEEDS["Z"] + 1])
    crystals = [TRICLINIC, ase.build.bulk("Si", cubic=True), ase.build.bulk("Al") * (1, 1, 3),
                ase.build.bulk("Mg"), ase.build.bulk("Na")]
    for activation in ("product", "silu"):
        config = module.Config(species, cutoff=3.5, degree=2, channels=14, layers=SEEDS["T"],
                               groups=SEEDS["B"], splines=SEEDS["R"], activation=activation)
        model = module.Facet(config)
        graphs = [module.find_neighbours(atoms, config) for atoms in crystals]
        module.evaluate(model, graphs)
        batch = module.make_batch(graphs, config.cutoff)
        out = model(batch, differentiable=True)
        out["forces"].square().sum().backward()
    model.origin = {"shortest": {"Si-O": 9.9}}
    with pytest.warns(UserWarning, match="Si and O|O and Si"):
        module.FacetCalculator(model, "cpu").get_potential_energy(TRICLINIC)
    model.splines.double().fit(model.splines)


def run_reference(module) -> None:
    """All of reference_numpy.py, on a crystal of three atoms."""
    for activation in ("product", "silu"):
        config = facet.Config(("Si", "O"), cutoff=2.9, degree=1, channels=6, layers=2, groups=3,
                              splines=5, activation=activation)
        with torch.random.fork_rng(devices=[]):
            model = facet.Facet(config, torch.float64)
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        plain = {name: getattr(config, name) for name in config.__dataclass_fields__}
        crystal = (TRICLINIC.symbols, TRICLINIC.positions, TRICLINIC.cell.array, TRICLINIC.pbc)
        module.evaluate(plain, state, *crystal)
    small = (TRICLINIC.symbols[:1], TRICLINIC.positions[:1], 0.65 * TRICLINIC.cell.array, True)
    module.forces(plain, state, *small)
    module.stress(plain, state, *small)


FILES = {"facet.py": (run_facet, SEEDS), "reference_numpy.py": (run_reference, {})}


@pytest.mark.parametrize("name", FILES)
def test_shape_comments_are_true(name):
    run, seeds = FILES[name]
    claims = instrumented(text_of(ROOT / name), run, seeds)
    for function in {claim.function for claim in claims}:
        seen = [claim.seen for claim in claims if claim.function == function]
        assert any(seen), f"{function} of {name} was never run: its shapes are not checked"

    # control: most of these comments, reversed, would have been noticed
    told_apart = []
    for claim in claims:
        several = len(set(claim.shapes[0].split(", "))) > 1
        if claim.seen and several and "..." not in claim.shapes[0]:
            told_apart.append(claim.lie_seen)
    assert np.mean(told_apart) > 0.5


TOY = '''
import torch

class Toy:
    def double(self, x, L=2):
        """[N, C] → [N, 2 C], and M is (L+1)²."""
        N = len(x)
        rows = torch.zeros((L + 1) ** 2, N)  # [M, N]
        long = torch.cat(
            [x, x],
            1,
        )  # [N, 2 C]
        a, b = long.chunk(2, 1)  # 2 × [N, C]
        parts = [a[:n] for n in (1, 2)]  # l × [≤ N, C]
        free = torch.zeros(3)  # a remark, [not a shape
        return long, rows  # [N, 2 C], [M, N]
'''


def run_toy(module) -> None:
    module.Toy().double(torch.zeros(4, 5))


def test_shape_comments_of_a_toy_are_true():
    """A remark above its function is no claim."""
    remark = "    # a remark [N, of no shape]\n"
    remarked = TOY.replace("    def double", f"{remark}    def double")
    for source in (TOY, remarked):
        claims = instrumented(source, run_toy, {})
        assert len(claims) == 5 and all(claim.seen for claim in claims)
    assert remark in remarked


@pytest.mark.parametrize("right, lie", [
    ("[N, C] → [N", "[C, N] → [N"), ("# [M, N]\n", "# [N, M]\n"), (")  # [N, 2 C]", ")  # [N, C]"),
    ("2 × [N, C]", "2 × [C, N]"), ("[≤ N, C]", "[≤ 1, C]"), ("], [M, N]", "], [N]"),
])
def test_wrong_shape_comment_of_a_toy_is_noticed(right, lie):
    assert TOY.count(right) == 1
    with pytest.raises(AssertionError, match="wrong shape comments"):
        instrumented(TOY.replace(right, lie), run_toy, {})


@pytest.mark.parametrize("name", FILES)
def test_letters_of_shapes_are_in_the_glossary(name):
    glossary = facet.__doc__.partition("Glossary")[2].partition("Conventions")[0]
    known = set(re.findall(r"(?m)(?:^ {4}|  )([A-Z])  \S", glossary))
    source = text_of(ROOT / name)
    letters = set()
    for line, comment in comments_of(source).items():
        claim = Claim("", line, comment)
        for shape in (*claim.shapes, *claim.otherwise):
            letters |= set(re.findall(r"\b[A-Z]\b", shape))
    assert letters, f"no shape comments in {name}"
    assert letters <= known, f"not in the glossary: {letters - known}"
