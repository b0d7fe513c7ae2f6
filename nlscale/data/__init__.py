"""Token shards on disk, the order in which they are read, and reading them.

Building is in `nlscale.data.build` (it needs webdataset and pyarrow; reading needs only numpy).
"""

from nlscale.data.index import read_index
from nlscale.data.order import SampleOrder
from nlscale.data.reader import BatchReader, Samples
from nlscale.data.shards import TokenShards

__all__ = ["BatchReader", "SampleOrder", "Samples", "TokenShards", "read_index"]
