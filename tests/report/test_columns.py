"""The table has the columns for which the report has numbers, worked out by hand."""

from reports import full_report, small_report


def test_str() -> None:
    """Worked out by hand."""
    assert str(small_report(warnings=["Layer collapse: no weight is left in 'fc.weight'."])).splitlines() == [
        "Pruned by DRIVE(rounds=100) in epoch 5, before step 1955 (12.3 s)",
        "parameter    shape    weights  kept  density  active",
        "conv.weight  8x4x3x3      288    36   12.50%  66.67%",
        "fc.weight    10x130     1,300     0    0.00%       -",
        "all                     1,588    36    2.27%  66.67%",
        "sparsity 97.73%, effective sparsity 98.49% (active: kept and on a path from input to output)",
        "! Layer collapse: no weight is left in 'fc.weight'.",
    ]


def test_str__costs() -> None:
    """Worked out by hand."""
    assert str(full_report(control="shuffle", cycle=2)).splitlines() == [
        "Pruned by DRIVE(rounds=100), cycle 2, in epoch 5, before step 1955 (12.3 s)",
        "control: the masks were shuffled within each parameter",
        "parameter    shape    weights  kept  density  active   MACs  non-zero MACs",
        "conv.weight  8x4x3x3      288    36   12.50%  66.67%  18.4k           2.3k",
        "fc.weight    10x130     1,300     0    0.00%       -   1.3k              0",
        "all                     1,588    36    2.27%  66.67%  19.7k           2.3k",
        "sparsity 97.73%, effective sparsity 98.49% (active: kept and on a path from input to output)",
        "multiply-adds of one sample (MACs; one is 2 FLOPs): 19.7k dense, 2.3k by non-zero weights, and 2k without"
        " prunable weights",
        "prunable weights: 3.75kB dense, as in memory; 343B if only the non-zero ones and a mask of 1 bit per"
        " weight are stored",
        "seconds: warmup 83.1, rounds 12.0, BatchNorm 0.3",
        "! Layer collapse: no weight is left in 'fc.weight'.",
    ]
