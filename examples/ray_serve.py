"""Replicas on several machines with Ray Serve: the same application, built anew in each replica.

    pip install "ray[serve]"
    HEADSPRING_MODEL=/shared/runs/quickstart HEADSPRING_API_KEY=… serve run examples.ray_serve:replicas

HEADSPRING_REPLICAS (2) replicas take HEADSPRING_CPUS (2) cores each; Ray waits where a cluster has fewer. Its proxy spreads
requests and streams answers. Every replica has its own engine, queue and cache, so that a prefix is found again only where it
was read. A replica that dies takes the requests that it holds with it; the others go on, and Ray starts it anew.
"""

import os

from ray import serve

import headspring as hs
from headspring.serving import ServerConfig, create_app


def build():
    """Runs in the replica: nothing of a model is ever sent between processes."""
    config = ServerConfig(keys=(os.environ["HEADSPRING_API_KEY"],), allowed_hosts=tuple(os.environ.get("HOSTS", "").split()))
    return create_app({"model": hs.load(os.environ["HEADSPRING_MODEL"])}, config)


replicas = serve.deployment(
    serve.ingress(build)(),
    name="headspring",
    num_replicas=int(os.environ.get("HEADSPRING_REPLICAS", "2")),
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": float(os.environ.get("HEADSPRING_CPUS", "2"))},
).bind()
