"""Which committed runs belong together."""

import pytest
from report import differences

from flame_ext.config import make_config

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
    assert differences(LONG, LONG | changed) == differences(LONG | changed, LONG) == named


def test_a_run_that_ends_before_it_settles_is_as_one_that_never_does() -> None:
    short = LONG | {"total_steps": 100}
    assert differences(short, short | {"settle_after": None}) == ""
    older = {name: value for name, value in short.items() if not name.startswith("settle")}
    assert differences(older, short) == ""
