"""Registers, spills and stack of every CUDA kernel on every shipped architecture.

``python benchmarks/ptxas_report.py`` compiles ``csrc/cuda/*.cu`` and writes the table to
``benchmarks/results/ptxas.csv``; with ``--check`` it compares instead and fails where a kernel
spills, appears or disappears, or takes more than `REGISTER_MARGIN` registers more than recorded.
``--files twin_q.cu,adam.cu`` compiles only these and leaves the table's other rows.
Dynamic shared memory is chosen at run time (``csrc/cuda/tile_plan.h``); the table's is static.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "ptxas.csv"
ARCHS = ("80", "86", "89", "90", "100", "120")
REGISTER_MARGIN = 16
COLUMNS = ("file", "kernel", "arch", "registers", "spill_stores", "spill_loads", "stack", "shared")

Row = dict[str, str]


def compile_file(source: Path, archs: tuple[str, ...]) -> str:
    """What ptxas reports about one file."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        command += ["-c", str(source), "-o", f"{folder}/out.o"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{source.name} does not compile:\n{run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def kernel_name(mangled: str) -> str:
    """`TwinQKernel<8>` of a mangled run_kernel instantiation, else the function's own name.

    A second argument of the template, true, is a kernel with tensor cores: `TwinQKernel<8>+tensor`.
    """
    for pattern in (
        r"\d+([A-Za-z]+Kernel)I(?:N?S\d*_)?\d+([A-Z][A-Za-z]+)E()",
        r"\d+([A-Za-z]+Kernel)(?:ILi(\d+)E)?(Lb1E)?",
        r"\d+([a-z_]+_kernel)(?:IL\w+?E(\d+)E)?()",
    ):
        if found := re.search(pattern, mangled):
            tile = f"<{found[2]}>" if found[2] else ""
            return found[1] + tile + ("+tensor" if found[3] else "")
    return mangled


def parse(report: str, file: str) -> list[Row]:
    """One row per kernel and architecture."""
    rows: list[Row] = []
    for line in report.splitlines():
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


def differences(recorded: list[Row], now: list[Row], archs: tuple[str, ...]) -> list[str]:
    """What became worse, in words."""

    def keyed(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
        return {(r["file"], r["kernel"], r["arch"]): r for r in rows if r["arch"] in archs}

    old, new = keyed(recorded), keyed(now)
    found = [f"{' '.join(key)}: not in the table" for key in new.keys() - old.keys()]
    found += [f"{' '.join(key)}: gone" for key in old.keys() - new.keys()]
    for key in sorted(new.keys() & old.keys()):
        for column, margin in (("registers", REGISTER_MARGIN), ("spill_stores", 0), ("stack", 0)):
            before, after = int(old[key][column]), int(new[key][column])
            if after > before + margin:
                found.append(f"{' '.join(key)}: {column} {before} -> {after}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the recorded table")
    parser.add_argument("--archs", default=",".join(ARCHS), help="compute capabilities")
    parser.add_argument("--files", help="names in csrc/cuda, separated by commas; all without")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on the PATH")
    archs = tuple(options.archs.split(","))
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    chosen = options.files.split(",") if options.files else [source.name for source in sources]
    rows = []
    for source in sources:
        if source.name in chosen:
            rows += parse(compile_file(source, archs), source.name)
    with TABLE.open() as file:
        recorded = list(csv.DictReader(file))
    if options.check:
        worse = differences([r for r in recorded if r["file"] in chosen], rows, archs)
        sys.exit("\n".join(worse) if worse else 0)
    if options.files:
        rows += [r for r in recorded if r["file"] not in chosen]
    rows.sort(key=lambda r: (r["file"], r["kernel"], int(r["arch"])))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
