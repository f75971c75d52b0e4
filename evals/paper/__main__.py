"""All experiments on one model: python -m evals.paper [NAME ...] [--quick] [--model DIR] ...

The results of one seed are written as they come, and those that are there are not measured again.
"""

import typer

from .frame import experiments

if __name__ == "__main__":
    typer.run(experiments)
