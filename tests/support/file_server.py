"""A server of files that a test downloads over a real connection."""

import http.server
import threading
import urllib.parse


class FileServer:
    """Answers with ranges and an ETag.

    files: {path: bytes, or a function from the query's fields to bytes}.
    stop_after: {path: number of bytes after which the next answer breaks off}.
    asked: (path, range) of each request.
    """

    def __init__(self, files):
        self.files, self.stop_after, self.asked, self.etag = files, {}, [], '"1"'
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                parts, span = urllib.parse.urlsplit(self.path), self.headers.get("Range")
                path = urllib.parse.unquote(parts.path)
                outer.asked.append((path, span))
                if path not in outer.files:
                    return self.send_error(404)
                content, start = outer.files[path], 0
                if callable(content):
                    content = content(urllib.parse.parse_qs(parts.query))
                if span and self.headers.get("If-Range") == outer.etag:
                    start = int(span.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206 if start else 200)
                self.send_header("ETag", outer.etag)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][: outer.stop_after.pop(path, None)])

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
