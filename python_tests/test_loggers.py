"""CSV and TensorBoard logs: nothing lost, nothing doubled after an interruption."""

import csv
import math
from pathlib import Path

import pytest

from flame_ext.evaluate import Evaluation
from flame_ext.loggers import (
    CsvLogger,
    EvaluationLog,
    MultiLogger,
    TensorBoardLogger,
    make_loggers,
    read_evaluations,
)
from flame_ext.tally import Tally


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_come_back_exactly_and_are_on_disk_at_once(tmp_path):
    path = tmp_path / "deep" / "progress.csv"
    logger = CsvLogger(path)
    value = 0.1 + 0.2
    logger.log(1, {"loss": value})
    assert float(rows_of(path)[0]["loss"]) == value
    logger.log(2, {"loss": math.nan})
    assert [row["step"] for row in rows_of(path)] == ["1", "2"]
    assert math.isnan(float(rows_of(path)[1]["loss"]))


def test_new_columns_are_joined_and_missing_values_left_empty(tmp_path):
    logger = CsvLogger(tmp_path / "a.csv")
    logger.log(1, {"loss": 1.0})
    logger.log(2, {"loss": 2.0, "ess": 3.0})
    logger.log(3, {"ess": 4.0})
    assert rows_of(tmp_path / "a.csv") == [
        {"step": "1", "loss": "1.0", "ess": ""},
        {"step": "2", "loss": "2.0", "ess": "3.0"},
        {"step": "3", "loss": "", "ess": "4.0"},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_metrics_of_one_step_share_a_row(tmp_path):
    logger = CsvLogger(tmp_path / "a.csv")
    logger.log(1, {"loss": 1.0, "eval": 0.5})
    logger.log(2, {"loss": 2.0})
    logger.log(2, {"eval": 9.0})
    logger.log(3, {"loss": 3.0})
    assert [(r["step"], r["loss"], r["eval"]) for r in rows_of(tmp_path / "a.csv")] == [
        ("1", "1.0", "0.5"),
        ("2", "2.0", "9.0"),
        ("3", "3.0", ""),
    ]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    first = CsvLogger(tmp_path / "a.csv")
    for step in (10, 20, 30):
        first.log(step, {"loss": float(step)})
    second = CsvLogger(tmp_path / "a.csv")
    second.log(20, {"loss": -20.0})
    second.log(30, {"loss": -30.0})
    found = [(r["step"], r["loss"]) for r in rows_of(tmp_path / "a.csv")]
    assert found == [("10", "10.0"), ("20", "-20.0"), ("30", "-30.0")]


def test_a_resumed_run_keeps_columns_it_does_not_know(tmp_path):
    CsvLogger(tmp_path / "a.csv").log(1, {"old": 1.0})
    CsvLogger(tmp_path / "a.csv").log(2, {"new": 2.0})
    assert rows_of(tmp_path / "a.csv") == [
        {"step": "1", "old": "1.0", "new": ""},
        {"step": "2", "old": "", "new": "2.0"},
    ]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,a,b\n1,1.0,2.0\n2,3.0,4.")
    CsvLogger(path).log(3, {"a": 5.0})
    assert path.read_text() == "step,a,b\n1,1.0,2.0\n3,5.0,\n"


def test_a_foreign_file_is_left_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("time,value\n1,2\n")
    with pytest.raises(ValueError, match=r"not written by flame_ext"):
        CsvLogger(path)
    assert path.read_text() == "time,value\n1,2\n"


def test_evaluations_are_written_and_read_back(tmp_path):
    log = EvaluationLog(tmp_path)
    log.write(Evaluation(100, 1.5, (1.0, 2.5), (10, 20)))
    log.write(Evaluation(200, 3.0, (4.0,), (30,)))
    header = (tmp_path / "evaluations.csv").read_text().splitlines()[0]
    assert header == "step,wall_time,mean_return,std_return,mean_length,returns"
    table = read_evaluations(tmp_path)
    assert table["step"] == [100.0, 200.0]
    assert table["wall_time"] == [1.5, 3.0]
    assert table["mean_return"] == [1.75, 4.0]
    assert table["std_return"] == [0.75, 0.0]
    assert table["mean_length"] == [15.0, 30.0]
    assert table["returns"] == [[1.0, 2.5], [4.0]]


def test_a_cut_evaluation_is_not_read(tmp_path):
    EvaluationLog(tmp_path).write(Evaluation(100, 1.5, (1.0, 2.5), (10, 20)))
    with (tmp_path / "evaluations.csv").open("a") as file:
        file.write("200,2.0,-5.0,1.0,200.0,-4.0 -")
    assert read_evaluations(tmp_path)["step"] == [100.0]


def test_reading_a_directory_without_evaluations_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        read_evaluations(tmp_path)


def test_several_loggers_get_the_same(tmp_path):
    logger = MultiLogger([CsvLogger(tmp_path / "a.csv"), CsvLogger(tmp_path / "b.csv")])
    logger.log(1, {"x": 1.0})
    logger.close()
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text() == "step,x\n1,1.0\n"


def scalars_of(directory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_gets_training_and_evaluation_curves(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    logger = TensorBoardLogger(tmp_path)
    logger.log(1, {"loss": 0.5})
    logger.log(2, {"loss": 0.25, "eval_return": 8.0})
    logger.close()
    assert scalars_of(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 0.25)],
        "eval/return": [(2, 8.0)],
    }


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    for start, factor in ((1, 1.0), (2, -1.0)):
        logger = TensorBoardLogger(tmp_path)
        for step in range(start, 4):
            logger.log(step, {"loss": factor * step})
        logger.close()
    assert scalars_of(tmp_path) == {"train/loss": [(1, 1.0), (2, -2.0), (3, -3.0)]}


def test_a_run_directory_gets_both(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    logger = make_loggers(tmp_path)
    logger.log(5, {"loss": 1.0})
    logger.close()
    assert rows_of(tmp_path / "progress.csv") == [{"step": "5", "loss": "1.0"}]
    assert scalars_of(tmp_path / "tensorboard") == {"train/loss": [(5, 1.0)]}


def test_a_tally_gives_means_since_the_last_row():
    tally = Tally()
    for values in ((1.0, 3.0), (10.0,)):
        for value in values:
            tally.add({"loss": value})
        assert tally.pop() == {"loss": sum(values) / len(values)}
    assert tally.pop() == {}


def test_a_replaced_row_keeps_nothing_of_the_former_one(tmp_path: Path) -> None:
    CsvLogger(tmp_path / "a.csv").log(20, {"loss": 1.0, "eval_return": 5.0})
    CsvLogger(tmp_path / "a.csv").log(20, {"loss": 2.0})
    with (tmp_path / "a.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "20", "loss": "2.0", "eval_return": ""}]
