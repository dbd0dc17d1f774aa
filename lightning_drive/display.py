"""What a person sees while masks are found: progress in the Trainer's own bar."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info


@contextmanager
def progress(trainer: pl.Trainer, description: str, total: int) -> Generator[Callable[[], None]]:
    """Show a bar within the Trainer's progress bar, Rich or tqdm; one line of text if there is none.

    A single step shows nothing.

    Args:
        trainer: The running Trainer.
        description: What is being done.
        total: How many steps there are.

    Yields:
        A function to call after each step.

    """
    bar = trainer.progress_bar_callback
    if total == 1:
        yield lambda: None
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        rich = bar.progress
        style = bar.theme.description
        task = rich.add_task(f"[{style}]{description}" if style else description, total=total)
        try:
            yield lambda: rich.update(task, advance=1, refresh=True)
        finally:
            rich.update(task, visible=False)  # not removed: Lightning finds its own tasks by their position
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        position = 2 * bar.process_position + 1
        with Tqdm(desc=description, total=total, position=position, leave=False, file=sys.stdout) as tqdm:
            yield lambda: tqdm.update() and None
    else:
        rank_zero_info(f"{description}: {total} rounds")
        yield lambda: None
