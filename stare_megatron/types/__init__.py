"""The objects that flow through a step.

    Prompt -> Trajectory(Span...) -> Group -> TokenBatch -> Scores -> Control -> UpdateStats

Each stage is a new frozen type; none has a field that is filled in later.
"""

from stare_megatron.types.batch import (
    Assignment,
    Begun,
    Graded,
    Group,
    GroupRequest,
    GroupSummary,
    Partial,
    Score,
    Scores,
    SequenceCost,
    TokenBatch,
    UpdateShare,
)
from stare_megatron.types.control import Control
from stare_megatron.types.measured import Measured, Measurements
from stare_megatron.types.stats import (
    QUADRANTS,
    UNOBSERVED,
    EntropyForces,
    EntropyReading,
    ForcedReading,
    GateDuty,
    Observed,
    ScoreSummary,
    StepStats,
    UpdateStats,
)
from stare_megatron.types.token_record import TokenRecord
from stare_megatron.types.trajectory import (
    Call,
    Completion,
    EpisodeCounts,
    Prompt,
    Sampling,
    Span,
    SpanKind,
    Status,
    Trajectory,
    Turn,
    VersionRuns,
    merged_runs,
)

__all__ = [
    "QUADRANTS",
    "UNOBSERVED",
    "Assignment",
    "Begun",
    "Call",
    "Completion",
    "Control",
    "EntropyForces",
    "EntropyReading",
    "EpisodeCounts",
    "ForcedReading",
    "GateDuty",
    "Graded",
    "Group",
    "GroupRequest",
    "GroupSummary",
    "Measured",
    "Measurements",
    "Observed",
    "Partial",
    "Prompt",
    "Sampling",
    "Score",
    "ScoreSummary",
    "Scores",
    "SequenceCost",
    "Span",
    "SpanKind",
    "Status",
    "StepStats",
    "TokenBatch",
    "TokenRecord",
    "Trajectory",
    "Turn",
    "UpdateShare",
    "UpdateStats",
    "VersionRuns",
    "merged_runs",
]
