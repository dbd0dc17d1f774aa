"""Print tables of finished runs with the paper's values, and draw its figures from the runs.

    python examples/paper/tables.py RESULTS.jsonl [MORE.jsonl ...]
    python examples/paper/tables.py RESULTS.jsonl --markdown PAGE.md      # between the marks in it, see MARKS
    python examples/paper/tables.py RESULTS.jsonl --brief README.md       # the same with the accuracies only
    python examples/paper/tables.py RESULTS.jsonl --figures DIR           # convnet_cifar10_figure5.png and so on
    python examples/paper/tables.py RESULTS.jsonl --speedups FILE --collapses FILE  # of speedup.py and collapse.py

A cell has the mean of its runs, which differ in their seeds, the sample standard deviation and the number of runs;
below is the paper's value, if there is one, and in brackets the difference of ours to it, in bold from one percentage
point on. Times are means over all sparsities.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import figures
import published
import results
from results import CONTROLS, EXPERIMENTS, METHODS, Collapse, Key, Run, Speedup, Summary
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

MARKS = (b"<!-- tables.py begins -->", b"<!-- tables.py ends -->")
MAIN = ("dense", "magnitude", "snip", "synflow", "drive", "gradual_exponential", "imp")
BOLD = re.compile(r"\*\*(.+?)\*\*")


@dataclass(frozen=True)
class Ablation:
    """A table of variants: its title, the methods that are its rows, and the one that all are compared with.

    It is made if there are runs of one of the ``variants``, which are among the rows.
    """

    title: str
    rows: Sequence[str]
    base: str
    variants: Sequence[str]


ABLATIONS = (
    Ablation(
        "what DRIVE's parts do",
        ("snip", "iterative_snip", "warmup_snip", "synflow", "warmup_synflow", "drive", "drive_long", "imp"),
        "drive",
        ("iterative_snip", "warmup_snip", "warmup_synflow", "drive_long"),
    ),
    Ablation(
        "criteria, schedules and windows of gradual pruning",
        (
            "drive",
            "gradual",
            "gradual_exponential",
            "gradual_exponential_half",
            "gradual_exponential_late",
            "gradual_drive",
            "gradual_drive_exponential",
        ),
        "drive",
        ("gradual", "gradual_exponential_half", "gradual_exponential_late", "gradual_drive"),
    ),
    Ablation(
        "as many epochs in all as IMP",
        ("drive_long", "gradual_long", "gradual_exponential_long", "imp"),
        "imp",
        ("drive_long", "gradual_long", "gradual_exponential_long"),
    ),
)


@dataclass(frozen=True)
class Table:
    """A table for the terminal or for Markdown. A cell may have several lines, with ``**bold**`` parts."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: Sequence[str]

    def print(self) -> None:
        console = Console(width=None if sys.stdout.isatty() else 200)  # files and pipes need no breaks
        table = RichTable(box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False, show_lines=True)
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*(BOLD.sub(r"[bold]\1[/bold]", cell) for cell in row))
        console.print(self.title, style="bold", highlight=False)
        console.print(table)
        for line in self.caption:
            console.print(line, markup=False, highlight=False)
        console.print()

    def markdown(self) -> str:
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line).replace("\n", "<br>") + " |" for line in lines)
        return "\n\n".join((f"**{self.title}**", table, *self.caption))


def all_tables(runs: Sequence[Run], brief: bool = False) -> list[Table]:
    tables = []
    for experiment in EXPERIMENTS.of(run.experiment for run in runs):
        own = [run for run in runs if run.experiment == experiment]
        main = [run for run in own if is_main(run.method) and run.control == "none"]
        if main:
            tables.append(accuracy_table(experiment, main))
        if brief:
            continue
        if main:
            tables.append(time_table(experiment, main))
        if any(run.control != "none" for run in own):
            tables.append(control_table(experiment, own))
        for ablation in ABLATIONS:
            if any(run.method in ablation.variants for run in own):
                tables.append(ablation_table(experiment, own, ablation))
    return tables


def is_main(method: str) -> bool:
    """Whether a method is in the first table: the paper's, and everybody's own."""
    return method in MAIN or method not in METHODS


