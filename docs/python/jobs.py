"""Creates jobs and follows what happens to them.

    python3 docs/python/jobs.py 127.0.0.1:50051 create sum '{"numbers": [1, 2, 3.5]}' --key sum@1
    python3 docs/python/jobs.py 127.0.0.1:50051 follow --after 0 --type sum
"""

import argparse
import json
import logging
import sys
import uuid

from jobledger.v1 import job_event_pb2, job_pb2, job_service_pb2 as api, org_event_pb2
from jobledger_client import CallError, Service, add_arguments, from_value, to_value


def create(service, options):
    """Creates a job. The idempotency key makes the call safe to repeat: it stays one job."""
    request = api.CreateJobRequest(
        type=options.type,
        payload=to_value(json.loads(options.payload), "payload"),
        max_attempts=options.max_attempts,
        idempotency_key=options.key or str(uuid.uuid4()),
    )
    created = service.repeat("CreateJob", request)
    print(created.job.id, "known from before" if created.deduplicated else "created")


def follow(service, options):
    """Prints events, those after `--after` first, and then new ones as they come."""
    is_whole = not options.type and not options.job
    filters = {"types": options.type, "job_id": options.job}
    for event in service.follow(after_seq=options.after, org_events=is_whole, **filters):
        if isinstance(event, org_event_pb2.OrgEvent):
            # A newer service may have changes that these stubs don't know.
            print(event.seq, "-", event.WhichOneof("change"), flush=True)
            continue
        print(event.seq, event.job_id, name_of(event), json.dumps(from_value(event.result)), flush=True)


def name_of(event):
    kinds, statuses = job_event_pb2.JobEventKind, job_pb2.JobStatus
    # A newer service may have kinds that these stubs don't know.
    kind = kinds.Name(event.kind) if event.kind in kinds.values() else f"JOB_EVENT_KIND_{event.kind}"
    return f"{kind} {statuses.Name(event.next_status)}"


def parse_arguments():
    parser = argparse.ArgumentParser(description="Creates jobs and follows what happens to them.")
    add_arguments(parser)
    commands = parser.add_subparsers(required=True, metavar="create|follow")
    creating = commands.add_parser("create", help="create a job, and print its id")
    creating.set_defaults(run=create)
    creating.add_argument("type", help="the job's type")
    creating.add_argument("payload", nargs="?", default="null", help="input for the worker, in JSON (default: null)")
    creating.add_argument("--key", help="idempotency key: the same again is the same job (default: a random one)")
    creating.add_argument("--max-attempts", type=int, default=3, metavar="N", help="failures until the job ends (3)")
    following = commands.add_parser("follow", help="print events")
    following.set_defaults(run=follow)
    following.add_argument("--after", type=int, metavar="SEQ", help="begin after this event (default: with new ones)")
    following.add_argument("--type", action="append", default=[], help="only of this type; may be given again")
    following.add_argument("--job", default="", metavar="UUID", help="only of this job, until it has ended")
    return parser.parse_args()


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = parse_arguments()
    try:
        options.run(Service.of(options), options)
    except (CallError, ValueError) as error:
        details = f" {error.metadata}" if isinstance(error, CallError) and error.metadata else ""
        sys.exit(f"{error}{details}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
