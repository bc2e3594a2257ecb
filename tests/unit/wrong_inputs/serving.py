"""`align serve` and `align chat` with settings, adapters and servers that cannot be used."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .adapters import LAYERS, adapter
from .here import PORT, Here, wrong

SHORT = ("--max-model-length", "64")


def serve(here: Here, *arguments: str) -> str:
    return here.align("serve", "model", *SHORT, *arguments)


@wrong("serve-adapter-unnamed", "An adapter to serve without a name")
def _(here: Here) -> str:
    return serve(here, "--adapter", "lora")


@wrong("serve-adapter-name", "An adapter to serve with a name that has a slash")
def _(here: Here) -> str:
    return serve(here, "--adapter", "a/b=lora")


@wrong("serve-adapter-twice", "Two adapters to serve with one name")
def _(here: Here) -> str:
    return serve(here, "--adapter", "a=lora", "--adapter", "a=other")


@wrong("serve-adapter-named-as-base", "An adapter to serve with the base model's name")
def _(here: Here) -> str:
    return serve(here, "--name", "base", "--adapter", "base=lora")


@wrong("serve-adapter-router", "An adapter to serve that trains the router in full")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{LAYERS[0]}.mlp.gate.weight": torch.ones(2, 32)}))
    return serve(here, "--adapter", "a=lora")


@wrong("serve-adapter-head", "An adapter to serve with factors on the output head")
def _(here: Here) -> str:
    here.change_config(tie_word_embeddings=False)
    size = len(here.tokenizer)
    head = {"A": torch.ones(2, 32), "B": torch.ones(size, 2)}
    named = {f"base_model.model.lm_head.lora_{kind}.weight": values for kind, values in head.items()}
    adapter(here, lambda tensors: tensors.update(named))
    return serve(here, "--adapter", "a=lora")


@wrong("serve-adapter-experts", "An adapter to serve on routed experts of a family that cannot have them")
def _(here: Here) -> str:
    from tests.tiny_families import save_tiny

    model = save_tiny("qwen3_moe", here.folder / "moe")
    stacks = {name: p.shape for name, p in model.named_parameters() if name.endswith(".experts.down_proj")}

    def on_experts(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        for name, (experts, hidden, width) in stacks.items():
            module = f"base_model.model.{name.removesuffix('.down_proj')}"
            tensors[f"{module}.lora_A.weight"] = torch.ones(2 * experts, width)
            tensors[f"{module}.lora_B.weight"] = torch.ones(hidden, 2 * experts)

    adapter(here, on_experts, target_modules=[])
    return here.align("serve", "moe", *SHORT, "--adapter", "a=lora")


@wrong("serve-experts-on-a-cpu", "Adapters on a CPU beside a model of another family with routed experts")
def _(here: Here) -> str:
    from tests.tiny_families import save_tiny

    save_tiny("qwen3_moe", here.folder / "moe")
    here.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return here.align("serve", "moe", *SHORT, "--adapters-dir", ".")


@wrong("serve-rank", "An adapter to serve with a rank above --max-rank")
def _(here: Here) -> str:
    adapter(here)
    return serve(here, "--adapter", "a=lora", "--max-rank", "1")


@wrong("serve-rank-large", "A rank that vLLM cannot serve")
def _(here: Here) -> str:
    return serve(here, "--max-rank", "1000")


@wrong("serve-max-adapters", "More adapters than --max-adapters")
def _(here: Here) -> str:
    return serve(here, "--adapter", "a=lora", "--adapter", "b=lora", "--max-adapters", "1")


@wrong("serve-adapters-dir", "A folder of adapters that does not exist")
def _(here: Here) -> str:
    return serve(here, "--adapters-dir", "nowhere")


@wrong("serve-open", "A server for other machines without a token")
def _(here: Here) -> str:
    here.monkeypatch.delenv("ALIGN_SERVE_TOKEN", raising=False)
    return serve(here, "--host", "0.0.0.0")


@wrong("serve-token-empty", "An empty token")
def _(here: Here) -> str:
    here.write("token", "\n")
    return serve(here, "--token-file", "token")


@wrong("serve-token-twice", "A token and a file with a token")
def _(here: Here) -> str:
    return serve(here, "--token", "a", "--token-file", "token")


@wrong("serve-token-file", "A token file that does not exist")
def _(here: Here) -> str:
    return serve(here, "--token-file", "token")


@wrong("serve-drain", "A negative time for running requests")
def _(here: Here) -> str:
    return serve(here, "--drain-seconds", "-1")


@wrong("serve-length", "A server for more tokens than the model's context")
def _(here: Here) -> str:
    return here.align("serve", "model", "--max-model-length", "1000")


@wrong("serve-cache", "A server with a cache of 0 GiB")
def _(here: Here) -> str:
    return serve(here, "--cache-gib", "0")


@wrong("serve-model-port-in-use", "A server on a port that is in use", varies=PORT)
def _(here: Here) -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return serve(here, "--port", str(taken.getsockname()[1]), "--no-proof")


@wrong("serve-tools", "A parser of tool calls with a template that does not render tools")
def _(here: Here) -> str:
    return serve(here, "--port", str(free_port()), "--tool-parser", "hermes")


@wrong("serve-adapter-of-an-adapter", "Serving an adapter whose base model is not known")
def _(here: Here) -> str:
    adapter(here, base_model_name_or_path=None)
    return here.align("serve", "lora")


@wrong("chat-without-model", "A chat without a checkpoint and without a server")
def _(here: Here) -> str:
    return here.align("chat")


@wrong("chat-model-of-checkpoint", "A chat with a checkpoint and the name of a server's model")
def _(here: Here) -> str:
    return here.align("chat", "model", "--model", "a")


@wrong("chat-url-and-adapter", "A chat with a server and an adapter")
def _(here: Here) -> str:
    return here.align("chat", "--url", "http://127.0.0.1:1", "--adapter", "lora")


@wrong("chat-url", "A chat with an address that is not a URL")
def _(here: Here) -> str:
    return here.align("chat", "--url", "localhost:8000")


@wrong("chat-no-server", "A chat with a server that is not running", varies=PORT)
def _(here: Here) -> str:
    return here.align("chat", "--url", f"http://127.0.0.1:{free_port()}")


@wrong("chat-other-server", "A chat with a server of something else", varies=PORT)
def _(here: Here) -> str:
    with answering(200, {"hello": "world"}) as port:
        return here.align("chat", "--url", f"http://127.0.0.1:{port}")


@wrong("chat-refused", "A chat with a server that refuses the token", varies=PORT)
def _(here: Here) -> str:
    with answering(401, {"error": {"message": "the bearer token is wrong"}}) as port:
        return here.align("chat", "--url", f"http://127.0.0.1:{port}")


@wrong("chat-unknown-model", "A chat with a model that the server does not have", varies=PORT)
def _(here: Here) -> str:
    with answering(200, {"data": [{"id": "base"}, {"id": "a"}]}) as port:
        return here.align("chat", "--url", f"http://127.0.0.1:{port}", "--model", "b")


@wrong("chat-adapter", "A chat with an adapter of another base model")
def _(here: Here) -> str:
    adapter(here, lambda tensors: tensors.update({f"{LAYERS[0]}.mlp.other.weight": torch.ones(2, 32)}))
    here.monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    return here.align("chat", "model", "--adapter", "a=lora")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def answering(status: int, values: dict[str, Any]) -> Iterator[int]:
    """A server that returns the same answer to every request; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        log_message: Callable[..., None] = lambda *_: None

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