def accuracy_table(experiment: str, runs: Sequence[Run]) -> Table:
    summaries = results.accuracies(runs)
    paper = published.ACCURACIES.get(experiment, {})
    columns = sparsities(runs)
    rows = []
    for method in [*MAIN[1:], *(method for method in METHODS.of(run.method for run in runs) if method not in METHODS)]:
        ours = [summaries.get((method, "none", sparsity)) for sparsity in columns]
        theirs = [paper.get(method, {}).get(sparsity) for sparsity in columns]
        if any(ours) or any(theirs):
            rows.append([METHODS[method], *map(beside_paper, ours, theirs)])
    dense = beside_paper(summaries.get(("dense", "none", 0.0)), published.UNPRUNED.get(experiment))
    caption = [f"Dense: {dense}".replace("\n", "; "), *measured_on(runs), *warned(runs)]
    number = 2 if experiment == "resnet18_imagenet32" else 1
    title = f"Table {number}. {EXPERIMENTS[experiment]}: test accuracy in % at a sparsity of"
    return Table(title, ["method", *map(percent, columns)], rows, caption)


def time_table(experiment: str, all_runs: Sequence[Run]) -> Table:
    runs = results.timed_together(all_runs)
    to_masks = results.seconds(runs, lambda run: run.seconds_to_masks)
    training = results.seconds(runs, lambda run: run.seconds["training"])
    total = results.seconds(runs, lambda run: run.total_seconds)
    ours = {method: summary.mean for method, summary in to_masks.items()}
    theirs = published.PRUNING_SECONDS.get(experiment, {})
    headings = ["method", "runs", "epochs in all", "time to masks", "training", "total", "masks faster than IMP's"]
    if theirs:
        headings += [f"paper, {published.PRUNING_HARDWARE}: time to masks", "paper: faster than IMP's"]
    rows = []
    for method, summary in total.items():
        epochs = results.listed(f"{run.total_epochs:,}" for run in runs if run.method == method)
        times = [duration(to_masks[method]), duration(training[method]), duration(summary)]
        rows.append([METHODS[method], str(summary.count), epochs, *times, speed_up(ours, method)])
        if theirs:
            rows[-1] += [f"{theirs[method]:,} s" if method in theirs else "-", speed_up(theirs, method)]
    title = f"{EXPERIMENTS[experiment]}: time to masks (warm-up and pruning, in IMP all cycles) and in all"
    elsewhere = dict.fromkeys(METHODS[run.method] for run in all_runs if run not in runs)
    note = f"Not timed with these, but on another machine or with other versions: {', '.join(elsewhere)}."
    return Table(title, headings, rows, [*measured_on(runs), *([note] if elsewhere else [])])


def control_table(experiment: str, runs: Sequence[Run]) -> Table:
    controlled = {(run.method, run.sparsity) for run in runs if run.control != "none"}
    chosen = [run for run in runs if (run.method, run.sparsity) in controlled]
    summaries = results.accuracies(chosen)
    rows = []
    for method in METHODS.of(run.method for run in chosen):
        for sparsity in sparsities(chosen):
            if (method, sparsity) in controlled:
                cells = [summaries.get((method, control, sparsity)) for control in CONTROLS]
                rows.append([f"{METHODS[method]}, {percent(sparsity)}", *(compared(cell, cells[0]) for cell in cells)])
    title = f"{EXPERIMENTS[experiment]}: test accuracy in % with its masks, with shuffled ones, and from new weights"
    note = "In brackets: difference to the masks and weights as they are (none), in percentage points."
    return Table(title, ["method", *CONTROLS], rows, [note, *measured_on(chosen)])


def ablation_table(experiment: str, runs: Sequence[Run], ablation: Ablation) -> Table:
    chosen = [run for run in runs if run.method in ablation.rows and run.control == "none"]
    summaries = results.accuracies(chosen)
    columns = sparsities(chosen)
    base = [summaries.get((ablation.base, "none", sparsity)) for sparsity in columns]
    rows = []
    for method in ablation.rows:
        if any(run.method == method for run in chosen):
            ours = [summaries.get((method, "none", sparsity)) for sparsity in columns]
            rows.append([METHODS[method], *map(compared, ours, base)])
    title = f"{EXPERIMENTS[experiment]}: {ablation.title}, by test accuracy in % at a sparsity of"
    note = f"In brackets: difference to {METHODS[ablation.base]}, in percentage points."
    return Table(title, ["method", *map(percent, columns)], rows, [note, *measured_on(chosen)])


