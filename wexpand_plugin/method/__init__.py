"""The method: clusters, statistics, solvers, allocation. Needs torch and scikit-learn."""
