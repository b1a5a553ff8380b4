"""Measurements: `python -m benchmarks.NAME [--quick]` runs both sides and prints last one JSON object (or a list).

    {"what", "ours", "theirs", "unit", "ratio", "hardware", "checked"}

Results that the documents quote lie in `benchmarks/results/`, with hardware, date and command.
"""
