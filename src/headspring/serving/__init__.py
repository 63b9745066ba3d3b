"""Serving: models behind OpenAI's API, for many clients at once, each request ending exactly once.

    from headspring.serving import ServerConfig, create_app, serve

    serve({"mine": LanguageModel.load("runs/quickstart")})       # http://127.0.0.1:8000, until a signal comes
    app = create_app({"mine": lm}, ServerConfig())               # the ASGI application, for a server of one's own

`guard` is the door, `app` the routes, `prompts` and `sampling` read requests, `loop` turns the engines in their one thread,
`session` stands between that thread and a reader, `answers` and `replies` send what comes.
"""

from headspring.serving.app import create_app
from headspring.serving.config import Limits, ServerConfig
from headspring.serving.server import serve

__all__ = ["Limits", "ServerConfig", "create_app", "serve"]
