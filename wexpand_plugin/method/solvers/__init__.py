"""Solvers that prune a weight given the second moment of its inputs, a file each."""
