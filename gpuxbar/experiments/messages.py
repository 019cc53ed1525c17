"""What commands say when they cannot go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["ended_by", "show_error"]


def show_error(error: Exception) -> None:
    """Print an error's message to standard error, on one line."""
    console = Console(stderr=True)
    console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)


@contextmanager
def ended_by(*errors: type[Exception]) -> Iterator[None]:
    """Show any of these errors, and end the command with status 2."""
    try:
        yield
    except errors as error:
        show_error(error)
        raise typer.Exit(2) from error
