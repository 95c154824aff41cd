"""Real work, measured: `python -m benchmarks NAME [--data DIR] [--quick] [--out DIR]`.

Each benchmark is one module with `run(data, quick, cache)`, which gives results as plain data, and `table(results)`.
Long stages are cached and go on where they were interrupted.
"""
