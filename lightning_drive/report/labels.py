"""What the report calls the phases of a pruning, and the controls."""

PHASES = {
    "warmup": "warmup",  # training before the cut
    "training": "training",  # the same, of one IMP cycle
    "rounds": "rounds",
    "measuring": "measuring",  # of paths and multiply-adds
    "batch_norm": "BatchNorm",  # estimating its statistics again
    "commit": "putting masks on",
}
"""The keys of ``PruningReport.phases``, in the order in which they happen, to words."""

CONTROLS = {
    "shuffle": "the masks were shuffled within each parameter",
    "reinit": "the survivors were re-initialised",
}
"""The values of ``control`` that change something, to what they change."""
