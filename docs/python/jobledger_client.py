"""What every client of jobledger needs: a connection, errors sorted by what to do about them, retries, and JSON."""

import logging
import math
import os
import random
import re
import threading
import time

import grpc
from google.protobuf import message, struct_pb2
from google.rpc import error_details_pb2
from grpc import StatusCode
from grpc_status import rpc_status

from jobledger.v1 import job_service_pb2 as api, job_service_pb2_grpc

# An answer with jobs is cut at about 4 MiB, which is gRPC's own limit.
MAX_ANSWER_BYTES = 16 << 20
# Seconds between tries: a random part of what grows from the first to the longest. A server that is back is found soon.
FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0
# Codes of the service's errors after which the same call may succeed, and the reasons for which it never does.
PASSING = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.INTERNAL)
LASTING = ("MESSAGE_TOO_LARGE", "TOO_MANY_TYPES")
CREDENTIAL = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
CODES = {code.value[0]: code for code in StatusCode}
# Up to here no other whole number becomes the same double: 2**53 is also what 2**53 + 1 becomes.
EXACT = 2**53 - 1
# How deep the service lets payloads and results nest.
MAX_DEPTH = 32


class CallError(Exception):
    """A failed call. `reason` and `metadata` are the service's; `reason` is empty if the error came from elsewhere."""

    def __init__(self, code, message, details=()):
        self.code, self.message, self.reason, self.metadata, self.retry_after = code, message or "", "", {}, 0.0
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in details:
            if detail.Unpack(info) and info.domain == "jobledger":
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                self.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        super().__init__(f"{self.reason or self.code.name}: {self.message}")

    @classmethod
    def of_call(cls, error):
        try:
            status = rpc_status.from_call(error)
            return cls(error.code(), error.details(), status.details if status else ())
        except (ValueError, message.DecodeError):
            return cls(error.code(), error.details())  # A proxy has put its own words on top of the service's.

    @classmethod
    def of_status(cls, status):
        """The error of one item of a batch, a google.rpc.Status."""
        return cls(CODES.get(status.code, StatusCode.UNKNOWN), status.message, status.details)

    @property
    def is_defect(self):
        """Whether the service met a defect of its own."""
        return self.code is StatusCode.INTERNAL and self.reason != ""

    def may_pass(self, answered):
        """Whether the same call may succeed later. `answered` says that such a call has succeeded before.

        An error without a reason comes from gRPC or a proxy, which word an outage in many ways. But before the first
        success a refused credential or an unknown service is a mistake in the configuration.
        """
        if self.code in CREDENTIAL:
            return answered
        if not self.reason:
            return answered or self.code is not StatusCode.UNIMPLEMENTED
        return self.code in PASSING and self.reason not in LASTING


class Backoff:
    """How long to wait before the next try."""

    def __init__(self):
        self.tries = 0

    def next(self, error):
        longest = min(FIRST_WAIT * 2 ** min(self.tries, 10), LONGEST_WAIT)
        self.tries += 1
        return max(random.uniform(0, longest), error.retry_after)

    def reset(self):
        self.tries = 0


