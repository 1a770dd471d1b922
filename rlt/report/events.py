"""Scalars from TensorBoard event files, the only place in which curves are kept.

A run that was interrupted and resumed leaves several files. Steps after the checkpoint that it
resumed from are in two of them. The value that was written last led to the final model.
"""

from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator

Scalars = dict[str, list[tuple[int, float]]]


def read_scalars(run_dir: Path) -> Scalars:
    """Return every scalar as (step, value) pairs, steps ascending; {} without event files."""
    written: dict[str, list[tuple[float, int, float]]] = {}
    for file in sorted(run_dir.glob("events.out.tfevents.*")):
        events = event_accumulator.EventAccumulator(
            str(file),
            size_guidance={event_accumulator.SCALARS: 0},  # 0: all of them
            purge_orphaned_data=False,
        )
        events.Reload()
        for tag in events.Tags()[event_accumulator.SCALARS]:
            written.setdefault(tag, []).extend(
                (event.wall_time, event.step, event.value) for event in events.Scalars(tag)
            )
    # The sort is stable: of two values with the same time, that of the later file comes last.
    return {
        tag: sorted({step: value for _, step, value in sorted(rows, key=lambda r: r[0])}.items())
        for tag, rows in sorted(written.items())
    }
