"""Data folders on another service: what fsspec reads, with whole shards kept on this machine.

`service` asks the service, and tries again; `cache` keeps shards in a folder of bounded size that
processes share; `ahead` fetches what the next steps need; `folder` is what reads through them. What
`checkpoint.mirror` writes goes through `opening` as well.
"""