def speedup_table(speedups: Sequence[Speedup]) -> Table:
    headings = [
        "experiment",
        "steps per epoch",
        "step",
        "round",
        "cut",
        "DRIVE",
        "IMP",
        "speed-up",
        "limit",
        "share",
        "paper",
    ]
    rows = []
    for speedup in speedups:
        paper = published.PRUNING_SECONDS.get(speedup.experiment, {})
        measured = (speedup.seconds_per_step, speedup.seconds_per_round, speedup.seconds_per_cut)
        rows.append(
            [
                EXPERIMENTS[speedup.experiment],
                f"{speedup.steps_per_epoch:,}",
                *(results.duration(seconds) for seconds in measured),
                *(f"{seconds / 3600:,.1f} h" for seconds in (speedup.drive, speedup.imp)),
                f"{speedup.imp / speedup.drive:.0f}x",
                f"{speedup.limit:.0f}x",
                f"{speedup.imp / speedup.drive / speedup.limit:.1%}",
                speed_up({method: float(seconds) for method, seconds in paper.items()}, "drive"),
            ]
        )
    timed = f"{results.listed(speedup.timed_steps for speedup in speedups)} steps, "
    timed += f"{results.listed(speedup.timed_rounds for speedup in speedups)} rounds and a cut"
    caption = [
        f"Timed: {timed}; the rest is multiplied out, with the paper's epochs and 100 rounds. The limit is IMP's time"
        " over DRIVE's if a round cost a step and all else nothing.",
        measured_with(speedups),
    ]
    return Table("Time to masks under the paper's protocol, DRIVE against IMP", headings, rows, caption)


def collapse_table(collapses: Sequence[Collapse]) -> Table:
    """Return the numbers of networks without a path from input to output, whose answer is always the same."""
    columns = sorted({collapse.sparsity for collapse in collapses})
    groups: dict[tuple[str, str], dict[float, list[Collapse]]] = {}
    for collapse in collapses:
        groups.setdefault((collapse.experiment, collapse.method), {}).setdefault(collapse.sparsity, []).append(collapse)
    rows = [
        [f"{EXPERIMENTS[experiment]}: {method}", *(collapsed(own.get(sparsity, ())) for sparsity in columns)]
        for (experiment, method), own in groups.items()
    ]
    note = "In brackets: their sparsity when what is kept but on no such path is counted as removed, lowest to highest."
    seeds = ", ".join(map(str, sorted({collapse.seed for collapse in collapses})))
    title = "Networks cut off from input to output before training, at a sparsity of"
    return Table(title, ["method", *map(percent, columns)], rows, [note, f"Seeds {seeds}. {measured_with(collapses)}"])


def collapsed(collapses: Sequence[Collapse]) -> str:
    if not collapses:
        return "not run"
    effective = [collapse.effective_sparsity for collapse in collapses if collapse.effective_sparsity is not None]
    spread = f" ({min(effective):.2%} to {max(effective):.2%})" if effective else ""
    return f"{sum(collapse.is_cut_off for collapse in collapses)} of {len(collapses)}{spread}"


def measured_with(lines: Sequence[Speedup | Collapse]) -> str:
    versions = results.listed(", ".join(f"{name} {number}" for name, number in line.versions.items()) for line in lines)
    parts = (
        results.listed(line.data for line in lines),
        f"batches of {results.listed(line.batch_size for line in lines)}",
        *(results.listed(line.hardware for line in lines), versions, results.listed(line.date for line in lines)),
        f"revision {results.listed(line.revision for line in lines)}",
    )
    return f"Measured on {'; '.join(parts)}."


def sparsities(runs: Iterable[Run]) -> list[float]:
    return sorted({run.sparsity for run in runs if run.sparsity})


def percent(fraction: float) -> str:
    return f"{100 * fraction:.10g}%"


def shown(summary: Summary) -> str:
    spread = "" if summary.deviation is None else f" ± {summary.deviation:.2f}"
    return f"{summary.mean:.2f}{spread} (n={summary.count})"


def difference(points: float) -> str:
    text = f"({points:+.2f})"
    return f"**{text}**" if abs(round(points, 2)) >= 1 else text


def beside_paper(ours: Summary | None, theirs: float | None) -> str:
    lines = [shown(ours) if ours else "not run"]
    if theirs is not None:
        lines.append(f"paper {theirs:.2f}" + (f" {difference(ours.mean - theirs)}" if ours else ""))
    return "\n".join(lines)


def compared(ours: Summary | None, base: Summary | None) -> str:
    if ours is None:
        return "not run"
    if base is None or ours is base:
        return shown(ours)
    return f"{shown(ours)}\n{difference(ours.mean - base.mean)}"


def duration(summary: Summary) -> str:
    return results.duration(summary.mean, summary.deviation) if summary.mean else "-"


def speed_up(seconds: Mapping[str, float], method: str) -> str:
    """Return how many times faster than IMP a method finds its masks."""
    if method == "imp" or "imp" not in seconds or not seconds.get(method):
        return "-"
    factor = seconds["imp"] / seconds[method]
    return f"{factor:,.1f}x" if factor < 10 else f"{factor:,.0f}x"


