"""`python -m worker`: one worker, until SIGTERM or SIGINT. Its options are `settings.py`, from the environment."""

import os
import secrets
import signal
import sys
import warnings

ARGUMENTS = ["--pool=prefork", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=WARNING"]


def main() -> None:
    """Run a worker in this process."""
    signal.signal(
        signal.SIGINT, lambda *_: os._exit(130)
    )  # until Celery installs its handlers, so that Ctrl-C shows no traceback
    from celery.exceptions import CPendingDeprecationWarning
    from celery.platforms import SecurityWarning
    from redis.exceptions import RedisError

    from ablation.errors import AblationError
    from worker import keys
    from worker.inventory import describe
    from worker.settings import make_writable, warn_of_unknown_variables

    warnings.simplefilter("ignore", SecurityWarning)  # running as root, as in a container: only JSON is accepted
    warnings.simplefilter(
        "ignore", CPendingDeprecationWarning
    )  # raised at every new connection; the default is intended
    warn_of_unknown_variables(os.environ)
    try:
        from worker.tasks import app, exit_code, settings  # reads the settings

        make_writable(settings.cache_dir, "ABLATION_CACHE_DIR")
        print(describe(settings), flush=True)
    except AblationError as error:
        sys.exit(f"Error: {error}")
    except RedisError as error:
        sys.exit(f"Error: the Redis that REDIS_URL names can't be used ({error}); start it, or set another one.")
    queues = f"--queues={keys.FINALIZE_QUEUE},{keys.SHARD_QUEUE}"
    app.worker_main(["--quiet", "worker", *ARGUMENTS, queues, f"--hostname=worker-{secrets.token_hex(4)}@%h"])
    sys.exit(exit_code())


if __name__ == "__main__":
    main()
