"""The inside of a worker: it claims jobs, runs a handler on each, and reports what became of them."""

import logging
import os
import queue
import socket
import threading
import time
import uuid
from datetime import timedelta

from grpc import StatusCode

from jobledger.v1 import job_pb2, job_service_pb2 as api
from jobledger_client import CREDENTIAL, Backoff, CallError, to_value

CLAIM_AT_ONCE = 100  # Jobs in one claim, at most.
CLAIM_WAIT = 5  # Seconds that a claim waits for jobs.
BEAT_AT_ONCE = 500  # Leases in one heartbeat: with the longest news they stay below the service's 4 MiB.
NEWS_INTERVAL = 1  # Seconds between heartbeats that are sent because of news.
REPORTS_AT_ONCE = 1_000  # Outcomes in one call.
REPORT_BYTES = 1 << 20  # Their size, unless it is a single one.
MAX_RESULT_BYTES = 1 << 20
LAST_REPORTS = 10  # Seconds to report outcomes in after the grace period.
TRIES_OF_DEFECTS = 5  # How often an outcome is reported that meets a defect of the service.
LONGEST_RETRY_AFTER = 365 * 86_400


class Permanent(Exception):
    """A handler raises it if another attempt would not help. `code` is a short, stable name of what went wrong."""

    def __init__(self, message, code="PERMANENT"):
        super().__init__(message)
        self.code = code


class GiveBack(Exception):
    """A handler raises it to put its job back into the queue, for `retry_after` seconds. No failure is counted."""

    def __init__(self, retry_after=0):
        super().__init__(f"given back for {retry_after} s")
        self.retry_after = retry_after


class Held:
    """A job that this worker holds under a lease. The worker's lock guards what changes."""

    def __init__(self, worker, lease):
        self.worker, self.job, self.token = worker, lease.job, lease.lease_token
        self.expires = time.monotonic() + worker.options.lease  # The lease ends then, unless a heartbeat extends it.
        self.news = {}  # What the handler said and no heartbeat has told yet.
        self.canceled = threading.Event()  # The handler should stop, for one of two reasons:
        self.is_cancel_requested = self.is_lost = False
        self.is_reporting = self.is_fallback = False
        self.defects = 0

    def report(self, stage=None, progress=None, message=None):
        """Takes news from the handler, in a form that the service accepts. A heartbeat tells it within a second."""
        news = {}
        if stage is not None:
            news["stage"] = clean(stage, 100)
        if message is not None:
            news["message"] = clean(message)
        if progress is not None:
            try:
                news["progress"] = max(0, min(100, int(progress)))
            except (TypeError, ValueError, OverflowError):
                logging.warning("job %s: progress %r is left out", self.job.id, progress)
        with self.worker.changed:
            self.news.update(news)
        self.worker.has_news.set()

    def take_news(self):
        news, self.news = self.news, {}
        return news

    def put_back(self, news):
        if not self.is_reporting:
            self.news = {**news, **self.news}


