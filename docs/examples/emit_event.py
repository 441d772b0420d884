"""Emits an event with the original SDK: python docs/examples/emit_event.py NAME JSON"""

import json
import os
import sys

from absurd_sdk import Absurd

app = Absurd(os.environ["ABSURD_DATABASE_URL"], queue_name=os.environ.get("ABSURD_DEFAULT_QUEUE", "default"))
app.emit_event(sys.argv[1], json.loads(sys.argv[2]))
app.close()
