"""How a run shows itself: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY = 50  # steps between two lines, or over which a mean is taken


class Lines:
    """Plain lines: the loss every 50 steps, the held-out loss when there is one."""

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self._losses: list[float] = []
        self._tokens, self._since = 0, time.monotonic()
        del done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def step(self, number: int, loss: float, tokens: int) -> None:
        """Count one step."""
        self._losses.append(loss)
        self._tokens += tokens
        if number % _EVERY == 0 or number == self.steps:
            mean, speed = self.means()
            print(
                f"step {number}/{self.steps}  loss {mean:.4f} nats/token  {speed:.0f} tokens/s",
                flush=True,
            )
            self._losses.clear()
            self._restart()

    def held_out(self, number: int, loss: float) -> None:
        """Tell the held-out loss."""
        print(f"step {number}/{self.steps}  held out {loss:.4f} nats/character", flush=True)
        self._restart()

    def means(self) -> tuple[float, float]:
        """Training loss since the last line, tokens per second since the last pause."""
        loss = sum(self._losses) / max(1, len(self._losses))
        return loss, self._tokens / max(1e-9, time.monotonic() - self._since)

    def _restart(self) -> None:
        self._tokens, self._since = 0, time.monotonic()


class Bar(Lines):
    """A bar with loss, held-out loss (both in nats), tokens per second and the time left."""

    def __init__(self, steps: int, done: int, console: Console):
        super().__init__(steps, done)
        self._held = ""
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, note="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, number: int, loss: float, tokens: int) -> None:
        """Move the bar by one step."""
        self._losses = [*self._losses[1 - _EVERY :], loss]
        self._tokens += tokens
        self._show(number)

    def held_out(self, number: int, loss: float) -> None:
        """Tell the held-out loss from now on."""
        self._held = f", held out {loss:.3f}/character"
        self._show(number)
        self._restart()

    def _show(self, number: int) -> None:
        """In few words: what does not fit beside the bar is cut off."""
        loss, speed = self.means()
        note = f"loss {loss:.3f}/token{self._held}, {speed:.0f} tokens/s"
        self._bar.update(self._task, completed=number, note=note)


def reporter(steps: int, done: int) -> Lines:
    """A bar on a terminal, lines where standard output is piped."""
    console = Console()
    return Bar(steps, done, console) if console.is_terminal else Lines(steps, done)
