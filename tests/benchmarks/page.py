"""Write the tables of `docs/performance.md` and `docs/accelerate.md` from the results of the benchmarks.

python -m pytest tests/benchmarks -n 0 --benchmark-json docs/benchmarks.json   # measures, and writes both pages
python tests/benchmarks/page.py part.json                                      # replaces results by those of a part
python tests/benchmarks/page.py                                                # only writes the pages again
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks.json"
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "accelerate.md")
MARKS = "<!-- benchmarks: {} begins -->", "<!-- benchmarks: {} ends -->"
NOT_MEASURED = "Not measured yet."
"""What stands in a place that may wait for its results."""
UNITS = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))}


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was measured, of ours and of its peers, and what it should come to.

    Args:
        group: The table that it belongs to.
        case: What was measured.
        unit: Of the measurements: ``"s"``, ``"bytes"`` or another.
        ours: Our measurements.
        peers: Name of a peer to its measurements, taken in turn with ours; the first is the one that the goal is about.
        goal: The most that ours may be of the first peer; ``None``: no goal was set.
        note: What a reader has to know.
        column: Its column in a table of speeds, such as the sparsity; empty: it has a line in a table of ratios.

    """

    group: str
    case: str
    unit: str
    ours: list[float]
    peers: dict[str, list[float]]
    goal: float | None = None
    note: str = ""
    column: str = ""

    def ratios(self, peer: str) -> list[float]:
        """Return ours divided by a peer's, pair by pair."""
        return [own / other for own, other in zip(self.ours, self.peers[peer], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "lightning", "numpy", "lightning-drive")
    return {"python": sys.version.split()[0], **{name.replace("-", "_"): version(name) for name in names}}


def write(results: Mapping[str, Any], pages: Sequence[Path] = PAGES) -> None:
    """Replace every marked part of the pages."""
    texts = [page.read_text(encoding="utf-8") for page in pages]
    for page, text in zip(pages, filled(texts, results), strict=True):
        page.write_text(text, encoding="utf-8")


def filled(texts: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    """Return the texts of the pages with the tables of these results.

    Raises:
        ValueError: If a group of figures has no place on the pages, a place that had figures has none, or the results
            of a group are from different machines or versions.

    """
    figures = figures_of(results)
    parts = {group: part([figure for figure in figures if figure.group == group]) for group in groups(figures)}
    parts["paper"] = on_paper()
    places = [_places(text, parts) for text in texts]
    expected = sorted(place for on_page in places for place in on_page)
    if expected != sorted(parts):
        raise ValueError(f"The pages have places for {expected}, but there are results for {sorted(parts)}.")
    return [
        _filled(text, {place: parts[place] for place in on_page} | {"machine": machine(results, on_page)})
        for text, on_page in zip(texts, places, strict=True)
    ]


def _places(text: str, measured: Iterable[str]) -> list[str]:
    """Return the groups that a page has places for, without those that still wait for their results."""
    places = re.findall(re.escape(MARKS[0]).replace(r"\{\}", "(.+?)"), text)
    waiting = [place for place in places if place not in measured and _between(text, place).strip() == NOT_MEASURED]
    return [place for place in places if place != "machine" and place not in waiting]


def _between(text: str, place: str) -> str:
    begins, ends = (mark.format(place) for mark in MARKS)
    return text.partition(begins)[2].partition(ends)[0]


def _filled(text: str, parts: Mapping[str, str]) -> str:
    for place, part in parts.items():
        begins, ends = (mark.format(place) for mark in MARKS)
        before, rest = text.split(begins)
        text = f"{before}{begins}\n\n{part}\n\n{ends}{rest.split(ends)[1]}"
    return text


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    names = {field.name for field in fields(Figure)}
    extras = (result["extra_info"] for result in results["benchmarks"])
    return [Figure(**{name: value for name, value in extra.items() if name in names}) for extra in extras]


def groups(figures: list[Figure]) -> list[str]:
    return unique(figure.group for figure in figures)


def machine(results: Mapping[str, Any], on_page: Iterable[str]) -> str:
    """Return where and when the groups on a page were measured, with the groups where there are several machines.

    Raises:
        ValueError: If the results of a group are from different machines or versions.

    """
    infos = [result["extra_info"] for result in results["benchmarks"] if result["extra_info"]["group"] in {*on_page}]
    on_machine: dict[str, list[Any]] = {}
    for info in infos:
        on_machine.setdefault(info.get("machine", described(results["machine_info"])), []).append(info)
    mixed = [
        group for group, times in Counter(g for own in on_machine.values() for g in _groups(own)).items() if times > 1
    ]
    if mixed:
        raise ValueError(
            f"Results of different machines or versions do not go in one table ({', '.join(mixed)}):"
            f" {' | '.join(sorted(on_machine))}."
        )
    lines = []
    for name, own in on_machine.items():
        taken = sorted({(info["date"], info["revision"]) for info in own})
        of = f" ({', '.join(_groups(own))})" if len(on_machine) > 1 else ""
        dates = ", ".join(f"{date} (revision {revision})" for date, revision in taken)
        lines.append(f"Measured on {name}{of}; {dates}.")
    return "\n\n".join(lines) or NOT_MEASURED


def _groups(infos: Iterable[Mapping[str, Any]]) -> list[str]:
    return unique(info["group"] for info in infos)


def described(info: Mapping[str, Any]) -> str:
    """Describe the machine and the versions that results come from."""
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    cpu = f"{info['cpu']['brand_raw']} (family {info['cpu'].get('family')}, model {info['cpu'].get('model')})"
    threads = f"{info['threads']} thread{'s' if info['threads'] > 1 else ''}"
    return f"{cpu}, {threads}, {info['system']} {info['release']}; {versions}"


def stamp(results: Mapping[str, Any]) -> None:
    """Note with every result when and where it was taken, and of what."""
    commit = results["commit_info"]
    revision = commit["id"][:8] + (" and changes" if commit.get("dirty") else "")
    for result in results["benchmarks"]:
        result["extra_info"] |= {
            "date": results["datetime"][:10],
            "revision": revision,
            "machine": described(results["machine_info"]),
        }


def part(figures: list[Figure]) -> str:
    """Return the table of a group: of ratios, or of speeds if its figures have columns."""
    return speeds(figures) if any(figure.column for figure in figures) else table(figures)


def table(figures: list[Figure]) -> str:
    rows = ["| | ours | | of | goal | |", "| --- | ---: | ---: | --- | ---: | --- |"]
    for figure in figures:
        for place, peer in enumerate(figure.peers):
            first = place == 0
            cells = [
                figure.case if first else "",
                amount(median(figure.ours), figure.unit) if first else "",
                f"{bold(ratio(figure, peer), first)}",
                f"{peer} ({amount(median(figure.peers[peer]), figure.unit)})",
                goal(figure) if first else "",
                figure.note if first else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def speeds(figures: list[Figure]) -> str:
    """Return how many times as fast ours is: as the first peer in each column, and in each cell as the other peers."""
    first = next(iter(figures[0].peers))
    columns = unique(figure.column for figure in figures)
    tables = [
        [f"| times as fast as {first} | its time | {' | '.join(columns)} |", f"| --- |{' ---: |' * (1 + len(columns))}"]
    ]
    for case in unique(figure.case for figure in figures):
        row = {figure.column: figure for figure in figures if figure.case == case}
        seconds = median(second for figure in row.values() for second in figure.peers[first])
        cells = [speed_and_goal(row[column], first) if column in row else "" for column in columns]
        tables[0].append(f"| {case} | {amount(seconds, 's')} | {' | '.join(cells)} |")
    peers = unique(peer for figure in figures for peer in figure.peers if peer != first)
    if peers:
        tables.append([f"| times as fast as | {' | '.join(peers)} |", f"| --- |{' ---: |' * len(peers)}"])
        for figure in figures:
            cells = [f"{speed(figure, peer):.2f}" if peer in figure.peers else "" for peer in peers]
            if any(cells):
                tables[1].append(f"| {figure.case}, {figure.column} | {' | '.join(cells)} |")
    notes = [figure.note for figure in figures if figure.note]
    return "\n\n".join(["\n".join(rows) for rows in tables] + unique(notes))


def speed(figure: Figure, peer: str) -> float:
    """Return how many times as fast as a peer ours is."""
    return 1 / median(figure.ratios(peer))


def speed_and_goal(figure: Figure, peer: str) -> str:
    """Return the speed, and the goal if there is one."""
    text = f"**{speed(figure, peer):.2f}**"
    if figure.goal is None:
        return text
    return f"{text} ({1 / figure.goal:.1f} {goal(figure).partition(' ')[2]})"


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def on_paper() -> str:
    """Work out what a round sends where weights are sharded over many ranks."""
    rows = [
        "| weights | ranks | weights per rank | histograms per round | sent by each rank | time on the network |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    histograms, per_histogram = 2, 8 * 2**16
    for weights, ranks in ((1e9, 8), (7e9, 64), (70e9, 512)):
        sent = histograms * 2 * (ranks - 1) / ranks * per_histogram  # a ring passes everything around twice
        seconds = sent / 12.5e9 + histograms * 2 * (ranks - 1) * 10e-6
        cells = (
            f"{weights:.0e}".replace("e+0", "e").replace("e+", "e"),
            f"{ranks}",
            f"{weights / ranks / 1e6:.0f} M",
            amount(histograms * per_histogram, "bytes"),
            amount(sent, "bytes"),
            amount(seconds, "s"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def goal(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    met = median(figure.ratios(next(iter(figure.peers)))) <= figure.goal
    return f"{figure.goal:.2f} {'met' if met else '**missed**'}"


def ratio(figure: Figure, peer: str) -> str:
    """Return the median ratio, and where there are several, the range of the middle half."""
    ratios = sorted(figure.ratios(peer))
    if len(ratios) < 3:
        return f"{median(ratios):.2f}"
    quarter = len(ratios) // 4
    return f"{median(ratios):.2f} ({ratios[quarter]:.2f}-{ratios[-1 - quarter]:.2f})"


def bold(text: str, is_bold: bool) -> str:
    head, _, tail = text.partition(" ")
    return f"**{head}** {tail}".rstrip() if is_bold else text


def amount(value: float, unit: str) -> str:
    if unit not in UNITS:
        return f"{value:.2f} {unit}"
    for size, name in UNITS[unit]:
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} {unit}"


def sentence(figure: Figure) -> str:
    peers = "; ".join(f"{ratio(figure, peer)} of {peer}" for peer in figure.peers)
    case = f"{figure.case}, {figure.column}" if figure.column else figure.case
    return f"{case}: {amount(median(figure.ours), figure.unit)}, {peers} {goal(figure)}"


def merged(results: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Replace those results that were taken again; each keeps its revision, its date and its machine."""
    for result in results["benchmarks"]:
        result["extra_info"].setdefault("machine", described(results["machine_info"]))
    again = {benchmark["fullname"]: benchmark for benchmark in part["benchmarks"]}
    return {
        **results,
        "benchmarks": [again.pop(result["fullname"], result) for result in results["benchmarks"]] + [*again.values()],
    }


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for path in sys.argv[1:]:
        results = merged(results, json.loads(Path(path).read_text(encoding="utf-8")))
    write(results)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
