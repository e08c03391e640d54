"""Memory and speed of the MIMIC-III reader on the open demo, its CHARTEVENTS inflated to as many rows as asked.

    python benchmarks/mimic_memory.py DIR --rows 50000000

Every copy of the demo's patients gets ids of its own, so that rows and stays grow together. Tables lie in a
temporary folder; the reader runs in a process of its own, whose peak of memory the system tells.
"""

from __future__ import annotations

import argparse
import gzip
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

IDS = ("subject_id", "hadm_id", "icustay_id")
APART = 1_000_000  # between the ids of two copies: the demo's are below that
READ = "import sys; from gatewise.sepsis import mimic; print(mimic.read_with_report(sys.argv[1])[0].measured.shape)"


def inflate(source: Path, target: Path, rows: int, plain: bool) -> int:
    """Writes the tables; returns how many rows CHARTEVENTS has."""
    table = pl.read_csv(source / "CHARTEVENTS.csv.gz", infer_schema_length=None)
    copies = max(1, round(rows / table.height))
    for path in source.glob("*.csv.gz"):
        if path.name.split(".")[0] not in ("CHARTEVENTS", "ICUSTAYS", "ADMISSIONS", "PATIENTS"):
            (target / path.name).write_bytes(path.read_bytes())
            continue
        part = table if path.name.startswith("CHARTEVENTS") else pl.read_csv(path, infer_schema_length=None)
        ids = [name for name in IDS if name in part.columns]
        with open(target / path.stem, "wb") if plain else gzip.open(target / path.name, "wb", 1) as file:
            for copy in range(copies):
                shifted = part.with_columns(pl.col(name) + copy * APART for name in ids)
                file.write(shifted.write_csv(include_header=copy == 0).encode())
    return table.height * copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the open demo, as .csv.gz")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--plain", action="store_true", help="CHARTEVENTS as .csv instead of .csv.gz")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = inflate(options.data, Path(folder), options.rows, options.plain)
        start = time.perf_counter()
        shape = subprocess.run([sys.executable, "-c", READ, folder], check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    speed = f"{seconds:.0f} s, {rows / seconds:,.0f} rows/s, peak {peak:.0f} MiB"
    print(f"{rows:,} rows of CHARTEVENTS -> records {shape.strip()}: {speed}")


if __name__ == "__main__":
    main()
