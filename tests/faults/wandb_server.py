"""Stand-ins for a W&B server on the loopback address: one that keeps what it is sent, and ones that misbehave."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

ANSWERS = {
    "401": b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\nno",
    "403": b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno",
    "429": b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\nno",
    "500": b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\nno",
    "garbage": b"\x00\xff\xfe this is not HTTP\r\n\r\n",
    "empty": b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{"data":{}}',
    "close": b"",
}


class BadServer:
    """Accepts connections and gives each the same bad answer; ``silent`` never answers, ``refused`` does not listen."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.n_connections = 0
        self._kept: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> BadServer:
        if self.kind == "refused":
            self._socket.close()
        else:
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for connection in [self._socket, *self._kept]:
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.n_connections += 1
                self._kept.append(connection)
                if self.kind != "silent":
                    threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.recv(65536)
            connection.sendall(ANSWERS[self.kind])
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65536)
            connection.close()


class WandbServer:
    """Understands the few requests that opening, logging, finishing and syncing a run need. Keeps runs by their id."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.config: dict[str, str] = {}
        self.summary: dict[str, str] = {}
        self.bodies: list[str] = []
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """No connection is taken or answered from here on."""
        self._http.shutdown()
        self._http.server_close()

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Logged rows without W&B's own fields."""
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.history.get(run_id, [])]

    def receive(self, path: str, body: str) -> None:
        """A ``file_stream`` request: lines of history to put at an offset."""
        run_id = path.split("/")[-2]
        sent = json.loads(body).get("files", {})
        if "wandb-history.jsonl" in sent:
            offset = sent["wandb-history.jsonl"]["offset"]
            lines = [json.loads(line) for line in sent["wandb-history.jsonl"]["content"]]
            history = self.history.setdefault(run_id, [])
            history[offset : offset + len(lines)] = lines
        if "wandb-summary.json" in sent:
            self.summary[run_id] = sent["wandb-summary.json"]["content"][-1]

    def reply(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The ``data`` of a GraphQL answer."""
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}}
        if operation == "UpsertBucket":
            name = given["name"]
            self.config[name] = given.get("config") or self.config.get(name, "{}")
            bucket = {"id": "r", "name": name, "displayName": name, "description": "", "config": self.config[name]}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": len(self.history.get(name, []))}
            return {"upsertBucket": {"bucket": bucket, "inserted": name not in self.history}}
        if operation == "RunResumeStatus":
            return {"model": project | {"bucket": self._resume_status(given["name"])}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "team", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return {}

    def _resume_status(self, name: str) -> dict[str, Any] | None:
        if name not in self.config:
            return None
        history = self.history.get(name, [])
        tail = json.dumps([json.dumps(row) for row in history[-1:]])
        status = {"id": "r", "name": name, "displayName": name, "notes": "", "tags": [], "config": self.config[name]}
        status |= {"summaryMetrics": self.summary.get(name, "{}"), "historyTail": tail, "eventsTail": "[]"}
        counts = {"logLineCount": 0, "historyLineCount": len(history), "eventsLineCount": 0}
        return status | counts | {"wandbConfig": json.dumps({"t": 1})}


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        text = body.decode(errors="replace")
        self.server_state.bodies.append(text)
        answer: dict[str, Any] = {}
        if "graphql" in self.path:
            request = json.loads(text)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = operation.group(1) if operation else ""
            answer = {"data": self.server_state.reply(name, request.get("variables") or {})}
        elif "file_stream" in self.path:
            self.server_state.receive(self.path, text)
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _serve
