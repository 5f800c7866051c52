"""The planner: what a job will cost, before it runs: memory of each device, time, exposed transfers, and what to
choose.

It prices the very schedule that the executor runs and has no formulas of its own for what a schedule does. Its modules:
`model` and `hardware` describe, `job` is what is asked and what is chosen, `memory` and `simulate` price, `search`
compares. Integers and floats only: no torch, so that a laptop can plan for a cluster.
"""
