"""Registers, spills and stack of every CUDA kernel on every shipped architecture.

``python benchmarks/ptxas_report.py BUILD_LOG`` reads what ptxas reported in a verbose build,

    export PIP_VERBOSE=1 SKBUILD_CMAKE_DEFINE="FLAME_EXT_CUDA=ON;FLAME_EXT_PTXAS_REPORT=ON"
    pip install . > BUILD_LOG

and writes it to ``benchmarks/results/ptxas.csv``; rows of sources that were not compiled stay. With
``--check`` it compares instead and fails where a kernel appears, disappears, spills more or takes
over `REGISTER_MARGIN` registers more than recorded. Dynamic shared memory is chosen at run time
(``csrc/cuda/tile_plan.h``); the table's is static.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "ptxas.csv"
REGISTER_MARGIN = 16
COLUMNS = ("file", "kernel", "arch", "registers", "spill_stores", "spill_loads", "stack", "shared")

Row = dict[str, str]


def kernel_name(mangled: str) -> str:
    """`TwinQKernel<8>` of a mangled run_kernel instantiation, else the function's own name.

    A second argument of the template, true, is a kernel with tensor cores: `TwinQKernel<8>+tensor`.
    """
    if found := re.search(r"\d+([A-Za-z]+Kernel)I(?:N?S\d*_)?(\d+)([A-Z]\w+)", mangled):
        return f"{found[1]}<{found[3][: int(found[2])]}>"  # names are written after their length
    for pattern in (
        r"\d+([A-Za-z]+Kernel)(?:ILi(\d+)E)?(Lb1E)?",
        r"\d+([a-z_]+_kernel)(?:IL\w+?E(\d+)E)?()",
    ):
        if found := re.search(pattern, mangled):
            tile = f"<{found[2]}>" if found[2] else ""
            return found[1] + tile + ("+tensor" if found[3] else "")
    return mangled


def parse(log: str) -> list[Row]:
    """One row per kernel and architecture, from a build's output."""
    rows: list[Row] = []
    file = ""
    for line in log.splitlines():
        if found := re.search(r"Building CUDA object \S*?(\w+\.cu)\.o", line):
            file = found[1]
        if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            rows.append(dict.fromkeys(COLUMNS, "0"))
            rows[-1] |= {"file": file, "kernel": kernel_name(found[1]), "arch": found[2]}
        for column, pattern in (
            ("stack", r"(\d+) bytes stack frame"),
            ("spill_stores", r"(\d+) bytes spill stores"),
            ("spill_loads", r"(\d+) bytes spill loads"),
            ("registers", r"Used (\d+) registers"),
            ("shared", r"(\d+) bytes smem"),
        ):
            if rows and (found := re.search(pattern, line)):
                rows[-1][column] = found[1]
    return rows


def differences(recorded: list[Row], now: list[Row]) -> list[str]:
    """What became worse, in words."""

    def keyed(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
        return {(r["file"], r["kernel"], r["arch"]): r for r in rows}

    old, new = keyed(recorded), keyed(now)
    found = [f"{' '.join(key)}: not in the table" for key in new.keys() - old.keys()]
    found += [f"{' '.join(key)}: gone" for key in old.keys() - new.keys()]
    for key in new.keys() & old.keys():
        for column, margin in (("registers", REGISTER_MARGIN), ("spill_stores", 0), ("stack", 0)):
            before, after = int(old[key][column]), int(new[key][column])
            if after > before + margin:
                found.append(f"{' '.join(key)}: {column} {before} -> {after}")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="output of a verbose build")
    parser.add_argument("--check", action="store_true", help="compare with the recorded table")
    options = parser.parse_args()
    rows = parse(options.log.read_text())
    if not rows:
        sys.exit(f"{options.log} has no report of ptxas: was it a build as --help shows it?")
    with TABLE.open() as file:
        recorded = list(csv.DictReader(file))
    if options.check:
        sys.exit("\n".join(differences(recorded, rows)) or 0)
    compiled = {row["file"] for row in rows}
    rows += [row for row in recorded if row["file"] not in compiled]
    rows.sort(key=lambda r: (r["file"], r["kernel"], int(r["arch"])))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
