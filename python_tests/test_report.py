"""Which committed runs belong together, and what is tabulated of them."""

import json
from pathlib import Path

import pytest
import report

from flame_ext.config import make_config
from flame_ext.evaluate import Evaluation
from flame_ext.loggers import EvaluationLog

LONG = make_config("flame", overrides={"total_steps": 200, "settle_after": 100}).to_dict()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gamma": 0.98}, "gamma"),
        ({"settle_after": None}, "settle_after, settled_embedding_rate, settled_horizon"),
        ({"settled_horizon": 4.0}, "settled_horizon"),
        ({"total_steps": 300}, ""),
        ({"total_steps": 100}, "settle_after, settled_embedding_rate, settled_horizon"),
    ],
)
def test_runs_differ_in_what_decides_them(changed: dict[str, object], named: str) -> None:
    assert (
        report.differences(LONG, LONG | changed)
        == report.differences(LONG | changed, LONG)
        == named
    )


def test_a_run_that_ends_before_it_settles_is_as_one_that_never_does() -> None:
    short = LONG | {"total_steps": 100}
    assert report.differences(short, short | {"settle_after": None}) == ""
    older = {name: value for name, value in short.items() if not name.startswith("settle")}
    assert report.differences(older, short) == ""


def write_run(
    folder: Path, name: str, algorithm: str, returns: list[float], seconds: float
) -> None:
    """A run of 20 evaluations, one every 50 steps, whose mean returns end in `returns`."""
    run = folder / "raw" / name
    run.mkdir(parents=True)
    log = EvaluationLog(run)
    values = [0.0] * (20 - len(returns)) + returns
    for i, value in enumerate(values, 1):
        log.write(Evaluation(50 * i, seconds * i / 20, (value,), (10,)))
    (run / "evaluations.csv").rename(folder / f"{name}.csv")
    settings = make_config(algorithm, overrides={"total_steps": 1000}).to_dict()
    (folder / f"{name}.json").write_text(json.dumps(settings))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "plot_learning_curves", lambda *_, **__: None)
    # The best before the last 10 %, which are the evaluations at 950 and 1000 steps.
    write_run(tmp_path, "A-sac-s0", "sac", [700.0, 90.0, 110.0], 600)
    write_run(tmp_path, "A-sac-s1", "sac", [700.0, 290.0, 310.0], 1200)
    write_run(tmp_path, "A-flame-s0", "flame", [0.0, 400.0, 400.0], 60)
    write_run(tmp_path, "A-flame-s1", "flame", [0.0, 600.0, 600.0], 60)
    write_run(tmp_path, "A-flame-s2", "flame", [0.0, 9000.0, 9000.0], 60)  # sac lacks this seed
    return tmp_path


def test_the_table_has_what_the_runs_reached(results: Path) -> None:
    report.report(results, "sac")
    text = (results / "table.md").read_text()
    # sample deviation of 110, 310 and of 100, 300: 200 / sqrt 2
    assert "| A | sac | 2 | 210 +- 141 | 110 310 | 200 +- 141 | 700 +- 0 | 15.0 |" in text
    assert "seeds 0, 1; 95 %" in text
    # (400 + 600) / 2 over (100 + 300) / 2
    assert "| flame | 2.50 [1.33, 6.00] | 1.00 [1.00, 1.00] |" in text
    assert "| sac | 1.00 [1.00, 1.00] | 0.50 [" in text


def test_a_baseline_without_positive_returns_has_no_ratios(results: Path) -> None:
    for seed in (0, 1):
        write_run(results, f"B-sac-s{seed}", "sac", [-1.0, -1.0], 60)
        write_run(results, f"B-flame-s{seed}", "flame", [1.0, 1.0], 60)
    report.report(results, "sac")  # the mean over both tasks is positive
    assert "No ratios: sac" in (results / "table.md").read_text()


def test_mixed_runs_are_refused(results: Path) -> None:
    settings = json.loads((results / "A-flame-s1.json").read_text())
    (results / "A-flame-s1.json").write_text(json.dumps(settings | {"gamma": 0.5}))
    with pytest.raises(SystemExit, match="A-flame-s1 and A-flame-s0 differ in gamma"):
        report.read_results(results)
    (results / "A-flame-s1.json").write_text(json.dumps(settings))
    table = (results / "A-flame-s1.csv").read_text().splitlines()
    (results / "A-flame-s1.csv").write_text("\n".join(table[:-1]) + "\n")
    with pytest.raises(SystemExit, match=r"runs of \[950.0, 1000.0\] steps are mixed"):
        report.read_results(results)
