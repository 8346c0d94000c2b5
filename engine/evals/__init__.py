"""Evaluation: benchmark suites, answers scored by verifiers or log-probabilities, and metrics with standard errors."""
