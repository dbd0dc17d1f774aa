"""Make the tables of `docs/performance.md` from the results of the benchmarks.

python -m pytest tests/benchmarks -n 0 --benchmark-json docs/benchmarks.json   # measures, and writes the page
python tests/benchmarks/page.py                                                # only writes the page again
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "performance.md"
MARKS = "<!-- benchmarks: {} begins -->", "<!-- benchmarks: {} ends -->"
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

    """

    group: str
    case: str
    unit: str
    ours: list[float]
    peers: dict[str, list[float]]
    goal: float | None = None
    note: str = ""

    def ratios(self, peer: str) -> list[float]:
        """Return ours divided by a peer's, pair by pair."""
        return [own / other for own, other in zip(self.ours, self.peers[peer], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "lightning", "numpy", "lightning-drive")
    return {"python": sys.version.split()[0], **{name.replace("-", "_"): version(name) for name in names}}


def write(results: Mapping[str, Any], page: Path = PAGE) -> None:
    """Replace every marked part of the page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")


def filled(text: str, results: Mapping[str, Any]) -> str:
    """Return the page's text with the tables of these results.

    Raises:
        ValueError: If a group of figures has no place on the page, or a place has no figures.

    """
    figures = figures_of(results)
    parts = {group: table([figure for figure in figures if figure.group == group]) for group in groups(figures)}
    parts |= {"machine": machine(results), "paper": on_paper()}
    places = re.findall(re.escape(MARKS[0]).replace(r"\{\}", r"(\w+)"), text)
    if sorted(places) != sorted(parts):
        raise ValueError(f"The page has places for {sorted(places)}, but there are results for {sorted(parts)}.")
    for group, part in parts.items():
        begins, ends = (mark.format(group) for mark in MARKS)
        before, rest = text.split(begins)
        text = f"{before}{begins}\n\n{part}\n\n{ends}{rest.split(ends)[1]}"
    return text


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    names = {field.name for field in fields(Figure)}
    extras = (result["extra_info"] for result in results["benchmarks"])
    return [Figure(**{name: value for name, value in extra.items() if name in names}) for extra in extras]


def groups(figures: list[Figure]) -> list[str]:
    return list(dict.fromkeys(figure.group for figure in figures))


def machine(results: Mapping[str, Any]) -> str:
    info = results["machine_info"]
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    taken = sorted({(info["date"], info["revision"]) for info in infos})
    return (
        f"Measured on {info['cpu']['brand_raw']}, {info['threads']} threads, {info['system']} {info['release']};"
        f" {versions}; {', '.join(f'{date} (revision {revision})' for date, revision in taken)}."
    )


def stamp(results: Mapping[str, Any]) -> None:
    """Note with every result when it was taken, and of what."""
    commit = results["commit_info"]
    revision = commit["id"][:8] + (" and changes" if commit.get("dirty") else "")
    for result in results["benchmarks"]:
        result["extra_info"] |= {"date": results["datetime"][:10], "revision": revision}


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
    return f"{figure.case}: {amount(median(figure.ours), figure.unit)}, {peers} {goal(figure)}"


def merged(results: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Replace those results that were taken again; every result knows its revision and date.

    Raises:
        ValueError: If the part is from another machine or of other versions.

    """
    for key in ("cpu", "threads", "versions"):
        if results["machine_info"][key] != part["machine_info"][key]:
            raise ValueError(f"Results of different machines or versions do not go together: {key} differs.")
    again = {benchmark["fullname"]: benchmark for benchmark in part["benchmarks"]}
    return {
        **results,
        "benchmarks": [again.pop(result["fullname"], result) for result in results["benchmarks"]] + [*again.values()],
    }


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for path in sys.argv[1:]:
        results = merged(results, json.loads(Path(path).read_text(encoding="utf-8")))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(results)


if __name__ == "__main__":
    main()
