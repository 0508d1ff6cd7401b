"""Who is let in, and who may do what.

`identity` and the other deciding modules are pure; `door` keeps what is in force up to date; `http_gate` and
`grpc_gate` stand before the two servers.
"""

from gradwatch.collector.access.config import Access as Access
