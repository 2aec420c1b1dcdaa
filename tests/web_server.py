"""A web server on the loopback interface; each path is a way in which servers behave."""

import http.server
import threading
import time

BODY = bytes(range(256)) * 40


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []  # paths
        self.sent = 0  # bytes of /endless that clients received
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        """Ignores clients that close the connection, as some tests do."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def _headers(self, status: int, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.asked.append(path)
        if path.endswith(".png"):
            self._headers(200, Content_Length=str(len(BODY)))
            self.wfile.write(BODY)
        elif path == "/redirect":
            self._headers(302, Location=query)
        elif path == "/round":
            self._headers(302, Location=f"/round?{query}x")
        elif path == "/endless":  # no Content-Length: the body ends when the client closes the connection
            self._headers(200)
            while self.server.sent < 1 << 26:
                self.server.sent += self.wfile.write(bytes(1 << 16))
        elif path == "/silent":
            time.sleep(3)
        elif path == "/drip":
            self._headers(200)
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "/drip-header":
            for _ in range(100):
                self.wfile.write(b"H")
                time.sleep(0.05)
        elif path == "/continue":
            for _ in range(100):
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                time.sleep(0.05)
        elif path == "/escape":
            self.wfile.write(b"HTTP/1.0 404 \x1b[2J\x1b]0;title\x07\r\n\r\n")
        elif path == "/rubbish":
            self.wfile.write(b"\x1b[31mrubbish\r\n\r\n")
        else:
            self._headers(404)
