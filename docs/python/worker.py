"""A worker: runs `handle` on jobs. docs/python.md says what becomes of a job when.

    python3 docs/python/worker.py 127.0.0.1:50051 sum --slots 8
"""

import argparse
import importlib
import logging
import os
import signal
import sys

from jobledger_client import Service, add_arguments, from_value
from jobledger_worker import Worker


def handle(job, report, canceled):
    """The work, and its result. Yours goes here, or into a module of its own (`--handler MODULE:FUNCTION`)."""
    report(stage="adding", progress=50)
    payload = from_value(job.payload) or {}
    return {"sum": sum(payload.get("numbers", []))}


def parse_arguments():
    parser = argparse.ArgumentParser(description="Works on jobs until SIGTERM or SIGINT.")
    add_arguments(parser)
    parser.add_argument("types", nargs="+", help="types of jobs to work on")
    handler = {"metavar": "MODULE:FUNCTION", "default": "__main__:handle"}
    parser.add_argument("--handler", **handler, help="what does the work (default: %(default)s)")
    number = {"type": float, "metavar": "SECONDS"}
    parser.add_argument("--slots", type=int, metavar="N", default=4, help="jobs at a time (default: %(default)s)")
    parser.add_argument("--lease", **number, default=30, help="how long it may be silent (default: %(default)s)")
    parser.add_argument("--grace", **number, default=30, help="for running jobs at a stop (default: %(default)s)")
    options = parser.parse_args()
    if options.slots < 1:
        parser.error("--slots must be at least 1")
    return options


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = parse_arguments()
    sys.path.append(os.getcwd())
    module, _, function = options.handler.partition(":")
    handler = getattr(importlib.import_module(module), function or "handle")
    worker = Worker(Service.of(options), handler, options)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)  # Both raise KeyboardInterrupt.
        return worker.run()
    except KeyboardInterrupt:
        logging.error("told to stop a second time: the leases of running jobs will end")
        return 1


if __name__ == "__main__":
    exit_code = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)  # A handler that is still running does not hold up the end.
