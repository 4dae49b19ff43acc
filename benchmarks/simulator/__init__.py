"""All policies in the simulator, over the loads and traces of the comparison: `python -m benchmarks.simulator`."""
