"""The progress bar of ``seqr silo train``: step, loss and time left; one plain line per tenth where no one watches."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from silo_client.training import Progress as Report


@contextmanager
def training_bar(console: Console) -> Iterator[Report]:
    """A function to be called with (step, steps, loss) after every step."""
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=None, loss="-", visible=False)

        def report(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, loss=f"{loss:.3f}", visible=True)

        yield report


def _plain_lines(console: Console) -> Report:
    def report(step: int, steps: int, loss: float) -> None:
        if step == steps or step % max(1, steps // 10) == 0:
            console.print(f"step {step} of {steps}, loss {loss:.3f}", highlight=False)

    return report
