"""What commands say when they cannot go on."""

from rich.console import Console
from rich.markup import escape

__all__ = ["show_error"]


def show_error(error: Exception) -> None:
    """Print an error's message to standard error, on one line."""
    console = Console(stderr=True)
    console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
