r"""Find which methods cut a network off at initialisation: no path is left from its input to its output.

    python examples/paper/collapse.py --experiments vgg16_cifar10 --results collapse.jsonl -- --data.root=DIR

Such a network returns the same answer for every image, and training cannot change that: its accuracy is that of chance.
Nothing is trained here; a seed sets the initial weights and the batches that a method reads. Arguments after `--` are
passed to every run, as to `main.py`. "Effective sparsity" counts kept weights on no such path as removed.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import results
from protocol import one_line_errors
from results import Collapse
from run import Wanted, be_quiet, build, circumstances, divided, kept

METHODS = {  # name to the method's file and further arguments
    "SNIP": ("snip", []),
    "SNIP, BatchNorm by running statistics": ("snip", ["--pruning.mode=eval"]),
    "iterative SNIP, 20 rounds": ("iterative_snip", ["--pruning.rounds=20"]),
    "SynFlow": ("synflow", []),
    "Magnitude": ("magnitude", []),
}


def prune(experiment: str, method: str, sparsity: float, seed: int, overrides: Sequence[str]) -> Collapse:
    """Prune before the first training step, and stop after it."""
    name, more = METHODS[method]
    cli = build(Wanted(experiment, name, "none", sparsity, seed), [*overrides, *more, "--trainer.max_steps=1"])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    report = cli.config_init.pruning.report
    return Collapse(
        experiment=experiment,
        method=method,
        sparsity=sparsity,
        seed=seed,
        data=cli.datamodule.name,
        batch_size=cli.datamodule.batch_size,
        num_kept=report.num_kept,
        effective_sparsity=report.effective_sparsity,
        empty_layers=[layer.name for layer in report.layers if not layer.num_kept],
        overrides=kept(overrides),
        **circumstances(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    own, overrides = divided(argv)
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--experiments", metavar="NAME", nargs="+", required=True, help="as for `main.py`")
    add("--methods", metavar="NAME", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    add("--sparsities", metavar="S", nargs="+", type=float, default=[0.95, 0.98, 0.993], help="fractions to remove")
    add("--seeds", metavar="N", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--results", metavar="FILE", type=Path, required=True, help="file to append a line to for each network")
    options = parser.parse_args(own)
    be_quiet()
    with one_line_errors():
        for network in product(options.experiments, options.methods, options.sparsities, options.seeds):
            collapse = prune(*network, overrides)
            results.append(options.results, collapse)
            state = "cut off" if collapse.is_cut_off else f"effective sparsity {collapse.effective_sparsity}"
            print("{}, {}, {:.1%}, seed {}:".format(*network), state, flush=True)


if __name__ == "__main__":
    main()
