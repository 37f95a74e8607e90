"""Datagram servers: with files, and with the packet and the listener themselves."""

import socket
import socketserver


class Shout(socketserver.DatagramRequestHandler):
    """Answers in capitals."""

    def handle(self) -> None:
        text: bytes = self.rfile.read()
        self.wfile.write(text.upper())
        print(len(self.packet), self.socket.fileno(), self.client_address)


class Count(socketserver.BaseRequestHandler):
    """Answers with a number."""

    request: tuple[bytes, socket.socket]

    def handle(self) -> None:
        packet, sock = self.request
        sock.sendto(str(len(packet)).encode(), self.client_address)


class Large(socketserver.ThreadingUDPServer):
    """Takes whole datagrams."""

    max_packet_size = 65535


def serve() -> None:
    with socketserver.UDPServer(("", 9999), Shout) as server:
        server.serve_forever()
    with Large(("", 0), Count) as large:
        large.serve_forever()
    with socketserver.UnixDatagramServer("/run/count.socket", Count) as unix:
        unix.serve_forever()
    with socketserver.ThreadingUnixDatagramServer(b"\0count", Count) as abstract:
        abstract.serve_forever()