class Worker:
    """Claims jobs in one thread, keeps leases in another, reports outcomes in a third, and runs each job in its own."""

    def __init__(self, service, handle, options):
        self.service, self.handle, self.options = service, handle, options
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.held = {}  # By lease token, until the outcome is reported.
        self.changed = threading.Condition()  # Guards `held` and all in it.
        self.has_news, self.stopping, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.request = None  # The claim that is not answered yet.
        self.outcomes = queue.SimpleQueue()
        self.exit_code = 0

    def run(self):
        """Works until KeyboardInterrupt, or until the service refuses the worker. Returns the exit code."""
        try:
            for task in (self.carry, self.keep, self.claim):
                threading.Thread(target=self.guard, args=(task,), name=task.__name__, daemon=True).start()
            while not self.ended.wait(0.2):
                pass  # A signal just before the wait does not end the wait. Python handles it after this one.
        except KeyboardInterrupt:
            logging.info("stopping; %d jobs have %g s to finish", len(self.held), self.options.grace)
        return self.stop()

    def stop(self):
        deadline = time.monotonic() + self.options.grace
        with self.changed:
            self.stopping.set()
            self.changed.notify_all()
        self.end_claim(deadline)
        self.ended.wait(CLAIM_WAIT + 1)
        with self.changed:
            self.changed.wait_for(lambda: not self.held, max(0, deadline - time.monotonic()))
            for held in list(self.held.values()):
                self.finish(held, {"status": "JOB_STATUS_QUEUED"})
                held.canceled.set()
            if not self.changed.wait_for(lambda: not self.held, LAST_REPORTS):
                logging.error("%d jobs could not be given back; their leases will end", len(self.held))
        return self.exit_code

    def guard(self, task):
        """Runs a task. The worker ends with the first one that does."""
        try:
            task()
        except Exception:
            logging.exception("the worker has a defect")
            self.exit_code = 1
        finally:
            self.ended.set()

    # Claim jobs.

    def claim(self):
        """Claims jobs for free slots until the worker stops."""
        backoff, answered = Backoff(), False
        while free := self.wait_for_slots():
            # A claim stays the same until it is answered: if an answer is lost, the next one has its jobs.
            self.request = self.request or api.ClaimJobsRequest(
                worker_id=self.id,
                types=self.options.types,
                max_jobs=min(free, CLAIM_AT_ONCE),
                lease_duration=timedelta(seconds=self.options.lease),
                wait=timedelta(seconds=CLAIM_WAIT),
                request_id=str(uuid.uuid4()),
                worker_host=socket.gethostname(),
            )
            try:
                leases = self.service.call("ClaimJobs", self.request, timeout=CLAIM_WAIT + 10).leases
            except CallError as error:
                if not error.may_pass(answered):
                    logging.error("the claim is refused: %s", error)
                    self.request, self.exit_code = None, 1
                    return
                wait = backoff.next(error)
                logging.warning("the claim is repeated in %.2f s: %s", wait, error)
                self.stopping.wait(wait)
                continue
            self.request, answered = None, True
            backoff.reset()
            for lease in leases:
                self.start(Held(self, lease))

    def wait_for_slots(self):
        """Returns how many slots are free, and 0 once the worker stops."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping.is_set() or len(self.held) < self.options.slots)
            return 0 if self.stopping.is_set() else self.options.slots - len(self.held)

    def end_claim(self, deadline):
        """Ends the claim under way, at a stop, and gives back what it brings.

        If it were canceled, the jobs of an answer on its way would stay held until their leases end. The same claim
        again, without a wait, ends the first one, and is answered with the jobs that the first one took.
        """
        request = self.request
        if not request:
            return
        again = api.ClaimJobsRequest()
        again.CopyFrom(request)
        again.ClearField("wait")
        backoff = Backoff()
        while True:
            try:
                leases = self.service.call("ClaimJobs", again, timeout=5).leases
                break
            except CallError as error:
                wait = backoff.next(error)
                if not error.may_pass(answered=True) or time.monotonic() + wait > deadline:
                    logging.warning("the last claim is left to itself: %s", error)
                    return
                time.sleep(wait)
        for lease in leases:
            self.start(Held(self, lease))

    def start(self, held):
        with self.changed:
            if held.token in self.held:
                return
            self.held[held.token] = held
        if self.stopping.is_set():
            self.finish(held, {"status": "JOB_STATUS_QUEUED"})
        else:
            threading.Thread(target=self.work, args=(held,), name=held.job.id, daemon=True).start()

    # Run the handler.

    def work(self, held):
        outcome = failure("WORKER_FAILED", "the worker has a defect; its log tells more")
        try:
            outcome = success(self.handle(held.job, held.report, held.canceled))
        except GiveBack as error:
            seconds = max(0, min(error.retry_after, LONGEST_RETRY_AFTER))
            outcome = {"status": "JOB_STATUS_QUEUED", "retry_after": timedelta(seconds=seconds)}
        except BaseException as error:
            logging.warning("job %s: the handler failed", held.job.id, exc_info=True)
            code = getattr(error, "code", None)
            code = code if isinstance(code, str) and code else type(error).__name__
            outcome = failure(code, error, retryable=not isinstance(error, Permanent))
        finally:
            self.finish(held, outcome)

    def finish(self, held, outcome):
        """Has the outcome of an attempt reported. The first one counts."""
        with self.changed:
            if held.is_reporting:
                return
            held.is_reporting = True
            if held.is_lost:
                logging.warning("job %s: the lease is lost, and the outcome with it", held.job.id)
                return self.let_go(held)
            if held.is_cancel_requested:
                kept = {name: outcome[name] for name in ("error_code", "error_message") if name in outcome}
                outcome = {"status": "JOB_STATUS_CANCELED", **kept}
            update = {"job_id": held.job.id, "lease_token": held.token, **held.take_news(), **outcome}
            self.outcomes.put((held, api.UpdateJobStatusRequest(**update)))

    def let_go(self, held):
        with self.changed:
            self.held.pop(held.token, None)
            self.changed.notify_all()

    # Keep leases.

    def keep(self):
        """Sends heartbeats for all leases, three in the time of a lease, and earlier where there is news."""
        backoff, interval, last = Backoff(), self.options.lease / 3, 0.0
        while True:
            if self.has_news.wait(interval):
                time.sleep(max(0, last + min(NEWS_INTERVAL, interval) - time.monotonic()))
            self.has_news.clear()
            last = time.monotonic()
            with self.changed:
                held = [held for held in self.held.values() if not held.is_lost]
            batches = [held[first : first + BEAT_AT_ONCE] for first in range(0, len(held), BEAT_AT_ONCE)]
            errors = [error for error in map(self.beat, batches) if error]
            if not errors:
                backoff.reset()
                continue
            wait = min(backoff.next(errors[-1]), interval)
            logging.warning("the heartbeat is repeated in %.2f s: %s", wait, errors[-1])
            time.sleep(wait)
            last = 0.0
            self.has_news.set()

    def beat(self, batch):
        """Sends one heartbeat. Returns why it is to be repeated, or None."""
        with self.changed:
            news = [held.take_news() for held in batch]
        try:
            return self.send_beat(batch, news)
        except CallError as error:
            with self.changed:
                for held, said in zip(batch, news):
                    held.put_back(said)
            return error

    def send_beat(self, batch, news):
        leases = [api.LeaseHeartbeat(lease_token=held.token, **said) for held, said in zip(batch, news)]
        request = api.HeartbeatRequest(worker_id=self.id, leases=leases)
        try:
            results = self.service.call("Heartbeat", request, timeout=min(5, self.options.lease / 3)).results
        except CallError as error:
            if error.code is not StatusCode.INVALID_ARGUMENT or not any(news):
                raise
            logging.warning("the heartbeat is repeated without news, which is refused: %s", error)
            return self.send_beat(batch, [{} for _ in batch])
        with self.changed:
            errors = [self.hear(*each) for each in zip(batch, news, results, strict=True)]
        return next((error for error in errors if error), None)

    def hear(self, held, said, result):
        """Takes note of how a lease stands. Returns why it is not extended, if it is not known to be lost either."""
        held.is_lost |= result.lease_lost
        held.is_cancel_requested |= result.cancel_requested
        if held.is_lost or held.is_cancel_requested:
            held.canceled.set()
        is_extended = result.HasField("expires_at")
        if is_extended:
            held.expires = time.monotonic() + self.options.lease
        status = getattr(result, "error", None)  # Older stubs don't have it.
        if status is None or not status.code:
            return None
        error = CallError.of_status(status)
        if is_extended:
            logging.warning("job %s: news is refused: %s", held.job.id, error)
            return None
        held.put_back(said)
        return error

    # Report outcomes.

    def carry(self):
        """Reports outcomes, many in one call: others gather while it is under way. Repeats each until it is settled."""
        backoff, waiting = Backoff(), []
        while True:
            while not waiting or not self.outcomes.empty():
                waiting.append(self.outcomes.get())
            count = fitting(waiting)
            batch, waiting = waiting[:count], waiting[count:]
            was_lost = [held.is_lost for held, _ in batch]
            errors = self.send_reports(batch)
            again = []
            for (held, update), error, lost in zip(batch, errors, was_lost, strict=True):
                update = self.settle(held, update, error, lost)
                if update:
                    again.append((held, update))
            waiting += again
            if not again:
                backoff.reset()
                continue
            error = next(error for error in errors if error)
            wait = backoff.next(error)
            logging.warning("%d reports are repeated in %.2f s: %s", len(again), wait, error)
            time.sleep(wait)

    def send_reports(self, batch):
        """Returns why each report of the batch was not taken, or None."""
        request = api.BatchUpdateJobStatusRequest(updates=[update for _, update in batch])
        try:
            results = self.service.call("BatchUpdateJobStatus", request, timeout=30).results
        except CallError as error:
            # One of many may be at fault.
            if len(batch) > 1 and (error.is_defect or not error.may_pass(answered=True)):
                return [self.send_reports([single])[0] for single in batch]
            return [error] * len(batch)
        return [CallError.of_status(result.error) if result.HasField("error") else None for result in results]

    def settle(self, held, update, error, was_lost):
        """Lets go of a job whose outcome is settled; otherwise returns the report to make next."""
        status = job_pb2.JobStatus.Name(update.status)
        if not error:
            logging.info("job %s: %s", held.job.id, status)
            return self.let_go(held)
        if error.reason in ("LEASE_LOST", "JOB_NOT_FOUND"):
            logging.warning("job %s: the lease is lost, and %s with it", held.job.id, status)
            return self.let_go(held)
        # A lease also ends by a report whose answer is lost. So one more report is made after a heartbeat says that the
        # lease is lost. While the service is away no lease ends; while it refuses the credential, it does in its time.
        is_refused = error.code in CREDENTIAL and time.monotonic() > held.expires + self.options.lease / 3
        held.defects += error.is_defect
        if was_lost or is_refused:
            logging.error("job %s: the lease is over; whether %s was taken is unknown: %s", held.job.id, status, error)
            return self.let_go(held)
        if error.may_pass(answered=True) and held.defects < TRIES_OF_DEFECTS:
            return update
        logging.error("job %s: %s is refused: %s", held.job.id, status, error)
        if held.is_fallback:
            return self.let_go(held)
        held.is_fallback, held.defects = True, 0
        return fallback(update, error)


def fitting(waiting):
    """How many of these reports one call takes."""
    size = 0
    for count, (_, update) in enumerate(waiting[:REPORTS_AT_ONCE]):
        size += update.ByteSize()
        if count and size > REPORT_BYTES:
            return count
    return min(len(waiting), REPORTS_AT_ONCE)


def success(result):
    try:
        value = to_value(result, "result")
    except ValueError as error:
        return failure("INVALID_RESULT", error, retryable=False)
    if value.ByteSize() > MAX_RESULT_BYTES:
        why = f"the result takes {value.ByteSize()} bytes encoded; the limit is {MAX_RESULT_BYTES}"
        return failure("INVALID_RESULT", why, retryable=False)
    return {"status": "JOB_STATUS_SUCCEEDED", "result": value}


def failure(code, why, retryable=True):
    error = {"error_code": clean(code, 100), "error_message": clean(str(why) or repr(why))}
    return {"status": "JOB_STATUS_FAILED", "retryable": retryable, **error}


def fallback(update, error):
    """What is reported instead of an outcome that the service refuses."""
    outcome = {"status": update.status}
    if update.status == job_pb2.JOB_STATUS_SUCCEEDED:
        outcome = failure("INVALID_RESULT", f"the service refuses the result: {error.message}", retryable=False)
    elif update.status == job_pb2.JOB_STATUS_FAILED:
        outcome = failure("REPORT_REFUSED", error.message, update.retryable)
    return api.UpdateJobStatusRequest(job_id=update.job_id, lease_token=update.lease_token, **outcome)


def clean(text, most=None):
    """A text as the service takes it: without NUL and lone surrogates, of at most `most` characters and 4 KiB."""
    text = str(text).replace("\0", "")[:most]
    return text.encode("utf-8", "replace")[:4096].decode("utf-8", "ignore")
