"""TensorBoard event files, written without TensorFlow or torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

# protobuf makes these classes when imported, so a type checker does not see them.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
    SummaryMetadata,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.types_pb2 import DataType  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.samples import SampleRow

FOLDER = "tensorboard"


class TensorBoardSink:
    """One scalar a metric. A resumed run marks its first step so that TensorBoard drops later events of older files."""

    def __init__(self, folder: Path, restored_step: int) -> None:
        self._writer = EventFileWriter(str(folder))
        if restored_step:
            self.rewind(restored_step)

    def rewind(self, step: int) -> None:
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        values = [Summary.Value(tag=m.name, simple_value=m.value) for m in metrics]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """As text: a table in Markdown."""
        lines = ["| " + " | ".join(SampleRow._fields) + " |", "|---" * len(SampleRow._fields) + "|"]
        lines += ["| " + " | ".join(_cell(str(value)) for value in row) + " |" for row in rows]
        value = Summary.Value(
            tag="samples",
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
            tensor=TensorProto(
                dtype=DataType.DT_STRING,
                string_val=["\n".join(lines).encode()],
                tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
            ),
        )
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _cell(text: str) -> str:
    """One line of a table in Markdown."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
