import sys
import time

import portico as socketserver


class Clock(socketserver.BaseRequestHandler):
    """Tell the time, and hang up."""

    def handle(self) -> None:
        self.request.sendall(time.strftime("%H:%M:%S\n").encode())


if __name__ == "__main__":
    address = ("127.0.0.1", int(sys.argv[1]))
    with socketserver.ThreadingTCPServer(address, Clock) as server:
        print("the clock is on port", server.server_address[1], flush=True)
        server.serve_forever()
