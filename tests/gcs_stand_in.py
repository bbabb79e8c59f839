"""A server that speaks as much of the JSON API of Google Cloud Storage as gcsfs and TensorStore use, in memory.

Objects with generations, conditions on them, listings with delimiters and pages, uploads of all three kinds, copies,
batches of deletions. What it does not know it answers with 501, so that no test passes by mistake.
"""

import base64
import email.utils
import hashlib
import itertools
import json
import re
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def _crc32c(data):
    import google_crc32c

    return base64.b64encode(struct.pack(">I", google_crc32c.value(data))).decode()


class Bucket:
    """Objects by name: (content, generation)."""

    def __init__(self):
        self.objects, self.generations, self.lock = {}, itertools.count(1001), threading.Lock()

    def put(self, name, content, match):
        """Write where the object has the generation `match` (0: none is there; None: anything); None if it has not."""
        with self.lock:
            if match is not None and self.generation(name) != int(match):
                return None
            self.objects[name] = (content, next(self.generations))
            return self.objects[name]

    def generation(self, name):
        """Of an object, 0 where there is none."""
        return self.objects[name][1] if name in self.objects else 0


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Be silent about clients that are gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """Use as a context: the server at `url`; `requests` are those it had, `refuse` may answer one with a status."""

    def __init__(self, *buckets):
        self.buckets = {name: Bucket() for name in buckets}
        self.requests, self.uploads, self.sessions = [], {}, itertools.count(1)
        self.refuse = lambda method, path: None
        server = self

        class Handler(_Handler):
            stand_in = server

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        # What moves gcsfs, and what moves TensorStore, which wants a token.
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def names(self, bucket, prefix=""):
        """The objects of a bucket."""
        return sorted(name for name in list(self.buckets[bucket].objects) if name.startswith(prefix))

    def content(self, bucket, name):
        """Of an object."""
        return self.buckets[bucket].objects[name][0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: Server

    def log_message(self, *_):
        """Say nothing."""

    def _do(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        split = urlsplit(self.path)
        path, query = split.path, {key: values[0] for key, values in parse_qs(split.query).items()}
        self.stand_in.requests.append((self.command, path, query))
        status = self.stand_in.refuse(self.command, unquote(path))
        if status:
            return self._fail(status)
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *map(unquote, found.groups()), query=query, body=body)
        return self._fail(501)

    do_GET = do_POST = do_PUT = do_DELETE = _do

    # ---- answers

    def _send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _fail(self, status):
        self._json({"error": {"code": status, "message": f"status {status}"}}, status)

    def _resource(self, bucket, name):
        content, generation = self.stand_in.buckets[bucket].objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": _crc32c(content),
            "etag": str(generation),
            "mediaLink": f"{self.stand_in.url}/download/storage/v1/b/{bucket}/o/{name}?alt=media",
        }

    # ---- objects

    def _bucket(self, bucket, query, body):
        if bucket not in self.stand_in.buckets:
            return self._fail(404)
        return self._json({"kind": "storage#bucket", "name": bucket, "location": "US", "storageClass": "STANDARD"})

    def _read(self, bucket, name, query, body):
        found = self.stand_in.buckets.get(bucket)
        if found is None or name not in found.objects:
            return self._fail(404)
        content, generation = found.objects[name]
        if "generation" in query and int(query["generation"]) != generation:
            return self._fail(404)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return self._fail(412)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._send(304)
        if query.get("alt") != "media":
            return self._json(self._resource(bucket, name))
        headers = {
            "Content_Type": "application/octet-stream",
            "X_Goog_Generation": generation,
            "X_Goog_Stored_Content_Length": len(content),
            "X_Goog_Hash": f"crc32c={_crc32c(content)}",
            "ETag": f'"{generation}"',
            "Date": email.utils.formatdate(usegmt=True),
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, content, **headers)
        first, last = asked.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            return self._fail(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(206, content[start:stop], **headers)

    def _list(self, bucket, query, body):
        if bucket not in self.stand_in.buckets:
            return self._fail(404)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names, prefixes = [], set()
        for name in self.stand_in.names(bucket, prefix):
            if name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                names.append(name)
        start = int(query.get("pageToken", 0))
        stop = start + int(query.get("maxResults", 1000))
        page = {"kind": "storage#objects", "items": [self._resource(bucket, name) for name in names[start:stop]]}
        if prefixes and not start:
            page["prefixes"] = sorted(prefixes)
        if stop < len(names):
            page["nextPageToken"] = str(stop)
        return self._json(page)

    def _delete(self, bucket, name, query, body):
        found = self.stand_in.buckets.get(bucket)
        if found is None or name not in found.objects:
            return self._fail(404)
        with found.lock:
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found.generation(name):
                return self._fail(412)
            found.objects.pop(name, None)
        return self._send(204)

    def _put(self, bucket, name, content, match):
        if bucket not in self.stand_in.buckets:
            return self._fail(404)
        if self.stand_in.buckets[bucket].put(name, content, match) is None:
            return self._fail(412)
        return self._json(self._resource(bucket, name))

    def _upload(self, bucket, query, body):
        match, kind = query.get("ifGenerationMatch"), query.get("uploadType")
        if kind == "media":
            return self._put(bucket, query["name"], body, match)
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"]).group(1).encode()
            line = b"\r\n" if body.startswith(b"--" + boundary + b"\r\n") else b"\n"
            _, metadata, content = body.split(b"--" + boundary)[:3] if body.count(b"--" + boundary) == 3 else (0, 0, 0)
            metadata, content = (part.split(line + line, maxsplit=1)[1] for part in (metadata, content))
            # Only the line's end is not content, which may end like one itself.
            return self._put(bucket, json.loads(metadata)["name"], content.removesuffix(line), match)
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            session = str(next(self.stand_in.sessions))
            self.stand_in.uploads[session] = [bucket, name, match, b""]
            return self._send(200, Location=f"{self.stand_in.url}/upload/session/{session}")
        return self._fail(501)

    def _chunk(self, session, query, body):
        upload = self.stand_in.uploads[session]
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if asked and asked[1] is not None and int(asked[1]) != len(upload[3]):
            return self._fail(503)
        upload[3] += body
        if not asked or asked[3] == str(len(upload[3])):
            return self._put(upload[0], upload[1], upload[3], upload[2])
        return self._send(308, Range=f"bytes=0-{len(upload[3]) - 1}")

    def _copy(self, bucket, name, to_bucket, to_name, query, body):
        found = self.stand_in.buckets.get(bucket)
        if found is None or name not in found.objects:
            return self._fail(404)
        self.stand_in.buckets[to_bucket].put(to_name, found.objects[name][0], None)
        return self._json({"done": True, "resource": self._resource(to_bucket, to_name)})

    def _batch(self, query, body):
        parts = []
        for bucket, name in re.findall(r"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)", body.decode()):
            found = self.stand_in.buckets[unquote(bucket)].objects.pop(unquote(name), None)
            line = "204 No Content" if found else '404 Not Found\r\n\r\n{"error": {"code": 404}}'
            parts.append(f"\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {line}\r\n\r\n")
        content = "--batch" + "--batch".join(parts) + "--batch--"
        return self._send(200, content.encode(), Content_Type="multipart/mixed; boundary=batch")


_ROUTES = [
    (r"GET /storage/v1/b/([^/]+)", _Handler._bucket),
    (r"GET /storage/v1/b/([^/]+)/o/?", _Handler._list),
    (r"GET (?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", _Handler._read),
    (r"DELETE /storage/v1/b/([^/]+)/o/([^/]+)", _Handler._delete),
    (r"POST /upload/storage/v1/b/([^/]+)/o", _Handler._upload),
    (r"(?:POST|PUT) /upload/session/(\d+)", _Handler._chunk),
    (r"POST /storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", _Handler._copy),
    (r"POST /batch/storage/v1", _Handler._batch),
]
