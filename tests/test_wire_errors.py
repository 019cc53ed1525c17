"""The table of errors of the wires' methods: what is recorded, what is shown, what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpuxbar.bench import wire_errors
from gpuxbar.bench.record import rows_of
from gpuxbar.bench.wire_errors import CASES, MARKERS, Pair, app, errors, table

README = Path(__file__).parent.parent / "kernels" / "README.md"
run = CliRunner().invoke


def test_the_readme_shows_the_recorded_rows():
    order = [pair.name for pair in CASES]
    rows = sorted(rows_of(wire_errors.RECORDED), key=lambda row: order.index(row["case"]))
    assert [row["case"] for row in rows] == order
    text = README.read_text()
    shown = text[text.index(MARKERS[0]) + len(MARKERS[0]) : text.index(MARKERS[1])]
    assert shown.strip() == table(rows)


def test_recorded_errors_are_those_of_today():
    pair = next(pair for pair in CASES if pair.size == 32 and pair.r_end == 1000)
    row = next(row for row in rows_of(wire_errors.RECORDED) if row["case"] == pair.name)
    for method, found in errors(pair).items():
        # rounding of the exact one depends on the compiler; the others err by the method
        assert found == pytest.approx(row["errors"][method], rel=1e-2, abs=2e-6)


@pytest.mark.parametrize("cells", ["gaussian", "uniform"])
def test_every_better_method_errs_less(cells):
    found = errors(Pair(cells, 24, 10e3, 2.5, 100.0))
    for place in (0, 1):
        none, first_order, ladder, mean_field, exact = (
            found[m][place] for m in wire_errors.reference.METHODS
        )
        assert none > first_order > ladder > mean_field > exact
        assert exact < 5e-6


def test_the_command_records_shows_and_draws(tmp_path, monkeypatch):
    record, readme, picture = (tmp_path / name for name in ("rows.jsonl", "README.md", "errors.png"))
    small = Pair("uniform", 8, 1e3, 1.0, 0.0)
    monkeypatch.setattr(wire_errors, "CASES", (small, Pair("gaussian", 9, 1e3, 1.0, 0.0)))
    assert run(app, ["8", "--record", str(record)]).exit_code == 0
    (row,) = [json.loads(line) for line in record.read_text().splitlines()]
    assert row["case"] == small.name
    assert row["errors"]["exact"][0] < 1e-6
    readme.write_text("\n".join(MARKERS))
    result = run(app, ["--record", str(record), "--readme", str(readme), "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    assert "| uniform, 8 x 8 | 1 kohm | 1, 0 ohm |" in readme.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = run(app, ["--record", str(tmp_path / "none.jsonl"), "--picture", str(picture)])
    assert result.exit_code == 2
    assert "must name a file of recorded rows" in result.output
