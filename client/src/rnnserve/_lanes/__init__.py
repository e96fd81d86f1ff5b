"""What one connection says and hears, without I/O: wishes become StreamRequests, StreamResponses become answers.

`Lanes` holds everything that is wished and not yet sent, and everything that is sent and not yet answered. Its caller
asks `flush` for the next message whenever the stream can take one, so whatever was wished since the last message
leaves in one; and gives `receive` every message that comes, and then `settle`. It has no socket, no thread, and no
clock but the one that it is given.

Lanes may move from one `Lanes` to another, each with what is wished on it: `part` and `let_go` give them away, and
`adopt` takes them in. A chunk of several lanes whose lanes are not all in one place is sent in parts, and answered when
all its rows are.

It outlives its streams. A chunk is kept whole until it is answered, with the step at which it starts. When a stream is
lost, `lost` makes everything unanswered a wish again: the next stream first opens the lanes that are needed, by the ids
of their sessions, and then sends the chunks anew, in their order and each from its own first step. The server applies
what it has not applied, and answers what it has with the same reply, so that each chunk is applied once. A lane on
which nothing is wished is opened again with the next wish, and not before.

`Lanes` is built of layers, a file each, that know only those above them in this list:

* `numbers`: lanes by their numbers;
* `pace`: short chunks that wait for one another, to share a frame;
* `order`: chunks that are wished, and when each may leave;
* `answers`: chunks that are sent, and what becomes of them;
* `opens`: lanes that open and close;
* `resends`: what is left of a lost stream;
* `messages`: all of it as messages to the server and from it;
* `lanes`: the whole, and how lanes move.
"""

from rnnserve._lanes.lanes import Lanes
from rnnserve._lanes.numbers import ProtocolViolation
from rnnserve._lanes.order import Account

__all__ = ["Account", "Lanes", "ProtocolViolation"]
