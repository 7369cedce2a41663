"""The science on top of a trace: how much is shared, how recall works, and the paper's claims.

One file an analysis. Each takes models, examples and sets, and returns rows; none reads or writes a run."""
