"""What data workers need. Only their fork server imports it, and the imports are all that runs there."""

from llava_llama31.trainer.redaction import quiet_libraries


quiet_libraries()

import llava_llama31.trainer.data.batches.collator  # noqa: E402
import llava_llama31.trainer.data.batches.dataset  # noqa: E402, F401
