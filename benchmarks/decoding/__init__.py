"""Sections of `benchmarks.generation`: `workload` (what all of them decode, and the roof), `ours`, `compiled` and `library`
(what others do), `kernels` (where a token's time goes)."""