class Service:
    """The service's calls, each with the caller's credential. Failures are CallErrors."""

    def __init__(self, address, tls=False, ca=None, cert=None, key=None, token=None, token_file=None, org=None):
        self.addresses = [part.strip() for part in address.split(",")]
        self.credentials = None
        if tls or ca or cert:
            self.credentials = grpc.ssl_channel_credentials(*(read(path) if path else None for path in (ca, key, cert)))
        self.token, self.token_file, self.org = token, token_file, org
        self.lock, self.current = threading.Lock(), 0
        self.stub = self.connect()

    def connect(self):
        options = [
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_reconnect_backoff_ms", int(LONGEST_WAIT * 1000)),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.use_local_subchannel_pool", 1),  # A new channel has a connection of its own.
        ]
        address = self.addresses[self.current % len(self.addresses)]
        if self.credentials:
            channel = grpc.secure_channel(address, self.credentials, options)
        else:
            channel = grpc.insecure_channel(address, options)
        return job_service_pb2_grpc.JobServiceStub(channel)

    def leave(self, stub, error):
        """Connects anew, to the next address, after a call that was not answered in time, or not at all.

        Keepalive notices a silent connection too, but after more than a minute: leases would have ended by then.
        """
        is_silent = error.code is StatusCode.DEADLINE_EXCEEDED and not error.reason
        is_away = error.code is StatusCode.UNAVAILABLE and len(self.addresses) > 1
        with self.lock:
            if (is_silent or is_away) and self.stub is stub:
                self.current += 1
                self.stub = self.connect()

    @classmethod
    def of(cls, options):
        """The service that the arguments of `add_arguments` name."""
        token = os.environ.get("JOBLEDGER_TOKEN") or None
        tls = {"tls": options.tls, "ca": options.tls_ca, "cert": options.tls_cert, "key": options.tls_key}
        return cls(options.address, token=token, token_file=options.token_file, org=options.org, **tls)

    def call(self, name, request, timeout=15):
        """Makes one call."""
        metadata, stub = self.metadata(), self.stub
        try:
            return getattr(stub, name)(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as failed:
            error = CallError.of_call(failed)
            self.leave(stub, error)
            raise error from None

    def repeat(self, name, request, patience=60):
        """Makes a call that is safe to repeat. Repeats it after errors that may pass, for `patience` seconds."""
        backoff, until = Backoff(), time.monotonic() + patience
        while True:
            try:
                return self.call(name, request)
            except CallError as error:
                wait = backoff.next(error)
                if not error.may_pass(answered=False) or time.monotonic() + wait > until:
                    raise
                logging.warning("%s is repeated in %.2f s: %s", name, wait, error)
                time.sleep(wait)

    def follow(self, after_seq=None, org_events=False, **filters):
        """Yields events in the order of `seq`, each once. Goes on after the last one when an error may pass.

        With `org_events` it yields the organisation's own events (`OrgEvent`), too: pauses, settings, bulk operations.
        They share the positions with the events of jobs (`JobEvent`), so that without filters no `seq` is left out.

        The events of one job (`job_id`) end with the job, others never. Raises a CallError that can't pass.
        """
        request = api.StreamJobEventsRequest(after_seq=after_seq, include_org_events=org_events, **filters)
        backoff, answered = Backoff(), False
        while True:
            stub = self.stub
            try:
                # A stream has no deadline.
                for answer in stub.StreamJobEvents(request, metadata=self.metadata()):
                    answered = True
                    backoff.reset()
                    item = answer.WhichOneof("item")
                    if item == "event":
                        request.after_seq = answer.event.seq
                        yield answer.event
                    elif item == "org_event":
                        request.after_seq = answer.org_event.seq
                        if org_events:
                            yield answer.org_event
                    elif item == "bookmark":
                        request.after_seq, request.log_id = answer.bookmark.seq, answer.bookmark.log_id
                return
            except grpc.RpcError as failed:
                error = CallError.of_call(failed)
                self.leave(stub, error)
            except CallError as failed:
                error = failed
            is_forbidden = error.reason and error.code is StatusCode.PERMISSION_DENIED
            if is_forbidden or not error.may_pass(answered):
                raise error
            wait = backoff.next(error)
            logging.warning("the stream is opened again after seq %d in %.2f s: %s", request.after_seq, wait, error)
            time.sleep(wait)

    def metadata(self):
        """The headers of a call. It reads the token's file each time, and so finds a renewed token."""
        try:
            token = read(self.token_file).decode("ascii").strip() if self.token_file else self.token
        except (OSError, UnicodeDecodeError) as error:
            raise CallError(StatusCode.UNAUTHENTICATED, f"no token: {error}") from None
        if token is not None and not re.fullmatch("[!-~]+", token):
            raise CallError(StatusCode.UNAUTHENTICATED, "the token is empty, or has characters that no token has")
        headers = {"authorization": f"Bearer {token}" if token else None, "x-org-id": self.org}
        return [(name, value) for name, value in headers.items() if value]


def add_arguments(parser):
    """The arguments that say where the service is, and who calls."""
    parser.add_argument("address", help="the service's HOST:PORT; several on one database are separated by commas")
    parser.add_argument("--tls", action="store_true", help="use TLS, and trust the public certificate authorities")
    parser.add_argument("--tls-ca", metavar="FILE", help="use TLS, and trust these certificates (PEM)")
    parser.add_argument("--tls-cert", metavar="FILE", help="use TLS, and show this client certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key (PEM)")
    token = "read an API token or JWT from this file for each call (default: the variable JOBLEDGER_TOKEN)"
    parser.add_argument("--token-file", metavar="FILE", help=token)
    parser.add_argument("--org", metavar="UUID", help="call for this organisation, where the credential names none")


def read(path):
    with open(path, "rb") as file:
        return file.read()


def to_value(json, path="value"):
    """JSON as a google.protobuf.Value. Raises a ValueError that names the place of what would not arrive unchanged."""
    value = struct_pb2.Value()
    fill(value, json, path, MAX_DEPTH)
    return value


def fill(value, json, path, depth):
    if json is None:
        value.null_value = struct_pb2.NULL_VALUE
    elif isinstance(json, bool):
        value.bool_value = json
    elif isinstance(json, int):
        if abs(json) > EXACT:
            raise ValueError(f"{path} is 2**53 or beyond, where a double may not give it back: make it a string")
        value.number_value = json
    elif isinstance(json, float):
        if not math.isfinite(json):
            raise ValueError(f"{path} is {json}, which JSON does not have")
        if abs(json) > EXACT:
            raise ValueError(f"{path} is 2**53 or beyond, where a double may not give it back: make it a string")
        value.number_value = json
    elif isinstance(json, str):
        value.string_value = json
    elif not isinstance(json, (dict, list, tuple)):
        raise ValueError(f"{path} is of type {type(json).__name__}, which JSON does not have")
    elif depth == 0:
        raise ValueError(f"{path} is nested deeper than {MAX_DEPTH} lists and objects")
    elif isinstance(json, dict):
        value.struct_value.SetInParent()
        for key, item in json.items():
            if not isinstance(key, str):
                raise ValueError(f"{path} has the key {key!r}, which is no string")
            fill(value.struct_value.fields[key], item, f"{path}.{key}", depth - 1)
    else:
        value.list_value.SetInParent()
        for index, item in enumerate(json):
            fill(value.list_value.values.add(), item, f"{path}[{index}]", depth - 1)


def from_value(value):
    """The JSON of a google.protobuf.Value. Whole numbers are ints; an absent value is None."""
    kind = value.WhichOneof("kind")
    if kind == "list_value":
        return [from_value(item) for item in value.list_value.values]
    if kind == "struct_value":
        return {key: from_value(item) for key, item in value.struct_value.fields.items()}
    if kind == "number_value":
        number = value.number_value
        is_negative_zero = number == 0 and math.copysign(1, number) < 0
        return int(number) if number.is_integer() and abs(number) <= EXACT and not is_negative_zero else number
    return None if kind in (None, "null_value") else getattr(value, kind)
