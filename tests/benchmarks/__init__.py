"""Benchmarks. Every module here exposes ``run() -> dict``; ``python -m tests.benchmarks`` runs them."""
