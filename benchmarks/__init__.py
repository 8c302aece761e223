"""Speed and memory beside peers, in one process run, with the results checked equal: `python -m benchmarks.<name>`."""
