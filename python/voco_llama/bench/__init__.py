"""What benchmarks are made of: timing in turns, files of results, the paper's table 7, and reports."""
