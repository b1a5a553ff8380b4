"""The sections of `benchmarks.train_step`."""
