"""Every port that the processes of a Ray node listen on, and what each answers to somebody without a token."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grpc
import psutil
import ray.core.generated

from tests.ray.smoke_place import PATIENCE

WITHOUT_STUBS = (
    ("ray.rpc.ObjectManagerService/Push", False, False),
    ("ray.rpc.ObjectManagerService/Pull", False, False),
    ("ray.rpc.ObjectManagerService/FreeObjects", False, False),
    ("opentelemetry.proto.collector.metrics.v1.MetricsService/Export", False, False),
    ("grpc.health.v1.Health/Check", False, False),
    ("grpc.health.v1.Health/Watch", False, True),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True, True),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", True, True),
)
"""Calls that Ray's servers take or might take, of which the installed package has no description."""
REFUSED, ABSENT, NO_GRPC = "UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"


@dataclass(frozen=True)
class Port:
    """A port that a process listens on."""

    process: str
    """Its name, as the docs call it."""
    address: str
    number: int


def listening_ports(processes: Iterable[psutil.Process]) -> list[Port]:
    """Return the ports of these processes, one entry for each address."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = _plain_name(process)
            for one in process.net_connections(kind="inet"):
                if one.status == psutil.CONN_LISTEN:
                    address = one.laddr.ip.removeprefix("::ffff:")
                    everywhere = address in ("::", "0.0.0.0")
                    found.append(Port(name, "127.0.0.1" if everywhere else address, one.laddr.port))
    return sorted(set(found), key=lambda port: (port.process, port.number, port.address))


def _plain_name(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if process.name() == "raylet":
        # Its command line holds those of the processes that it starts.
        return "raylet"
    for part in ("monitor.py", "dashboard.py", "ray.util.client.server"):
        if part in line:
            return part.removesuffix(".py").rpartition("ray.util.")[2]
    return "worker" if "default_worker.py" in line or line.startswith(("ray::Held", "ray::IDLE")) else process.name()


def grpc_calls() -> list[tuple[str, bool, bool]]:
    """Return every call of the installed Ray's servers: name, whether it is asked by a stream, answers by one."""
    calls = list(WITHOUT_STUBS)
    for module in pkgutil.iter_modules(ray.core.generated.__path__):
        if module.name.endswith("_pb2"):
            described = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                calls += [
                    (f"{service.full_name}/{call.name}", call.client_streaming, call.server_streaming)
                    for call in service.methods
                ]
    return calls


def ask_by_grpc(port: Port) -> dict[str, str]:
    """Ask a port every call with an empty message; return {call: status} of those it has, none if it speaks no gRPC."""
    found = {}
    with grpc.insecure_channel(f"{port.address}:{port.number}") as channel:
        for name, asks_by_stream, answers_by_stream in grpc_calls():
            status = _status(channel, name, asks_by_stream=asks_by_stream, answers_by_stream=answers_by_stream)
            if status == NO_GRPC:
                return {}
            if status != ABSENT:
                found[name] = status
    return found


def _status(channel: grpc.Channel, name: str, *, asks_by_stream: bool, answers_by_stream: bool) -> str:
    kind = f"{'stream' if asks_by_stream else 'unary'}_{'stream' if answers_by_stream else 'unary'}"
    call = getattr(channel, kind)(f"/{name}")
    try:
        answer = call(iter([b""]) if asks_by_stream else b"", timeout=10 * PATIENCE)
        if answers_by_stream:
            next(answer, None)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def ask_by_http(port: Port, path: str) -> tuple[int, bytes] | None:
    """Return status and content of a page, None if the port speaks no HTTP."""
    connection = http.client.HTTPConnection(port.address, port.number, timeout=30 * PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException:
        return None
    finally:
        connection.close()


def processes_of(pid: int) -> Iterator[psutil.Process]:
    """Yield a process and all that it started."""
    process = psutil.Process(pid)
    yield process
    yield from process.children(recursive=True)
