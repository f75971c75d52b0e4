"""Solvers that prune a weight given the second moment of its inputs, a file each.

A solver is a function of a weight [rows, in] and Hessians [n, in, in] that returns n sparse copies
of the weight, [n, rows, in]; beside it stands how many Hessians it can take at once.
"""