def measured_on(runs: Sequence[Run]) -> list[str]:
    """Return in a line the data, settings and circumstances of the runs, with all values where they differ."""
    seeds = sorted({run.seed for run in runs})
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for library, version in run.versions.items():
            versions.setdefault(library, {})[version] = None
    parts = (
        results.listed(
            f"{run.data}, {run.train_images:,} images to train on and {run.test_images:,} to test on" for run in runs
        ),
        f"batches of {results.listed(run.batch_size for run in runs)}",
        f"{results.listed(run.epochs for run in runs)} epochs",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        results.listed(run.hardware for run in runs),
        ", ".join(f"{library} {results.listed(numbers)}" for library, numbers in versions.items()),
        results.listed(sorted(run.date for run in runs)),
        f"revision {results.listed(run.revision for run in runs)}",
    )
    return [f"Measured on {'; '.join((*parts, *changed(runs)))}."]


def changed(runs: Sequence[Run]) -> list[str]:
    """Return what the command line changed in the configuration, except for the place of the data."""
    counts = Counter(argument for run in runs for argument in run.overrides if not argument.startswith("--data.root="))
    parts = (
        f"`{argument}`" + (f" in {count} of {len(runs)} runs" if count < len(runs) else "")
        for argument, count in counts.items()
    )
    return [f"with {', '.join(parts)}"] if counts else []


def warned(runs: Sequence[Run]) -> list[str]:
    """Return in a line the runs with warnings, such as one about a layer without any weights left."""
    counts = Counter(f"{METHODS[run.method]} at {percent(run.sparsity)}" for run in runs if run.warnings)
    return (
        [f"Runs that gave warnings: {', '.join(f'{which} ({count})' for which, count in counts.items())}."]
        if counts
        else []
    )


def write_markdown(path: Path, tables: Sequence[Table]) -> None:
    """Replace the text between the marks of a file, and no other byte."""
    text = path.read_bytes()
    begins, ends = (text.find(mark) for mark in MARKS)
    if [text.count(mark) for mark in MARKS] != [1, 1] or begins > ends:
        sys.exit(f"{path} must have {MARKS[0].decode()} and below it {MARKS[1].decode()}, each once.")
    body = "\n\n".join(table.markdown() for table in tables)
    path.write_bytes(text[: begins + len(MARKS[0])] + f"\n\n{body}\n\n".encode() + text[ends:])


def read_runs(paths: Sequence[Path]) -> list[Run]:
    try:
        runs = results.read(paths, Run)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if not runs:
        sys.exit(f"There is no finished run in {', '.join(map(str, paths))}.")
    if twice := results.duplicates(runs):
        sys.exit(f"The same run must not be there twice, delete all but one: {'; '.join(map(name, twice))}.")
    if unlike := mixtures(runs):
        sys.exit(f"Seeds of one cell must have the same data, batch size and epochs: {'; '.join(map(name, unlike))}.")
    return runs


def mixtures(runs: Sequence[Run]) -> list[Key]:
    """Return the runs that differ from the first one of their cell in more than the seed."""
    first: dict[tuple[object, ...], tuple[object, ...]] = {}
    unlike = []
    for run in runs:
        sizes = (run.train_images, run.test_images, run.batch_size, run.epochs, run.total_epochs)
        if first.setdefault(run.key[:-1], (run.data, *sizes)) != (run.data, *sizes):
            unlike.append(run.key)
    return unlike


def name(key: Key) -> str:
    experiment, method, control, sparsity, seed = key
    return f"{experiment}, {method}, control {control}, sparsity {sparsity:g}, seed {seed}"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print tables of finished runs with the paper's values.")
    add = parser.add_argument
    add("results", metavar="RESULTS", type=Path, nargs="+", help="file with a JSON line for every run")
    add("--speedups", metavar="FILE", type=Path, help="results of speedup.py")
    add("--collapses", metavar="FILE", type=Path, help="results of collapse.py")
    add("--markdown", metavar="FILE", type=Path, help="write the tables between the marks in this file, too")
    add("--brief", metavar="FILE", type=Path, help="write the tables of accuracies between the marks in this file, too")
    add("--figures", metavar="DIR", type=Path, help="folder for the figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    runs = read_runs(options.results)
    tables = all_tables(runs)
    try:
        if options.speedups:
            tables.append(speedup_table(results.read([options.speedups], Speedup)))
        if options.collapses:
            tables.append(collapse_table(results.read([options.collapses], Collapse)))
        if options.markdown:
            write_markdown(options.markdown, tables)
        if options.brief:
            write_markdown(options.brief, all_tables(runs, brief=True))
        drawn = figures.save_all(runs, options.figures) if options.figures else []
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for table in tables:
        table.print()
    for path in drawn:
        print(path)


if __name__ == "__main__":
    main()
