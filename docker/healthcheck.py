"""`healthcheck.py [PATH] [PORT]`: exit 0 if the server in this container answers 200; /health and 8000 unless given.

It asks 127.0.0.1, whatever proxy the environment names.
"""

import http.client
import sys

DEFAULT_PORT = 8000
TIMEOUT_SECONDS = 4


def main() -> int:
    """1 with the reason on standard error if the answer is not 200, or does not come."""
    path, port = [*sys.argv[1:], *("/health", str(DEFAULT_PORT))[len(sys.argv) - 1 :]]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status == 200:
            return 0
        print(f"{path}: {response.status} {response.read(200).decode(errors='replace')}", file=sys.stderr)
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr)
    finally:
        connection.close()
    return 1


if __name__ == "__main__":
    sys.exit(main())
