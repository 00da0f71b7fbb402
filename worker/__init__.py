"""The workers: `settings` to `redis_server` are the torch-free front desk, `runner` to `tasks` the back room."""
