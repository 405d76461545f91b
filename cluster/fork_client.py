"""Stands where Ray starts Python: asks the fork server for a worker, and ends when that does.

    python fork_client.py SOCKET SCRIPT ARGUMENTS...

Imports little, for it is in the way of every worker. Without a server it becomes the worker itself.
"""

import json
import os
import socket
import struct
import sys


def main() -> int:
    path, *arguments = sys.argv[1:]
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        body = json.dumps(asked).encode()
        socket.send_fds(server, [struct.pack("I", len(body))], [0, 1, 2])
        server.sendall(body)
    except OSError:
        os.execv(sys.executable, [sys.executable, *arguments])
    answer = server.recv(4)  # for as long as the worker lives
    return struct.unpack("i", answer)[0] % 256 if answer else 1


if __name__ == "__main__":
    sys.exit(main())
