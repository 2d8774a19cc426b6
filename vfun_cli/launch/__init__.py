"""From resolved options to a running job and back.

1. ``job.decide`` settles everything about a launch: devices, data, model, plan, files, command. It writes nothing.
2. ``show`` prints that: the preview, a dry run, and at the end the result.
3. ``start.start`` locks the run directory, writes the files, launches, and launches again after a crash.
4. ``supervise.launch`` is one launch: the processes, their ``progress``, a wish to stop, and why they ended.
5. ``resume_check`` says whether a continuation is still the same run; ``preemption`` what a signal means without one.
"""
