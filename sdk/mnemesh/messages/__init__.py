"""The request and reply of every operation, as frozen Structs.

A caller's entity document is `Entity`; what a read returns is `Context`. Times are RFC 3339 with a zone (or
MessagePack timestamps); sequences are positions in a site's log; scores are larger for better whatever the metric.
Which operation takes which of these is in `subjects.yaml`. `agents` has what agents ask, `shards` what is asked of
shards, `sites` what devices and hubs tell each other, `views` what views ask. Looks at `wire` only.
"""

from mnemesh.messages.agents import *
from mnemesh.messages.base import *
from mnemesh.messages.shards import *
from mnemesh.messages.sites import *
from mnemesh.messages.views import *
