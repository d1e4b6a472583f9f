"""What data workers need, imported by their fork server alone, which runs nothing of ours but imports."""

from llava_llama31.trainer.redaction import quiet_libraries


quiet_libraries()

import llava_llama31.trainer.data.batches.collator  # noqa: E402
import llava_llama31.trainer.data.batches.dataset  # noqa: E402, F401
