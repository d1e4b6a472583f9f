"""A report that is made again at each request, for this machine alone."""

import sys
import webbrowser
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.redaction import say
from llava_llama31.trainer.report.page import report_page
from llava_llama31.trainer.report.run_facts import run_facts


HOST = "127.0.0.1"


class ReportServer(ThreadingHTTPServer):
    """Serves the report at `/` and the runs' browsers of answers beside it.

    Args:
        folders: of the runs.
        port: 0: a free one.
        every: seconds between reloads of the page.

    Raises:
        UserError: the port is not free.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], *, port: int, every: int):
        self.folders, self.every = folders, every
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            fix = "name another port, or none"
            raise UserError(f"{port}: {error.strerror}", where="--port", fix=fix) from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def content(self, path: str) -> str | None:
        """What is at a path, or None."""
        runs = [run_facts(folder) for folder in self.folders]
        pages = {page: f"answers/{i}/{page.name}" for i, run in enumerate(runs) for page in run.answer_pages}
        if path == "/":
            return report_page(runs, pages.__getitem__, refresh=self.every)
        return next((page.read_text(encoding="utf-8") for page, name in pages.items() if path == f"/{name}"), None)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        # by another name a page of the web could reach it, through a name server of its own
        if self.headers.get("Host") not in (
            f"{HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            return self.send_error(403)
        try:
            content = self.server.content(self.path)
        except UserError as error:  # the folder has gone
            return self.send_error(500, explain=str(error))
        if content is None:
            return self.send_error(404)
        body = content.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass  # a line at each reload


def watch(folders: Sequence[Path], *, port: int, every: int, opens: bool) -> int:
    """Serve the report until Ctrl-C; returns the exit code.

    Raises:
        UserError: a folder is not a run's, or the port is not free.
    """
    for folder in folders:
        run_facts(folder)
    with ReportServer(folders, port=port, every=every) as server:
        sys.stdout.write(f"{server.address}\n")
        sys.stdout.flush()
        say("Ctrl-C ends it")
        if opens:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
