#!/usr/bin/env bash
# matscipy 1.3.1, its many-body calculator with the Stillinger-Weber parameters of silicon, with
# ase 3.29.0.
#
# The parameters name their element, but the calculator does not look: germanium, carbon or copper at
# the places of the silicon atoms have the energy of silicon, to the last digit.
#
# Our guess: an element for which there are no parameters raises an error, as with the Tersoff
# potential of the same calculator.
#
# Seen:
#     Si -34.205556 eV, Ge -34.205556 eV, C -34.205556 eV, Cu -34.205556 eV
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check matscipy==1.3.1 ase==3.29.0 numpy==2.4.6

"$folder/env/bin/python" -W ignore - <<'EOF'
from ase.build import bulk
from matscipy.calculators.manybody import Manybody
from matscipy.calculators.manybody.explicit_forms import StillingerWeber
from matscipy.calculators.manybody.explicit_forms.stillinger_weber import (
    Stillinger_Weber_PRB_31_5262_Si as parameters,
)

energies = []
for element in ("Si", "Ge", "C", "Cu"):
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.symbols[:] = element
    atoms.calc = Manybody(**StillingerWeber(parameters))
    energies.append(atoms.get_potential_energy())
    print(f"{element} {energies[-1]:.6f} eV")
assert parameters["el"] == "Si" and len(set(energies)) == 1, "it has changed"
EOF
