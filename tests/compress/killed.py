"""Kills compression runs at random moments: `python killed.py KILLS '{"model": ..., ...}'`.

The second argument holds the arguments of `compress`. One process imports everything and forks a
child for each run; the child is killed, and the next one resumes what it left: KILLS times, or more
until one had finished a block. Prints how many were killed, how often they had finished blocks, and
how many outputs were compared with that of a run that nothing stopped; exit code 1 as soon as one
differs.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import llmcompressor  # noqa: F401
from loguru import logger

from wexpand_plugin.compress.oneshot import compress
from wexpand_plugin.compress.progress import unfinished


def started(arguments: dict) -> int:
    """A child that compresses and ends with code 0; its number."""
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        compress(**arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def written(path: str) -> dict[str, bytes]:
    files = (file for file in Path(path).rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def main() -> int:
    kills, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
    logger.remove()
    out, whole = arguments["output"], arguments["output"] + "-whole"
    begin = time.perf_counter()
    _, status = os.waitpid(started(arguments | {"output": whole}), 0)
    length, right = time.perf_counter() - begin, written(whole)
    if status:
        return 1
    arguments["resume"], killed, finished, compared, moments = True, 0, 0, 0, random.Random()
    while True:
        child, end = started(arguments), time.perf_counter() + moments.uniform(0, 1.2 * length)
        ended = 0
        enough = killed >= kills and finished > 0
        while not ended and (enough or time.perf_counter() < end):
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
            finished += any("-block-" in file.name for file in unfinished(out).glob("*"))
        elif status:
            return 1
        if Path(out).exists():  # complete, be it that the run was killed just after
            if written(out) != right:
                print("another output than that of a run that nothing stopped", file=sys.stderr)
                return 1
            compared += 1
            shutil.rmtree(out)
            if enough:
                break
    print(killed, finished, compared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
