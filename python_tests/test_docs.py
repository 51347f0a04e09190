"""The documentation keeps up with the code: options are explained, links lead somewhere."""

import re
from pathlib import Path

import pytest

from flame_ext.config import make_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_every_option_is_in_the_table_with_its_values():
    text = (ROOT / "docs/training.md").read_text()
    options = text.split("## Options", 1)[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\|", options, flags=re.MULTILINE)
    listed = {name: (default, paper or default) for name, default, paper in rows}
    values = [make_config("flame", preset).to_dict() for preset in ("default", "paper")]
    assert listed == {name: tuple(as_text(v[name]) for v in values) for name in values[0]}


def test_what_the_defaults_change_from_algorithm_to_algorithm():
    options = {
        name: make_config(name).to_dict() for name in ("flame", "flame-r", "diffusion", "sac")
    }
    rows = {key: [as_text(options[a][key]) for a in options] for key in options["flame"]}
    wanted = [f"| `{k}` | {' | '.join(r)} |" for k, r in rows.items() if len(set(r)) > 1]
    text = (ROOT / "docs/algorithm.md").read_text().split("## Presets", 1)[1]
    listed = [line for line in text.splitlines() if line.startswith("| `")]
    assert listed == wanted[1:], "the first row is the algorithm itself"


def as_text(value):
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
