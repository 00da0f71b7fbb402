"""`python -m worker`: one worker, until SIGTERM or SIGINT. Its options are `settings.py`, from the environment."""

import secrets
import sys
import warnings

from celery.platforms import SecurityWarning
from redis.exceptions import RedisError

from ablation.errors import ServiceError
from worker import keys
from worker.settings import Settings, hide_password
from worker.store import connect

ARGUMENTS = ["--pool=prefork", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=WARNING"]


def describe(settings: Settings) -> str:
    """What this worker found, in two lines."""
    with connect(settings) as client:
        redis = client.info("server")
    return (
        f"worker: Redis {redis['redis_version']} at {hide_password(settings.redis_url)}, {settings.threads} threads, "
        f"device {settings.device or 'CUDA if there, else CPU'}\n"
        f"worker: data {settings.data_dir}, checkpoints {settings.checkpoint_dir}, cache {settings.cache_dir}"
    )


def main() -> None:
    """Run a worker in this process."""
    warnings.simplefilter("ignore", SecurityWarning)  # of root, as in a container: it is about pickle, and we take JSON
    try:
        from worker.tasks import app, settings  # reads the settings

        print(describe(settings), flush=True)
    except (ServiceError, RedisError) as error:
        sys.exit(f"Error: {error}")
    queues = f"--queues={keys.FINALIZE_QUEUE},{keys.SHARD_QUEUE}"
    app.worker_main(["--quiet", "worker", *ARGUMENTS, queues, f"--hostname=worker-{secrets.token_hex(4)}@%h"])


if __name__ == "__main__":
    main()
