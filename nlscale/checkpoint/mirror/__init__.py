"""A copy of a run's checkpoints on another service, such as object storage.

The URL is checked before a run begins (`check`), the run that it belongs to is written there
(`label`), finished checkpoints are copied beside the training (`copier`), and one is brought back
where the run's folder is gone (`fetch`). What a service can do, it does in `remote`, through
fsspec, which is imported only where a mirror is set.
"""
