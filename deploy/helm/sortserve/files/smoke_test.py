"""Asks a server as its first client would: its models, then one completion with a budget. Exit 0, or 1 and the reason."""

import json
import os
import sys
import urllib.error
import urllib.request

URL = os.environ["SORTSERVE_URL"]
KEY = os.environ.get("SORTSERVE_API_KEY", "")
ASKS_FOR_KEYS = os.environ.get("SORTSERVE_ASKS_FOR_KEYS") == "yes"


def ask(path, body=None):
    headers = {"Content-Type": "application/json", "X-Latency-Budget-Ms": "20000"}
    if KEY:
        headers["Authorization"] = "Bearer " + KEY
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(URL + path, data, headers), timeout=60) as response:
        return json.load(response), response.headers


def main():
    if ASKS_FOR_KEYS and not KEY:
        try:
            ask("/v1/models")
        except urllib.error.HTTPError as error:
            if error.code == 401:
                print("the server asks for a key; set test.apiKeySecret to test an answer too")
                return
        sys.exit("the server answered without a key, although it has a keys file")
    models = [model["id"] for model in ask("/v1/models")[0]["data"]]
    print("models:", ", ".join(models))
    answer, headers = ask("/v1/completions", {"model": models[0], "prompt": "Once upon a time", "max_tokens": 8})
    if answer["usage"]["completion_tokens"] < 1:
        sys.exit(f"no tokens came: {answer}")
    text, made_by, status = answer["choices"][0]["text"], headers["X-Submodel"], headers["X-Latency-Budget-Status"]
    print(f"made by {made_by}, budget {status}: {text!r}")


try:
    main()
except urllib.error.HTTPError as error:
    sys.exit(f"{error}: {error.read(2000).decode(errors='replace')}")
except OSError as error:
    sys.exit(f"{URL}: {error}")
