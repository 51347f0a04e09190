"""Where numbers go: CSV files, TensorBoard, or both; an interrupted run appends to them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flame_ext.evaluate import Evaluation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROGRESS_FILE = "progress.csv"
EVALUATIONS_FILE = "evaluations.csv"
TENSORBOARD_DIR = "tensorboard"
EVALUATION_COLUMNS = (
    "step",
    "wall_time",
    "mean_return",
    "std_return",
    "mean_length",
    "returns",
)


class Logger(Protocol):
    """Anything that takes named numbers by step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` at environment step ``step``; steps never decrease in one process."""

    def close(self) -> None:
        """Write what is still held back."""


class CsvTable:
    """A CSV file keyed by its first column ``step``, on disk after every row.

    Rows of the same step are merged. A new column rewrites the file with the union of the columns,
    through a temporary file so that a crash leaves one whole file. When a process starts at a step
    that the file already has, the file's rows from there on are dropped: they were written after
    the checkpoint from which that process resumed.

    Args:
        path: The file; its directory is made if needed.
        columns: Columns to begin with, after ``step``.

    Raises:
        ValueError: If the file exists and is not such a table.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = ["step", *(name for name in columns if name != "step")]
        self._rows: list[dict[str, str]] = []
        if self.path.exists() and self.path.stat().st_size:
            self._read()
        self._started = False
        self._last_row_at = 0

    def write(self, step: int, values: Mapping[str, str]) -> None:
        """Add ``values`` (text by column) at ``step``, or merge them into that step's row."""
        first = not self._started
        if first:
            self._rows = [row for row in self._rows if int(row["step"]) < step]
            self._started = True
        merging = bool(self._rows) and self._rows[-1]["step"] == str(step)
        if merging:
            self._rows[-1].update(values)
        else:
            self._rows.append({"step": str(step), **values})
        new = [name for name in values if name not in self._columns]
        self._columns += new
        if new or first:
            self._write_all()
        else:
            self._write_last(replace=merging)

    def _read(self) -> None:
        reader = _read_whole_lines(self.path)
        names, rows = list(reader.fieldnames or []), list(reader)
        if names[:1] != ["step"] or not all(row["step"].isdigit() for row in rows):
            raise ValueError(
                f"{self.path} exists but its first column is not 'step' with whole numbers; it was "
                "not written by flame_ext. Move it away or choose another run directory."
            )
        self._columns = names + [name for name in self._columns if name not in names]
        self._rows = rows

    def _encode(self, rows: Sequence[Mapping[str, str]], *, header: bool = False) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def _write_all(self) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(self._encode(self._rows, header=True))
        os.replace(temporary, self.path)
        self._last_row_at = self.path.stat().st_size - len(self._encode(self._rows[-1:]))

    def _write_last(self, *, replace: bool) -> None:
        with self.path.open("r+b") as file:
            if replace:
                file.seek(self._last_row_at)
                file.truncate()
            else:
                self._last_row_at = file.seek(0, os.SEEK_END)
            file.write(self._encode(self._rows[-1:]))


class CsvLogger:
    """Metrics as rows of a CSV file, see `CsvTable`.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self._table = CsvTable(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row; numbers are written so that reading gives the same float."""
        self._table.write(step, {name: repr(float(value)) for name, value in metrics.items()})

    def close(self) -> None:
        """Nothing is held back."""


class TensorBoardLogger:
    """Metrics as TensorBoard scalars: ``train/<name>``, and ``eval/<name>`` for ``eval_<name>``.

    TensorBoard is imported at the first number, which takes about a second.

    Args:
        directory: Where the event files go.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to every metric's curve.

        Raises:
            ImportError: If TensorBoard is not installed.
        """
        if self._writer is None:
            self._writer = _open_writer(self._directory, step)
        for name, value in metrics.items():
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            self._writer.add_scalar(tag, float(value), step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _open_writer(directory: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"TensorBoard logging needs the tensorboard package ({error}). Install it with "
            "`pip install tensorboard`, or use CsvLogger alone."
        ) from error
    # Points from `step` on are of a process that ended after its last checkpoint: hide them.
    return SummaryWriter(str(directory), purge_step=step)


class MultiLogger:
    """Several loggers as one.

    Args:
        loggers: Each gets everything, in this order.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on to every logger."""
        for logger in self.loggers:
            logger.log(step, metrics)

    def close(self) -> None:
        """Close every logger."""
        for logger in self.loggers:
            logger.close()


def _read_whole_lines(path: Path) -> csv.DictReader[str]:
    """A table without its last line if that was cut short by a crash."""
    whole, _, _ = path.read_text().rpartition("\n")
    return csv.DictReader(io.StringIO(whole))


class EvaluationLog:
    """``evaluations.csv`` of a run directory; the column ``returns`` holds each episode's return.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._table = CsvTable(Path(run_dir) / EVALUATIONS_FILE, EVALUATION_COLUMNS)

    def write(self, evaluation: Evaluation) -> None:
        """Add one evaluation."""
        numbers = ("wall_time", "mean_return", "std_return", "mean_length")
        row = {name: repr(float(getattr(evaluation, name))) for name in numbers}
        row["returns"] = " ".join(repr(float(value)) for value in evaluation.returns)
        self._table.write(evaluation.step, row)


def read_evaluations(run_dir: str | Path) -> dict[str, list[Any]]:
    """Columns of a run's ``evaluations.csv``: floats by name, ``returns`` as lists of floats.

    Raises:
        FileNotFoundError: If the run has no evaluation yet.
        ValueError: If the file is another table.
    """
    path = Path(run_dir) / EVALUATIONS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {run_dir} is not a run directory, or its run was stopped "
            "before the first evaluation."
        )
    reader = _read_whole_lines(path)
    if reader.fieldnames and not set(EVALUATION_COLUMNS) <= set(reader.fieldnames):
        raise ValueError(f"{path} has the columns {reader.fieldnames}: no run's evaluations")
    rows = list(reader)
    table: dict[str, list[Any]] = {
        name: [float(row[name]) for row in rows] for name in EVALUATION_COLUMNS[:-1]
    }
    table["returns"] = [[float(word) for word in row["returns"].split()] for row in rows]
    return table


def make_loggers(run_dir: str | Path) -> MultiLogger:
    """The loggers of every run: ``progress.csv`` and ``tensorboard/`` in its directory."""
    run_dir = Path(run_dir)
    return MultiLogger(
        [CsvLogger(run_dir / PROGRESS_FILE), TensorBoardLogger(run_dir / TENSORBOARD_DIR)]
    )
