"""Benchmarks, run as `python -m tsconv.bench.NAME`. Every number they print was measured in that run."""
