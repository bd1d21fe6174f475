"""Compare the test errors that a run printed with those in the README's listing.

    python .ci/compare.py README.md LOG

Rounding differs from processor to processor, and training amplifies it: an error may be larger or
smaller than the listed one by a quarter. On one processor the numbers are equal to the last digit.
"""
import re
import sys
from pathlib import Path

ALLOWED = 1.25


def numbers(path: str) -> list[float]:
    """The six errors of Facet in the test table: MAE and RMSE of energy, forces, stress."""
    text = Path(path).read_text(encoding="utf-8")
    lines = re.findall(r"^  Facet +(.*)$", text, re.MULTILINE)
    if not lines:
        sys.exit(f"{path}: has no line of test errors")
    return [float(number) for number in re.findall(r"[\d.]+", lines[0])]


listed = numbers(sys.argv[1])
found = numbers(sys.argv[2])
print("listed", listed)
print("found ", found)
for want, got in zip(listed, found, strict=True):
    if not 1 / ALLOWED < got / want < ALLOWED:
        sys.exit(f"{got} is not within a quarter of {want}: the README's listing is out of date")
print("the README's listing holds")
