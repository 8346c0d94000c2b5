"""What a model can do: suites of questions, answers judged by verifiers or by log-probability, numbers with their standard errors."""
