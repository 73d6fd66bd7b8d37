"""
Runs side by side: several algorithms and seeds on a task, on this machine or on a Dask cluster, with one figure and one table.

``sb3-algd compare`` is :mod:`sb3_algd.compare.__main__`; the benchmarks are made of the same parts.
"""
