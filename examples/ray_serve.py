"""Replicas on several machines with Ray Serve: the same application, built anew in each replica.

    pip install "ray[serve]"
    HEADSPRING_MODEL=/shared/runs/quickstart HEADSPRING_API_KEY=… serve run examples.ray_serve:replicas

Ray's proxy spreads requests and streams answers; every replica has its own engine, queue and cache, so that a prefix is found
again only where it was read. Not run by the tests, which have no Ray.
"""

import os

from ray import serve

import headspring as hs
from headspring.serving import ServerConfig, create_app


def build():
    """Runs in the replica: nothing of a model is ever sent between processes."""
    config = ServerConfig(keys=(os.environ["HEADSPRING_API_KEY"],), allowed_hosts=tuple(os.environ.get("HOSTS", "").split()))
    return create_app({"model": hs.load(os.environ["HEADSPRING_MODEL"])}, config)


Replica = serve.ingress(build)()
replicas = serve.deployment(num_replicas=2, max_ongoing_requests=256, ray_actor_options={"num_cpus": 2})(Replica).bind()
