"""What the benchmarks share: sides that take turns, a table, and random models of a chosen size."""
