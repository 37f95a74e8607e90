"""Become `redis-server`, in memory only, on a port that is free.

    python redis_server.py

Redis does not say which port the kernel gave it, so one is found and let go just before.  A child
process waits until Redis answers there, and prints the port.
"""

import os
import socket
import time

HOST = "127.0.0.1"


def announce(port: int, redis: int) -> None:
    while os.getppid() == redis:
        try:
            socket.create_connection((HOST, port)).close()
        except ConnectionRefusedError:
            time.sleep(0.01)  # nothing tells when another program will listen
        else:
            print(port, flush=True)
            break


def become_redis(port: int) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    options = ["--bind", HOST, "--port", str(port), "--save", "", "--appendonly", "no"]
    os.execvp("redis-server", ["redis-server", *options])


if __name__ == "__main__":
    with socket.create_server((HOST, 0)) as probe:
        free_port = probe.getsockname()[1]
    this = os.getpid()
    if os.fork() == 0:
        announce(free_port, this)
    else:
        become_redis(free_port)
