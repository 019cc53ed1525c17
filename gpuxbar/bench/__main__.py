"""`gpuxbar bench`: parse, measure, print, record."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gpuxbar.bench import CASES, Case, OracleMismatch, measure
from gpuxbar.bench.gpu.reads import CONVOLUTIONS, READS
from gpuxbar.bench.gpu.table import gpu_table
from gpuxbar.bench.record import (
    append,
    avx2_table,
    environment,
    lines_of,
    markers,
    other_ratios,
    put_table,
    rewrite_readmes,
    rows_of,
    summary_table,
)
from gpuxbar.experiments.messages import ended_by
from gpuxbar.spec.errors import nearest

ROOT = Path(__file__).parents[2]
RECORDS = ("cpu", "updates", "parasitics-bench", "parasitics-training")
app = typer.Typer(add_completion=False)


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="What to measure; all if none is given.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each contender; as many as fit 4 s if not given.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="JSON-lines file to append to or, with --readme, to read; all of examples/results if not given."
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the cases and stop.")] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="ARCHITECTURE", help="Say how reads would run on a GPU, such as sm_90, and why."
        ),
    ] = None,
    multiprocessors: Annotated[int, typer.Option(min=1, help="Of the GPU of --explain.")] = 132,
    readme: Annotated[
        bool, typer.Option("--readme", help="Rewrite the tables of the READMEs from the recorded rows.")
    ] = False,
    root: Annotated[Path, typer.Option(help="Folder of README.md and examples/ for --readme.")] = Path(),
) -> None:
    """Time the library against the ideal product and against plain PyTorch, after checking its results."""
    console = Console()
    with ended_by(ValueError, OSError, OracleMismatch):
        if list_:
            for case in CASES:
                console.print(f"{case.name:20} {case.size}", highlight=False, soft_wrap=True)
        elif explain is not None:
            _explain(console, explain, multiprocessors)
        elif readme:
            records = (
                [root / "examples/results" / f"{name}.jsonl" for name in RECORDS]
                if record is None
                else [record]
            )
            rows = [row for each in records for row in rows_of(each)]
            narrow = rows_of(root / "examples/results/avx2.jsonl") if record is None else []
            rewrite_readmes(root, rows)
            if narrow:
                put_table(root / "examples/README.md", avx2_table(narrow, rows), *markers("avx2"))
                put_table(root / "README.md", summary_table(narrow), *markers("summary"))
            on_gpu = gpu_table(lines_of(root / "examples/results/gpu.jsonl"))
            put_table(root / "examples/README.md", on_gpu, *markers("gpu"))
        else:
            _measure(console, _chosen(names or []), threads, rounds, record)


def _explain(console: Console, arch: str, multiprocessors: int) -> None:
    if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise ValueError(f"bench: `explain` must name an architecture, got {arch!r}; give one such as sm_90")
    where_bytes_pay = [
        replace(r, precision="int8")
        for r in READS
        if not r.case.int8 and (r.noise == "none" or r.tile >= 512)
    ]
    for read in (*READS, *where_bytes_pay, *CONVOLUTIONS):
        title = f"{read.name}: {read.size}, noise {read.noise}"
        try:
            text = read.plan(arch, multiprocessors).explain()
        except ValueError as error:  # no other precision takes the place of bytes
            text = f"impossible: {error}"
        console.print(f"{title}\n{text}", highlight=False, soft_wrap=True)


def _chosen(names: list[str]) -> list[Case]:
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"bench: `case` must be a case, got {name!r}; {nearest(name, known)}")
    return [known[name] for name in names] or list(CASES)


def _measure(
    console: Console, cases: list[Case], threads: int, rounds: int | None, record: Path | None
) -> None:
    table = Table(
        title=f"{threads} thread{'s' if threads > 1 else ''}; times of the unit in ms, ratios to it"
    )
    for head in ("case", "unit", "gpuxbar", "target", "others", "extra MB", "error"):
        table.add_column(head)
    red = []
    for case in cases:
        try:
            row = _with_bar(console, case, threads, rounds)
        except OracleMismatch as error:
            table.add_row(case.name, "[red]oracle disagrees: no number[/red]")
            red.append(f"{case.name}: {error}")
            continue
        row |= environment(ROOT)
        table.add_row(*_cells(row))
        if record is not None:
            append(record, row)
    console.print(table)
    if red:
        raise OracleMismatch("; ".join(red))


def _with_bar(console: Console, case: Case, threads: int, rounds: int | None) -> dict[str, Any]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(case.name, total=None)

        def tick(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return measure(case, thread_count=threads, rounds=rounds, tick=tick)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    unit = next(iter(row["ms"].values()))
    ours = row["ratio"].get("gpuxbar")
    memory = row["extra_mb"].get("gpuxbar")
    return (
        row["case"], f"{unit[1]:.2f}", "" if ours is None else f"{ours:.2f}", _target(row),
        other_ratios(row), "" if memory is None else f"{memory:.1f}", f"{row['error']:.0e}",
    )  # fmt: skip


def _target(row: dict[str, Any]) -> str:
    if row["target_ms"] is not None:
        return f"{row['target_ms']:g} ms: {row['ms']['gpuxbar'][1]:.2f}"
    return "" if row["target"] is None else f"{row['target']:g}"


if __name__ == "__main__":
    app()
