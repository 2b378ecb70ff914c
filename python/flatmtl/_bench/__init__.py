"""`python -m flatmtl bench`: kernels, solvers, aggregations and whole steps beside the machine's limits and other code.

Sections (`kernels`, `solvers`, `aggregation`, `steps`) measure and fill a plain record for JSON; `report` and `plots` draw
it. Times are in seconds, sizes in bytes. Nothing here is imported by the rest of the package.
"""
