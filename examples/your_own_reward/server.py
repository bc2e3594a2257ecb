"""A reward server that speaks the protocol of docs/rewards.md, on the standard library alone.

python examples/your_own_reward/server.py 8123
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(prompt: list[dict[str, str]], completion: str) -> float:
    """1 for a completion without capital letters, otherwise 0. Replace this with your own model or service."""
    return float(completion == completion.lower())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open

    def do_GET(self) -> None:
        self.send({"status": "ok"})  # GET /health; without a tokenizer fingerprint, align sends texts

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))  # POST /score
        pairs = zip(request["prompts"], request["completions"], strict=True)
        self.send({"scores": [score(prompt, completion) for prompt, completion in pairs]})

    def send(self, response: dict) -> None:
        body = json.dumps(response).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
