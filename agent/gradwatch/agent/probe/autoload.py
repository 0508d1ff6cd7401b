"""What torch calls at the end of `import torch`, in every process of every job.

Entry-point group `torch.backends`. An exception here would break `import torch`, and
its time is everybody's start-up time: so the standard library only, nothing at all
unless GRADWATCH_SPOOL is set, and nothing ever raised.
"""

import os
import sys


def autoload() -> None:
    """Activate the probe if this process belongs to a watched job."""
    if not os.environ.get("GRADWATCH_SPOOL") or sys.platform == "win32":
        return
    try:
        from gradwatch.agent.probe.activate import activate
        from gradwatch.agent.probe.ray_train import announce

        activate()
        announce()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        sys.stderr.write(
            f"gradwatch: this process is not watched: activation failed with {error!r}. "
            "The training goes on without it.\n"
        )
