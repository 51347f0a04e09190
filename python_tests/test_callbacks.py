"""Callbacks and the progress display, without a trainer."""

import io
import time

import pytest

from flame_ext import progress as module
from flame_ext.callbacks import Callback, FunctionCallback, StopAfterSeconds, StopOnReturn
from flame_ext.evaluate import Evaluation
from flame_ext.progress import Progress


def evaluation(mean):
    return Evaluation(1000, 2.0, (mean - 1.0, mean + 1.0), (10, 10))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_base_callback_never_stops():
    callback = Callback()
    answers = [
        callback.on_start(None),
        callback.on_log(None, {}),
        callback.on_evaluation(None, evaluation(1.0)),
        callback.on_end(None, None),
    ]
    assert answers == [None] * 4


@pytest.mark.parametrize(("mean", "goes_on"), [(99.9, True), (100.0, False), (101.0, False)])
def test_stop_on_return(mean, goes_on):
    assert StopOnReturn(100.0).on_evaluation(None, evaluation(mean)) is goes_on


def test_a_return_that_is_no_number_stops_nothing():
    with pytest.raises(ValueError, match="threshold=nan"):
        StopOnReturn(float("nan"))


def test_stop_after_seconds(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    callback = StopAfterSeconds(60.0)
    assert callback.on_start(None) is None
    now[0] += 59.0
    assert callback.on_log(None, {}) is True
    assert callback.on_evaluation(None, evaluation(0.0)) is True
    now[0] += 1.0
    assert callback.on_log(None, {}) is False
    assert callback.on_evaluation(None, evaluation(0.0)) is False


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_stop_after_seconds_needs_time(seconds):
    with pytest.raises(ValueError, match="must be positive"):
        StopAfterSeconds(seconds)


@pytest.mark.parametrize("event", ["start", "log", "evaluation", "end"])
def test_a_function_is_called_at_its_event_only(event):
    calls = []
    callback = FunctionCallback(lambda *args: calls.append(args), event)
    callback.on_start("trainer")
    callback.on_log("trainer", "log")
    callback.on_evaluation("trainer", "evaluation")
    callback.on_end("trainer", "end")
    assert calls == [("trainer",) if event == "start" else ("trainer", event)]


@pytest.mark.parametrize(
    ("answer", "passed_on"), [(False, False), (True, None), (None, None), (0, None), ([], None)]
)
def test_only_false_itself_stops(answer, passed_on):
    assert FunctionCallback(lambda *_: answer).on_evaluation(None, None) is passed_on


def test_an_unknown_event_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'evaluation'"):
        FunctionCallback(print, "evaluate")


def drive(stream):
    progress = Progress(2000, initial=500, algorithm="flame", stream=stream)
    progress.update(1000, 50)
    progress.show({"train_return": 12.0, "ess": 7.53, "entropy": -1.5, "alpha": 0.02, "other": 1.0})
    progress.evaluated(evaluation(100.0))
    progress.update(2000, 150)
    progress.close()
    return stream.getvalue()


def test_without_a_terminal_there_is_one_line_per_evaluation():
    text = drive(io.StringIO())
    assert text.count("\n") == 1
    assert "1,000/2,000" in text
    assert "100.0 +- 1.0" in text
    for word in (
        "steps/s",
        "updates/s",
        "train return 12",
        "ESS 7.53",
        "entropy -1.50",
        "alpha 0.02",
    ):
        assert word in text
    assert "other" not in text


def test_a_terminal_gets_a_bar_and_the_same_line():
    text = drive(Terminal())
    assert "flame" in text
    assert "2000/2000" in text
    assert "100.0 +- 1.0" in text
    assert "ESS 7.53" in text


def test_speeds_are_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    stream = io.StringIO()
    progress = module.Progress(2000, initial=500, stream=stream)
    progress.update(600, 1000)
    clock[0] += 10
    progress.update(1500, 1700)
    progress.evaluated(Evaluation(1500, 1.0, (1.0,), (1,)))
    assert " 100 steps/s  70 updates/s" in stream.getvalue()
