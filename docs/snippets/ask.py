"""Send lines and print the answer: python ask.py HOST PORT [LINE...]."""

import socket
import sys

host, port, *lines = sys.argv[1:]
with socket.create_connection((host, int(port))) as connection:
    connection.sendall("".join(f"{line}\n" for line in lines).encode())
    connection.shutdown(socket.SHUT_WR)  # nothing more to say
    print(connection.makefile().read(), end="")
