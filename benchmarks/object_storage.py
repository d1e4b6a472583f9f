"""Measures opening and reading a large set behind an HTTP server on the same machine.

    python benchmarks/object_storage.py [--rows 1000000] [--batch 64] [--keep DIR] [--parquet]

Writes `--rows` rows with an image of a few pixels as shards (about 2.6 kB a row), or as one parquet file with 100 rows
a row group, serves them from another process, and prints, of a fresh one: seconds until the set is open, until the
first shuffled batch is there (also those of its own CPU time, which other processes hardly change), rows per second
after that, requests per row and peak memory. The rows are compared with those of the disk in the same order.
"""

import argparse
import io
import json
import multiprocessing
import os
import re
import resource
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_llama31.trainer.data.shards.writing import write_shards
from llava_llama31.trainer.data.sources.records import open_records
from llava_llama31.trainer.recipes.schema import DataSource


NUM_IMAGES = 100
NUM_BATCHES = 32


def write_set(folder: Path, num_rows: int) -> Path:
    """JSON lines and images, then shards of them; returns the folder of the shards."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_rows):
            talk = [
                {"from": "human", "value": f"<image>\nwhat is number {number}?"},
                {"from": "gpt", "value": str(number)},
            ]
            row = {"id": f"{number}", "image": f"{number % NUM_IMAGES}.png", "conversations": talk}
            file.write(json.dumps(row) + "\n")
    shards = folder / "shards"
    source = DataSource(name="rows", path=str(folder / "rows.jsonl"), format="llava")
    write_shards(source, str(shards), num_shards=max(1, num_rows // 50_000))
    return shards


def write_parquet(folder: Path, num_rows: int) -> Path:
    """A parquet file with row groups of 100 rows, as `datasets` writes images; returns it."""
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    images = []
    for _ in range(NUM_IMAGES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    path, writer = folder / "rows.parquet", None
    for first in range(0, num_rows, 10_000):
        rows = [
            {
                "id": f"{number}",
                "image": images[number % NUM_IMAGES],
                "conversations": [
                    {"from": "human", "value": f"<image>\nwhat is number {number}?"},
                    {"from": "gpt", "value": str(number)},
                ],
            }
            for number in range(first, min(first + 10_000, num_rows))
        ]
        table = pyarrow.Table.from_pylist(rows)
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=100)
    assert writer is not None
    writer.close()
    return path


def serve(folder: Path, ready: Connection) -> None:
    """Files of a folder by byte range, until the process is ended; counts requests."""
    counts = {"requests": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            counts["requests"] += 1
            if self.path == "/count":
                return self._send(200, json.dumps(counts).encode(), {})
            path = folder / self.path.strip("/")
            if not path.is_file():
                return self._send(404, b"", {})
            size = path.stat().st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(match[1]) if match else 0
            end = min(int(match[2]) + 1, size) if match and match[2] else size
            body = b""
            if with_body:
                with path.open("rb") as file:
                    file.seek(start)
                    body = file.read(end - start)
            headers = {"ETag": f'"{size}"', "Accept-Ranges": "bytes"}
            if match:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            self._send(206 if match else 200, body, headers | {"Content-Length": str(end - start)})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def read(path: str, batch: int, found: Connection) -> None:
    """Open a set and read shuffled batches; sends times, memory and a digest of what was read."""
    started, began_cpu = time.perf_counter(), time.process_time()
    store = open_records(DataSource(name="rows", path=path, format="llava"))
    opened = time.perf_counter() - started
    order = np.random.default_rng(1).permutation(len(store))[: NUM_BATCHES * batch].reshape(NUM_BATCHES, batch)
    first, first_cpu, texts = 0.0, 0.0, []
    for rows in order.tolist():
        store.prefetch(rows)
        for row in rows:
            record = store[row]
            texts.append((record.id, record.messages[-1]["content"][0]["text"], record.images[0].size()))
        first_cpu = first_cpu or time.process_time() - began_cpu
        first = first or time.perf_counter() - started
    seconds = time.perf_counter() - started - first
    facts: dict[str, Any] = {"rows": len(store), "opened_s": round(opened, 2), "first_batch_s": round(first, 2)}
    facts["first_batch_cpu_s"] = round(first_cpu, 2)
    facts["rows_per_s"] = round((NUM_BATCHES - 1) * batch / seconds)
    facts["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    found.send((facts, texts))


def measured(path: str, batch: int) -> tuple[dict[str, Any], list]:
    """What `read` finds in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=read, args=(path, batch, there))
    process.start()
    there.close()  # so that the end of a process that failed is noticed
    try:
        return here.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--parquet", action="store_true", help="read parquet in place, not shards")
    parser.add_argument("--keep", type=Path, help="folder to keep the set in, and to find them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary) / "cache")
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shards, path = folder / "shards", folder / "shards"
        if options.parquet:
            shards, path = folder, folder / "rows.parquet"
        if not (path if options.parquet else shards / "index.json").is_file():
            started = time.perf_counter()
            (write_parquet if options.parquet else write_set)(folder, options.rows)
            print(f"written: {options.rows / (time.perf_counter() - started):,.0f} rows/s, one process")
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        server = context.Process(target=serve, args=(shards, there), daemon=True)
        server.start()
        there.close()  # as above
        url = f"http://127.0.0.1:{here.recv()}" + ("/rows.parquet" if options.parquet else "")
        import urllib.request

        local, expected = measured(str(path), options.batch)
        remote, found = measured(url, options.batch)
        with urllib.request.urlopen(f"{url.removesuffix('/rows.parquet')}/count") as answer:
            requests = json.load(io.BytesIO(answer.read()))["requests"]
        server.terminate()
        assert found == expected, "the store gave other rows than the disk"
        print(f"disk:  {local}")
        print(f"store: {remote | {'requests_per_row': round(requests / len(found), 2)}}")
        print(f"{len(found):,} shuffled rows are equal, in the same order")


if __name__ == "__main__":
    main()
