"""The command line and what it runs: data, models, tasks, runs, the report."""
